"""The former name of `xtuner2llava.mapping`."""

from xtuner2llava.mapping import *  # noqa: F403

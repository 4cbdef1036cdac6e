"""Publishing on the Hugging Face Hub: checks, uploads, and one commit that makes all of it visible.

Only calls that huggingface_hub 0.25 and 2.x both have are used, and it is imported where it is
used: that takes a quarter of a second.
"""

from xtuner2llava.hub.destination import Destination, Pushed
from xtuner2llava.hub.publishing import (
    check_access,
    choose_destination,
    deliver_to,
    publish_converted,
    publish_small_files,
)
from xtuner2llava.hub.pushing import name_notes, push_folder
from xtuner2llava.hub.upload import Upload

__all__ = [
    "Destination",
    "Pushed",
    "Upload",
    "check_access",
    "choose_destination",
    "deliver_to",
    "name_notes",
    "publish_converted",
    "publish_small_files",
    "push_folder",
]

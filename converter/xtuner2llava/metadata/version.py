"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """Such as "0.1.0"; "unknown" where the code runs without being installed."""
    try:
        return installed_version("xtuner2llava")
    except PackageNotFoundError:
        return "unknown"

"""Converts LLaVA models trained with XTuner to official LLaVA.

    from xtuner2llava import convert, inspect, plan

    report = convert("iter_39620.pth", "llava-qwen1.5-7b-xtuner", llm="Qwen/Qwen1.5-7B-Chat")

The library never prints, never exits, and changes no global state of torch or logging.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtuner2llava.api import convert, inspect, plan, push, verify
    from xtuner2llava.errors import (
        CheckpointError,
        ConversionError,
        CorruptFileError,
        Fault,
        HubError,
        MappingError,
        OutputError,
        PlanError,
        UnsafeFileError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from xtuner2llava.hub.upload import Pushed
    from xtuner2llava.inspection.inspection import Inspection
    from xtuner2llava.metadata.report import Report
    from xtuner2llava.planning.plan import Plan
    from xtuner2llava.verification.outcome import Check, Verification

    __version__: str

__all__ = [
    "Check",
    "CheckpointError",
    "ConversionError",
    "CorruptFileError",
    "Fault",
    "HubError",
    "Inspection",
    "MappingError",
    "OutputError",
    "Plan",
    "PlanError",
    "Pushed",
    "Report",
    "UnsafeFileError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "VerificationError",
    "convert",
    "inspect",
    "plan",
    "push",
    "verify",
]

# Where each name is; a module is imported when one of its names is first asked for, so that the
# command line answers at once.
_MODULES = {
    "api": ("convert", "inspect", "plan", "push", "verify"),
    "hub.upload": ("Pushed",),
    "inspection.inspection": ("Inspection",),
    "planning.plan": ("Plan",),
    "metadata.report": ("Report",),
    "verification.outcome": ("Check", "Verification"),
}


def __getattr__(name: str) -> object:
    """PEP 562."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("xtuner2llava")
        except PackageNotFoundError:
            return "unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((m for m, names in _MODULES.items() if name in names), "errors")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})

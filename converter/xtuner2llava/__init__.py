"""Converts LLaVA models trained with XTuner to official LLaVA.

    from xtuner2llava import convert, inspect, plan

    report = convert("iter_39620.pth", "llava-qwen1.5-7b-xtuner", llm="Qwen/Qwen1.5-7B-Chat")

The library never prints, never exits, and changes no global state of torch or logging.
"""

from xtuner2llava.conversion import convert, foresee_training, inspect, plan, push
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
from xtuner2llava.hub import Pushed
from xtuner2llava.inspection import Inspection
from xtuner2llava.outlook import Outlook
from xtuner2llava.plan import Plan
from xtuner2llava.report import Report
from xtuner2llava.verify import Check, Verification, verify
from xtuner2llava.version import version

__version__ = version()

__all__ = [
    "Check",
    "CheckpointError",
    "ConversionError",
    "CorruptFileError",
    "Fault",
    "HubError",
    "Inspection",
    "MappingError",
    "Outlook",
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
    "foresee_training",
    "inspect",
    "plan",
    "push",
    "verify",
]

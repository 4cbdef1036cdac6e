"""Whether the program that the output is for can load it."""

from __future__ import annotations

from xtuner2llava.errors import UnsupportedError
from xtuner2llava.mapping import Family
from xtuner2llava.options import flag
from xtuner2llava.planning.programs import PROGRAMS


def check_program(name: str | None, family: Family | None) -> None:
    """Raises `UnsupportedError` where the program has no class for what the LLM becomes."""
    if name is None or family is None or PROGRAMS[name].takes(family.target_class.name):
        return
    others = [
        other for other, program in PROGRAMS.items() if program.takes(family.target_class.name)
    ]
    raise UnsupportedError(
        f"{PROGRAMS[name].title} has no class for {family.target_class.architecture}, which this "
        "LLM becomes",
        where=flag("for_"),
        advice=f"Programs that have one: {', '.join(others)}.",
    )

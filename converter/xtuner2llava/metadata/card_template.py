"""A card of the user's own, with places for what the conversion knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtuner2llava.errors import CorruptFileError, Fault, UsageError, raise_faults
from xtuner2llava.metadata.front_matter import dump, parse, split
from xtuner2llava.options import PathOrText
from xtuner2llava.storage.json_file import Json
from xtuner2llava.storage.small_file import read_plain

# What may stand between {{ and }}: the sections of the generated card.
PLACES = ("name", "summary", "parts", "usage", "prompt", "conversion", "caveats")
_PLACE = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CardTemplate:
    """The text of a README.md in which `{{ usage }}` and other `PLACES` are filled.

    What it says between `---` lines stays as it is; metadata that it does not have is added.
    """

    text: str

    def fill(self, metadata: Mapping[str, Json], sections: Mapping[str, str]) -> str:
        """The card, with `sections` in their places and `metadata` where it says nothing."""
        yaml_text, body = split(self.text)
        own = parse(yaml_text or "")
        missing = {key: value for key, value in metadata.items() if key not in own}
        added = dump(missing).removeprefix("---\n").removesuffix("---\n") if missing else ""
        head = f"{yaml_text.rstrip()}\n" if yaml_text and yaml_text.strip() else ""
        filled = _PLACE.sub(lambda match: sections[match[1]].strip(), body)
        return f"---\n{head}{added}---\n{filled}"


def read_card_template(path: PathOrText | None) -> CardTemplate | None:
    """Reads a file of at most 1 MiB. Raises `UsageError` with all that is wrong with it."""
    if path is None:
        return None
    where = f"--card-template {path}"
    try:
        text = read_plain(Path(path), _MAX_BYTES).decode("utf-8-sig")
    except CorruptFileError as error:
        raise UsageError(error.faults[0].what, where=where) from error
    except UnicodeDecodeError as error:
        raise UsageError("cannot be read (it is not UTF-8)", where=where) from error
    faults = [
        Fault(where, f"has no place '{name}'", f"Known are {', '.join(PLACES)}.")
        for name in sorted(set(_PLACE.findall(text)) - set(PLACES))
    ]
    yaml_text, _ = split(text)
    try:
        parse(yaml_text or "")
    except ValueError as error:
        faults.append(Fault(where, f"its metadata between --- lines {error}"))
    raise_faults(UsageError, faults)
    return CardTemplate(text)

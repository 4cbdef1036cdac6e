"""The model card: what the model is made of, how to load it, how it was converted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from xtuner2llava import __version__
from xtuner2llava.errors import CorruptFileError, Fault, UsageError, raise_faults
from xtuner2llava.metadata.front_matter import MARK, dump, front_matter, parse, split
from xtuner2llava.options import PROGRAMS, ConvertOptions, Options, PathOrText, decided
from xtuner2llava.planning.chat_template import prompt_text
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import hub_id, redact_name, redactor
from xtuner2llava.sources.artifact import VISUAL_ENCODER
from xtuner2llava.sources.part import Part
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.storage.small_file import read_plain

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_TITLES = {
    "parts": "What it is made of",
    "usage": "Load it",
    "prompt": "Prompt",
    "conversion": "How it was converted",
    "caveats": "Caveats",
}
# What may stand between {{ and }} in a card of the user's own.
PLACES = ("name", "summary", *_TITLES)
_PLACE = re.compile(r"\{\{\s*([\w.-]+)\s*\}\}")
_MAX_BYTES = 1 << 20
_QUESTION = "What is in this picture?"
_LONGEST_PROMPT = 2000
_ADVICE = re.compile(r"--[a-z]|Give .*--[a-z]")


def model_card(plan: Plan, options: ConvertOptions, template: str | None) -> str:
    """The text of README.md. It names no path of this machine, and nothing of the training data.

    `options` are those of the conversion, to say the command. With `template`, the card is the
    user's: its places are filled, and metadata that it does not have is added.
    """
    sections, metadata = _sections(plan, options), front_matter(plan)
    if template is not None:
        return _filled(template, metadata, sections)
    text = [f"{dump(metadata)}{MARK}", f"# {sections['name']}", sections["summary"]]
    text += [f"## {title}\n\n{sections[n]}" for n, title in _TITLES.items() if sections[n]]
    return "\n\n".join(text) + "\n"


def _sections(plan: Plan, options: ConvertOptions) -> dict[str, str]:
    """The text of each of `PLACES`, in Markdown."""
    from jinja2 import Environment, StrictUndefined

    jinja = Environment(  # noqa: S701 - Markdown
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    jinja.filters |= {"repr": repr, "code": _code, "fenced": _fenced, "plain": _plain}
    tower, target = plan.checkpoint.visual_encoder.config, plan.mapping.target_class
    tower_name = str(plan.config.get("mm_vision_tower")).lower()
    example, redact = _example_prompt(plan), redactor(plan, options)
    module = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).make_module(
        {
            "plan": plan,
            "checkpoint": plan.checkpoint,
            "options": options,
            "programs": PROGRAMS,
            "version": __version__,
            "base": _base,
            "origin": partial(_origin, redact=redact),
            "writes_tower": any(each.component == VISUAL_ENCODER for each in plan.tensors),
            "image_size": integer(tower.values, "image_size") if tower is not None else None,
            "is_next": not PROGRAMS["llava"].takes(target),
            "fits_sglang": PROGRAMS["sglang"].takes(target)
            and plan.config.get("mm_projector_type") == "mlp2x_gelu"
            and ("clip" in tower_name or "siglip" in tower_name),
            "question": _QUESTION,
            "example": example,
            "image_prompt": example or f"<image>\n{_QUESTION}",
            "command": _command(plan, options),
            "notes": list(filter(None, map(_for_readers, map(redact, plan.notes)))),
        }
    )
    return {name: str(getattr(module, name)()).strip() for name in PLACES}


def _plain(text: str) -> str:
    """Text from the checkpoint as it is, in one line, without links, HTML and cells of its own."""
    marked = re.compile(r"`[^`]*`|[\[<|]")
    return marked.sub(lambda m: m[0] if m[0][0] == "`" else f"\\{m[0]}", " ".join(text.split()))


def _code(text: str) -> str:
    text = repr(text)[1:-1]
    around = _fence(text, 1) + " " * ("`" in text)
    return f"{around}{text}{around[::-1]}"


def _fenced(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than `text` has anywhere in a row: what they enclose does not end before."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def _example_prompt(plan: Plan) -> str | None:
    """A prompt with an image and a question, as in training; None where that is not known."""
    template = plan.chat.prompt
    text = prompt_text(template, _QUESTION) if template is not None else None
    return text if text is not None and len(text) <= _LONGEST_PROMPT else None


def _base(part: Part) -> str:
    known = hub_id(part.name, part.folder)
    if known is not None:
        return f"[{known}](https://huggingface.co/{known})"
    return _plain(redact_name(part.name)) if part.name else "-"


def _origin(part: Part, redact: Callable[[str], str]) -> str:
    frozen = "frozen in training, as the base model"
    return redact(part.origin) if part.trained else frozen


def _for_readers(note: str) -> str:
    """`note` without sentences that tell which flag to give: a reader has nothing to convert."""
    sentences = re.split(r"(?<=[.!?]) ", note)
    return " ".join(text for text in sentences if not _ADVICE.match(text))


def _command(plan: Plan, options: Options) -> str:
    """The command line of the conversion, without paths: files and folders by their names."""
    path = plan.checkpoint.artifact.path
    source = hub_id(None, path) or redact_name(str(path))
    words = ["xtuner2llava", "convert", source, plan.suggested_name]
    for flag, value in decided(options).items():
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, redact_name(str(value))]
    return shlex.join(words)


def read_card_template(path: PathOrText | None) -> str | None:
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
        faults.append(Fault(where, f"its metadata between --- lines: {error}"))
    raise_faults(UsageError, faults)
    return text


def _filled(template: str, metadata: Mapping[str, Json], sections: Mapping[str, str]) -> str:
    """The card, with `sections` in their places and `metadata` where it says nothing."""
    yaml_text, body = split(template)
    own = parse(yaml_text or "")
    missing = {key: value for key, value in metadata.items() if key not in own}
    added = dump(missing).removeprefix("---\n").removesuffix("---\n") if missing else ""
    head = f"{yaml_text.rstrip()}\n" if yaml_text and yaml_text.strip() else ""
    return f"---\n{head}{added}---\n" + _PLACE.sub(lambda m: sections[m[1]], body)

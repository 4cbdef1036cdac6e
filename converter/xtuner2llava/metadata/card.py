"""The model card: what the model is made of, how to load it, how it was converted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from xtuner2llava import __version__
from xtuner2llava.errors import CorruptFileError, Fault, UsageError, raise_faults
from xtuner2llava.metadata.front_matter import MARK, dump, front_matter, parse, split
from xtuner2llava.metadata.usage import example_prompt, usage
from xtuner2llava.options import ConvertOptions, Options, PathOrText, decided
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.redaction import hub_id, redact_name, redact_text
from xtuner2llava.sources import Part
from xtuner2llava.storage.json_file import Json, integer
from xtuner2llava.storage.small_file import read_plain

_ADVICE = re.compile(r"--[a-z]|Give .*--[a-z]")
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


def model_card(plan: Plan, options: ConvertOptions, template: str | None) -> str:
    """The text of README.md. It names no path of this machine, and nothing of the training data.

    `options` are those of the conversion, to say the command. With `template`, the card is the
    user's: its places are filled, and metadata that it does not have is added.
    """
    sections = {
        "name": plan.suggested_name,
        "summary": _summary(plan),
        "parts": "\n".join(_parts(plan)),
        "usage": usage(plan),
        "prompt": "\n".join(_prompt(plan)),
        "conversion": _conversion(plan, options),
        "caveats": "\n".join(f"- {note}" for note in map(_for_readers, plan.notes) if note),
    }
    metadata = front_matter(plan)
    if template is not None:
        return _filled(template, metadata, sections)
    text = [f"{dump(metadata)}{MARK}", f"# {sections['name']}", sections["summary"]]
    text += [
        f"## {title}\n\n{sections[name].strip()}"
        for name, title in _TITLES.items()
        if sections[name]
    ]
    return "\n\n".join(text) + "\n"


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
        faults.append(Fault(where, f"its metadata between --- lines {error}"))
    raise_faults(UsageError, faults)
    return text


def _filled(template: str, metadata: Mapping[str, Json], sections: Mapping[str, str]) -> str:
    """The card, with `sections` in their places and `metadata` where it says nothing."""
    yaml_text, body = split(template)
    own = parse(yaml_text or "")
    missing = {key: value for key, value in metadata.items() if key not in own}
    added = dump(missing).removeprefix("---\n").removesuffix("---\n") if missing else ""
    head = f"{yaml_text.rstrip()}\n" if yaml_text and yaml_text.strip() else ""
    return f"---\n{head}{added}---\n" + _PLACE.sub(lambda m: sections[m[1]].strip(), body)


def _for_readers(note: str) -> str:
    """`note` without sentences that tell which flag to give: a reader has nothing to convert."""
    sentences = re.split(r"(?<=[.!?]) ", redact_text(note))
    return " ".join(text for text in sentences if not _ADVICE.match(text))


def _summary(plan: Plan) -> str:
    tower = plan.checkpoint.visual_encoder.config
    size = integer(tower.values, "image_size") if tower is not None else None
    pictures = f" It sees pictures at {size} by {size} pixels." if size else ""
    what = (
        "as transformers' `LlavaForConditionalGeneration`"
        if plan.mapping.format == "hf"
        else f"in the layout of official LLaVA, class `{plan.architecture}`"
    )
    xtuner = "[XTuner](https://github.com/InternLM/xtuner)"
    return f"A LLaVA model trained with {xtuner}, {what}.{pictures}"


def _parts(plan: Plan) -> Iterator[str]:
    checkpoint = plan.checkpoint
    yield "| part | base model | weights |"
    yield "|---|---|---|"
    yield f"| LLM | {_base(checkpoint.llm)} | {_origin(checkpoint.llm)} |"
    yield f"| vision tower | {_base(checkpoint.visual_encoder)} | {_tower(plan)} |"
    kind = plan.config.get("mm_projector_type") or "mlp2x_gelu"
    yield f"| projector (`{kind}`) | - | trained |"


def _base(part: Part) -> str:
    known = hub_id(part.name, part.folder)
    if known is not None:
        return f"[{known}](https://huggingface.co/{known})"
    return redact_name(part.name) if part.name else "-"


def _origin(part: Part) -> str:
    return redact_text(part.origin) if part.trained else "frozen in training, as the base model"


def _tower(plan: Plan) -> str:
    written = any(planned.component == "visual_encoder" for planned in plan.tensors)
    origin = _origin(plan.checkpoint.visual_encoder)
    return origin if written else f"{origin}; not in these files"


def _prompt(plan: Plan) -> Iterator[str]:
    prompt, template = example_prompt(plan), plan.chat.template
    if prompt is not None:
        named = f"XTuner's template `{template}`" if template else "a template"
        yield f"It was trained with {named}, without system text: as above, in one turn,"
        yield from ("", "```text", prompt, "```", "")
    ids = plan.generation_config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    numbers = ", ".join(str(n) for n in listed if isinstance(n, int))
    words = ", ".join(f"`{word}`" for word in plan.chat.stop_words)
    if words:
        yield f"A turn ends with {words}."
    if numbers:
        yield f"Generation stops at the tokens {numbers}, as `generation_config.json` says."


def _conversion(plan: Plan, options: ConvertOptions) -> str:
    artifact = plan.checkpoint.artifact
    when = f", iteration {artifact.iteration}" if artifact.iteration is not None else ""
    verified = (
        f"All {len(plan.tensors)} tensors were read back and compared with their sources, bit for "
        "bit.\n"
        if options.verify
        else ""
    )
    return (
        f"From an XTuner checkpoint ({artifact.layout}{when}) by xtuner2llava {__version__}, with "
        f"the mapping `{plan.mapping.family}` → `{plan.mapping.format}`, in "
        f"{plan.config.get('torch_dtype')}:\n\n"
        f"```console\n$ {_command(plan, options)}\n```\n\n"
        f"{verified}`conversion.json` has the checksums, and what every part was made from."
    )


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

"""The card: what the model is made of, how to load it, how it was converted."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from xtuner2llava.metadata.front_matter import dump, front_matter
from xtuner2llava.metadata.prompt import Prompt, prompt_of
from xtuner2llava.metadata.template import Template
from xtuner2llava.metadata.usage import usage
from xtuner2llava.options import Options, decided
from xtuner2llava.planning.plan import Plan
from xtuner2llava.planning.published import hub_id, published_name, published_text
from xtuner2llava.sources import Part
from xtuner2llava.storage.json_file import integer

CARD_NAME = "README.md"
MARK = (
    "<!-- Written by xtuner2llava. Take this line out to keep your own text when it is pushed "
    "again. -->"
)


def model_card(
    plan: Plan,
    version: str,
    options: Options | None = None,
    *,
    verified: bool = False,
    measured: Sequence[str] = (),
    template: Template | None = None,
) -> str:
    """The text of README.md. It names no path of this machine, and nothing of the training data.

    `options` are those of the conversion, to say the command; `verified` that every tensor was
    compared with its source; `measured` are sentences about further measurements. With `template`,
    the card is the user's.
    """
    prompt = prompt_of(plan)
    sections = {
        "name": plan.suggested_name,
        "summary": _summary(plan),
        "parts": "\n".join(_parts(plan)),
        "usage": "\n".join(usage(plan, prompt)),
        "prompt": "\n".join(_prompt(plan, prompt)),
        "conversion": "\n".join(_conversion(plan, version, options, verified, measured)),
        "caveats": "\n".join(f"- {published_text(note)}" for note in plan.notes),
    }
    metadata = front_matter(plan)
    if template is not None:
        return template.fill(metadata, sections)
    text = [f"{dump(metadata)}{MARK}", f"# {sections['name']}", sections["summary"]]
    for title, name in (
        ("What it is made of", "parts"),
        ("Load it", "usage"),
        ("Prompt", "prompt"),
        ("How it was converted", "conversion"),
        ("Caveats", "caveats"),
    ):
        if sections[name]:
            text += [f"## {title}", sections[name].strip()]
    return "\n\n".join(text) + "\n"


def is_generated(text: str) -> bool:
    """Whether a card is ours to replace."""
    return MARK in text


def _summary(plan: Plan) -> str:
    size = integer(plan.checkpoint.visual_encoder.config.values, "image_size") if (
        plan.checkpoint.visual_encoder.config
    ) else None  # fmt: skip
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
    return published_name(part.name) if part.name else "-"


def _origin(part: Part) -> str:
    return published_text(part.origin) if part.trained else "frozen in training, as the base model"


def _tower(plan: Plan) -> str:
    written = any(planned.component == "visual_encoder" for planned in plan.tensors)
    origin = _origin(plan.checkpoint.visual_encoder)
    return origin if written else f"{origin}; not in these files"


def _prompt(plan: Plan, prompt: Prompt | None) -> Iterator[str]:
    if prompt is not None:
        named = f"XTuner's template `{prompt.template}`" if prompt.template else "a template"
        yield f"It was trained with {named}, without system text: as above, in one turn,"
        yield from ("", "```text", prompt.text, "```", "")
    ids = plan.generation_config.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    numbers = ", ".join(str(n) for n in listed if isinstance(n, int))
    words = ", ".join(f"`{word}`" for word in plan.chat.stop_words)
    if words:
        yield f"A turn ends with {words}."
    if numbers:
        yield f"Generation stops at the tokens {numbers}, as `generation_config.json` says."


def _conversion(
    plan: Plan, version: str, options: Options | None, verified: bool, measured: Sequence[str]
) -> Iterator[str]:
    checkpoint = plan.checkpoint
    when = checkpoint.artifact.iteration
    yield (
        f"From an XTuner checkpoint ({checkpoint.artifact.layout}"
        + (f", iteration {when}" if when is not None else "")
        + f") by xtuner2llava {version}, with the mapping `{plan.mapping.family}` → "
        f"`{plan.mapping.format}`, in {plan.config.get('torch_dtype')}:"
    )
    yield from ("", "```console", f"$ {command(plan, options)}", "```", "")
    if verified:
        yield (
            f"All {len(plan.tensors)} tensors were read back and compared with their sources, bit "
            "for bit."
        )
    yield from measured
    yield "`conversion.json` has the checksums, and what every part was made from."


def command(plan: Plan, options: Options | None) -> str:
    """The command line of the conversion, without paths: files and folders by their names."""
    path = plan.checkpoint.artifact.path
    source = hub_id(None, path) or published_name(str(path))
    words = ["xtuner2llava", "convert", source, plan.suggested_name]
    for flag, value in decided(options).items() if options is not None else ():
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, published_name(str(value))]
    return shlex.join(words)

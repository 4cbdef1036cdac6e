"""Every option of the commands and of the Python API, stated once.

A field of these classes is a keyword argument of the API (`api.py`), a flag of the command line
(`flags.py`) and a row of `docs/cli.md`. Annotations are objects here, not strings: the checks and
the flags follow from them.
"""

import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

from xtuner2llava.errors import Fault, UsageError, raise_faults

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from xtuner2llava.planning.plan import Plan

PathOrText: TypeAlias = str | PathLike[str]
# Called with (stage, bytes done, bytes in all), from one thread at a time.
OnProgress: TypeAlias = Callable[[str, int, int], None]

Format: TypeAlias = Literal["llava", "hf"]
ModelType: TypeAlias = Literal["official", "llava"]
Dtype: TypeAlias = Literal["auto", "keep", "float16", "bfloat16", "float32"]
Weights: TypeAlias = Literal["master", "module"]
ProgramName: TypeAlias = Literal[
    "llava", "llava-next", "transformers", "vllm", "sglang", "lmdeploy"
]


@dataclass(frozen=True, slots=True)
class Program:
    """`classes` are the plain LLM classes that it has for its format; None: all of the format.

    `seen` are the families that a test ran it with; docs/compatibility.md has versions. `serve` is
    the command that serves the folder after it.
    """

    title: str
    format: Format
    model_type: ModelType
    classes: tuple[str, ...] | None = None
    seen: frozenset[str] = frozenset()
    serve: str = ""

    def takes(self, target_class: str) -> bool:
        """Whether it loads an LLM of the plain class `target_class`."""
        return self.classes is None or target_class in self.classes


_VLLM = frozenset("internlm2 llama mistral mixtral phi3 qwen2 qwen2_moe qwen3".split())
# haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT `llava/model/__init__.py`; sglang
# `python/sglang/srt/models/llava.py`, which refuses the format hf; vLLM
# `vllm/model_executor/models/llava.py`; lmdeploy `lmdeploy/pytorch/models/llava.py`.
PROGRAMS: Mapping[str, Program] = {
    "llava": Program("LLaVA", "llava", "official", ("llama", "mistral")),
    "llava-next": Program(
        "LLaVA-NeXT", "llava", "official", ("llama", "mistral", "mixtral", "qwen2")
    ),
    "transformers": Program("transformers", "hf", "official"),
    "vllm": Program("vLLM", "hf", "official", seen=_VLLM, serve="vllm serve"),
    "sglang": Program(
        "SGLang",
        "llava",
        "llava",
        ("llama", "mistral", "qwen2"),
        serve="python -m sglang.launch_server --model-path",
    ),
    "lmdeploy": Program("LMDeploy", "hf", "official", serve="lmdeploy serve api_server"),
}

TARGET, INPUT, OUTPUT, EXACTNESS = "Target", "Input", "Output", "Exactness"
SPEED, HUB, TALK = "Speed and memory", "Hub", "Talk"
GROUPS = (TARGET, INPUT, OUTPUT, EXACTNESS, SPEED, HUB, TALK)

_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?|\.\d+) *([KMGT])B", re.IGNORECASE | re.ASCII)
_POWERS = {"K": 3, "M": 6, "G": 9, "T": 12}


def option(
    default: object,
    group: str,
    help: str,
    *,
    metavar: str = "",
    unset: str = "",
    decides: bool | None = None,
) -> Any:
    """A field of an options class. With the metavar SIZE, it is a number of bytes.

    `unset` says what holds where it is not given, and `decides` that the converted bytes follow
    from it; they do not from options for speed and the Hub.
    """
    metadata = {
        "group": group,
        "help": help,
        "metavar": metavar,
        "unset": unset,
        "size": metavar == "SIZE",
        "decides": group not in (SPEED, HUB) if decides is None else decides,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class CheckedOptions:
    """Checks every field against its annotation. Raises one `UsageError` for all faults."""

    def __post_init__(self) -> None:
        faults = []
        for each in fields(self):
            what = _mistake(getattr(self, each.name), each.type, each.metadata.get("size", False))
            if what:
                faults.append(Fault(flag(each.name), what))
        raise_faults(UsageError, faults)


@dataclass(frozen=True, kw_only=True)
class SourceOptions(CheckedOptions):
    """What is read, and what its parts become in any format."""

    llm: PathOrText | None = option(
        None, INPUT, "Base LLM: config and tokenizer, and weights where the checkpoint has none or "
        "LoRA. Not one that `xtuner convert merge` made: the adapter would be merged twice.",
        metavar="PATH_OR_REPO", unset="what the XTuner config names",
    )  # fmt: skip
    vision: PathOrText | None = option(
        None, INPUT, "Base vision tower, likewise, and not merged.", metavar="PATH_OR_REPO",
        unset="what the XTuner config names",
    )  # fmt: skip
    tokenizer: PathOrText | None = option(
        None, INPUT, "The tokenizer that was trained with, where it is not the base LLM's.",
        metavar="PATH_OR_REPO", unset="what the XTuner config names",
    )  # fmt: skip
    xtuner_config: PathOrText | None = option(
        None, INPUT, "Read as data; no code in it is run.", metavar="FILE.py",
        unset="the one in the checkpoint",
    )  # fmt: skip
    mapping: PathOrText | None = option(
        None, INPUT, "LLM family.", metavar="NAME_OR_FILE", unset="found by config and tensor names"
    )
    weights: Weights = option(
        "master", INPUT, "Of a DeepSpeed directory: float32 master or 16-bit module weights."
    )
    lora_alpha: float | None = option(
        None, INPUT, "The LLM's LoRA alpha, where it is recorded nowhere.", metavar="N"
    )
    vision_lora_alpha: float | None = option(None, INPUT, "The tower's, likewise.", metavar="N")
    include_vision_tower: bool = option(
        True, OUTPUT, "Write the tower's tensors even if it was frozen: the only layout that LLaVA "
        "and LLaVA-NeXT both load right.",
    )  # fmt: skip
    vision_tower_name: str | None = option(
        None, OUTPUT, "What to write as mm_vision_tower.", metavar="ID",
        unset="what the XTuner config names",
    )  # fmt: skip
    bos_token: str | None = option(
        None, OUTPUT, "Put it on the tokenizer, as XTuner's advice for Qwen does; LLaVA then drops "
        "a token after each image.", metavar="TOKEN", unset="none for Qwen, else the base's",
    )  # fmt: skip
    dtype: Dtype = option("auto", EXACTNESS, "auto: the base LLM's torch_dtype; keep: as stored.")

    def base(self, part: str) -> str | None:
        """The base model that was given for the "llm" or the "visual_encoder"."""
        given = self.llm if part == "llm" else self.vision
        return None if given is None else fspath(given)

    def alpha(self, part: str) -> float | None:
        """The LoRA alpha that was given for the "llm" or the "visual_encoder"."""
        return self.lora_alpha if part == "llm" else self.vision_lora_alpha


@dataclass(frozen=True, kw_only=True)
class InspectOptions(SourceOptions):
    """What decides the output of any format."""

    model_type: ModelType = option("official", OUTPUT, "llava: for servers that know no other.")

    def with_format(self, name: str) -> "Options":
        """The options of `plan` and `convert` for a format, with these choices."""
        kind = Options if isinstance(self, Options) else InspectOptions
        shared: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(kind)}
        return Options(**{**shared, "format": name})


@dataclass(frozen=True, kw_only=True)
class Options(InspectOptions):
    """What decides the output; how it is written is not among it."""

    for_: ProgramName | None = option(
        None, TARGET, "Sets --format and --model-type for that program, and says what it does not "
        "load.", decides=False,
    )  # fmt: skip
    format: Format = option(
        "llava", TARGET, "llava: official LLaVA; hf: LlavaForConditionalGeneration."
    )
    max_shard_size: str = option(
        "5GB", OUTPUT, "Most bytes of tensors in a file, as the Hub counts them.", metavar="SIZE"
    )
    stream_base: bool = option(
        False, SPEED, "Read the base LLM's safetensors from the Hub as they are needed; nothing is "
        "stored.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.for_ is None:
            return
        program = PROGRAMS[self.for_]
        faults = []
        for name, default in (("format", "llava"), ("model_type", "official")):
            value, wanted = getattr(self, name), getattr(program, name)
            if value not in (default, wanted):
                faults.append(
                    Fault(flag(name), f"is {value!r}, and {program.title} reads {wanted!r}")
                )
            object.__setattr__(self, name, wanted)
        raise_faults(UsageError, faults)


@dataclass(frozen=True, kw_only=True)
class WatchedOptions(CheckedOptions):
    on_progress: OnProgress | None = None


@dataclass(frozen=True, kw_only=True)
class PushOptions(WatchedOptions):
    """How a model is published."""

    jobs: int | None = option(
        None,
        SPEED,
        "Threads that write, or files sent at once.",
        metavar="N",
        unset="min(4, cores)",
    )
    private: bool = option(False, HUB, "Only you see the repository; a public one is refused.")
    revision: str | None = option(None, HUB, "Made if need be.", metavar="BRANCH", unset="main")
    commit_message: str | None = option(None, HUB, "What the commit is called.", metavar="TEXT")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options, PushOptions):
    """`Options`, and how the output is written and published."""

    verify: bool = option(
        True, EXACTNESS, "Read OUT back and compare it with its sources, bit for bit.",
        decides=False,
    )  # fmt: skip
    restart: bool = option(
        False, OUTPUT, "Throw an unfinished run away; without it, one that matches goes on where "
        "it stopped.", decides=False,
    )  # fmt: skip
    resume: bool = option(
        False, OUTPUT, "Taken, and changes nothing: going on is the default.", decides=False
    )
    overwrite: bool = option(
        False, OUTPUT, "Replace OUT, if a conversion wrote it and nothing else lies in it.",
        decides=False,
    )  # fmt: skip
    card_template: PathOrText | None = option(
        None, OUTPUT, "Your own model card; {{ usage }}, {{ parts }} and others are filled in.",
        metavar="FILE.md",
    )  # fmt: skip
    max_memory: str = option(
        "256MB", SPEED, "Working buffers of all threads together; Python and torch come on top.",
        metavar="SIZE",
    )  # fmt: skip
    push_to_hub: str | None = option(
        None, HUB, "Publish OUT there when it is complete.", metavar="REPO_ID"
    )
    low_disk: bool = option(
        False, HUB, "With --push-to-hub: send and remove each shard before the next is written; "
        "OUT does not appear.",
    )  # fmt: skip
    executor: "Executor | None" = None
    on_plan: Callable[["Plan"], None] | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(SourceOptions, WatchedOptions):
    """What a converted folder is held to."""

    against: PathOrText | None = option(
        None, INPUT, "Make the plan again and compare every tensor bit for bit. Give the options "
        "that were given to convert.", metavar="CHECKPOINT",
    )  # fmt: skip
    jobs: int | None = option(
        None, SPEED, "Tensors compared at once.", metavar="N", unset="min(4, cores)"
    )
    format: Format | None = option(
        None, TARGET, "Check that OUT is of this format.", unset="what OUT says"
    )
    model_type: ModelType | None = option(
        None, OUTPUT, "Check that OUT is of this kind.", unset="what OUT says"
    )
    max_shard_size: str | None = option(
        None, OUTPUT, "Taken as convert takes it; shards of any size are right.", metavar="SIZE"
    )
    logits: bool = option(
        False, EXACTNESS, "With --against: also run both models, layer by layer, and compare their "
        "logits.",
    )  # fmt: skip
    reference: PathOrText | None = option(
        None, EXACTNESS, "Also run OUT, layer by layer, and compare its logits with those that you "
        "made with the real model. docs/mappings.md says how.", metavar="FILE.npz",
    )  # fmt: skip
    trust_remote_code: bool = option(
        False, EXACTNESS, "With --logits: run the base LLM's own Python, where transformers does "
        "not have its class.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TryOptions(CheckedOptions):
    """How a converted model is asked."""

    max_new_tokens: int = option(256, OUTPUT, "The most tokens of an answer.", metavar="N")
    device: str | None = option(
        None, SPEED, "A device of torch.", metavar="NAME", unset="cuda where there is one, else cpu"
    )
    on_text: Callable[[str], None] | None = None


def decided(options: CheckedOptions) -> dict[str, Any]:
    """What was chosen of what decides the output, by flag; the defaults are left out."""
    return {
        flag(each.name): value
        for each in fields(options)
        if each.metadata.get("decides") and (value := getattr(options, each.name)) != each.default
    }


def defaults() -> dict[str, Any]:
    """The options that decide the output, by flag, where nothing was chosen."""
    return {
        flag(each.name): "not given" if each.default is None else each.default
        for each in fields(ConvertOptions)
        if each.metadata.get("decides")
    }


def flag(name: str) -> str:
    """The flag of a field on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def choices(annotation: object) -> tuple[str, ...]:
    """The values of the `Literal` in an annotation; none for another annotation."""
    return tuple(v for each in members(annotation) if get_origin(each) is Literal
                 for v in get_args(each))  # fmt: skip


def members(annotation: object) -> tuple[object, ...]:
    """The types that a union is made of."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def parse_size(size: str) -> int:
    """A size such as "5GB" in bytes, as the Hub reads it. Raises `ValueError`."""
    if count := _bytes_in(size):
        return count
    raise ValueError(f"{size!r} is not a size")


def _bytes_in(size: str) -> int:
    """0 where it is not a size."""
    found = _SIZE.fullmatch(size.strip())
    return int(float(found[1]) * 10 ** _POWERS[found[2].upper()]) if found else 0


def check_argument(name: str, value: object) -> None:
    """Raises `UsageError` unless `value` can be a path, a repo id or another text."""
    what = _mistake(value, PathOrText, False)
    if what:
        raise UsageError(what, where=name)


def _mistake(value: object, annotation: object, is_size: bool) -> str:
    """What is wrong with a value; empty where nothing is."""
    known = choices(annotation)
    kinds = [get_origin(each) or each for each in members(annotation) if not isinstance(each, str)]
    if not kinds or (value is None and types.NoneType in kinds):
        return ""
    by_kind = next((found for kind, found in _BY_KIND.items() if kind in kinds), None)
    if known:
        fits, expected = isinstance(value, str) and value in known, f"one of {', '.join(known)}"
    elif by_kind is not None:
        fits, expected = by_kind[0](value), by_kind[1]
    elif is_size:
        fits = isinstance(value, str) and _bytes_in(value) > 0
        expected = "a number with its unit, such as '5GB' or '500MB'"
    elif isinstance(value, str | PathLike if PathLike in kinds else str):
        text = fspath(value)
        fits = isinstance(text, str) and bool(text.strip()) and "\0" not in text
        expected = "a text that is not empty and has no NUL"
    else:
        fits, expected = False, "a text or a path" if PathLike in kinds else "a text"
    shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}..."
    return "" if fits else f"is {shown}, expected {expected}"


# What a value of a type must be, and what messages call it.
_BY_KIND: Mapping[object, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (
        lambda value: isinstance(value, Integral) and value is not True and int(value) >= 1,
        "a whole number, 1 or more",
    ),
    float: (
        lambda value: isinstance(value, Real) and value is not True and 0 < float(value) < math.inf,
        "a number above 0",
    ),
    Callable: (callable, "something to call"),
}

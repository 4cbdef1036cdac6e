"""LoRA adapters as XTuner saves them: their factors, their settings, and the merge with the base.

In a `.pth` the factors are called `base_model.model.{module}.lora_A.default.weight`; in an adapter
folder `.default` is missing (huggingface/peft `src/peft/utils/save_and_load.py`). The rank is in
the shapes; alpha is in the XTuner config or in `adapter_config.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from xtuner2llava.errors import Fault, UnsupportedError, raise_faults
from xtuner2llava.sources.lora_settings import LoraSettings
from xtuner2llava.sources.model_config import ModelConfig
from xtuner2llava.tensors.computed import Transpose
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.lora import Merge, Reshaped

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?P<adapter>\.[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
# A saved module, and what it was before it was trained (peft `utils/other.py`,
# ModulesToSaveWrapper).
_SAVED = re.compile(
    r"(?P<module>.+?)\.(?:modules_to_save(?:\.default)?|(?P<original>original_module))"
    r"\.(?P<leaf>.+)"
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FIRST_FACTORS = ("lora_A", "lora_embedding_A")
# As the LLMs of transformers are called that can have them tied; the head is then not saved.
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IS_IT_THE_BASE = "is it the one that was used?"
# Enough to distinguish a merge from rounding: some 100,000 elements.
_MODULES_COMPARED, _ROWS_COMPARED = 4, 32


@dataclass(frozen=True, slots=True)
class Adapter:
    """The factors by module, and the tensors that replace the base's (saved modules, biases)."""

    factors: Mapping[str, Mapping[str, LazyTensor]]
    replacements: Mapping[str, LazyTensor]
    settings: LoraSettings | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, ascending."""
        factors = [factor for module in self.factors.values() for factor in module.items()]
        return tuple(sorted({t.rows for kind, t in factors if kind in _FIRST_FACTORS}))

    @property
    def title(self) -> str:
        """What to call it in records: "LoRA (rank 64, alpha 16)"."""
        if not self.factors:
            return "saved biases"
        alpha = self.settings.alpha if self.settings is not None else None
        shown = "unknown" if alpha is None else f"{alpha:g}"
        return f"LoRA (rank {', '.join(map(str, self.ranks))}, alpha {shown})"

    def own_base(self, where: str) -> Mapping[str, LazyTensor] | None:
        """The part's weights under the adapter, if they are saved beside it.

        XTuner does not save them, but DeepSpeed does where frozen parameters are not excluded
        (`frozen_param_fragments`), and so does its zero_to_fp32.py. Raises `UnsupportedError` where
        only some adapted modules have theirs.
        """
        lacking = [m for m in self.factors if f"{m}.weight" not in self.replacements]
        # PEFT saves an adapted embedding or head with its adapter (`save_embedding_layers`).
        if {f"{m}.weight" for m in {*self.factors} - {*lacking}} <= {_EMBEDDING, _HEAD}:
            return None
        if lacking:
            what = (
                f"has no weights under its adapter, while {len(self.factors) - len(lacking)} "
                f"other modules have theirs"
            )
            advice = "Expected are the base weights of all adapted modules, or of none."
            raise UnsupportedError.from_faults([Fault.about(where, lacking, what, advice)])
        return self.replacements


class _Refused(dict[str, list[str]]):
    """What is wrong, and the names of which it is true: mostly, those of all modules."""

    def add(self, what: str, name: str) -> None:
        self.setdefault(what, []).append(name)

    def raise_all(self, where: str) -> None:
        faults = [Fault.about(where, names, what) for what, names in self.items()]
        raise_faults(UnsupportedError, faults)


def is_adapted(names: Iterable[str]) -> bool:
    """Whether a part's tensors are those of a PEFT model."""
    return any(name.startswith(_PREFIX) or ".lora_" in name for name in names)


def read_adapter(
    tensors: Mapping[str, LazyTensor], settings: LoraSettings | None, where: str
) -> Adapter:
    """The adapter among `tensors`, whose names are the part's own. Raises `UnsupportedError`."""
    factors: dict[str, dict[str, LazyTensor]] = {}
    replacements: dict[str, LazyTensor] = {}
    originals: dict[str, LazyTensor] = {}
    refused = _Refused()
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        home, key = replacements, name.replace(".base_layer.", ".")
        if factor := _FACTOR.fullmatch(name):
            if factor["adapter"] not in (None, ".default", ".weight") or factor["leaf"] == "bias":
                refused.add("an adapter or factor of a kind XTuner never makes", full)
                continue
            home, key = factors.setdefault(factor["module"], {}), factor["kind"]
        elif saved := _SAVED.fullmatch(name):
            home = originals if saved["original"] else replacements
            key = f"{saved['module']}.{saved['leaf']}"
        if key in home:
            what = "is there under two names, and which of them was trained is not recorded"
            refused.add(what, full)
        home[key] = tensor
    refused.raise_all(where)
    return Adapter(factors, {**originals, **replacements}, settings)


def merge(base: Mapping[str, LazyTensor], adapter: Adapter, where: str) -> dict[str, LazyTensor]:
    """The tensors of `base` with the adapter merged in. Raises `UnsupportedError`, all faults."""
    merged = dict(base)
    refused = _Refused()
    for name, tensor in adapter.replacements.items():
        if (own := base.get(name)) is None:
            refused.add("is saved beside the adapter, but the base has none", name)
        # An embedding or head may have other rows: those of tokens that were added.
        elif own.shape == tensor.shape or (
            len(own.shape) == len(tensor.shape) == 2 and own.row_shape == tensor.row_shape
        ):
            merged[name] = tensor
        else:
            shapes = f"has shape {list(tensor.shape)}, the base's has {list(own.shape)}"
            refused.add(f"{shapes}; {_IS_IT_THE_BASE}", name)
    for module, factors in adapter.factors.items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        kind = adapter.settings.bias if adapter.settings is not None else "none"
        if weight not in base:
            what = f"the base model has no such module; {_IS_IT_THE_BASE}"
            refused.add(what, f"LoRA on {module}")
        elif kind != "none" and bias in base and bias not in adapter.replacements:
            # Both look for it under the name that the module has without an adapter: XTuner
            # (`xtuner/model/utils.py`, `get_peft_model_state_dict`) and PEFT, up to 0.17.
            what = (
                f"bias={kind!r} says that its bias was trained, but the checkpoint has none: "
                "XTuner and older versions of PEFT do not save it; a DeepSpeed directory of the "
                "run has it"
            )
            refused.add(what, f"LoRA on {module}")
        else:
            try:
                merged[weight] = _merged(merged[weight], module, factors, adapter.settings)
            except ValueError as error:
                refused.add(str(error), f"LoRA on {module}")
    for module in _lacking(base, adapter):
        what = "has no factors, while other layers have them there; was the adapter saved whole?"
        refused.add(what, f"LoRA on {module}")
    refused.raise_all(where)
    return merged


def _lacking(base: Mapping[str, LazyTensor], adapter: Adapter) -> Iterator[str]:
    """Modules without factors whose likes in other layers have some, by what the record selects."""
    targets = adapter.settings.targets if adapter.settings is not None else None
    kinds = {_NUMBER.sub("*", module) for module in adapter.factors}
    for name in base if targets is not None else ():
        module = name.removesuffix(".weight")
        if module == name or module in adapter.factors or _NUMBER.sub("*", module) not in kinds:
            continue
        if not targets or any(f".{module}".endswith(f".{target}") for target in targets):
            yield module


def untied(
    base: Mapping[str, LazyTensor], adapter: Adapter, config: ModelConfig
) -> Mapping[str, LazyTensor]:
    """`base`, where head and embedding are one tensor and the adapter changes either, with both.

    PEFT adapts one module, or trains a copy of it. The weight under that stays, and so does the
    module that is tied to it (peft `tuners/lora/layer.py`, Embedding; `utils/other.py`,
    ModulesToSaveWrapper).
    """
    tied = config.values.get("tie_word_embeddings") is not False and _HEAD not in base
    changed = {*adapter.replacements, *(f"{module}.weight" for module in adapter.factors)}
    if tied and _EMBEDDING in base and changed & {_EMBEDDING, _HEAD}:
        return {**base, _HEAD: base[_EMBEDDING]}
    return base


def share_in(
    weights: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor], adapter: Adapter
) -> float | None:
    """How much of what the adapter adds to `base` is in `weights`: 0.0 nothing, 1.0 all of it.

    It is the projection of how `weights` differ from `base` onto what a merge adds, over the first
    rows of a few modules. None where the tensors do not fit each other, or the adapter adds nothing
    there. Raises `ConversionError` where the adapter does not fit `base`.
    """
    import torch

    settings = replace(adapter.settings, bias="none") if adapter.settings is not None else None
    merged = merge(base, Adapter(adapter.factors, {}, settings), "")
    along = length = 0.0
    for module in list(adapter.factors)[:_MODULES_COMPARED]:
        name = f"{module}.weight"
        if name not in weights or weights[name].shape != base[name].shape:
            return None
        stop = min(base[name].rows, _ROWS_COMPARED)
        own, before, after = (
            tensors[name].read(0, stop).to(torch.float64) for tensors in (weights, base, merged)
        )
        along += float(((own - before) * (after - before)).sum())
        length += float(((after - before) ** 2).sum())
    return along / length if length > 0 else None


def _merged(
    weight: LazyTensor,
    module: str,
    factors: Mapping[str, LazyTensor],
    settings: LoraSettings | None,
) -> LazyTensor:
    """`weight` with one module's factors; raises `ValueError` where it cannot be merged exactly."""
    embedding = "lora_embedding_A" in factors
    kinds = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [kind for kind in kinds if kind not in factors]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is missing")
    down, up = (factors[kind] for kind in kinds)
    rank = down.rows
    if not rank:
        raise ValueError("its rank is 0")
    scale = settings.scale(module, rank) if settings is not None else None
    if settings is None or scale is None:
        raise ValueError(
            f"rank {rank} is in the shapes, but alpha is recorded nowhere; "
            "give --lora-alpha (LLM) or --vision-lora-alpha (tower)"
        )
    magnitude = factors.get("lora_magnitude_vector")
    transposed = embedding or _is_transposed(weight, down, up, settings)
    if (magnitude is not None or settings.use_dora) and transposed:
        raise ValueError("DoRA on an embedding or a transposed layer cannot be merged")
    if settings.use_dora and magnitude is None:
        raise ValueError("use_dora is set, but its magnitude vector is missing")
    if transposed:
        return Merge(weight, Transpose(down), Transpose(up), scale)
    if len(weight.shape) > 2 and magnitude is not None:
        raise ValueError("DoRA on a convolution cannot be merged")
    # A convolution's factors are a convolution to `rank` channels and a 1 x 1 one from them.
    left, right = (
        factor if len(factor.shape) == 2 else Reshaped(factor, (math.prod(factor.row_shape),))
        for factor in (up, down)
    )
    return Merge(weight, left, right, scale, magnitude)


def _is_transposed(
    weight: LazyTensor, down: LazyTensor, up: LazyTensor, settings: LoraSettings
) -> bool:
    """Whether `weight` is of GPT-2's Conv1D, (in, out), rather than of a linear layer, (out, in).

    PEFT goes by the layer and overrules `fan_in_fan_out` (peft `tuners/lora/model.py`,
    `_create_new_module`), so the setting counts only where the shapes say nothing.
    """
    inputs, outputs = down.shape[-1:], up.shape[:1]
    if inputs == outputs and settings.fan_in_fan_out:
        raise ValueError(
            "fan_in_fan_out is set, and a square weight does not show whether PEFT applied it"
        )
    return len(down.shape) == 2 and inputs != outputs and weight.shape == (*inputs, *outputs)

"""LoRA adapters as XTuner saves them: their factors, their settings, and the merge with the base.

In a `.pth` the factors are called `base_model.model.{module}.lora_A.default.weight`; in an adapter
folder `.default` is missing (huggingface/peft `src/peft/utils/save_and_load.py`). The rank is in
the shapes; alpha is not, it stands in the XTuner config or in `adapter_config.json`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xtuner2llava.errors import Fault, UnsupportedError, raise_faults
from xtuner2llava.tensors import LazyTensor, Merge, Reshaped, Transpose

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?P<adapter>\.[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save(?:\.default)?\.(?P<leaf>.+)")

# What LoraConfig can say without changing what the weights are (peft `tuners/lora/config.py`).
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_lora_weights "
    "layers_pattern layers_to_transform lora_dropout megatron_core modules_to_save "
    "peft_type peft_version r rank_pattern revision runtime_config target_modules task_type "
    "qalora_group_size ensure_weight_tying type".split()
)
_UNDERSTOOD = frozenset("alpha_pattern bias fan_in_fan_out lora_alpha use_dora use_rslora".split())
# Beyond it lie only damage, infinity and NaN.
_LARGEST_ALPHA = 1e9
# Initialisations that also change the base weights, so that the base is not what was trained on.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What the shapes do not say. `where` is the file that says it."""

    where: str
    alpha: float | None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> LoraSettings:
        """The settings of a LoraConfig's keywords; refuses by name what cannot be merged."""
        faults = [
            Fault(where, f"LoRA setting {key}={value!r}", "It cannot be merged exactly.")
            for key, value in values.items()
            if key not in _HARMLESS | _UNDERSTOOD and value
        ]
        kind = str(values.get("peft_type") or "LORA").rpartition(".")[2]
        if kind != "LORA":
            faults.append(Fault(where, f"peft_type is {kind[:40]!r}, expected LORA"))
        start = values.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            faults.append(
                Fault(where, f"init_lora_weights={start!r} changes the base weights too",
                      "Merge with PEFT where the changed base is, and give the result as --llm.")
            )  # fmt: skip
        bias = values.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            faults.append(Fault(where, f"bias={bias!r}, expected none, all or lora_only"))
        pattern = values.get("alpha_pattern") or {}
        alphas: dict[str, float] = {}
        for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
            # PEFT takes keys as regular expressions; a stranger's are not run.
            if not re.fullmatch(r"[\w.]+", str(key)) or not _is_number(value):
                faults.append(Fault(where, f"alpha_pattern {key!r}: {value!r} is no plain name"))
            else:
                alphas[str(key)] = float(value)
        alpha = values.get("lora_alpha")
        if alpha is not None and not _is_number(alpha):
            faults.append(Fault(where, f"lora_alpha={alpha!r}, expected a number"))
        raise_faults(UnsupportedError, faults)
        return cls(
            where,
            float(alpha) if alpha is not None else None,
            bool(values.get("use_rslora")),
            bool(values.get("use_dora")),
            bool(values.get("fan_in_fan_out")),
            str(bias),
            alphas,
        )

    def scale(self, module: str, rank: int) -> float | None:
        """alpha / rank, or alpha / sqrt(rank) for rslora; None if no alpha is known."""
        alpha = self.alpha
        for key, value in self.alpha_pattern.items():
            if module == key or module.endswith("." + key):
                alpha = value
                break
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < _LARGEST_ALPHA


@dataclass(frozen=True, slots=True)
class Adapter:
    """The factors by module, and the tensors that replace the base's (saved modules, biases)."""

    factors: Mapping[str, Mapping[str, LazyTensor]]
    replacements: Mapping[str, LazyTensor]
    settings: LoraSettings | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, ascending."""
        return tuple(
            sorted(
                {
                    tensor.shape[0]
                    for module in self.factors.values()
                    for kind, tensor in module.items()
                    if kind in ("lora_A", "lora_embedding_A")
                }
            )
        )


def is_adapted(names: Mapping[str, object]) -> bool:
    """Whether a part's tensors are those of a PEFT model."""
    return any(name.startswith(_PREFIX) or ".lora_" in name for name in names)


def read_adapter(
    tensors: Mapping[str, LazyTensor], settings: LoraSettings | None, where: str
) -> Adapter:
    """The adapter among `tensors`, whose names are the part's own. Raises `UnsupportedError`."""
    factors: dict[str, dict[str, LazyTensor]] = {}
    replacements: dict[str, LazyTensor] = {}
    faults: list[Fault] = []
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        factor = _FACTOR.fullmatch(name)
        saved = _SAVED.fullmatch(name)
        if factor is not None:
            if factor["adapter"] not in (None, ".default", ".weight") or factor["leaf"] == "bias":
                faults.append(
                    Fault(f"{where}, {full}", "an adapter or factor of a kind XTuner never makes")
                )
                continue
            factors.setdefault(factor["module"], {})[factor["kind"]] = tensor
        elif saved is not None:
            replacements[f"{saved['module']}.{saved['leaf']}"] = tensor
        else:
            replacements[name.replace(".base_layer.", ".")] = tensor
    raise_faults(UnsupportedError, faults)
    return Adapter(factors, replacements, settings)


def merge(base: Mapping[str, LazyTensor], adapter: Adapter, where: str) -> dict[str, LazyTensor]:
    """The tensors of `base` with the adapter merged in. Raises `UnsupportedError`, all faults."""
    settings = adapter.settings
    merged = dict(base)
    faults: list[Fault] = []
    for name, tensor in adapter.replacements.items():
        if name not in base:
            faults.append(
                Fault(f"{where}, {name}", "is saved beside the adapter, but the base has none")
            )
        elif base[name].shape != tensor.shape:
            faults.append(
                Fault(
                    f"{where}, {name}",
                    f"has shape {list(tensor.shape)}, the base's has {list(base[name].shape)}",
                    "Is this the base model that was trained?",
                )
            )
        else:
            merged[name] = tensor
    # Mostly, what is wrong with one module is wrong with all.
    refused: dict[str, list[str]] = {}
    for module, factors in adapter.factors.items():
        name = f"{module}.weight"
        try:
            if name not in base:
                raise ValueError("the base model has no such module; is it the one that was used?")
            _check_bias(module, base, adapter)
            merged[name] = _merged(merged[name], module, factors, settings)
        except ValueError as error:
            refused.setdefault(str(error), []).append(module)
    for what, modules in refused.items():
        others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        faults.append(Fault(f"{where}, LoRA on {modules[0]}{others}", what))
    raise_faults(UnsupportedError, faults)
    return merged


def _check_bias(module: str, base: Mapping[str, LazyTensor], adapter: Adapter) -> None:
    """Raises `ValueError` where the bias of a module was trained and is not there.

    XTuner (`xtuner/model/utils.py`, `get_peft_model_state_dict`) and PEFT, up to 0.17, look for it
    under the name that the module has without an adapter, and save none with bias="lora_only".
    """
    kind = adapter.settings.bias if adapter.settings is not None else "none"
    name = f"{module}.bias"
    if kind != "none" and name in base and name not in adapter.replacements:
        raise ValueError(
            f"bias={kind!r} says that its bias was trained, but the checkpoint has none: XTuner "
            "and older versions of PEFT do not save it; a DeepSpeed directory of the run has it"
        )


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
    down, up = factors[kinds[0]], factors[kinds[1]]
    magnitude = factors.get("lora_magnitude_vector")
    rank = down.rows
    if not rank:
        raise ValueError("its rank is 0")
    scale = settings.scale(module, rank) if settings is not None else None
    if settings is None or scale is None:
        raise ValueError(
            f"rank {rank} is in the shapes, but alpha is recorded nowhere; "
            "give --lora-alpha (LLM) or --vision-lora-alpha (tower)"
        )
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
    left = up if len(up.shape) == 2 else Reshaped(up, (math.prod(up.row_shape),))
    right = down if len(down.shape) == 2 else Reshaped(down, (math.prod(down.row_shape),))
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
            "fan_in_fan_out is set, and a square weight does not show whether PEFT heeded that"
        )
    return len(down.shape) == 2 and inputs != outputs and weight.shape == (*inputs, *outputs)

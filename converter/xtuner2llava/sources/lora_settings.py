"""The settings of a LoRA that are not in the shapes of its factors: alpha, and how it is scaled."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from xtuner2llava.errors import ConversionError, Fault, UnsupportedError, raise_faults
from xtuner2llava.training_config.values import Section

# Keys of LoraConfig that do not change what the weights are (peft `tuners/lora/config.py`).
_HARMLESS = frozenset(
    "auto_mapping exclude_modules inference_mode layers_pattern "
    "layers_to_transform lora_dropout megatron_core modules_to_save peft_version "
    "qalora_group_size revision runtime_config target_modules task_type type".split()
)
_UNDERSTOOD = frozenset(
    "alpha_pattern base_model_name_or_path bias fan_in_fan_out init_lora_weights lora_alpha "
    "peft_type r rank_pattern use_dora use_rslora".split()
)
# With one of these, not every module of a name has factors.
_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules")
_PLAIN = re.compile(r"[\w.]+")
# A larger one is damage, infinity or NaN.
_LARGEST_ALPHA = 1e9
# Initialisations that also change the base weights, so that the base is not what was trained on.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of an adapter in one record. `where` is the record: a file, or a flag.

    `rank_pattern` are the keys of that, `ranks` all that the record names; empty where it names
    none. `targets` are the ends of the names of all modules with factors, empty for all linear
    ones; None where something else selects them. `base` is the base model's name.
    """

    where: str
    alpha: float | None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: frozenset[str] = frozenset()
    ranks: frozenset[int] = frozenset()
    targets: tuple[str, ...] | None = None
    base: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> LoraSettings:
        """The settings of a LoraConfig's keywords; refuses by name what cannot be merged."""
        inexact = "It cannot be merged exactly."
        refused = [
            (f"LoRA setting {key}={value!r}", inexact)
            for key, value in values.items()
            if key not in _HARMLESS | _UNDERSTOOD and value
        ]
        if (kind := str(values.get("peft_type") or "LORA").rpartition(".")[2]) != "LORA":
            refused.append((f"peft_type is {kind[:40]!r}, expected LORA", ""))
        start = values.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            what = f"init_lora_weights={start!r} changes the base weights too"
            advice = "Merge with PEFT where the changed base is, and give the result as --llm."
            refused.append((what, advice))
        if (bias := values.get("bias") or "none") not in ("none", "all", "lora_only"):
            refused.append((f"bias={bias!r}, expected none, all or lora_only", ""))
        pattern = _mapping(values, "alpha_pattern")
        refused += [
            (f"alpha_pattern {key!r}: {value!r} is not a plain name", "")
            for key, value in pattern.items()
            # PEFT takes keys as regular expressions; those of untrusted files are not run.
            if not _PLAIN.fullmatch(str(key)) or not _is_number(value)
        ]
        alpha, base = values.get("lora_alpha"), values.get("base_model_name_or_path")
        if alpha is not None and not _is_number(alpha):
            refused.append((f"lora_alpha={alpha!r}, expected a number", ""))
        raise_faults(UnsupportedError, [Fault(where, *each) for each in refused])
        return cls(
            where,
            float(alpha) if alpha is not None else None,
            bool(values.get("use_rslora")),
            bool(values.get("use_dora")),
            bool(values.get("fan_in_fan_out")),
            str(bias),
            {str(key): float(value) for key, value in pattern.items()},
            frozenset(map(str, _mapping(values, "rank_pattern"))),
            _ranks(values),
            _targets(values),
            base if isinstance(base, str) and base else None,
        )

    @classmethod
    def from_config(cls, lora: Section, given_alpha: float | None) -> LoraSettings:
        """The settings of an XTuner config's LoraConfig.

        What `given_alpha`, the user's, decides need not be readable there. Defaults are those of
        PEFT (peft `tuners/lora/config.py`, the same in 0.11 and today).
        """
        values: dict[str, Any] = lora.others((*_HARMLESS, "r", "lora_alpha", "alpha_pattern"))
        values |= {key: lora.table.get(key) for key in ("target_modules", *_SELECTING)}
        try:
            pattern = lora.section("alpha_pattern")
            alpha, rank = lora.number("lora_alpha", 8), lora.positive("r", 8)
            values |= {"lora_alpha": alpha, "r": rank}
            values["alpha_pattern"] = pattern.others(()) if pattern else None
        except ConversionError:
            if given_alpha is None:
                raise
        return cls.from_mapping(values, lora.where)

    def scale(self, module: str, rank: int) -> float | None:
        """alpha / rank, or alpha / sqrt(rank) for rslora; None if no alpha is known.

        Raises `ValueError` where the patterns leave open which alpha counts.
        """
        named = {k: v for k, v in self.alpha_pattern.items() if f".{module}".endswith(f".{k}")}
        alphas: set[float | None] = {*named.values()} if named else {self.alpha}
        # The first key counts, and mmengine and PEFT save them sorted. Up to 0.13, PEFT took the
        # first of `rank_pattern` for both (peft `tuners/lora/model.py`, `_create_and_replace`).
        if named and any(
            f".{module}".endswith(f".{key}") or not _PLAIN.fullmatch(key)
            for key in self.rank_pattern - named.keys()
        ):
            alphas.add(self.alpha)
        if len(alphas) > 1:
            known = " or ".join(sorted("unknown" if a is None else f"{a:g}" for a in alphas))
            raise ValueError(f"its alpha is {known} by alpha_pattern and rank_pattern")
        (alpha,) = alphas
        if alpha is None:
            return None
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def settle(
    beside: LoraSettings | None,
    config: LoraSettings | None,
    alpha: float | None,
    ranks: Sequence[int],
    flag: str,
) -> tuple[LoraSettings | None, list[str]]:
    """The settings to use, and notes on records that say otherwise.

    `beside` is adapter_config.json and `config` the XTuner config, `alpha` what the user gave with
    the option `flag`, `ranks` those of the factors' shapes. A record that contradicts the other, or
    the shapes, makes the scale of the merge ambiguous: that raises `UnsupportedError`, unless the
    user's alpha decides.
    """
    if beside is not None and beside.alpha is None and config is not None:
        beside = replace(beside, alpha=config.alpha)
    records = [record for record in (beside, config) if record is not None]
    contradictions = [
        Fault(
            record.where,
            f"says r {_listed(record.ranks)}, the factors have rank {_listed(ranks)}",
            f"It is of another training. {flag} N decides alpha; the rank is that of the factors.",
        )
        for record in records
        if record.ranks and not record.ranks.issuperset(ranks)
    ]
    faults: list[Fault] = []
    for one, two in pairwise(records):
        if _alphas(one) != _alphas(two):
            what = f"says lora_alpha {_alphas(one)}, {two.where} says lora_alpha {_alphas(two)}"
            advice = f"They are of different trainings, or one was edited. {flag} N decides."
            contradictions.append(Fault(one.where, what, advice))
        for name in ("use_rslora", "use_dora"):
            says, otherwise = getattr(one, name), getattr(two, name)
            if says != otherwise:
                what = f"says {name}={says}, {two.where} says {name}={otherwise}"
                faults.append(Fault(one.where, what, "Give the config of this training."))
    raise_faults(UnsupportedError, [*(contradictions if alpha is None else ()), *faults])
    if alpha is None:
        return beside or config, []
    notes = [
        f"{flag} {alpha:g} is used; {record.where} says lora_alpha {_alphas(record)}."
        for record in records
        if record.alpha_pattern or record.alpha not in (None, alpha)
    ]
    notes += [f"{fault.where} {fault.what}; {flag} {alpha:g} decides." for fault in contradictions]
    chosen = beside or config or LoraSettings(flag, alpha)
    return replace(chosen, where=flag, alpha=alpha, alpha_pattern={}), notes


def _ranks(values: Mapping[str, Any]) -> frozenset[int]:
    usual, named = values.get("r"), _mapping(values, "rank_pattern").values()
    # Without the usual rank, the pattern is not all of them.
    return frozenset(
        n for n in (usual, *named) if isinstance(usual, int) and isinstance(n, int) and n > 0
    )


def _targets(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    named = values.get("target_modules")
    if named is None or named == "all-linear":
        named = []
    is_list = isinstance(named, (list, tuple)) and all(isinstance(name, str) for name in named)
    return tuple(named) if is_list and not any(map(values.get, _SELECTING)) else None


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[Any, Any]:
    """The dict under `key`; empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _alphas(record: LoraSettings) -> str:
    usual = "unknown" if record.alpha is None else f"{record.alpha:g}"
    pattern = ", ".join(f"{key}: {value:g}" for key, value in sorted(record.alpha_pattern.items()))
    return f"{usual} ({pattern})" if pattern else usual


def _listed(numbers: Sequence[int] | frozenset[int]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < _LARGEST_ALPHA

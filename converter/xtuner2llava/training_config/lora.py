"""What the config says of a LoRA: the numbers that a `.pth` does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner2llava.training_config.section import Section
from xtuner2llava.training_config.values import Value

_READ = "r lora_alpha bias use_rslora use_dora fan_in_fan_out rank_pattern alpha_pattern".split()
# The tensors say which modules an adapter is for; the rest does not change what it stands for.
_WITHOUT_EFFECT = (
    "type target_modules modules_to_save lora_dropout task_type inference_mode".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class LoraArguments:
    """The arguments of `peft.LoraConfig` for one part of the model.

    Defaults are those of PEFT (peft/tuners/lora/config.py, the same in 0.11 and today). Each
    property raises `CheckpointError` where the config gives the value in a way that cannot be
    read, or of the wrong type, so `options.lora_alpha or training_config.lora_alpha` asks
    only if needed.
    """

    section: Section

    @property
    def r(self) -> int:
        return self.section.positive("r", 8)

    @property
    def lora_alpha(self) -> float:
        return self.section.number("lora_alpha", 8)

    @property
    def use_rslora(self) -> bool:
        return self.section.flag("use_rslora")

    @property
    def use_dora(self) -> bool:
        return self.section.flag("use_dora")

    @property
    def fan_in_fan_out(self) -> bool:
        return self.section.flag("fan_in_fan_out")

    @property
    def bias(self) -> str:
        """`none`, `all` or `lora_only`."""
        return self.section.text("bias") or "none"

    @property
    def rank_pattern(self) -> Mapping[str, int]:
        patterns = self.section.section("rank_pattern")
        return {str(key): patterns.positive(key, 1) for key in patterns.table} if patterns else {}

    @property
    def alpha_pattern(self) -> Mapping[str, float]:
        patterns = self.section.section("alpha_pattern")
        return {str(key): patterns.number(key, 0) for key in patterns.table} if patterns else {}

    @property
    def other(self) -> Mapping[str, Value]:
        """Every further key and its value: a stage that cannot honour one refuses by name."""
        return self.section.others((*_READ, *_WITHOUT_EFFECT))

"""What a user may choose about a conversion, with the defaults of the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike

from xtuner2llava.errors import Fault, UsageError, raise_faults
from xtuner2llava.sources import BaseChoice

DTYPES = ("auto", "keep", "float16", "bfloat16", "float32")
MODEL_TYPES = ("official", "llava")
WEIGHTS = ("master", "module")

PathOrText = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class Options:
    """The choices that decide what the output is; how it is written is not among them.

    Raises `UsageError` for a value that does not exist.
    """

    llm: PathOrText | None = None
    vision: PathOrText | None = None
    xtuner_config: PathOrText | None = None
    mapping: PathOrText | None = None
    format: str = "llava"
    model_type: str = "official"
    dtype: str = "auto"
    include_vision_tower: bool = True
    vision_tower_name: str | None = None
    bos_token: str | None = None
    max_shard_size: str = "5GB"
    lora_alpha: float | None = None
    vision_lora_alpha: float | None = None
    weights: str = "master"

    def __post_init__(self) -> None:
        faults = [
            Fault(f"--{name}", f"is {value!r}, expected one of {', '.join(known)}")
            for name, value, known in (
                ("dtype", self.dtype, DTYPES),
                ("model-type", self.model_type, MODEL_TYPES),
                ("weights", self.weights, WEIGHTS),
            )
            if value not in known
        ]
        raise_faults(UsageError, faults)

    def with_format(self, name: str) -> Options:
        """The same choices for another format."""
        return replace(self, format=name)

    @property
    def base_choice(self) -> BaseChoice:
        return BaseChoice(
            None if self.llm is None else str(self.llm),
            None if self.vision is None else str(self.vision),
            self.lora_alpha,
            self.vision_lora_alpha,
        )

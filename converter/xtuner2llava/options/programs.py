"""Programs that load LLaVA models: which output each reads, and which LLM classes it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Program:
    """`classes` are the plain LLM classes that it has for its format; None: all of the format.

    `seen` are the families that a test ran it with; docs/compatibility.md has versions. `serve` is
    the command that serves the folder after it.
    """

    title: str
    format: Literal["llava", "hf"]
    model_type: Literal["official", "llava"]
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

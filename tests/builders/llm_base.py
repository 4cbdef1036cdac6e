"""Base LLMs before a training, without weights: config, tokenizer and generation settings.

Config keys and special tokens are those of the published models; sizes are tiny.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from builders import internlm2_tokenizer, qwen_tokenizer
from builders.families.models import KINDS, SIZES

_LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_PHI_3 = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
_LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def write_llm_base(folder: Path, kind: str, checkpoints: Path, **change: Any) -> Path:
    """The base called `kind`; `change` are keys of its config."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = dict(SIZES)
    if kind == "internlm2":
        config = {**SIZES, **_of("internlm2"), "vocab_size": 520, "bias": False}
        internlm2_tokenizer.write_base(
            folder, (internlm2_tokenizer.DATA / "plain.model").read_bytes()
        )
    elif kind == "phi3":  # microsoft/Phi-3-mini-4k-instruct
        config |= {**_of("phi3"), "sliding_window": 2047, "max_position_embeddings": 4096}
        special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        _write_fast(folder, checkpoints, "LlamaTokenizer", _PHI_3, special)
    elif kind == "llama3":  # meta-llama/Meta-Llama-3-8B-Instruct
        config |= {**_of("llama"), "rope_theta": 500000.0, "max_position_embeddings": 8192}
        config["bos_token_id"], config["eos_token_id"] = 384, 385
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        _write_fast(folder, checkpoints, "PreTrainedTokenizerFast", _LLAMA_3, special)
        _write(folder / "generation_config.json", {"bos_token_id": 384, "eos_token_id": [385, 386]})
    elif kind == "llama3_1":
        write_llm_base(folder / "of", "llama3", checkpoints)
        for path in (folder / "of").iterdir():
            path.rename(folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        config["rope_scaling"] = _LLAMA_3_1
    elif kind == "qwen":  # Qwen/Qwen-7B-Chat, whose tokenizer has no special tokens of its own
        if importlib.util.find_spec("dashscope") is None:
            pytest.skip("dashscope, which has the real qwen.tiktoken, is not installed")
        config = {**SIZES, **_of("qwen"), "vocab_size": 151936}
        qwen_tokenizer.write_base(folder)
    else:
        raise ValueError(kind)
    _write(folder / "config.json", {**config, **change})
    return folder


def _of(kind: str) -> dict[str, Any]:
    made = KINDS[kind]
    names = {"architectures": [made.architecture], "model_type": made.model_type}
    return {**made.config, **names}


def _write_fast(
    folder: Path, checkpoints: Path, name: str, added: Sequence[str], special: dict[str, str]
) -> None:
    """The tiny Llama's tokenizer.json with further tokens, from id 384 on."""
    base = checkpoints / "bases/llm_llama"
    content = json.loads((base / "tokenizer.json").read_text())
    tokens = [{"id": 384 + i, **internlm2_tokenizer.added(text)} for i, text in enumerate(added)]
    content["added_tokens"] += tokens
    _write(folder / "tokenizer.json", content)
    if name == "LlamaTokenizer":
        (folder / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    decoder = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokens
    }
    values = {"added_tokens_decoder": decoder, "tokenizer_class": name, **special}
    _write(folder / "tokenizer_config.json", values)


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))

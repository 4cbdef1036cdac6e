"""The real `qwen.tiktoken`, as Qwen 1's repositories have it, and a tokenizer that reads it itself.

Both are of the package `dashscope`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from builders.prepared_tokenizer import write_prepared
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.tokenizers.conversion import prepare_tokenizer
from xtuner2llava.tokenizers.qwen import read_ranks
from xtuner2llava.tokenizers.tokenizer import read_tokenizer

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def dashscope_folder() -> Path:
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def oracle() -> Any:
    """The tokenizer of `dashscope`; it has `encode` and `decode`."""
    # Its packages import a web client, which the tokenizer has no need of.
    package = ModuleType("dashscope_tokenizers")
    package.__path__ = [str(dashscope_folder() / "tokenizers")]
    sys.modules[package.__name__] = package
    module = importlib.import_module("dashscope_tokenizers.qwen_tokenizer")
    return module.QwenTokenizer(str(dashscope_folder() / "resources/qwen.tiktoken"))


def write_base(folder: Path) -> Path:
    """Qwen 1's tokenizer as its model repositories hold it, but for the code."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(dashscope_folder() / "resources/qwen.tiktoken", folder)
    config = {
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_converted(base: Path, folder: Path) -> Path:
    """The files that the shipped family makes of it."""
    family = Catalogue.shipped().families["qwen"]
    prepared = prepare_tokenizer(
        read_tokenizer(base),
        family.tokenizer.convert,
        family.tokenizer.special_tokens,
        eos=family.generation.eos[0],
        pad=family.generation.pad,
    )
    assert prepared.notes == ("qwen.tiktoken was written as the files of a Qwen2Tokenizer.",)
    assert prepared.tokenizer.copied == ()
    return write_prepared(prepared, folder)


def texts(count: int) -> Iterator[str]:
    """Texts of every kind that tokenizers differ in, always the same ones."""
    rng = random.Random(20240501)  # noqa: S311 - texts, not secrets
    words = (
        "the model 模型 図書館 한국어 naïve Straße ﬁn don't I'LL x_1 ==> 😀👩\u200d👧 ١٢٣".split()
    )
    ranks = list(read_ranks(dashscope_folder() / "resources/qwen.tiktoken"))
    makers: list[Callable[[], str]] = [
        lambda: " ".join(rng.choices(words, k=rng.randint(1, 9))),
        lambda: "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 30))),
        lambda: "".join(rng.choices(" \t\n\r\u00a0\u3000", k=rng.randint(1, 40))),
        lambda: "".join(rng.choices("0123456789.,-+", k=rng.randint(1, 30))),
        lambda: "".join(rng.choices("=-*#_/.ab(){};\n ", k=rng.randint(1, 60))),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 30))),
        lambda: "".join("e" + chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randint(1, 9))),
        lambda: "".join(chr(rng.randint(0x1F300, 0x1F6FF)) for _ in range(rng.randint(1, 9))),
        lambda: "".join(chr(rng.randint(0xAC00, 0xD7A3)) for _ in range(rng.randint(1, 9))),
        lambda: rng.choice(["=", "-", " ", "\n", "\t", "a", "哈", "!", "0"]) * rng.randint(1, 300),
        lambda: f"\tdef f{rng.randint(0, 99)}(x):\n{' ' * rng.randint(1, 20)}return x  # ok\r\n",
        lambda: b"".join(rng.choices(ranks, k=rng.randint(1, 8))).decode("utf-8", "ignore"),
        lambda: f"{START}user\n{rng.choice(words)}{STOP}\n<|extra_{rng.randint(0, 204)}|>{END}",
    ]
    for number in range(count):
        yield makers[number % len(makers)]()

"""Has the loader of SGLang's LLaVA take folders. Nothing is computed: its kernels need a GPU.

Of `sglang`, whose unpacked package is on the path, only `srt/models/llava.py` is real. All else has
stand-ins; LLMs are those of transformers, whose tensors its own go by. Standard input: a JSON list
of folders. Standard output: for each, {"taken": number of tensors} or {"error": text}.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
import transformers
from safetensors.torch import load_file

REAL = "sglang.srt.models.llava"


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of sglang in which everything is there and nothing does anything."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "sglang" or name == REAL:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock()
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


def read_sglang():
    source = importlib.metadata.distribution("sglang").locate_file("sglang/srt/models/llava.py")
    spec = importlib.util.spec_from_file_location(REAL, source)
    sys.meta_path.insert(0, StandIns())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.default_weight_loader = put
    return module


def put(parameter, tensor):
    if parameter.shape != tensor.shape:
        raise ValueError(f"{tuple(tensor.shape)} for {tuple(parameter.shape)}")


class Llm(torch.nn.Module):
    """The class of transformers that `name` is in SGLang too, without memory."""

    def __init__(self, name, values):
        super().__init__()
        kind = getattr(transformers, name)
        with torch.device("meta"):
            self.model = kind(kind.config_class(**values))

    def load_weights(self, weights):
        for name, tensor in weights:
            put(dict(self.model.named_parameters())[name], tensor)


def take(module, folder):
    values = json.loads((folder / "config.json").read_text())
    (architecture,) = values["architectures"]
    tensors = load_file(folder / "model.safetensors")
    if architecture == "LlavaForConditionalGeneration":
        model = getattr(module, architecture).__new__(getattr(module, architecture))
        torch.nn.Module.__init__(model)
        model.vision_feature_select_strategy = values["vision_feature_select_strategy"]
    else:
        name = architecture.removeprefix("Llava").replace("Qwen", "Qwen2")

        def llm(config, **_):
            return Llm(name, values)

        setattr(module, name, llm)
        importlib.import_module("sglang.srt.models.mistral").MistralForCausalLM = llm
        # As SGLang reads it: without the classes of LLaVA, whose model_type it does not know.
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(module, architecture)(config)
    model.load_weights(tensors.items())
    return {"taken": len(tensors)}


def main():
    with contextlib.redirect_stdout(sys.stderr):
        module = read_sglang()
        results = []
        for folder in json.load(sys.stdin):
            try:
                results.append(take(module, Path(folder)))
            except Exception as error:
                results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

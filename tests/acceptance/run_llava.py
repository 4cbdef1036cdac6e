"""Loads folders the way the official LLaVA does, and says how far its logits are from a reference.

Runs in an environment that `tests/acceptance/environment` makes, in a folder from which the paths
of `mm_vision_tower` lead to the towers: in `llava`, or in `llava-next`, with a checkout of
LLaVA-NeXT on the path, the jobs that say so. Standard input: a JSON list of jobs, each

    {"folder": path, "reference": path of a reference.npz, "how": one of the names in HOW}

Standard output: a JSON list of results in the same order, each either {"error": text} or

    {"class": name, "differences": {name of logits: largest difference}, "generated": [token, …]}

A job with a "picture" and a "prompt" in place of the reference is asked, through LLaVA's own image
and prompt functions. Its result is

    {"ids": [token, …], "pixels": [sum, sum of absolute values], "tokens": [token, …]}
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import numpy
import torch
import transformers
from llava import model as classes
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image
from safetensors.torch import load_file

NEW_TOKENS = 12
TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."


class OfficialFloat16:
    """What LLaVA's own `load_pretrained_model` gives: its class by folder name, all in float16."""

    arguments: ClassVar = {"device": "cpu", "device_map": "cpu"}

    def __init__(self, folder):
        name = get_model_name_from_path(folder)
        self.tokenizer, self.model, _, _ = load_pretrained_model(
            folder, None, name, **self.arguments
        )

    def logits(self, ids, pixels):
        return self.model(input_ids=ids, images=pixels.to(self.model.dtype)).logits

    def generate(self, ids, pixels):
        # Before transformers 4.38, ids generated from embeddings start with the bos token.
        return self.model.generate(
            ids,
            images=pixels.to(self.model.dtype),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )


class OfficialFloat32(OfficialFloat16):
    """LLaVA's class of the config as its loader builds it, but for the float32."""

    fast = False
    attention = None

    def __init__(self, folder):
        (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, use_fast=self.fast and architecture != "LlavaLlamaForCausalLM"
        )
        self.model = getattr(classes, architecture).from_pretrained(
            folder,
            low_cpu_mem_usage=True,
            torch_dtype=torch.float32,
            device_map={"": "cpu"},
            attn_implementation=self.attention,
        )
        self.model.get_vision_tower().float()


class OfficialEager(OfficialFloat32):
    """The same with the attention that is written out, which knows of windows."""

    attention = "eager"


class NextFloat16(OfficialFloat16):
    """The same of LLaVA-NeXT, whose Mistral answers in `generate` alone.

    Its `forward` takes image_sizes for modalities (`language_model/llava_mistral.py`).
    """

    arguments: ClassVar = {"attn_implementation": "eager"}

    def logits(self, ids, pixels):
        """Those of the last token."""
        made = self.model.generate(
            ids,
            images=pixels.to(self.model.dtype),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return made.scores[0][None]


class NextFloat32(NextFloat16, OfficialFloat32):
    __init__ = OfficialFloat32.__init__
    fast = True
    attention = "eager"


class Qwen:
    """What LLaVA-NeXT's LlavaQwenForCausalLM computes, composed here.

    That is: Qwen2 without rope scaling; the tower's config from `mm_vision_tower` and its tensors
    from the folder; image features in place of the image token; `generate` from embeddings
    (LLaVA-VL/LLaVA-NeXT `llava/model/language_model/llava_qwen.py`, `llava/model/llava_arch.py`).
    """

    dtype = torch.float32

    def __init__(self, folder):
        folder = Path(folder)
        config = transformers.Qwen2Config.from_dict(
            json.loads((folder / "config.json").read_text())
        )
        config.rope_scaling = None
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)
        tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors.update(load_file(file))
        parts = {TOWER: {}, PROJECTOR: {}, "": {}}
        for name, tensor in tensors.items():
            prefix = next(prefix for prefix in parts if name.startswith(prefix))
            parts[prefix][name[len(prefix) :]] = tensor

        with contextlib.redirect_stdout(sys.stderr):
            tower = transformers.CLIPVisionModel.from_pretrained(config.mm_vision_tower)
        tower.load_state_dict(parts[TOWER])
        self.tower = tower.to(self.dtype).eval()
        self.select_layer = config.mm_vision_select_layer
        linear = torch.nn.Linear
        self.projector = torch.nn.Sequential(
            linear(config.mm_hidden_size, config.hidden_size),
            torch.nn.GELU(),
            linear(config.hidden_size, config.hidden_size),
        )
        self.projector.load_state_dict(parts[PROJECTOR])
        self.projector.to(self.dtype)
        self.model = transformers.Qwen2ForCausalLM(config)
        if config.tie_word_embeddings:
            parts[""]["lm_head.weight"] = parts[""]["model.embed_tokens.weight"]
        self.model.load_state_dict(parts[""])
        self.model.to(self.dtype).eval()
        with contextlib.suppress(OSError):
            self.model.generation_config = transformers.GenerationConfig.from_pretrained(folder)

    def embeds(self, ids, pixels):
        seen = self.tower(pixels.to(self.dtype), output_hidden_states=True)
        image = self.projector(seen.hidden_states[self.select_layer][:, 1:])
        place = ids[0].tolist().index(IMAGE_TOKEN_INDEX)
        embed = self.model.get_input_embeddings()
        return torch.cat([embed(ids[:, :place]), image, embed(ids[:, place + 1 :])], dim=1)

    def logits(self, ids, pixels):
        return self.model(inputs_embeds=self.embeds(ids, pixels)).logits

    def generate(self, ids, pixels):
        return self.model.generate(
            inputs_embeds=self.embeds(ids, pixels), max_new_tokens=NEW_TOKENS, do_sample=False
        )


class QwenFloat16(Qwen):
    dtype = torch.float16


HOW = {
    "next float16": NextFloat16,
    "next float32": NextFloat32,
    "official float16": OfficialFloat16,
    "official float32": OfficialFloat32,
    "official eager": OfficialEager,
    "qwen float16": QwenFloat16,
    "qwen float32": Qwen,
}


def ask(job):
    """The first tokens of an answer, as LLaVA's `eval/run_llava.py` asks."""
    folder = job["folder"]
    config = transformers.PretrainedConfig.from_dict(
        json.loads((Path(folder) / "config.json").read_text())
    )
    processor = transformers.CLIPImageProcessor.from_pretrained(config.mm_vision_tower)
    pixels = process_images([Image.open(job["picture"]).convert("RGB")], processor, config)
    loaded = HOW[job["how"]](folder)
    ids = tokenizer_image_token(
        job["prompt"], loaded.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
    ).unsqueeze(0)
    loaded.model.generation_config.eos_token_id = None
    with torch.inference_mode():
        generated = loaded.generate(ids, pixels)[0].tolist()
    return {
        "ids": ids[0].tolist(),
        "pixels": [pixels.sum().item(), pixels.abs().sum().item()],
        "tokens": generated[1:],  # the first is the bos token
    }


def run(job):
    reference = numpy.load(job["reference"])
    ids = torch.from_numpy(reference["input_ids"])
    pixels = torch.from_numpy(reference["pixel_values"])
    loaded = HOW[job["how"]](job["folder"])
    with torch.inference_mode():
        logits = loaded.logits(ids, pixels)[0].float()
        generated = loaded.generate(ids, pixels)[0].tolist()
    return {
        "class": type(loaded.model).__name__,
        "differences": {
            name: largest(logits, torch.from_numpy(reference[name]))
            for name in reference.files
            if name.startswith("logits")
        },
        "generated": generated,
    }


def largest(logits, expected):
    """Their largest difference, in the places and tokens that `logits` are of."""
    return (logits - expected[-len(logits) :, : logits.shape[1]]).abs().max().item()


def main():
    warnings.simplefilter("ignore")  # the tower is built under meta before it is loaded
    results = []
    for job in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                results.append(ask(job) if "prompt" in job else run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

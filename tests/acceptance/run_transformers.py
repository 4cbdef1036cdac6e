"""What the transformers that LLaVA pins makes of folders, and LLaVA's own functions of tokenizers.

Runs in the environment that `tests/acceptance/environment` makes. Standard input: a JSON list of
jobs, standard output: a JSON list of results in the same order, or {"error": text} for one.

    {"do": "model", "folder": path, "reference": path of a reference.npz}
        → {"info": {kind: names}, "differences": {name: largest}, "generated": [token, …]}
    {"do": "tokenize", "folder": path, "fast": bool, "texts": [text, …]}
        → {"class": name, "length": n, "bos": text or null, "ids": [[id, …], …]}
    {"do": "image_token", "folder": path, "fast": bool, "prompts": [text, …]}
        → [{"ids": [id, …], "chunks": [[id, …], …]}, …]: LLaVA's ids, and those of each chunk alone
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings

import numpy
import torch
from llava.mm_utils import tokenizer_image_token
from transformers import AutoTokenizer, LlavaForConditionalGeneration


def model(job):
    made, info = LlavaForConditionalGeneration.from_pretrained(
        job["folder"], torch_dtype=torch.float32, output_loading_info=True
    )
    reference = numpy.load(job["reference"])
    ids = torch.from_numpy(reference["input_ids"]).clone()
    ids[ids == -200] = made.config.image_token_index  # one for the whole image, in this version
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.from_numpy(reference["pixel_values"]),
        "attention_mask": torch.ones_like(ids),
    }
    with torch.inference_mode():
        logits = made.eval()(**inputs).logits[0]
        generated = made.generate(**inputs, max_new_tokens=3, do_sample=False)
    return {
        "info": {kind: list(names) for kind, names in info.items() if names},
        "differences": {
            name: (logits[:, : reference[name].shape[-1]] - torch.from_numpy(reference[name]))
            .abs()
            .max()
            .item()
            for name in reference.files
            if name.startswith("logits")
        },
        "generated": generated[0].tolist(),
    }


def tokenizer_of(job):
    return AutoTokenizer.from_pretrained(job["folder"], use_fast=job["fast"])


def tokenize(job):
    tokenizer = tokenizer_of(job)
    return {
        "class": type(tokenizer).__name__,
        "length": len(tokenizer),
        "bos": tokenizer.bos_token,
        "ids": [tokenizer(text)["input_ids"] for text in job["texts"]],
    }


def image_token(job):
    tokenizer = tokenizer_of(job)
    return [
        {
            "ids": tokenizer_image_token(prompt, tokenizer),
            "chunks": [tokenizer(chunk)["input_ids"] for chunk in prompt.split("<image>")],
        }
        for prompt in job["prompts"]
    ]


DO = {"model": model, "tokenize": tokenize, "image_token": image_token}


def main():
    warnings.simplefilter("ignore")
    results = []
    for job in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                results.append(DO[job["do"]](job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

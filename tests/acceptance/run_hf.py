"""Loads and saves folders of the format hf, and says what came of it.

Runs in any environment with transformers 4.45 or later. Standard input: a JSON list of jobs, each

    {"folder": path, "texts": [text, …], "picture": path of an image}

Standard output: a JSON list of results in the same order, each {"error": text} or two of

    {"ids": [[id, …], …], "prompt": [id, …], "pixels": sum, "logits": sum, "tokens": [token, …]}

the first by the folder, the second by what model and processor saved of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings

import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

TALK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is  it?"}]}]


def look(folder, job):
    model = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(TALK, add_generation_prompt=True)
    image = Image.open(job["picture"]).convert("RGB")
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in job["texts"]]
    if ids != [processor.tokenizer(text)["input_ids"] for text in job["texts"]]:
        raise ValueError("AutoTokenizer and AutoProcessor make different ids")
    for text in ("<image>", tokenizer.pad_token):
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(f"{text} is not one token")
    with torch.inference_mode():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found = {
        "ids": ids,
        "prompt": inputs["input_ids"][0].tolist(),
        "pixels": inputs["pixel_values"].double().abs().sum().item(),
        "logits": logits.double().abs().sum().item(),
        "tokens": tokens[0].tolist(),
    }
    return found, model, processor


def run(job):
    first, model, processor = look(job["folder"], job)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        return [first, look(saved, job)[0]]


def main():
    warnings.simplefilter("ignore")
    results = []
    for job in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                results.append(run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

"""Loads, asks and saves folders of the format hf, and says what came of it.

Runs in any environment with transformers 4.45 or later. Standard input: a JSON list of jobs, each

    {"folder": path, "questions": [{"picture": path, "question": text}, …], "tokens": n,
     "texts": [text, …], "reference": path of a reference.npz}

of which the last two may be missing. Standard output: the version, and a result for each job in the
same order, either {"error": text} or

    {"answers": [answer, …], "ids": [[id, …], …], "batch": difference, "pipeline": text,
     "one step": [id, …], "saved": [answer, …], "saved ids": [[id, …], …], "reference": difference}

An answer is

    {"ids": [id, …], "pixels": [sum, sum of absolute values], "tokens": [id, …], "text": text}

with -200 for the image. `batch` is the largest difference of logits between the questions in one
batch and each alone, `reference` that from the reference's, both as parts of the largest logit.
`pipeline` is what the chat pipeline answers to the first question, and `one step` its ids where
`apply_chat_template` tokenizes by itself, null where a version has neither; `saved` are answers of
what model and processor saved.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings

import numpy
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

IMAGE = -200
PIPELINE = "image-text-to-text"


class Loaded:
    """A folder with its processor, and `texts` as its tokenizer encodes them."""

    def __init__(self, folder, job):
        self.job = job
        self.model = LlavaForConditionalGeneration.from_pretrained(folder).float().eval()
        self.model.generation_config.eos_token_id = None
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokenizer = self.processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids("<image>")
        self.pictures = [Image.open(q["picture"]).convert("RGB") for q in job["questions"]]
        alone = AutoTokenizer.from_pretrained(folder)
        self.ids = [alone(text)["input_ids"] for text in job.get("texts", ())]
        if self.ids != [self.tokenizer(text)["input_ids"] for text in job.get("texts", ())]:
            raise ValueError("AutoTokenizer and AutoProcessor make different ids")
        for text in ("<image>", alone.pad_token):
            if len(alone(text, add_special_tokens=False)["input_ids"]) != 1:
                raise ValueError(f"{text} is not one token")

    def messages(self, index, **image):
        text = {"type": "text", "text": self.job["questions"][index]["question"]}
        return [{"role": "user", "content": [{"type": "image", **image}, text]}]

    def inputs(self, *chosen):
        chat = self.processor.apply_chat_template
        return self.processor(
            images=[self.pictures[index] for index in chosen],
            text=[chat(self.messages(index), add_generation_prompt=True) for index in chosen],
            padding=True,
            return_tensors="pt",
        )

    def generate(self, inputs):
        made = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.job["tokens"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return new, torch.stack(made.logits, dim=1)

    def answers(self):
        """The answers to all questions, each alone, and the largest difference in a batch."""
        answers, alone = [], []
        for index in range(len(self.pictures)):
            inputs = self.inputs(index)
            (tokens,), logits = self.generate(inputs)
            alone.append(logits)
            pixels = inputs["pixel_values"].double()
            answers.append(
                {
                    "ids": self.once(inputs["input_ids"][0].tolist()),
                    "pixels": [pixels.sum().item(), pixels.abs().sum().item()],
                    "tokens": tokens,
                    "text": self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                }
            )
        _, together = self.generate(self.inputs(*range(len(self.pictures))))
        return answers, difference(together, torch.cat(alone))

    def once(self, ids):
        """`ids` with IMAGE for all patches of the image."""
        place, count = ids.index(self.image_id), ids.count(self.image_id)
        return [*ids[:place], IMAGE, *ids[place + count :]]

    def pipeline(self):
        try:
            pipe = transformers.pipeline(PIPELINE, model=self.model, processor=self.processor)
        except KeyError:  # before 4.47
            return None
        (answered,) = pipe(
            text=self.messages(0, image=self.pictures[0]),
            max_new_tokens=self.job["tokens"],
            return_full_text=False,
            generate_kwargs={"do_sample": False},
        )
        return answered["generated_text"].strip()

    def one_step(self):
        messages = self.messages(0, image=self.pictures[0])
        made = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = made["input_ids"][0].tolist()
        return self.once(ids)

    def reference(self):
        if "reference" not in self.job:
            return None
        reference = numpy.load(self.job["reference"])
        given, expected = reference["input_ids"][0].tolist(), reference["logits_f32"]
        patches = len(expected) - len(given) + 1
        place = given.index(IMAGE)
        ids = [*given[:place], *[self.image_id] * patches, *given[place + 1 :]]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        pixels = torch.from_numpy(reference["pixel_values"])
        logits = self.model(**inputs, pixel_values=pixels).logits[0]
        return difference(logits[:, : expected.shape[-1]], torch.from_numpy(expected))


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def run(job):
    loaded = Loaded(job["folder"], job)
    answers, batch = loaded.answers()
    result = {"answers": answers, "ids": loaded.ids, "batch": batch}
    result |= {"pipeline": loaded.pipeline(), "reference": loaded.reference()}
    result["one step"] = None if result["pipeline"] is None else loaded.one_step()
    with tempfile.TemporaryDirectory() as folder:
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
        saved = Loaded(folder, job)
        return {**result, "saved": saved.answers()[0], "saved ids": saved.ids}


def main():
    warnings.simplefilter("ignore")
    results = []
    for job in json.load(sys.stdin):
        try:
            with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
                results.append(run(job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump({"version": transformers.__version__, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()

"""Asks vLLM on CPU, greedily.

Runs in the environment that `tests/consumers/environment vllm` makes. Standard input: a JSON job

    {"tokens": n, "models": [{"folder": path, "questions": [{"picture": path, "prompt": text}, …]},
                             …]}

With "chat" in place of "prompt", a question is asked through vLLM's chat and the model's template.
Standard output: the version, and for each model either {"error": text} or an answer for each of
its questions, with the log-probabilities of the five likeliest tokens at each step:

    {"version": text, "models": [[{"ids": [id, …], "tokens": [id, …], "top": [{id: value}, …]}, …],
                                 …]}
"""

from __future__ import annotations

import base64
import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # a minute of a C++ compiler for each model
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def ask(engine, question, sampling):
    from PIL import Image

    if "prompt" in question:
        image = Image.open(question["picture"]).convert("RGB")
        given = {"prompt": question["prompt"], "multi_modal_data": {"image": image}}
        (answer,) = engine.generate(given, sampling, use_tqdm=False)
        return answer
    data = base64.b64encode(Path(question["picture"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": question["chat"]},
    ]
    messages = [{"role": "user", "content": content}]
    (answer,) = engine.chat(messages, sampling, use_tqdm=False)
    return answer


def answers(model, tokens):
    from vllm import LLM, SamplingParams

    engine = LLM(
        model["folder"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=2,
        max_num_batched_tokens=512,
    )
    # Rows of a padded vocabulary have no text, which its detokenizer does not expect.
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True, detokenize=False
    )
    for question in model["questions"]:
        answer = ask(engine, question, sampling)
        (output,) = answer.outputs
        yield {
            "ids": list(answer.prompt_token_ids),
            "tokens": list(output.token_ids),
            "top": [
                {token: value.logprob for token, value in step.items()} for step in output.logprobs
            ],
        }


def run(job):
    from vllm.distributed import cleanup_dist_env_and_memory

    models = []
    for model in job["models"]:
        try:
            models.append(list(answers(model, job["tokens"])))
        except Exception as error:
            models.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
        cleanup_dist_env_and_memory()
    return {"version": version("vllm-cpu"), "models": models}


def main():
    out = os.fdopen(os.dup(1), "w")  # vLLM writes to the standard output
    os.dup2(2, 1)
    with out:
        json.dump(run(json.load(sys.stdin)), out)


if __name__ == "__main__":
    main()

"""Makes GGUF files of a folder of the format hf as docs/gguf.md says, and asks llama.cpp.

Runs in the environment that `tests/consumers/environment llama.cpp` makes, which holds scripts of
llama.cpp beside its `bin`. Standard input: a JSON job

    {"folder": path, "work": path of an empty folder, "tokens": n, "questions": [question, …]}

A question is {"chat": text}, and may have a "picture": path. Standard output, with the five largest
log-probabilities of each step, and `prompt`, its length in tokens:

    {"version": text, "metadata": {key: value}, "mmproj": {key: value},
     "answers": [{"prompt": n, "tokens": [id, …], "top": [{id: value}, …]}, …]}
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SOURCES = Path(sys.prefix) / "llama.cpp"
LEGACY = SOURCES / "tools/mtmd/legacy-models"
os.environ |= {
    "LLAMA_MEDIA_MARKER": "<image>",  # what the chat template puts first
    "NO_LOCAL_GGUF": "1",
    "PYTHONPATH": str(SOURCES / "gguf-py"),
}
# llama.cpp knows tokenizers of byte pairs by what they make of a text, and not those of tests.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(*command):
    subprocess.run([sys.executable, *command], stdout=sys.stderr, check=True)


def convert(folder, work):
    """text.gguf and mmproj.gguf in `work`."""
    copy, vit = work / "copy", work / "vit"
    shutil.copytree(folder, copy)
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": False}))
    script, to = SOURCES / "convert_hf_to_gguf.py", work / "text.gguf"
    run_script("-c", CONVERT, SOURCES, script, copy, "--outfile", to, "--outtype", "f32")
    run_script(LEGACY / "llava_surgery_v2.py", "-C", "-m", copy)
    vit.mkdir()
    (copy / "llava.clip").rename(vit / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    layer = config["vision_feature_layer"]
    (vit / "config.json").write_text(
        json.dumps({**config["vision_config"], "vision_feature_layer": layer})
    )
    projector = ("--llava-projector", copy / "llava.projector", "--output-dir", vit)
    encoder = LEGACY / "convert_image_encoder_to_gguf.py"
    run_script(encoder, "-m", vit, *projector, "--clip-model-is-vision", "--use-f32")
    (vit / "mmproj-model-f32.gguf").rename(work / "mmproj.gguf")


def metadata(file):
    sys.path.insert(0, str(SOURCES / "gguf-py"))
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    short = (name for name in fields if not name.startswith("GGUF.") and "token" not in name)
    named = ("add_bos_token", "bos_token_id", "eos_token_id", "add_space_prefix")
    keys = [*short, *(f"tokenizer.ggml.{name}" for name in named)]
    return {key: fields[key].contents() for key in keys if key in fields}


def serve(work):
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = str(work / "text.gguf")
    params.mmproj.path = str(work / "mmproj.gguf")
    params.n_ctx = 256
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 1
    return Server(params)


def ask(server, question, tokens):
    common = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
    content = [{"type": "text", "text": question["chat"]}]
    if "picture" in question:
        data = base64.b64encode(Path(question["picture"]).read_bytes()).decode()
        url = {"url": f"data:image/png;base64,{data}"}
        content.insert(0, {"type": "image_url", "image_url": url})
    messages = [{"role": "user", "content": content}]
    reply = server.handle_chat_completions(
        {"messages": messages, "logprobs": True, "top_logprobs": 5, **common}
    )
    steps = reply["choices"][0]["logprobs"]["content"]
    return {
        "prompt": reply["usage"]["prompt_tokens"],
        "tokens": [step["id"] for step in steps],
        "top": [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps],
    }


def run(job):
    work = Path(job["work"])
    convert(Path(job["folder"]), work)
    server = serve(work)
    return {
        "version": version("xllamacpp"),
        "metadata": metadata(work / "text.gguf"),
        "mmproj": metadata(work / "mmproj.gguf"),
        "answers": [ask(server, question, job["tokens"]) for question in job["questions"]],
    }


def main():
    out = os.fdopen(os.dup(1), "w")  # llama.cpp writes to the standard output
    os.dup2(2, 1)
    with out:
        json.dump(run(json.load(sys.stdin)), out)


if __name__ == "__main__":
    main()

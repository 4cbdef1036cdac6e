"""Checkpoints and base models from a Hub on loopback: what is fetched, and what is only read."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hub_server import Client, HubServer, content

CARD = (
    b"---\nlicense: other\nlicense_name: tiny-license\nlicense_link: LICENSE\n"
    b"language: [en, zh]\n---\n# Tiny\n"
)
# Beside what is needed, what such repositories hold too.
OTHERS = {
    "pytorch_model.bin": b"not needed",
    "original/params.json": b"{}",
    "original/tokenizer.model": b"not needed",
    "onnx/model.onnx": b"not needed",
    "modeling_tiny.py": b"raise SystemExit",
}


@pytest.fixture
def home() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    return Path(os.environ["HF_HOME"])


@pytest.fixture
def client(hub: HubServer, home: Path) -> Client:
    return Client(hub, home)


NUMBERS = itertools.count()


@dataclass(frozen=True)
class Names:
    """Repositories of one test, which nothing is cached of."""

    llm: str
    vision: str
    trained: str

    @property
    def bases(self) -> dict[str, str]:
        return {"llm": self.llm, "vision": self.vision}


@pytest.fixture
def names(hub: HubServer, checkpoints: Path) -> Names:
    """The bases and a private checkpoint, as safetensors and, on branch `bin`, as .bin."""
    number = next(NUMBERS)
    names = Names(f"qwen/tiny-{number}", f"openai/clip-tiny-{number}", f"ann/trained-{number}")
    bases = checkpoints / "bases"
    hub.add(names.llm, {**content(bases / "llm_qwen2"), **OTHERS, "README.md": CARD})
    hub.add(names.vision, {**content(bases / "vision_clip"), **OTHERS})
    folder = checkpoints / "qwen2_d_lora_vislora"
    trained = hub.add(names.trained, content(folder / "iter_2_xtuner"), private=True)
    trained.put("bin", {}, "another layout")
    trained.upload(content(folder / "iter_2_xtuner_bin"), "bin")
    return names


def fetched(hub: HubServer, repo_id: str) -> set[str]:
    """The files whose content was asked for."""
    paths = [request.path for request in hub.log("GET", f"^/{repo_id}/resolve/")]
    return {re.sub(r".*/resolve/[0-9a-f]{40}/", "", path) for path in paths}


def convert(client: Client, names: Names, out: Path, **more: Any) -> dict[str, Any]:
    checkpoint = more.pop("checkpoint", names.trained)
    return client.call("convert", checkpoint, out, **{**names.bases, **more})


def fault(client: Client, names: Names, out: Path, **more: Any) -> str:
    checkpoint = more.pop("checkpoint", names.trained)
    answer = client.ask("convert", checkpoint, out, **{**names.bases, **more})
    assert answer.error is not None, "it was converted"
    assert not out.exists()
    return f"{answer.error}: {answer.text}"


def test_only_what_is_needed_is_fetched(
    names: Names, hub: HubServer, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    convert(client, names, tmp_path / "llava-qwen")
    llm = content(checkpoints / "bases/llm_qwen2").keys()
    assert fetched(hub, names.llm) == {*llm, "README.md"}
    assert fetched(hub, names.vision) == content(checkpoints / "bases/vision_clip").keys()
    assert fetched(hub, names.trained) == {
        "llm_adapter/adapter_config.json",
        "llm_adapter/adapter_model.safetensors",
        "projector/config.json",
        "projector/model.safetensors",
        "visual_encoder_adapter/adapter_config.json",
        "visual_encoder_adapter/adapter_model.safetensors",
        "xtuner_config.py",
    }


def test_it_is_what_local_folders_give(
    names: Names, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    convert(client, names, tmp_path / "llava-qwen-1", vision_tower_name="clip")
    local = checkpoints / "qwen2_d_lora_vislora/iter_2_xtuner"
    bases = {"llm": checkpoints / "bases/llm_qwen2", "vision": checkpoints / "bases/vision_clip"}
    out = tmp_path / "llava-qwen-2"
    client.call("convert", local, out, vision_tower_name="clip", **bases)
    one, two = content(tmp_path / "llava-qwen-1"), content(out)
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {"README.md", "conversion.json"}


def test_a_revision_and_bin_weights(
    names: Names, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    convert(client, names, tmp_path / "llava-qwen", checkpoint=f"{names.trained}@bin")
    assert {
        name for name in fetched(hub, names.trained) if not name.endswith((".json", ".py"))
    } == {
        "llm_adapter/adapter_model.bin",
        "projector/pytorch_model.bin",
        "visual_encoder_adapter/adapter_model.bin",
    }


def test_a_part_in_bin_beside_parts_in_safetensors(
    names: Names, hub: HubServer, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    folder = checkpoints / "qwen2_d_lora_vislora"
    files = content(folder / "iter_2_xtuner")
    del files["projector/model.safetensors"]
    files["projector/pytorch_model.bin"] = (
        folder / "iter_2_xtuner_bin/projector/pytorch_model.bin"
    ).read_bytes()
    hub.add("ann/mixed", files)
    convert(client, names, tmp_path / "llava-qwen", checkpoint="ann/mixed")
    weights = {name for name in fetched(hub, "ann/mixed") if name.endswith((".bin", "tensors"))}
    assert len(weights) == 3
    assert "projector/pytorch_model.bin" in weights


def test_the_card_inherits_license_and_languages(
    names: Names, client: Client, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard

    convert(client, names, tmp_path / "llava-qwen")
    data = ModelCard.load(tmp_path / "llava-qwen" / "README.md").data
    assert data.license == "other"
    assert data.license_name == "tiny-license"
    assert data.license_link == f"https://huggingface.co/{names.llm}/blob/main/LICENSE"
    assert data.language == ["en", "zh"]
    assert data.base_model == [names.llm, names.vision]
    assert data.to_dict()["base_model_relation"] == "finetune"


def test_private_gated_missing_and_wrong_revisions(
    names: Names, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "llava-qwen"
    hub.add("meta/gated", hub.repos[names.llm].content(), gated=True)
    private = fault(client, names, out, token=None)
    what = "is not a folder here, and is not a repository on the Hub that this token can see"
    assert f"{names.trained}: {what}" in private
    assert "log in" in private
    text = fault(client, names, out, llm="meta/gated", vision="openai/nothing")
    assert "2 faults" in text
    assert "; meta/gated is gated" in text
    assert "Ask for access" in text
    assert "; openai/nothing is not a repository" in text
    assert "has no such revision" in fault(client, names, out, checkpoint=f"{names.trained}@v9")
    assert "401" in fault(client, names, out, **{"token": "hf_wrong"})
    assert hub.token not in private + text


def test_a_reader_of_a_gated_repository(
    names: Names, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    hub.add("meta/open", hub.repos[names.llm].content(), gated=True, readers={"ann"})
    convert(client, names, tmp_path / "llava-qwen", llm="meta/open")


# Settings that huggingface_hub reads when it is imported need a process of their own.
OFFLINE = """
import sys
from xtuner2llava import ConversionError, convert
trained, llm, vision = sys.argv[1:]
convert(trained, "llava-qwen-2", llm=llm, vision=vision)
try:
    convert(trained, "llava-qwen-3", llm="qwen/other", vision=vision)
except ConversionError as error:
    print(error)
"""


def test_offline_the_cache_serves(
    names: Names, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    convert(client, names, tmp_path / "llava-qwen-1")
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, names.trained, names.llm, names.vision],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": hub.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert content(tmp_path / "llava-qwen-1") == content(tmp_path / "llava-qwen-2")
    assert hub.requests == []
    assert "; qwen/other is not in the local cache, and the Hub cannot be reached" in done.stdout


def test_a_hub_that_is_down_is_said(tmp_path: Path) -> None:
    with HubServer() as server:
        environment = server.environment(tmp_path / "home", server.token)
    done = subprocess.run(
        [sys.executable, "-m", "xtuner2llava", "inspect", "ann/trained"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "and the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


# Weights that are read, and not stored


def test_a_streamed_base_gives_the_same_bytes_and_is_not_stored(
    names: Names, hub: HubServer, client: Client, home: Path, tmp_path: Path
) -> None:
    convert(
        client, names, tmp_path / "llava-qwen-1", stream_base=True, jobs=2, max_shard_size="100KB"
    )
    size = len(hub.repos[names.llm].content()["model.safetensors"])
    ranges = [
        request.headers.get("Range") or request.headers["range"]
        for request in hub.log("GET", f"^/{names.llm}/resolve/.*/model.safetensors")
    ]
    assert ranges[0] == "bytes=0-7"  # The header comes first, and nothing comes whole.
    cache = home / f"hub/models--{names.llm.replace('/', '--')}"
    assert not list(cache.rglob("*.safetensors"))
    assert max(path.stat().st_size for path in cache.rglob("blobs/*")) < size / 10
    # Not streamed: the same bytes of everything, and the weights in the cache.
    convert(client, names, tmp_path / "llava-qwen-2", max_shard_size="100KB")
    assert content(tmp_path / "llava-qwen-1") == content(tmp_path / "llava-qwen-2")
    assert list(cache.rglob("*.safetensors"))


def test_a_plan_of_a_streamed_base_reads_its_header(
    names: Names, hub: HubServer, tmp_path: Path
) -> None:
    """As a program, which turns the progress bars of huggingface_hub off before importing it."""
    words = [names.trained, "--llm", names.llm, "--vision", names.vision, "--stream-base", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "xtuner2llava", "plan", *words],
        env={**os.environ, "HF_TOKEN": hub.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["tensors"]) == 114
    assert len(hub.log("GET", f"^/{names.llm}/resolve/.*/model.safetensors")) == 2


def test_a_streamed_base_in_shards(
    names: Names, hub: HubServer, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoints / "bases/llm_qwen2/model.safetensors")
    order = sorted(tensors)
    files = content(checkpoints / "bases/llm_qwen2")
    del files["model.safetensors"]
    weight_map = {}
    for place, part in enumerate((order[:20], order[20:]), 1):
        name = f"model-0000{place}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, tmp_path / name, metadata={"format": "pt"})
        files[name] = (tmp_path / name).read_bytes()
        weight_map |= dict.fromkeys(part, name)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    hub.add("qwen/shards", files)
    convert(client, names, tmp_path / "llava-qwen-1", llm="qwen/shards", stream_base=True)
    convert(client, names, tmp_path / "llava-qwen-2")
    one, two = content(tmp_path / "llava-qwen-1"), content(tmp_path / "llava-qwen-2")
    assert one["model.safetensors"] == two["model.safetensors"]


def test_reading_goes_on_after_errors_and_drops(
    names: Names, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    pattern = f"GET /{names.llm}/resolve/.*/model.safetensors"
    hub.fail(pattern, status=500, skip=1)
    hub.fail(pattern, drop="inside", skip=2)
    hub.fail(pattern, drop="before", skip=2)
    convert(
        client, names, tmp_path / "llava-qwen-1", stream_base=True, jobs=1, max_shard_size="60KB"
    )
    assert [f.times for f in hub.faults] == [0, 0, 0]
    convert(client, names, tmp_path / "llava-qwen-2", max_shard_size="60KB")
    assert content(tmp_path / "llava-qwen-1") == content(tmp_path / "llava-qwen-2")


def test_a_base_without_safetensors_is_not_streamed(
    names: Names, hub: HubServer, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    files = content(checkpoints / "bases/llm_qwen2")
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.add("qwen/bin", files)
    text = fault(client, names, tmp_path / "llava-qwen", llm="qwen/bin", stream_base=True)
    assert "qwen/bin: has no safetensors" in text
    assert "Leave stream_base=True out" in text  # As the caller knows it


def test_a_local_base_is_read_where_it_lies(
    names: Names, hub: HubServer, client: Client, checkpoints: Path, tmp_path: Path
) -> None:
    local = checkpoints / "bases/llm_qwen2"
    convert(client, names, tmp_path / "llava-qwen", llm=local, stream_base=True)
    assert hub.log("GET", names.llm) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (struct.pack("<Q", 1 << 40) + b"{}", "its header claims"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (struct.pack("<Q", 2) + b"[]", "is not a JSON object"),
        (b"short", "has only 5 bytes"),
    ],
)
def test_what_is_no_safetensors_file_there(
    names: Names,
    hub: HubServer,
    client: Client,
    checkpoints: Path,
    tmp_path: Path,
    data: bytes,
    said: str,
) -> None:
    files = content(checkpoints / "bases/llm_qwen2")
    hub.add("qwen/wrong", {**files, "model.safetensors": data})
    text = fault(client, names, tmp_path / "llava-qwen", llm="qwen/wrong", stream_base=True)
    assert said in text
    assert "qwen/wrong@" in text

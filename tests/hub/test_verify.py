"""`verify owner/name` against a Hub on loopback: what is published, without its tensors."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from hub_server import Client, HubServer, content

REPO = "ann/llava-qwen-tiny"


@pytest.fixture(scope="module")
def published(original: Path) -> dict[str, bytes]:
    return content(original)


def failed(found: dict[str, Any]) -> dict[str, str]:
    return {c["check"]: c["detail"] for c in found["checks"] if c["result"] == "FAILED"}


def test_a_published_model_is_right_and_its_tensors_stay_there(
    hub: HubServer, client: Client, published: dict[str, bytes]
) -> None:
    hub.add(REPO, published)
    found = client.call("verify", REPO)
    assert found["passed"], found["verdict"]
    assert found["figures"]["commit"] == hub.repos[REPO].branches["main"]
    results = {check["check"]: check["result"] for check in found["checks"]}
    assert results["checksums of small files"] == results["tensors of the LLM"] == "ok"
    # The record has BLAKE3, and the Hub states SHA-256.
    assert results["checksums of shards"] == "skipped"
    weights = hub.log("GET", r"/resolve/.*\.safetensors$")
    shards = [name for name in published if name.endswith(".safetensors")]
    assert len(weights) == 2 * len(shards)
    for request in weights:
        (span,) = (value for key, value in request.headers.items() if key.lower() == "range")
        assert int(span.rpartition("-")[2]) < 20_000  # Headers alone.


def test_a_revision_and_an_edited_card(
    hub: HubServer, client: Client, published: dict[str, bytes]
) -> None:
    repo = hub.add(REPO, published)
    commit = repo.branches["main"]
    repo.upload({"README.md": b"# Mine\n", "config.json": b"{}"})
    assert client.call("verify", f"{REPO}@{commit}")["passed"]
    repo.upload({"config.json": published["config.json"]})
    assert client.call("verify", REPO)["passed"]


@pytest.mark.parametrize("fault", ["config", "missing", "size", "header", "name", "path", "bin"])
def test_what_is_wrong_there_is_found(
    hub: HubServer, client: Client, published: dict[str, bytes], fault: str
) -> None:
    first = next(n for n in sorted(published) if n.startswith("model-00001"))
    shard = published[first]
    files = dict(published)
    if fault == "config":
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"x": 1}).encode()
    elif fault == "missing":
        del files[first]
    elif fault == "size":
        files[first] += b"\0"
    elif fault == "header":
        files[first] = struct.pack("<Q", 1 << 40) + shard[8:]
    elif fault == "name":
        files[first] = shard.replace(b"layernorm", b"LayerNorm", 1)
    elif fault == "path":
        files["generation_config.json"] = b'{"from": "/home/ann/models/x"}'
    else:
        files["pytorch_model.bin"] = b"pickle"
    hub.add(REPO, files)
    said = {
        "config": ("checksums of small files", "config.json is not what was written"),
        "missing": ("checksums of shards", f"{first} is not there"),
        "size": ("checksums of shards", "bytes, conversion.json says"),
        "header": ("safetensors headers", "its header claims 1,099,511,627,776 bytes"),
        "name": ("index and files", "which is in no file"),
        "path": ("no local paths", "/home/ann"),
        "bin": ("index and files", "pytorch_model.bin lies beside"),
    }
    check, detail = said[fault]
    assert detail in failed(client.call("verify", REPO))[check]


def test_checksums_that_the_hub_states_are_compared(
    hub: HubServer, client: Client, published: dict[str, bytes]
) -> None:
    """Records of schema 1 have SHA-256."""
    record = json.loads(published["conversion.json"])
    for shard in record["shards"]:
        shard["sha256"] = hashlib.sha256(published[shard["file"]]).hexdigest()
    first = record["shards"][0]["file"]
    files = {**published, "conversion.json": json.dumps(record).encode()}
    hub.add(REPO, files)
    checks = {c["check"]: c for c in client.call("verify", REPO)["checks"]}
    assert checks["checksums of shards"]["result"] == "ok"
    flipped = bytearray(files[first])
    flipped[-1] ^= 1
    hub.add("ann/llava-qwen-flipped", {**files, first: bytes(flipped)})
    found = failed(client.call("verify", "ann/llava-qwen-flipped"))
    assert f"{first} is not what was written" in found["checksums of shards"]


def test_what_cannot_be_verified_is_an_error(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    missing = client.ask("verify", "ann/nothing")
    assert missing.error == "CheckpointError"
    assert "ann/nothing: is not a folder here, and is not a repository" in missing.text
    hub.add("ann/gated-llava", {"config.json": b"{}"}, gated=True)
    hub.repos["ann/gated-llava"].readers.clear()
    against = client.ask("verify", "ann/gated-llava", against=tmp_path)
    assert against.error == "UsageError"
    assert "hf download ann/gated-llava" in against.text
    other = client.call("verify", "ann/gated-llava")  # The owner's own.
    assert not other["passed"]
    assert "config.json" in failed(other)
    assert client.ask("verify", "nothing").error == "UsageError"  # A folder's name, mistyped.

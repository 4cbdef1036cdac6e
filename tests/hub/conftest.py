"""A client of the Hub on loopback, and a converted folder to publish."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub_server import Client, HubServer


@pytest.fixture
def client(hub: HubServer, checkpoints: Path) -> Client:
    return Client(hub, checkpoints)


@pytest.fixture(scope="package")
def original(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with three shards, not to be written to."""
    from xtuner2llava import convert

    out = tmp_path_factory.mktemp("converted") / "llava-qwen-tiny"
    convert(
        checkpoints / "qwen2_e_full_fullvis" / "iter_2.pth",
        out,
        llm=checkpoints / "bases/llm_qwen2",
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip-tiny",
        max_shard_size="200KB",
    )
    return out

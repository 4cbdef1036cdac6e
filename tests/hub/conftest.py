"""A Hub on loopback, a client of it in another process, and a converted folder to publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import Client, HubServer


@pytest.fixture(scope="package")
def loopback() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(loopback: HubServer) -> HubServer:
    """The Hub without the repositories, requests and faults of the test before."""
    loopback.repos.clear()
    loopback.requests.clear()
    loopback.faults.clear()
    loopback.chunk_bytes = None
    return loopback


@pytest.fixture(scope="package")
def client(
    loopback: HubServer, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("hub") / "home"
    with Client(loopback, home, checkpoints) as client:
        yield client


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

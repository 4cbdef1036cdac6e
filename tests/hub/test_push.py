"""`push` and `--push-to-hub` against a Hub on loopback, through the real client."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hub_server import Blob, Client, HubServer, content

LARGE = ".safetensors"


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """A converted folder with three shards, to be changed by a test."""
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    return copy


def shards_of(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(f"*{LARGE}")}


def changes(hub: HubServer) -> list[str]:
    """What was sent and committed, and nothing that only looks."""
    return [
        f"{request.method} {request.path}"
        for request in hub.log("PUT") + hub.log("POST", "/(commit|branch)/")
    ]


# What is published


def test_the_repository_becomes_the_folder(hub: HubServer, client: Client, out: Path) -> None:
    pushed = client.call("push", out, "ann/llava-qwen-tiny")
    repo = hub.repos["ann/llava-qwen-tiny"]
    assert repo.content() == content(out)
    assert not repo.private
    assert len(shards_of(out)) == 3
    assert {name for name, blob in repo.files().items() if blob.lfs} == shards_of(out)
    assert repo.messages == ["initial commit", "LLaVA model converted by xtuner2llava"]
    assert pushed["link"] == f"{hub.url}/ann/llava-qwen-tiny"
    assert pushed["commit"] == repo.branches["main"]
    assert pushed["files"] == sorted(content(out))
    assert pushed["bytes"] == sum(map(len, content(out).values()))
    assert (pushed["removed"], pushed["notes"]) == ([], [])


def test_nothing_is_sent_twice(hub: HubServer, client: Client, out: Path) -> None:
    first = client.call("push", out, "ann/model-qwen-llava")
    assert len(hub.log("PUT")) == 3
    hub.requests.clear()
    again = client.call("push", out, "ann/model-qwen-llava")
    assert changes(hub) == []
    assert again["commit"] == first["commit"]
    assert len(hub.repos["ann/model-qwen-llava"].messages) == 2


def test_what_another_repository_revision_lacks_is_committed_without_sending(
    hub: HubServer, client: Client, out: Path
) -> None:
    client.call("push", out, "ann/m", revision="one")
    hub.requests.clear()
    client.call("push", out, "ann/m", revision="two")
    assert hub.log("PUT") == []  # Storage belongs to the repository and not to a branch.
    repo = hub.repos["ann/m"]
    assert repo.content("two") == repo.content("one") == content(out)
    assert repo.content("main") == {}


def test_private_revision_and_message(hub: HubServer, client: Client, out: Path) -> None:
    pushed = client.call(
        "push", out, "llava-qwen", private=True, revision="v1", commit_message="Iteration 2"
    )
    repo = hub.repos["ann/llava-qwen"]  # The owner is whose token it is.
    assert repo.private
    assert repo.messages[-1] == "Iteration 2"
    assert repo.content("v1") == content(out)
    assert repo.content("main") == {}
    assert pushed["link"] == f"{hub.url}/ann/llava-qwen/tree/v1"
    assert pushed["revision"] == "v1"


def test_a_public_repository_is_not_private(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    text = fault(client, out, private=True)
    assert text.startswith("HubError: ann/llava-qwen: is public, and private=True is given")
    assert repo.content() == {}
    client.call("push", out, "ann/llava-mine-qwen", private=True)
    assert hub.repos["ann/llava-mine-qwen"].private
    client.call("push", out, "ann/llava-mine-qwen", private=True)  # It was made so.


def test_convert_publishes_what_it_wrote(
    hub: HubServer, client: Client, original: Path, tmp_path: Path
) -> None:
    report = client.call(
        "convert",
        "qwen2_e_full_fullvis/iter_2.pth",
        tmp_path / "llava-qwen-tiny",
        vision_tower_name="openai/clip-tiny",
        max_shard_size="200KB",
        push_to_hub="ann/llava-qwen-tiny",
    )
    repo = hub.repos["ann/llava-qwen-tiny"]
    assert repo.content() == content(tmp_path / "llava-qwen-tiny")
    assert {name: repo.content()[name] for name in shards_of(original)} == {
        name: data for name, data in content(original).items() if name.endswith(LARGE)
    }
    assert report["pushed"]["commit"] == repo.branches["main"]


def test_convert_publishes_what_an_earlier_run_finished(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """The same command with --push-to-hub: nothing is written again, and all of it is sent."""
    case, out = "qwen2_e_full_fullvis/iter_2.pth", tmp_path / "llava-qwen-tiny"
    given = {"vision_tower_name": "openai/clip-tiny", "max_shard_size": "200KB"}
    client.call("convert", case, out, **given)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = client.call("convert", case, out, **given, push_to_hub="ann/llava-qwen-tiny")
    assert report["already_converted"] is True
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    repo = hub.repos["ann/llava-qwen-tiny"]
    assert repo.content() == content(out)
    assert report["pushed"]["commit"] == repo.branches["main"]
    again = client.call("convert", case, out, **given, push_to_hub="ann/llava-qwen-tiny")
    assert again["already_converted"] is True
    assert repo.content() == content(out)


def test_uploads_in_parts(hub: HubServer, client: Client, out: Path) -> None:
    hub.chunk_bytes = 65536
    client.call("push", out, "ann/llava-qwen")
    assert hub.repos["ann/llava-qwen"].content() == content(out)
    assert len(hub.log("PUT")) > 6


def test_progress_counts_bytes_once(hub: HubServer, client: Client, out: Path) -> None:
    hub.fail("PUT /storage", drop="inside")
    answer = client.ask("push", out, "ann/llava-qwen")
    total = sum(len(data) for name, data in content(out).items() if name.endswith(LARGE))
    for stage in ("check", "upload"):
        counted = [(done, all_) for name, done, all_ in answer.progress if name == stage]
        assert counted[-1] == (total, total)
        assert [done for done, _ in counted] == sorted(done for done, _ in counted)


# What is there already


def test_weights_of_an_earlier_model_go(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    kept = {"figure.png": b"png", "pytorch_model.bin": b"bin", "lora/model.safetensors": b"x"}
    repo.upload({"model-00001-of-00002.safetensors": b"old", "model.safetensors": b"old", **kept})
    pushed = client.call("push", out, "ann/llava-qwen")
    assert pushed["removed"] == ["model-00001-of-00002.safetensors", "model.safetensors"]
    assert repo.content() == {**content(out), **kept}
    assert len(repo.messages) == 3  # One commit took them away and brought the new ones.


def test_an_owners_own_card_stays(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    own = b"---\nlicense: mit\n---\n# My model\n\nI wrote this.\n"
    repo.upload({"README.md": own})
    pushed = client.call("push", out, "ann/llava-qwen")
    assert repo.content()["README.md"] == own
    assert any("README.md" in note for note in pushed["notes"])
    assert repo.content().keys() == content(out).keys()
    hub.requests.clear()
    client.call("push", out, "ann/llava-qwen")
    assert changes(hub) == []


def test_a_card_edited_in_the_folder_is_published(
    hub: HubServer, client: Client, out: Path
) -> None:
    client.call("push", out, "ann/llava-qwen")
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    client.call("push", out, "ann/llava-qwen")
    assert hub.repos["ann/llava-qwen"].content()["README.md"] == b"---\nlicense: mit\n---\n# Mine\n"


def test_a_card_of_metadata_only_is_filled(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    repo.upload({"README.md": b"---\nlicense: mit\n---\n"})
    client.call("push", out, "ann/llava-qwen")
    card = repo.content()["README.md"].decode()
    generated = (out / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    assert metadata.startswith("license: mit\n")
    assert metadata.removeprefix("license: mit\n") == generated.split("---\n", 2)[1]
    assert body == generated.split("---\n", 2)[2]
    # Then it is ours to renew, but what was said there stays; and all is quiet.
    hub.requests.clear()
    client.call("push", out, "ann/llava-qwen")
    assert repo.content()["README.md"].decode() == card
    assert hub.log("POST", "/commit/") == []


def test_a_generated_card_is_renewed(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    old = (out / "README.md").read_text().replace("## Load it", "## Load this")
    repo.upload({"README.md": old.encode()})
    client.call("push", out, "ann/llava-qwen")
    assert repo.content()["README.md"] == (out / "README.md").read_bytes()


def test_names_that_llava_takes_for_another_class_are_noted(
    client: Client, hub: HubServer, out: Path
) -> None:
    pushed = client.call("push", out, "ann/llava-llama-mine")
    (note,) = pushed["notes"]
    assert "lacks 'qwen'" in note
    assert "contains 'llama'" in note


# What is checked before anything is sent


def fault(client: Client, out: Path, repo_id: str = "ann/llava-qwen", **more: Any) -> str:
    answer = client.ask("push", out, repo_id, **more)
    assert answer.error is not None, "it was published"
    return f"{answer.error}: {answer.text}"


def test_a_folder_that_changed_is_refused(hub: HubServer, client: Client, out: Path) -> None:
    (out / "generation_config.json").write_text("{}")
    (out / "config.json").unlink()
    (out / sorted(shards_of(out))[0]).unlink()
    text = fault(client, out)
    assert text.startswith("VerificationError: 3 faults")
    assert "generation_config.json: is not what was written" in text
    assert "model-00001-of-00003.safetensors: is not there" in text
    assert f"The same at 1 more place: {out / 'config.json'}\n" in text
    assert hub.requests == []


def test_a_small_file_that_is_large_is_not_read(hub: HubServer, client: Client, out: Path) -> None:
    """A folder that somebody gave away may say so in its record, with the right checksum."""
    os.truncate(out / "README.md", (64 << 20) + 1)
    os.truncate(out / "tokenizer.json", 1 << 40)  # A hole, which takes no space.
    text = fault(client, out)
    assert text.startswith("VerificationError: 2 faults")
    assert "README.md: has 67,108,865 bytes, expected at most 67,108,864" in text
    assert "tokenizer.json: has 1,099,511,627,776 bytes" in text
    assert hub.requests == []


def test_a_flipped_bit_is_refused(hub: HubServer, client: Client, out: Path) -> None:
    shard = sorted(shards_of(out))[1]
    data = bytearray((out / shard).read_bytes())
    data[-1] ^= 1
    (out / shard).write_bytes(data)
    text = fault(client, out)
    assert text.startswith("VerificationError")
    assert f"checksums of shards: {shard} is not what was written" in text
    assert hub.requests == []


def test_a_card_with_a_path_is_refused(hub: HubServer, client: Client, out: Path) -> None:
    (out / "README.md").write_text("# Mine\n\nFrom /home/somebody/runs/iter_2.pth.\n")
    text = fault(client, out)
    assert "no local paths" in text
    assert hub.requests == []


def test_a_folder_that_no_conversion_wrote_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert fault(client, tmp_path).startswith("UsageError")


def test_unexpected_files_are_not_published(hub: HubServer, client: Client, out: Path) -> None:
    (out / "notes.txt").write_text("about the data")
    pushed = client.call("push", out, "ann/llava-qwen")
    assert "notes.txt" not in hub.repos["ann/llava-qwen"].content()
    assert any("notes.txt" in note for note in pushed["notes"])


def test_names_in_the_record_do_not_lead_out(hub: HubServer, client: Client, out: Path) -> None:
    record = json.loads((out / "conversion.json").read_text())
    secret = out.parent / "secret.txt"
    secret.write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    (out / "link.json").symlink_to(secret)
    for name, expected in [
        ("link.json", "link.json: is not there"),
        ("../secret.txt", "some that are not in the folder"),
    ]:
        files = {**record["files"], name: digest}
        (out / "conversion.json").write_text(json.dumps({**record, "files": files}))
        assert expected in fault(client, out)
    assert hub.requests == []


def test_a_token_in_a_file_is_not_published(hub: HubServer, client: Client, out: Path) -> None:
    card = out / "README.md"
    card.write_text(card.read_text() + "\nexport HF_TOKEN=hf_" + "b" * 34)
    text = fault(client, out)
    assert "README.md: holds what looks like a Hub token" in text
    assert "b" * 34 not in text
    assert hub.requests == []


def test_a_card_that_the_hub_refuses(hub: HubServer, client: Client, out: Path) -> None:
    (out / "README.md").write_text("---\nlicense: [mit\n---\n# Mine\n")
    text = fault(client, out)
    assert "HubError" in text
    assert "README.md" in text
    assert hub.repos["ann/llava-qwen"].content() == {}


# Who may


@pytest.mark.parametrize(
    ("repo_id", "more", "kind", "said"),
    [
        ("ann/llava-qwen", {"token": None}, "HubError", "needs a token, and there is none"),
        ("ann/llava-qwen", {"token": "hf_wrong"}, "HubError", "the Hub answered 401"),
        ("ben/llava-qwen", {}, "HubError", "the Hub answered 403"),
        ("an n/llava", {}, "UsageError", "is not a name for a repository"),
    ],
)
def test_refusals_say_what_to_do(
    client: Client, out: Path, repo_id: str, more: dict[str, Any], kind: str, said: str
) -> None:
    text = fault(client, out, repo_id, **more)
    assert text.startswith(kind)
    assert said in text
    assert "\n    " in text  # What to do.


def test_somebody_elses_repository(hub: HubServer, client: Client, out: Path) -> None:
    hub.add("ben/llava-qwen")
    text = fault(client, out, "ben/llava-qwen")
    assert "403" in text
    assert "may not write there" in text
    assert hub.repos["ben/llava-qwen"].content() == {}


def test_the_token_is_in_no_error(client: Client, hub: HubServer, out: Path) -> None:
    hub.fail("POST .*/preupload/", status=400)
    assert hub.token not in fault(client, out)


# Callbacks


@pytest.mark.parametrize("chunk_bytes", [None, 65536])
def test_what_the_callback_raises_comes_out_as_it_is(
    hub: HubServer, client: Client, out: Path, chunk_bytes: int | None
) -> None:
    """It is raised inside a request, through the HTTP library; so is what stops other threads."""
    hub.chunk_bytes = chunk_bytes
    answer = client.ask("push", out, "ann/llava-qwen", raise_at="upload")
    assert answer.error == "LookupError"
    assert answer.text.splitlines()[-1] == "LookupError: raised by the callback"
    assert hub.repos["ann/llava-qwen"].content() == {}


# Networks


def test_a_server_error_and_a_dropped_connection_are_tried_again(
    hub: HubServer, client: Client, out: Path
) -> None:
    hub.fail("PUT /storage", status=503)
    hub.fail("PUT /storage", drop="inside", skip=1)
    hub.fail("POST .*/objects/batch", status=503)
    client.call("push", out, "ann/llava-qwen")
    assert all(f.times == 0 for f in hub.faults)
    assert hub.repos["ann/llava-qwen"].content() == content(out)


@pytest.mark.parametrize("how", [{"status": 503}, {"drop": "before"}, {"drop": "after"}])
def test_a_commit_whose_answer_is_lost_is_made_once(
    hub: HubServer, client: Client, out: Path, how: dict[str, Any]
) -> None:
    hub.fail("POST .*/commit/main", **how)
    client.call("push", out, "ann/llava-qwen")
    repo = hub.repos["ann/llava-qwen"]
    assert repo.content() == content(out)
    assert len(repo.messages) == 2


def test_a_commit_by_others_in_between_stays(hub: HubServer, client: Client, out: Path) -> None:
    def other() -> None:
        hub.repos["ann/llava-qwen"].upload({"figure.png": b"png", "model.safetensors": b"old"})

    hub.fail("POST .*/commit/main", meanwhile=other)
    pushed = client.call("push", out, "ann/llava-qwen")
    assert [r.status for r in hub.log("POST", "/commit/")] == [412, 200]
    assert hub.repos["ann/llava-qwen"].content() == {**content(out), "figure.png": b"png"}
    # Also the weights that came in between are not left beside ours.
    assert pushed["removed"] == ["model.safetensors"]


def test_endless_conflicts_are_an_error(hub: HubServer, client: Client, out: Path) -> None:
    hub.fail("POST .*/commit/main", status=412, times=99)
    text = fault(client, out)
    assert "412" in text
    assert "Run the same command again" in text
    assert hub.repos["ann/llava-qwen"].content() == {}


def test_what_was_sent_before_a_failure_is_not_sent_again(
    hub: HubServer, client: Client, out: Path
) -> None:
    hub.fail("PUT /storage", status=400, skip=2)
    assert "the Hub answered 400" in fault(client, out, jobs=1)
    assert hub.repos["ann/llava-qwen"].content() == {}
    hub.requests.clear()
    client.call("push", out, "ann/llava-qwen")
    assert len(hub.log("PUT")) == 1
    assert hub.repos["ann/llava-qwen"].content() == content(out)


# Repositories with rules of their own


def test_a_repository_without_large_files(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    repo.put("main", {".gitattributes": Blob(b"")}, "no LFS")
    client.call("push", out, "ann/llava-qwen")
    assert repo.content() == content(out)
    assert hub.log("PUT") == []


@pytest.mark.slow
def test_a_repository_that_ignores_weights(hub: HubServer, client: Client, out: Path) -> None:
    repo = hub.add("ann/llava-qwen")
    repo.upload({".gitignore": b"*.safetensors\n"})
    text = fault(client, out)
    assert "VerificationError" in text
    assert "model-00001-of-00003.safetensors" in text
    assert ".gitignore" in text

"""`verify` by itself: a right folder passes, and each kind of damage fails where it is.

Damage that a checksum would show is sealed first, so that the other checks show what they can.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import (
    copy_of,
    edit_json,
    edit_tensors,
    flip_bit,
    results,
    rewrite_header,
    seal,
    set_keys,
)
from reference.cases import Converted
from xtuner2llava import UsageError, verify
from xtuner2llava.verification import plain_model
from xtuner2llava.verification.checks import tokenizer as tokenizer_check

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(converted: Converted) -> Path:
    """Qwen2, everything trained, one shard."""
    return converted("qwen2_e_full_fullvis", dtype="float16")


@pytest.fixture(scope="module")
def sharded(converted: Converted) -> Path:
    return converted("qwen2_e_full_fullvis", dtype="float16", max_shard_size="200KB")


def test_a_converted_folder_is_right(whole: Path, sharded: Path) -> None:
    for folder in (whole, sharded):
        found = verify(folder)
        assert results(found) == {}
        assert found.passed
        assert found.verdict.startswith("Verified: 20 checks, none failed.")
        # The towers of the test are at a relative path.
        assert [check.name for check in found.with_result("warning")] == ["mm_vision_tower"]
    assert verify(sharded).named("index and files").detail == "114 tensors in 3 files, each once"


def test_the_report_as_data(whole: Path) -> None:
    found = verify(whole)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["passed"] is True
    assert data["out"] == str(whole)
    assert {
        "check": "tied embeddings",
        "result": "ok",
        "detail": "not tied, the head is there",
    } in data["checks"]
    with pytest.raises(KeyError, match="nonsense"):
        found.named("nonsense")


def test_a_record_with_sha256(whole: Path, tmp_path: Path) -> None:
    """What versions before BLAKE3 wrote."""

    def old(record: dict[str, Any]) -> None:
        def digest(name: str) -> str:
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()

        record["schema"] = 1
        record["files"] = {name: digest(name) for name in record["files"]}
        for shard in record["shards"]:
            del shard["blake3"]
            shard["sha256"] = digest(shard["file"])

    folder = copy_of(whole, tmp_path)
    edit_json(folder / "conversion.json", old)
    assert results(verify(folder)) == {}
    flip_bit(folder / "model.safetensors", -1)
    text = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(text + "\n")
    found = results(verify(folder))
    assert (
        "model.safetensors is not what was written: its sha256 is" in found["checksums of shards"]
    )
    assert "generation_config.json is not" in found["checksums of small files"]


# Each: what is damaged, which check fails, and what it says.


def renamed_tensor(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.gate.weight"] = tensors.pop(
            "model.layers.1.mlp.gate_proj.weight"
        )

    edit_tensors(folder, change)


def transposed_tensor(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))


def without(*names: str) -> Damage:
    return lambda folder: edit_tensors(
        folder, lambda tensors: [tensors.pop(name) for name in names]
    )


def config(**values: Any) -> Damage:
    return lambda folder: set_keys(folder / "config.json", **values)


def without_key(file: str, key: str) -> Damage:
    return lambda folder: edit_json(folder / file, lambda values: values.pop(key))


def swapped_offsets(header: bytes) -> bytes:
    values = json.loads(header)
    one, other = (values[f"model.layers.{n}.input_layernorm.weight"] for n in (0, 1))
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    return json.dumps(values, separators=(",", ":")).encode().ljust(len(header))


def tokens_beyond_the_rows(folder: Path) -> None:
    new = {index: f"<new_{index}>" for index in range(363, 403)}

    def change(values: dict[str, Any]) -> None:
        last = values["added_tokens"][-1]
        values["added_tokens"] += [{**last, "id": n, "content": text} for n, text in new.items()]

    def list_them(values: dict[str, Any]) -> None:
        decoder = values["added_tokens_decoder"]
        decoder |= {str(n): {**decoder["361"], "content": text} for n, text in new.items()}

    edit_json(folder / "tokenizer.json", change)
    edit_json(folder / "tokenizer_config.json", list_them)


TOWER = "model.vision_tower.vision_tower.vision_model."
SEALED: dict[str, tuple[Damage, str, str]] = {
    "tensor renamed": (
        renamed_tensor,
        "tensors of the LLM",
        "model.layers.1.mlp.gate_proj.weight is missing; model.layers.1.mlp.gate.weight is "
        "unexpected",
    ),
    "tensor transposed": (
        transposed_tensor,
        "tensors of the LLM",
        "up_proj.weight has shape [64, 112], expected [112, 64]",
    ),
    "tensor of the tower gone": (
        without(f"{TOWER}encoder.layers.2.mlp.fc1.weight"),
        "tensors of the vision tower",
        "vision_model.encoder.layers.2.mlp.fc1.weight is missing",
    ),
    "second layer of the projector gone": (
        without("model.mm_projector.2.weight", "model.mm_projector.2.bias"),
        "tensors of the projector",
        "2.weight is missing",
    ),
    "projector type of another depth": (
        config(mm_projector_type="mlp3x_gelu"),
        "tensors of the projector",
        "4.weight is missing",
    ),
    "head dropped": (
        without("lm_head.weight"),
        "tied embeddings",
        "there is no lm_head.weight",
    ),
    "tie flag flipped": (
        config(tie_word_embeddings=True),
        "tied embeddings",
        "tie_word_embeddings is true, and lm_head.weight is there",
    ),
    "vocab_size changed": (
        config(vocab_size=384),
        "vocabulary size",
        "model.embed_tokens.weight has 400 rows, vocab_size is 384",
    ),
    "dtype of the config": (
        config(torch_dtype="bfloat16"),
        "dtype",
        "is float16, torch_dtype says bfloat16",
    ),
    "tower that would be ignored": (
        config(unfreeze_mm_vision_tower=False),
        "vision tower in the folder",
        "unfreeze_mm_vision_tower is not true",
    ),
    "key that LLaVA takes for true": (
        without_key("config.json", "mm_use_im_patch_token"),
        "config keys",
        "mm_use_im_patch_token is missing",
    ),
    "words of transformers 5": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "config keys",
        "rope_parameters is a word of transformers 5",
    ),
    "model type of another class": (
        config(model_type="llava_llama"),
        "config keys",
        "model_type is 'llava_llama', expected llava_qwen",
    ),
    "eos dropped": (
        without_key("generation_config.json", "eos_token_id"),
        "generation config",
        "there is no eos_token_id, so it never stops",
    ),
    "end of turn no longer eos": (
        lambda folder: (
            set_keys(folder / "generation_config.json", eos_token_id=361),
            set_keys(folder / "config.json", eos_token_id=361),
        ),
        "tokenizer",
        "<|im_end|> (id 360) ended each turn in training, and is not an eos_token_id",
    ),
    "eos in one of two configs": (
        without_key("config.json", "eos_token_id"),
        "generation config",
        "eos_token_id is [360, 361] in generation_config.json and missing in config.json",
    ),
    "generation config gone": (
        lambda folder: (folder / "generation_config.json").unlink(),
        "generation config",
        "is missing or empty",
    ),
    "preprocessor gone": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "image processor",
        "preprocessor_config.json is missing",
    ),
    "colour of two numbers": (
        lambda folder: set_keys(folder / "preprocessor_config.json", image_mean=[0.5, 0.5]),
        "image processor",
        "image_mean is [0.5, 0.5], expected three numbers",
    ),
    "projector that LLaVA does not have": (
        config(mm_projector_type="resampler"),
        "tensors of the projector",
        "mm_projector_type 'resampler' is not one that LLaVA has",
    ),
    "tower of another width": (
        config(mm_hidden_size=96),
        "tensors of the projector",
        "wide, the config says 96",
    ),
    "flag of a tower that is not there": (
        lambda folder: edit_tensors(
            folder,
            lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(TOWER)],
        ),
        "vision tower in the folder",
        "unfreeze_mm_vision_tower is not false, and its tensors are not there",
    ),
    "pad beyond the vocabulary": (
        lambda folder: set_keys(folder / "generation_config.json", pad_token_id=400),
        "generation config",
        "pad_token_id 400 is beyond the 400 rows",
    ),
    "bos contradicts": (
        config(bos_token_id=5),
        "generation config",
        "bos_token_id is [5] in config.json, [361] in generation_config.json",
    ),
    "tokenizer replaced by a larger one": (
        tokens_beyond_the_rows,
        "tokenizer",
        "the embedding has 400 rows: LLaVA would add random ones",
    ),
    "tokenizer broken": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer",
        "does not load",
    ),
    "tokenizer a byte too large": (
        lambda folder: os.truncate(folder / "tokenizer.json", (64 << 20) + 1),
        "tokenizer",
        "tokenizer.json has 67,108,865 bytes, expected at most 67,108,864",
    ),
    "preprocessor of another size": (
        lambda folder: set_keys(
            folder / "preprocessor_config.json", crop_size={"height": 336, "width": 336}
        ),
        "image processor",
        "crops to 336 pixels, 576 patches of 14; the tower has 16",
    ),
    "preprocessor of a class that 4.37.2 lacks": (
        lambda folder: set_keys(
            folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessorFast"
        ),
        "image processor",
        "names CLIPImageProcessorFast, expected CLIPImageProcessor",
    ),
    "tower named by a local path": (
        config(mm_vision_tower="/data/models/clip"),
        "mm_vision_tower",
        "'/data/models/clip' is a path of one machine",
    ),
    "home in the card": (
        lambda folder: (folder / "README.md").write_text("Trained in /home/jane/runs/7 .\n"),
        "no local paths",
        "README.md says '/home/jane/runs/7'",
    ),
    "record of another format": (
        lambda folder: edit_json(
            folder / "conversion.json", lambda values: values["mapping"].update(format="hf")
        ),
        "record and config",
        "the record says format 'hf', the folder is llava",
    ),
    "header padded wrongly": (
        lambda folder: rewrite_header(folder / "model.safetensors", lambda header: header + b" "),
        "safetensors headers",
        "is not padded with spaces to a multiple of eight",
    ),
    "header padded too much": (
        lambda folder: rewrite_header(
            folder / "model.safetensors", lambda header: header + b" " * 8
        ),
        "safetensors headers",
        "is not padded with spaces to a multiple of eight",
    ),
    "tensors in another order": (
        lambda folder: rewrite_header(folder / "model.safetensors", swapped_offsets),
        "safetensors headers",
        "are not in the order that safetensors writes, from model.layers.1.input_layernorm.weight",
    ),
    "bytes after the last tensor": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes() + b"\0" * 8
        ),
        "safetensors headers",
        "model.safetensors: has 546,192 bytes, its header describes 546,184",
    ),
    "file without a format": (
        lambda folder: rewrite_header(
            folder / "model.safetensors", lambda header: header.replace(b'"pt"', b'"tf"')
        ),
        "safetensors headers",
        "its __metadata__ is not {'format': 'pt'}",
    ),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ),
        "safetensors headers",
        "pre_layrnorm.weight: ends at byte 546,184 of a file with 546,084",
    ),
    "a pickle beside the weights": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
        "index and files",
        "pytorch_model.bin lies beside the safetensors files",
    ),
    "config without a class": (
        config(architectures=["LlamaForCausalLM"]),
        "config.json",
        "architectures is ['LlamaForCausalLM'], expected one of",
    ),
    "config without architectures": (
        config(architectures=[]),
        "config.json",
        "architectures is [], expected one of",
    ),
    "config that is not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json",
        "is not JSON",
    ),
    "config of a monster": (
        config(num_hidden_layers=10**9),
        "tensors of the LLM",
        "num_hidden_layers is 1,000,000,000",
    ),
    "a link to nowhere": (
        lambda folder: (folder / "x.safetensors").symlink_to("nowhere"),
        "safetensors headers",
        "x.safetensors: cannot be read",
    ),
    "tokenizer that does not encode": (
        lambda folder: set_keys(folder / "tokenizer_config.json", model_max_length="x"),
        "tokenizer",
        "does not load: TypeError",
    ),
    "record gone": (
        lambda folder: (folder / "conversion.json").unlink(),
        "conversion.json",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("damage", SEALED)
def test_damage_that_checksums_do_not_show(whole: Path, tmp_path: Path, damage: str) -> None:
    change, check, says = SEALED[damage]
    folder = copy_of(whole, tmp_path)
    change(folder)
    if (folder / "conversion.json").is_file():
        seal(folder)
    found = verify(folder)
    assert not found.passed
    assert says in results(found)[check]
    assert "checksums of shards" not in results(found)
    assert check in found.verdict


def swap_shards(folder: Path) -> None:
    one, other = sorted(folder.glob("model-0000[12]*"))
    aside = one.rename(folder / "aside")
    other.rename(one)
    aside.rename(other)


SHARDED: dict[str, tuple[Damage, str]] = {
    "shards swapped": (swap_shards, f", {INDEX} says model-0000"),
    "index entry removed": (
        lambda folder: edit_json(
            folder / INDEX, lambda values: values["weight_map"].pop("model.norm.weight")
        ),
        "model.norm.weight is in model-0000",
    ),
    "index entry too many": (
        lambda folder: edit_json(
            folder / INDEX,
            lambda values: values["weight_map"].update(
                {"model.extra": "model-00001-of-00003.safetensors"}
            ),
        ),
        "names model.extra, which is in no file",
    ),
    "index without its map": (
        lambda folder: edit_json(folder / INDEX, lambda values: values.pop("weight_map")),
        "has no weight_map",
    ),
    "shard gone": (
        lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
        "names model-00002-of-00003.safetensors, which is not there",
    ),
    "shard too many": (
        lambda folder: shutil.copy(
            folder / "model-00001-of-00003.safetensors",
            folder / "model-00004-of-00003.safetensors",
        ),
        "is in model-00001-of-00003.safetensors and in model-00004-of-00003.safetensors",
    ),
    "total size": (
        lambda folder: edit_json(
            folder / INDEX, lambda values: values["metadata"].update(total_size=7)
        ),
        "says total_size 7, the tensors have",
    ),
    "index gone": (
        lambda folder: (folder / INDEX).unlink(),
        "so model.safetensors is expected alone",
    ),
}


@pytest.mark.parametrize("damage", SHARDED)
def test_damage_to_shards(sharded: Path, tmp_path: Path, damage: str) -> None:
    change, says = SHARDED[damage]
    folder = copy_of(sharded, tmp_path)
    change(folder)
    seal(folder)
    assert says in results(verify(folder))["index and files"]


@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (
            lambda folder: flip_bit(folder / "model.safetensors", -1),
            "checksums of shards",
            "model.safetensors is not what was written",
        ),
        (
            lambda folder: set_keys(folder / "config.json", rope_theta=10000.0),
            "checksums of small files",
            "config.json is not what was written",
        ),
        (
            lambda folder: set_keys(folder / "preprocessor_config.json", image_mean=[0, 0, 0]),
            "checksums of small files",
            "preprocessor_config.json is not what was written",
        ),
        (
            lambda folder: (folder / "special_tokens_map.json").unlink(),
            "checksums of small files",
            "special_tokens_map.json is not there",
        ),
        (
            lambda folder: (folder / "notes.txt").write_text("x"),
            "no other files",
            "notes.txt is not named in conversion.json",
        ),
    ],
)
def test_damage_that_only_checksums_show(
    whole: Path, tmp_path: Path, damage: Damage, check: str, says: str
) -> None:
    folder = copy_of(whole, tmp_path)
    damage(folder)
    found = results(verify(folder))
    assert says in found[check]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "result", "says"),
    [
        ("llava-qwen", "ok", "'llava-qwen' is loaded as LlavaQwenForCausalLM"),
        ("model", "warning", "'model' lacks 'llava' and lacks 'qwen'"),
        (
            "llava-llama-qwen",
            "warning",
            "contains 'llama': LLaVA or LLaVA-NeXT loads another class",
        ),
        ("llava-mixtral-qwen", "warning", "contains 'mixtral'"),
        ("llava-qwen-moe", "warning", "contains 'moe'"),
        ("models--me--llava-qwen/snapshots/0123", "ok", "'llava-qwen' is"),
        ("llava-qwen/checkpoint-7", "ok", "'llava-qwen_checkpoint-7' is"),
    ],
)
def test_the_folders_name(whole: Path, tmp_path: Path, name: str, result: str, says: str) -> None:
    """Which names those are, `planning/test_folder_name.py` compares with both loaders."""
    shutil.copytree(whole, tmp_path / name)
    check = verify(tmp_path / name).named("folder name")
    assert check.result == result
    assert says in check.detail


def test_a_llama_whose_name_one_loader_takes_for_another(
    converted: Converted, tmp_path: Path
) -> None:
    whole = converted("llama_e_full_fullvis", dtype="float16")
    shutil.copytree(whole, tmp_path / "llava-zephyr")
    check = verify(tmp_path / "llava-zephyr").named("folder name")
    assert check.result == "warning"
    assert check.detail == (
        "'llava-zephyr' contains 'zephyr': LLaVA or LLaVA-NeXT loads another class than "
        "LlavaLlamaForCausalLM; rename the folder"
    )


def test_dtypes_that_are_kept_are_those_of_the_config(converted: Converted, tmp_path: Path) -> None:
    folder = copy_of(converted("llama_e_full_fullvis", dtype="keep"), tmp_path)
    assert verify(folder).named("dtype").result == "ok"
    set_keys(folder / "config.json", torch_dtype="bfloat16")
    seal(folder)
    assert results(verify(folder))["dtype"] == "none is bfloat16"


def test_a_path_in_what_was_copied_is_a_warning(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    set_keys(folder / "tokenizer_config.json", name_or_path="/mnt/vendor/model")
    seal(folder)
    found = verify(folder)
    assert found.passed
    assert found.named("no local paths").result == "warning"
    assert "tokenizer_config.json says '/mnt/vendor/model'" in found.named("no local paths").detail


def test_the_users_home_and_name(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(whole, tmp_path)
    monkeypatch.setenv("LOGNAME", "jdoe")
    monkeypatch.setenv("HOME", "/srv/jdoe")
    card = folder / "README.md"
    for text, leaks in (
        ("By jdoe/llava on the Hub, see https://example.org/a/b/c, path/to/x and/or y.", False),
        ("At cluster/jdoe", True),
        ("In ~/runs/llava/x", True),
        ("C:\\Users\\jane", True),
    ):
        card.write_text(text)
        seal(folder)
        assert (verify(folder).named("no local paths").result == "FAILED") is leaks, text
    monkeypatch.setenv("HOME", "/")
    card.write_text("See https://example.org .")
    seal(folder)
    assert verify(folder).named("no local paths").result == "ok"


def test_a_user_without_home_and_name(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs with a number for a user."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert verify(whole).named("no local paths").result == "ok"


def test_a_tokenizer_with_a_bos_is_warned_of(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        set_keys(folder / name, **{"bos_token": "<|im_start|>"})
    seal(folder)
    check = verify(folder).named("bos of the tokenizer")
    assert check.result == "warning"
    assert "loses the first token of every chunk after an image" in check.detail


def test_what_is_asked_for_is_compared_with_the_folder(whole: Path) -> None:
    found = verify(whole, format="hf", model_type="llava", vision_tower_name="openai/clip")
    assert results(found) == {
        "as asked for": "it is of format llava, --format is hf; its model_type is 'llava_qwen', "
        "--model-type is llava; its mm_vision_tower is 'bases/vision_clip', "
        "--vision-tower-name is openai/clip"
    }
    assert verify(whole, format="llava", model_type="official").passed


def test_what_is_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        verify(tmp_path / "nothing")


def test_a_tokenizer_that_cannot_be_loaded_here_is_still_counted(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 reads tokenizer.model with protobuf, which may not be installed."""
    folder = copy_of(converted("llama_e_full_fullvis", dtype="float16"), tmp_path)
    (folder / "tokenizer.json").unlink()

    def refuse(source: Path, model_type: object) -> Any:
        raise ValueError("requires the protobuf library")

    monkeypatch.setattr(tokenizer_check, "load_tokenizer", refuse)
    monkeypatch.setattr(tokenizer_check, "has_sentencepiece", lambda: False)
    found = verify(folder).named("tokenizer")
    assert found.result == "skipped" and "sentencepiece and protobuf" in found.detail
    (folder / "added_tokens.json").write_text(json.dumps({"more": 10_000}))
    found = verify(folder).named("tokenizer")
    assert found.result == "FAILED" and "has ids up to 10000" in found.detail
    monkeypatch.setattr(tokenizer_check, "has_sentencepiece", lambda: True)
    assert "does not load" in verify(folder).named("tokenizer").detail


def test_logits_need_a_checkpoint(whole: Path) -> None:
    message = r"^logits: needs the checkpoint[^\n]*\n *Give against=CHECKPOINT"
    with pytest.raises(UsageError, match=message):
        verify(whole, logits=True)


@pytest.mark.parametrize("text", ["# Mine\n", "", "{card}\nA sentence more.\n"])
def test_a_card_may_be_edited_and_nothing_else(whole: Path, tmp_path: Path, text: str) -> None:
    folder = copy_of(whole, tmp_path)
    card = folder / "README.md"
    card.write_text(text.replace("{card}", card.read_text()))
    found = verify(folder)
    assert found.passed
    assert "README.md was edited since" in found.named("checksums of small files").detail
    assert "edited" not in verify(whole).named("checksums of small files").detail
    card.write_text(f"{text} /home/ann/models")
    assert verify(folder).named("no local paths").result == "FAILED"
    set_keys(folder / "special_tokens_map.json", x="")
    found = verify(folder)
    assert "special_tokens_map.json is not what" in found.named("checksums of small files").detail
    card.unlink()
    assert "README.md is not there" in verify(folder).named("checksums of small files").detail


def test_options_of_a_checkpoint_need_one(whole: Path) -> None:
    with pytest.raises(UsageError) as error:
        verify(whole, llm="base", weights="module", dtype="float16")
    assert [fault.where for fault in error.value.faults] == ["llm", "weights"]
    assert "without against none is" in error.value.faults[0].what


def test_a_folder_is_held_to_every_option_of_its_output(whole: Path) -> None:
    values = json.loads((whole / "conversion.json").read_text())
    assert "as asked for" not in results(verify(whole, dtype=values["dtype"], bos_token=None))
    other = "bfloat16" if values["dtype"] == "float16" else "float16"
    for options, said in (
        ({"dtype": other}, f"its dtype is {values['dtype']}"),
        ({"include_vision_tower": False}, "the vision tower is in it"),
        ({"bos_token": "<|im_start|>"}, "its bos token is None"),
    ):
        found = verify(whole, **options).named("as asked for")
        assert found.result == "FAILED" and said in found.detail
    with pytest.raises(UsageError, match="trust_remote_code: is for logits=True with against"):
        verify(whole, trust_remote_code=True)


def test_no_libraries_global_state_is_changed(whole: Path) -> None:
    import torch

    before = torch.random.get_rng_state().clone(), torch.get_default_dtype()
    verify(whole)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert torch.get_default_dtype() is before[1]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("vision_config", {"image_size": 10**9}),
        ("text_config", {"model_type": "qwen2_moe", "num_experts": 10**9}),
        ("text_config", {"model_type": "gpt_neo", "num_layers": 10**9}),
    ],
)
def test_a_model_of_any_size_is_not_made(
    converted: Converted, tmp_path: Path, part: str, values: dict[str, Any]
) -> None:
    folder = copy_of(converted("qwen2_e_full_fullvis", format="hf"), tmp_path)
    edit_json(folder / "config.json", lambda config: config[part].update(values))
    check = "tensors of the LLM" if part == "text_config" else "tensors of the vision tower"
    assert results(verify(folder))[check].endswith(" is 1,000,000,000")


def test_a_mean_of_none_is_clips_own(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    set_keys(folder / "preprocessor_config.json", image_mean=None)
    seal(folder)
    assert verify(folder).passed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", [{"file": "x" * 5000}]),
        ("shards", [{"file": ["x"]}, 7]),
        ("shards", [{"file": ".."}]),
        ("files", {"x" * 5000: {"blake3": "x"}}),
        ("files", {"a\0b": 7}),
    ],
)
def test_a_record_of_what_cannot_be_a_file(
    whole: Path, tmp_path: Path, key: str, value: object
) -> None:
    folder = copy_of(whole, tmp_path)
    set_keys(folder / "conversion.json", **{key: value})
    check = "checksums of shards" if key == "shards" else "checksums of small files"
    assert " is not there" in results(verify(folder))[check]


def test_a_transformers_that_is_too_old_for_the_class_skips_what_needs_it(
    whole: Path, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 4.50 is for Qwen3. A `model_type` of no version is a failed check."""
    import transformers

    known = {k: v for k, v in transformers.CONFIG_MAPPING.items() if k != "qwen2"}
    monkeypatch.setattr(transformers, "CONFIG_MAPPING", known)
    found = verify(whole)
    assert found.passed
    skipped = [check.name for check in found.with_result("skipped")]
    assert skipped == ["tensors of the LLM", "tied embeddings"]
    assert "has no model_type 'qwen2'" in found.named("tied embeddings").detail
    folder = copy_of(converted("qwen2_e_full_fullvis", format="hf"), tmp_path)
    edit_json(folder / "config.json", lambda values: values["text_config"].update(model_type="no"))
    assert "has no model_type 'no'" in results(verify(folder))["tensors of the LLM"]


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_on_the_hub_is_not_asked_for(
    converted: Converted, tmp_path: Path, key: str
) -> None:
    """transformers 5 would load its code, where the package `kernels` is installed."""
    folder = copy_of(converted("qwen2_e_full_fullvis", format="hf"), tmp_path)

    def change(config: dict[str, Any]) -> None:
        config["text_config"][key] = config["vision_config"][key] = "some/kernel"

    edit_json(folder / "config.json", change)
    seal(folder)
    assert verify(folder).passed
    kind = plain_model.plain_config({"model_type": "qwen2", key: "some/kernel"})
    assert kind._attn_implementation != "some/kernel"

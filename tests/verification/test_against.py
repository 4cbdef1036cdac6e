"""`verify --against`: every tensor compared with the plan made again, and every damage found."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from damage import copy_of, edit_tensors, exchange, results, seal, set_keys
from reference.cases import CASES, Converted
from xtuner2llava import (
    CheckpointError,
    PlanError,
    UnsupportedError,
    Verification,
    convert,
    verify,
)
from xtuner2llava.planning.plan import PlannedTensor
from xtuner2llava.storage.json_file import Json
from xtuner2llava.storage.safetensors_file import SafetensorsFile
from xtuner2llava.tensors.computed import cast
from xtuner2llava.tensors.dtype import BY_NAME
from xtuner2llava.verification.against import _first_difference, compare

BITS = "every tensor, bit for bit"
TENSORS = "tensors against the checkpoint"
FILES = "small files as planned"


def against(
    checkpoints: Path, folder: Path, case: str, source: str = "iter_2_xtuner", **options: Any
) -> Verification:
    """`folder` against a checkpoint of `case`, by default one that needs no second process."""
    base = CASES[case]
    bases = {"llm": checkpoints / base.llm, "vision": checkpoints / base.vision}
    return verify(folder, against=checkpoints / case / source, **{**bases, **options})


@pytest.fixture(scope="module")
def llama(converted: Converted) -> Path:
    """Everything trained; the LLM is float16 in the checkpoint, the rest float32."""
    return converted("llama_e_full_fullvis", "iter_2_xtuner", dtype="float16")


@pytest.fixture(scope="module")
def lora(converted: Converted) -> Path:
    """LoRA on LLM and tower, merged and rounded to float16."""
    return converted("qwen2_d_lora_vislora", "iter_2_xtuner", dtype="float16")


def test_a_right_folder(checkpoints: Path, llama: Path) -> None:
    found = against(checkpoints, llama, "llama_e_full_fullvis")
    assert results(found) == {}
    assert found.named("tensors against the checkpoint").detail == "105 tensors, by family llama"
    assert found.named(BITS).detail == "30 copied, 75 rounded once, 0 computed"
    assert (
        found.figures["tensors"]["bytes"]
        == sum(  # type: ignore[index, call-overload]
            path.stat().st_size for path in llama.glob("*.safetensors")
        )
        - 8
        - int.from_bytes((llama / "model.safetensors").read_bytes()[:8], "little")
    )


def test_a_right_merge(checkpoints: Path, lora: Path) -> None:
    found = against(checkpoints, lora, "qwen2_d_lora_vislora")
    assert results(found) == {}
    assert found.named(BITS).detail == "0 copied, 69 rounded once, 45 computed"
    assert found.figures["tensors"]["computed"] == 45  # type: ignore[index, call-overload]


LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("change", "check", "says"),
    [
        (
            lambda t: t["model.norm.weight"].view(torch.int16)[5:6].bitwise_xor_(1),
            BITS,
            ("model.norm.weight[5] is ", "; 1 elements differ"),
        ),
        (
            lambda t: exchange(
                t, f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"
            ),
            BITS,
            (f"{LAYER}.self_attn.k_proj.weight[0, 0] is", f"{LAYER}.self_attn.q_proj.weight[0, 0]"),
        ),
        (
            lambda t: t[f"{LAYER}.mlp.down_proj.weight"][63, 111:].neg_(),
            BITS,
            (f"{LAYER}.mlp.down_proj.weight[63, 111] is ", "; 1 elements differ"),
        ),
        (
            lambda t: t.update({f"{LAYER}.input_layernorm.weight": torch.zeros(64)}),
            TENSORS,
            (f"{LAYER}.input_layernorm.weight is float32 [64], expected float16 [64]",),
        ),
        (
            lambda t: t.update({"model.image_newline": torch.zeros(64).half()}),
            TENSORS,
            ("model.image_newline is not in the plan",),
        ),
        (
            lambda t: t.pop("model.mm_projector.2.bias"),
            TENSORS,
            ("model.mm_projector.2.bias is missing",),
        ),
        (
            lambda t: t["lm_head.weight"][7, 8:9].fill_(float("nan")),
            BITS,
            ("lm_head.weight[7, 8] is nan",),
        ),
    ],
)
def test_damage_to_tensors_is_named(
    checkpoints: Path,
    llama: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    check: str,
    says: tuple[str, ...],
) -> None:
    folder = copy_of(llama, tmp_path)
    edit_tensors(folder, change)
    seal(folder)
    found = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    for text in says:
        assert text in found[check]


def test_one_unit_in_a_merge(checkpoints: Path, lora: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = copy_of(lora, tmp_path)
    edit_tensors(folder, lambda t: t[name].view(torch.int16)[3, 4:5].add_(1))
    seal(folder)
    found = against(checkpoints, folder, "qwen2_d_lora_vislora")
    assert f"{name}[3, 4] is " in results(found)[BITS]
    assert "; 1 elements differ" in results(found)[BITS]


def test_a_merge_of_the_wrong_scale(checkpoints: Path, converted: Converted, lora: Path) -> None:
    wrong = converted("qwen2_d_lora_vislora", "iter_2_xtuner", dtype="float16", lora_alpha=64.0)
    found = results(against(checkpoints, wrong, "qwen2_d_lora_vislora"))
    assert "model.layers.0.self_attn.q_proj.weight[0, 0] is" in found[BITS]
    # With the same wrong scale it is what was asked for.
    assert against(checkpoints, wrong, "qwen2_d_lora_vislora", lora_alpha=64.0).passed
    assert not against(checkpoints, lora, "qwen2_d_lora_vislora", vision_lora_alpha=1.0).passed


def test_another_checkpoint(checkpoints: Path, llama: Path) -> None:
    found = results(against(checkpoints, llama, "llama_b_full_frozenvis"))
    assert "model.embed_tokens.weight[" in found[BITS]


def test_another_base(checkpoints: Path, converted: Converted, tmp_path: Path) -> None:
    folder = converted("qwen2_a_pretrain", "iter_2_xtuner", dtype="float16")
    base = Path(shutil.copytree(checkpoints / "bases/llm_qwen2", tmp_path / "base"))
    assert against(checkpoints, folder, "qwen2_a_pretrain", llm=base).passed
    edit_tensors(base, lambda t: t["model.norm.weight"][0:1].add_(0.5))
    found = results(against(checkpoints, folder, "qwen2_a_pretrain", llm=base))
    assert "model.norm.weight[0] is" in found[BITS]


def test_the_dtype_is_the_recorded_one_unless_asked_for(checkpoints: Path, llama: Path) -> None:
    found = results(against(checkpoints, llama, "llama_e_full_fullvis", dtype="bfloat16"))
    assert "is float16 [384, 64], expected bfloat16 [384, 64]" in found[TENSORS]
    assert 'torch_dtype is "float16", planned is "bfloat16"' in found[FILES]
    assert against(checkpoints, llama, "llama_e_full_fullvis", dtype="float16").passed


def test_dtypes_as_stored(checkpoints: Path, converted: Converted) -> None:
    folder = converted("llama_e_full_fullvis", "iter_2_xtuner", dtype="keep")
    found = against(checkpoints, folder, "llama_e_full_fullvis")
    assert results(found) == {}
    assert found.named(BITS).detail == "105 copied, 0 rounded once, 0 computed"


def test_without_the_tower(checkpoints: Path, converted: Converted) -> None:
    case = "llama_b_full_frozenvis"
    folder = converted(case, "iter_2_xtuner", include_vision_tower=False)
    right = against(checkpoints, folder, case, include_vision_tower=False)
    assert results(right) == {}
    assert right.named("vision tower in the folder").result == "warning"
    found = results(against(checkpoints, folder, case))
    assert (
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding is missing"
        in found[TENSORS]
    )


# Small files, whose checksums are sealed.


def test_a_replaced_tokenizer_of_the_same_size(
    checkpoints: Path, llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama, tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[300], list(vocab)[301]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    seal(folder)
    assert verify(folder).passed
    found = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    assert f"tokenizer.json: model.vocab.{one} is 301, planned is 300" in found[FILES]


def test_another_image_processor(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    set_keys(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    seal(folder)
    assert verify(folder).passed
    found = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    assert "preprocessor_config.json: image_mean.0 is 0.5, planned is 0.48" in found[FILES]


def test_a_tokenizer_that_was_given_a_bos(checkpoints: Path, converted: Converted) -> None:
    case = "qwen2_e_full_fullvis"
    folder = converted(case, "iter_2_xtuner", **{"bos_token": "<|im_start|>"})
    assert against(checkpoints, folder, case, **{"bos_token": "<|im_start|>"}).passed
    found = results(against(checkpoints, folder, case))
    assert 'bos_token is "<|im_start|>", planned is null' in found[FILES]


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt"])
def test_small_files_are_compared(
    checkpoints: Path, converted: Converted, tmp_path: Path, name: str
) -> None:
    folder = copy_of(converted("qwen2_e_full_fullvis", "iter_2_xtuner"), tmp_path)
    if name == "merges.txt":
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([*lines[:-2], lines[-1], lines[-2], ""]))
    elif name == "vocab.json":
        (folder / name).unlink()
    else:
        set_keys(folder / name, rope_theta=10.0)
    seal(folder)
    said = results(against(checkpoints, folder, "qwen2_e_full_fullvis"))[FILES]
    expected = {
        "config.json": "config.json: rope_theta is 10.0, planned is 1000000.0",
        "vocab.json": "vocab.json is missing",
        "merges.txt": "merges.txt differs from byte ",
    }
    assert expected[name] in said


@pytest.mark.parametrize(
    ("name", "planned"),
    [
        ("/data/me/clip", "clip"),
        ("~/clip/", "clip"),
        ("C:\\me\\clip", "clip"),
        ("", "bases/vision_clip"),
        ("  ", "bases/vision_clip"),
    ],
)
def test_a_tower_set_for_one_machine_is_a_failed_check(
    checkpoints: Path, llama: Path, tmp_path: Path, name: str, planned: str
) -> None:
    """Users set it to load the tower from a folder; `convert` does not write that."""
    folder = copy_of(llama, tmp_path)
    set_keys(folder / "config.json", mm_vision_tower=name)
    seal(folder)
    said = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    written, expected = json.dumps(name), json.dumps(planned)
    assert said[FILES] == f"config.json: mm_vision_tower is {written}, planned is {expected}"
    assert "mm_vision_tower" in said


def test_a_recorded_dtype_that_is_none_is_a_failed_check(
    checkpoints: Path, llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama, tmp_path)
    set_keys(folder / "conversion.json", dtype="float3")
    said = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    assert said == {"record and config": "the record says dtype 'float3', the config 'float16'"}


# What cannot be compared.


def test_a_damaged_folder_is_not_compared(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    found = against(checkpoints, folder, "llama_e_full_fullvis", logits=True)
    assert found.named("tensors against the checkpoint").result == "skipped"
    assert not found.passed


def test_what_is_not_a_checkpoint(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="an empty folder"):
        verify(llama, against=tmp_path)
    (tmp_path / "x.pth").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match=r"x\.pth: starts as a checkpoint"):
        verify(llama, against=tmp_path / "x.pth")
    with pytest.raises(PlanError, match="'nowhere/to/be' is not a folder here"):
        against(checkpoints, llama, "llama_e_full_fullvis", llm="nowhere/to/be")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_a_hostile_pickle_is_refused_and_not_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"projector.model.0.bias": torch.zeros(1)}, "x": Evil()}, "e.pth")
    with pytest.raises(CheckpointError, match=r"its pickle imports 'pathlib\.Path'"):
        verify(llama, against="e.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_wrong_row_of_a_fused_tensor(checkpoints: Path, tmp_path: Path) -> None:
    """Rows dealt out in thirds instead of by groups."""
    source = KINDS["internlm2"].make(tmp_path / "model", bos_token_id=1, eos_token_id=2)
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    out = tmp_path / "llava-internlm2"
    convert(trained.checkpoint, out, dtype="float32", **trained.bases)
    assert verify(out, against=trained.checkpoint, **trained.bases).passed
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]

    def deal(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (tensors[names[0]][i].clone() for i in (0, 16))
        tensors[names[0]][0], tensors[names[0]][16] = second, first

    edit_tensors(out, deal)
    seal(out)
    found = results(verify(out, against=trained.checkpoint, **trained.bases))
    assert f"{names[0]}[0, 0] is" in found[BITS]
    assert "; 128 elements differ" in found[BITS]


def test_all_tensors_that_differ_are_named_with_any_number_of_jobs(
    checkpoints: Path, llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama, tmp_path)
    names = ["lm_head.weight", "model.norm.weight", "model.mm_projector.0.bias"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name] += 1

    edit_tensors(folder, change)
    seal(folder)
    said = [
        results(against(checkpoints, folder, "llama_e_full_fullvis", jobs=jobs))[BITS]
        for jobs in (1, 4)
    ]
    assert said[0] == said[1]
    assert all(name in said[0] for name in names)


def test_what_is_missing_is_found_before_data_is_read(
    checkpoints: Path, llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(llama, tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    seal(folder)
    read = []
    found = against(
        checkpoints,
        folder,
        "llama_e_full_fullvis",
        on_progress=lambda stage, done, total: read.append((stage, done, total)),
    )
    # What is there is still compared, and the progress is of that.
    assert results(found)[TENSORS] == "lm_head.weight is missing"
    assert BITS not in results(found)
    size = found.figures["tensors"]["bytes"]  # type: ignore[index, call-overload]
    assert read[-1] == ("compare", size, size)


@pytest.mark.parametrize(("stored", "differs"), [("float16", False), ("float32", True)])
def test_which_nan_counts_only_in_copies(tmp_path: Path, stored: str, differs: bool) -> None:
    """Rounded, it depends on the processor, and on where a block ends."""
    from safetensors.torch import save_file

    values = torch.tensor([1.0, math.nan, 2.0])
    other = values.view(torch.int32).bitwise_or(1).where(values.isnan(), values.view(torch.int32))
    save_file({"w": other.view(torch.float32)}, tmp_path / "out.safetensors")
    save_file({"w": values.to(getattr(torch, stored))}, tmp_path / "source.safetensors")
    found, source = (
        SafetensorsFile(tmp_path / f"{name}.safetensors").tensors for name in ("out", "source")
    )
    planned = PlannedTensor("w", "llm", cast(source["w"], BY_NAME["float32"]), ("w",), "", "copy")
    assert compare(found, [planned]) == (
        ["w[1] is nan, expected nan; 1 elements differ"] if differs else []
    )


def test_a_hostile_file_is_compared_in_the_memory_of_its_size(
    checkpoints: Path, llama: Path, tmp_path: Path
) -> None:
    """A path to each of its values would take gigabytes."""
    folder = copy_of(llama, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"k" * 400_000: [0] * 50_000}))
    tracemalloc.start()
    found = against(checkpoints, folder, "llama_e_full_fullvis")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "generation_config.json: bos_token_id is null, planned is 1" in results(found)[FILES]
    assert most < 100 << 20


def test_the_first_value_that_differs() -> None:
    there: Json = {"a": {"b": [1, {"c": True}]}, "n": 1, "x": [1, 2]}
    assert _first_difference(there, json.loads(json.dumps(there))) is None
    for planned, found in (
        ({**there, "n": 1.0}, ("n", "1", "1.0")),
        ({**there, "n": True}, ("n", "1", "true")),
        ({**there, "x": [1]}, ("x.1", "2", "null")),
        ({**there, "x": {}}, ("x", "[1, 2]", "{}")),
        ({**there, "a": {"b": [1, {"c": False}]}}, ("a.b.1.c", "true", "false")),
        ({**there, "long": "y" * 100}, ("long", "null", f'"{"y" * 56}...')),
    ):
        assert _first_difference(there, planned) == found

"""`verify --against`: every tensor recomputed by another path, and every way to be wrong found."""

from __future__ import annotations

import ast
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS
from builders.zero import ZeroRun
from damage import copy_of, edit_tensors, exchange, results, seal, set_keys
from reference.cases import CASES, Converted
from xtuner2llava import CheckpointError, UsageError, Verification, convert, verify
from xtuner2llava.options import Options
from xtuner2llava.verification.recomputed.comparison import (
    Comparison,
    unit_in_the_last_place,
)
from xtuner2llava.verification.recomputed.files import FileTensor
from xtuner2llava.verification.recomputed.opening import open_trained
from xtuner2llava.verification.recomputed.weight import Block, Weight

BITS = "copied and rounded, bit for bit"
MERGED = "merged and computed, against float64"


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
    assert found.named(BITS).detail == "30 copied, 75 rounded once"
    assert found.named(MERGED).result == "skipped"
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
    figures: Any = found.figures["tensors"]
    assert figures["computed"] == 45
    # Half a unit is what rounding costs; a float32 sum may tip a value that is nearly between two.
    assert 0.499 < figures["max_ulp"] < 0.501
    assert figures["not_nearest"] < figures["computed_elements"] / 1000
    assert "largest error 0.500" in found.named(MERGED).detail


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
            BITS,
            (f"{LAYER}.input_layernorm.weight is torch.float32 [64], expected torch.float16 [64]",),
        ),
        (
            lambda t: t.update({"model.image_newline": torch.zeros(64).half()}),
            "tensors against the checkpoint",
            ("model.image_newline is not made of the checkpoint",),
        ),
        (
            lambda t: t.pop("model.mm_projector.2.bias"),
            "tensors against the checkpoint",
            ("projector: 2.bias is missing",),
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
    assert f"{name}[3, 4] is " in results(found)[MERGED]
    assert "; 1 elements differ" in results(found)[MERGED]
    assert 0.5 < found.figures["tensors"]["max_ulp"] < 1.5  # type: ignore[index, call-overload, operator]


def test_a_merge_of_the_wrong_scale(checkpoints: Path, converted: Converted, lora: Path) -> None:
    wrong = converted("qwen2_d_lora_vislora", "iter_2_xtuner", dtype="float16", lora_alpha=64.0)
    found = results(against(checkpoints, wrong, "qwen2_d_lora_vislora"))
    assert "model.layers.0.mlp.down_proj.weight[0, 0] is" in found[MERGED]
    # With the same wrong scale it is what was asked for.
    assert against(checkpoints, wrong, "qwen2_d_lora_vislora", lora_alpha=64.0).passed
    assert not against(checkpoints, lora, "qwen2_d_lora_vislora", vision_lora_alpha=1.0).passed


def test_another_checkpoint(checkpoints: Path, llama: Path) -> None:
    found = results(against(checkpoints, llama, "llama_b_full_frozenvis"))
    assert "lm_head.weight[" in found[BITS]


def test_another_base(checkpoints: Path, converted: Converted, tmp_path: Path) -> None:
    folder = converted("qwen2_a_pretrain", "iter_2_xtuner", dtype="float16")
    base = Path(shutil.copytree(checkpoints / "bases/llm_qwen2", tmp_path / "base"))
    assert against(checkpoints, folder, "qwen2_a_pretrain", llm=base).passed
    edit_tensors(base, lambda t: t["model.norm.weight"][0:1].add_(0.5))
    found = results(against(checkpoints, folder, "qwen2_a_pretrain", llm=base))
    assert "model.norm.weight[0] is" in found[BITS]


def test_the_dtype_is_the_recorded_one_unless_asked_for(checkpoints: Path, llama: Path) -> None:
    found = results(against(checkpoints, llama, "llama_e_full_fullvis", dtype="bfloat16"))
    assert (
        "lm_head.weight is torch.float16 [384, 64], expected torch.bfloat16 [384, 64]"
        in found[BITS]
    )
    assert against(checkpoints, llama, "llama_e_full_fullvis", dtype="float16").passed


def test_dtypes_as_stored(checkpoints: Path, converted: Converted) -> None:
    folder = converted("llama_e_full_fullvis", "iter_2_xtuner", dtype="keep")
    found = against(checkpoints, folder, "llama_e_full_fullvis")
    assert results(found) == {}
    assert found.named(BITS).detail == "105 copied, 0 rounded once"


def test_without_the_tower(checkpoints: Path, converted: Converted) -> None:
    case = "llama_b_full_frozenvis"
    folder = converted(case, "iter_2_xtuner", include_vision_tower=False)
    right = against(checkpoints, folder, case, include_vision_tower=False)
    assert results(right) == {}
    assert right.named("vision tower in the folder").result == "warning"
    found = results(against(checkpoints, folder, case))
    assert (
        "visual_encoder: vision_model.embeddings.class_embedding is missing"
        in (found["tensors against the checkpoint"])
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
    assert f"token {one!r} has id 301, the base's 300" in found["tokenizer as the base's"]


def test_another_image_processor(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    set_keys(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    seal(folder)
    assert verify(folder).passed
    found = results(against(checkpoints, folder, "llama_e_full_fullvis"))
    assert (
        "image_mean is [0.5, 0.5, 0.5], the base's [0.48" in found["image processor as the base's"]
    )


def test_a_tokenizer_that_was_given_a_bos(checkpoints: Path, converted: Converted) -> None:
    case = "qwen2_e_full_fullvis"
    folder = converted(case, "iter_2_xtuner", **{"bos_token": "<|im_start|>"})
    found = against(checkpoints, folder, case)
    assert found.passed
    assert "changed; same tokens, same splitting" in found.named("tokenizer as the base's").detail


# What cannot be compared.


def test_a_damaged_folder_is_not_compared(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    found = against(checkpoints, folder, "llama_e_full_fullvis", logits=True)
    assert found.named("tensors against the checkpoint").result == "skipped"
    assert not found.passed


def test_what_is_no_checkpoint(checkpoints: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no checkpoint of XTuner"):
        verify(llama, against=tmp_path)
    (tmp_path / "x.pth").write_bytes(b"PK nothing")
    with pytest.raises(CheckpointError, match=r"x\.pth: torch.load refuses it"):
        verify(llama, against=tmp_path / "x.pth")
    with pytest.raises(UsageError, match=r"^llm: 'nowhere/to/be' is no folder here"):
        against(checkpoints, llama, "llama_e_full_fullvis", llm="nowhere/to/be")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_a_hostile_pickle_is_refused_and_not_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"projector.model.0.bias": torch.zeros(1)}, "x": Evil()}, "e.pth")
    with pytest.raises(CheckpointError, match=r"its pickle asks for pathlib\.Path"):
        verify(llama, against="e.pth")
    assert not (tmp_path / "pwned").exists()


# The families, whose rules are read and applied a second time.


@pytest.fixture(scope="module")
def family(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path
) -> Callable[..., tuple[Trained, Path, dict[str, Any]]]:
    """A kind's checkpoint as an XTuner folder, its conversion, and what else verifies it."""

    def make(kind: str, **options: Any) -> tuple[Trained, Path, dict[str, Any]]:
        from safetensors.torch import save_file

        folder = tmp_path_factory.mktemp("family")
        source = KINDS[kind].make(folder / "model", bos_token_id=1, eos_token_id=2, pad_token_id=0)
        trained = write_trained(folder / "trained", source, checkpoints)
        # As safetensors, which are opened without a second process.
        home = folder / "iter_1_xtuner"
        (home / "projector").mkdir(parents=True)
        state = torch.load(trained.checkpoint, weights_only=True)["state_dict"]
        parts = {"llm.": home, "projector.": home / "projector"}
        for prefix, place in parts.items():
            tensors = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}
            save_file(tensors, place / "model.safetensors", {"format": "pt"})
            shutil.copy(trained.llm / "config.json", place)
        # The same bases, so that the LLM's config is not that of the folder.
        out = folder / f"llava-{kind}"
        bases = {"llm": trained.llm, "vision": trained.vision}
        convert(home, out, vision_tower_name="openai/x", **bases, **options)
        return trained, out, {"against": home, **bases}

    return make


FAMILIES = [name for name in KINDS if name not in ("llama_3_1", "qwen3", "gemma", "qwen2_moe")]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_comes_to_the_same(kind: str, family: Any) -> None:
    _, out, given = family(kind, dtype="bfloat16")
    found = verify(out, **given)
    wrong = {name: text for name, text in results(found).items() if name != "folder name"}
    assert wrong == {}
    if kind == "baichuan2":
        assert "1 tensors, largest error 0.50" in found.named(MERGED).detail


def test_a_wrong_row_of_a_fused_tensor(family: Any) -> None:
    """Rows dealt out in thirds instead of by groups: what the mapping's meaning is about."""
    _, out, given = family("internlm2", dtype="float32")
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]

    def deal(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (tensors[names[0]][i].clone() for i in (0, 16))
        tensors[names[0]][0], tensors[names[0]][16] = second, first

    edit_tensors(out, deal)
    seal(out)
    found = results(verify(out, **given))
    assert f"{names[0]}[0, 0] is" in found[BITS]
    assert "; 128 elements differ" in found[BITS]


# DeepSpeed directories of every shape, cut by an independent builder.


@pytest.mark.parametrize(("stage", "ranks", "sub_group"), [(2, 1, 99), (1, 3, 99), (3, 4, 9)])
def test_deepspeed_parameters(tmp_path: Path, stage: int, ranks: int, sub_group: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    run = ZeroRun(
        groups=[
            {"llm.a.weight": some(5, 3), "projector.model.0.bias": some(7)},
            {"llm.b.weight": some(2, 2, 2), "projector.model.0.weight": some(1)},
        ],
        stage=stage,
        ranks=ranks,
        frozen={"visual_encoder.vision_model.f.weight": some(3, 3)},
        shared={"llm.c.weight": "llm.a.weight"},
        sub_group=sub_group,
    )
    path = run.save(tmp_path / "iter_2.pth")
    for name in ("llm", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    options = Options(llm=tmp_path / "llm", vision=tmp_path / "clip")
    trained = open_trained(str(path), options)
    found = {
        f"{part}.{name}": weight
        for part, weights in trained.weights.items()
        for name, weight in weights.items()
    }
    assert set(found) == set(run.dense)
    for name, expected in run.dense.items():
        assert torch.equal(found[name].whole().value, expected), name
        last = found[name].count - 1
        assert torch.equal(found[name].read(last, last + 1).value, expected[last:]), name


def test_units_in_the_last_place() -> None:
    values = torch.tensor([1.0, 1.5, -2.0, 0.75, 0.0, 1e-30], dtype=torch.float64)
    assert unit_in_the_last_place(values, torch.float16).tolist() == [
        2.0**-10, 2.0**-10, 2.0**-9, 2.0**-11, 2.0**-24, 2.0**-24,
    ]  # fmt: skip
    assert unit_in_the_last_place(values, torch.bfloat16).tolist()[:4] == [
        2.0**-7, 2.0**-7, 2.0**-6, 2.0**-8,
    ]  # fmt: skip
    assert unit_in_the_last_place(values, torch.float32)[5] == 2.0**-123


@pytest.mark.parametrize(("stored", "differs"), [(torch.float16, False), (torch.float32, True)])
def test_which_nan_counts_only_in_copies(stored: torch.dtype, differs: bool) -> None:
    """Rounded, it depends on the processor, and on where a block ends."""
    values = torch.tensor([1.0, math.nan, 2.0])
    other = values.view(torch.int32).bitwise_or(1).where(values.isnan(), values.view(torch.int32))
    written = FileTensor((3,), torch.float32, lambda a, b: other.view(torch.float32)[a:b])
    weight = Weight((3,), stored, False, lambda a, b: Block(values.to(stored)[a:b]))
    found = Comparison()
    found.add("w", written, weight, torch.float32, lambda count: None)
    assert found.faults == (["w[1] is nan, expected nan; 1 elements differ"] if differs else [])


def test_nothing_that_converts_takes_part() -> None:
    """What the verification imports of the rest of the package, statement by statement."""
    import xtuner2llava.errors

    package = Path(xtuner2llava.errors.__file__).parent
    shared = (
        "xtuner2llava.errors",
        "xtuner2llava.options",
        "xtuner2llava.recipe",
        "xtuner2llava.sources.hub",
        "xtuner2llava.sources.json_file",
        "xtuner2llava.verification",
    )
    modules = list((package / "verification").rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                if name.startswith("xtuner2llava"):
                    assert name.startswith(shared), f"{path.name} imports {name}"

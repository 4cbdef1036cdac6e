"""What `convert` writes is what the oracle computes, for every checkpoint, format and dtype.

`verify --against` makes the same plan again, so an error in the plan passes there. Here it does
not: the second half of this module puts errors into the product, one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from builders.zero import ZeroRun
from damage import results
from oracle.expected import expected, faults, unit_in_the_last_place
from oracle.reading import read_alphas, read_checkpoint
from reference.cases import CASES, Converted
from xtuner2llava import convert, verify

DTYPES = ("float16", "bfloat16", "float32", "keep")


@cache
def of_case(checkpoints: Path, case: str, source: str, **options: Any) -> dict[str, torch.Tensor]:
    base = CASES[case]
    return expected(
        checkpoints / case / source,
        checkpoints / base.llm,
        checkpoints / base.vision,
        read_alphas(checkpoints / case / "iter_2_xtuner"),
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["llava", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_every_checkpoint(
    checkpoints: Path, converted: Converted, case: str, format: str, dtype: str
) -> None:
    folder = converted(case, format=format, dtype=dtype)
    wanted = of_case(checkpoints, case, "iter_2.pth", hf=format == "hf")
    assert len(wanted) > 100
    assert faults(folder, wanted, dtype) == []


@pytest.mark.parametrize("dtype", ["float16", "keep"])
@pytest.mark.parametrize("case", CASES)
def test_every_exported_folder(
    checkpoints: Path, converted: Converted, case: str, dtype: str
) -> None:
    folder = converted(case, "iter_2_xtuner", dtype=dtype)
    assert faults(folder, of_case(checkpoints, case, "iter_2_xtuner"), dtype) == []


TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\n\ta tab, 1234567890 and 3.14!",
    "naïve café — “quotes” … 你好 世界 🙂",
    "def f(x): return x ** 2  # comment",
)


@pytest.mark.parametrize("format", ["llava", "hf"])
@pytest.mark.parametrize("case", ["qwen2_b_full_frozenvis", "llama_d_lora_vislora"])
def test_tokenizer_and_image_processor(
    checkpoints: Path, converted: Converted, case: str, format: str
) -> None:
    from tokenizers import Tokenizer

    folder, base = converted(case, dtype="float16", format=format), CASES[case]
    ours, theirs = (
        Tokenizer.from_file(str(place / "tokenizer.json"))
        for place in (folder, checkpoints / base.llm)
    )
    assert theirs.get_vocab().items() <= ours.get_vocab().items()
    for text in TEXTS:
        # Without special tokens: whether a bos is added is the prompt's matter in `hf`.
        found_ids, ids = (t.encode(text, add_special_tokens=False).ids for t in (ours, theirs))
        assert found_ids == ids
    found, wanted = (
        json.loads((place / "preprocessor_config.json").read_text())
        for place in (folder, checkpoints / base.vision)
    )
    keys = ("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor")
    assert all(found.get(key) == wanted.get(key) for key in keys)


BINS = ["qwen2_b_full_frozenvis", "qwen2_d_lora_vislora", "llama_d_lora_vislora"]


@pytest.mark.parametrize("case", BINS)
def test_folders_of_bin_files(checkpoints: Path, converted: Converted, case: str) -> None:
    folder = converted(case, "iter_2_xtuner_bin", dtype="float16")
    assert faults(folder, of_case(checkpoints, case, "iter_2_xtuner_bin"), "float16") == []


@pytest.mark.parametrize("case", ["qwen2_f_zero2_full"])
def test_the_module_weights_of_deepspeed(
    checkpoints: Path, converted: Converted, case: str
) -> None:
    folder = converted(case, dtype="keep", weights="module")
    assert faults(folder, of_case(checkpoints, case, "iter_2.pth", masters=False), "keep") == []
    assert faults(folder, of_case(checkpoints, case, "iter_2.pth"), "keep") != []


def test_shards(checkpoints: Path, converted: Converted) -> None:
    case = "qwen2_e_full_fullvis"
    folder = converted(case, dtype="float16", max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert faults(folder, of_case(checkpoints, case, "iter_2.pth"), "float16") == []


HF_ONLY = ("llama_3_1", "phi3_long", "qwen3", "gemma", "qwen2_moe")


def make_family(folder: Path, checkpoints: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a family, and its base models."""
    source = KINDS[kind].make(folder / "model", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    trained = write_trained(folder / "trained", source, checkpoints)
    return trained.checkpoint, trained.bases


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    import transformers

    hf = kind in HF_ONLY
    if not (KINDS[kind].shapes or hasattr(transformers, KINDS[kind].architecture)):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    checkpoint, bases = make_family(tmp_path, checkpoints, kind)
    out = tmp_path / f"llava-{kind}"
    format = "hf" if hf else "llava"
    convert(checkpoint, out, dtype="bfloat16", format=format, **bases)
    wanted = expected(checkpoint, bases["llm"], bases["vision"], {}, hf=hf)
    assert faults(out, wanted, "bfloat16") == []


# Errors in the plan, which `verify --against` makes again and does not see.


def _merge_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner2llava.tensors.lora import Merge

    right = Merge.__init__

    def wrong(self: Merge, weight: Any, left: Any, right_: Any, scale: float, *rest: Any) -> None:
        right(self, weight, left, right_, 2 * scale, *rest)

    monkeypatch.setattr(Merge, "__init__", wrong)


def _truncate(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(source: torch.Tensor, target: torch.Tensor) -> None:
        bits = source.float().view(torch.int32) & ~0xFFFF
        target.copy_(bits.view(torch.float32))

    monkeypatch.setattr("xtuner2llava.writing.blocks.round_into", wrong)


def _normalize_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner2llava.tensors.computed import Normalize

    def wrong(self: Normalize, start: int, stop: int, out: torch.Tensor) -> None:
        self._source.read_into(start, stop, out)

    monkeypatch.setattr(Normalize, "read_into", wrong)


def _groups_as_thirds(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner2llava.mapping import rules
    from xtuner2llava.tensors.rows import split

    def wrong(tensor: Any, groups: int, slots: Any) -> Any:
        return split(tensor, [groups * slot for slot in slots])

    monkeypatch.setattr(rules, "deinterleave", wrong)


def _ranks_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner2llava.sources import zero_directory

    right = zero_directory._rank_files

    def wrong(path: Path) -> Any:
        models, optimizers = right(path)
        return models, optimizers[::-1]

    monkeypatch.setattr(zero_directory, "_rank_files", wrong)
    monkeypatch.setattr(zero_directory, "_check_ranks", lambda *given: 3)


def _wrong_mapping(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nfamily: mine\nextends: llama\ntensors:\n"
        "  - for: {i: num_hidden_layers}\n    from: model.layers.{i}.mlp\n"
        "    to: model.layers.{i}.mlp\n    rules:\n"
        "      - rename: {gate_proj.weight: up_proj.weight, up_proj.weight: gate_proj.weight}\n"
    )
    return path


@pytest.mark.parametrize(
    ("error", "case", "differs"),
    [
        (_merge_twice, "qwen2_d_lora_vislora", "self_attn.q_proj.weight is "),
        (_truncate, "llama_e_full_fullvis", "lm_head.weight is not what was stored"),
        (_ranks_exchanged, "qwen2_f_zero3_full", "lm_head.weight is not what was stored"),
    ],
)
def test_an_error_in_the_product_is_seen_here(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[pytest.MonkeyPatch], None],
    case: str,
    differs: str,
) -> None:
    error(monkeypatch)
    out, source = tmp_path / f"llava-{case.partition('_')[0]}", checkpoints / case / "iter_2.pth"
    options = {**CASES[case].options(checkpoints), "dtype": "bfloat16"}
    convert(source, out, **options)
    assert results(verify(out, against=source, **options)) == {}
    found = faults(out, of_case(checkpoints, case, "iter_2.pth"), "bfloat16")
    assert any(differs in text for text in found)


@pytest.mark.parametrize(
    ("error", "kind", "differs"),
    [
        (_normalize_nothing, "baichuan2", "lm_head.weight is "),
        (_groups_as_thirds, "internlm2_early", "self_attn.q_proj.weight is not what was stored"),
    ],
)
def test_an_error_in_a_verb_is_seen_here(
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    differs: str,
) -> None:
    checkpoint, bases = make_family(tmp_path, checkpoints, kind)
    error(monkeypatch)
    out = tmp_path / "llava-llama"
    convert(checkpoint, out, dtype="float32", **bases)
    assert results(verify(out, against=checkpoint, **bases)) == {}
    found = faults(out, expected(checkpoint, bases["llm"], bases["vision"], {}), "float32")
    assert any(differs in text for text in found)


def test_a_wrong_mapping_is_seen_here(checkpoints: Path, tmp_path: Path) -> None:
    case, out = "llama_e_full_fullvis", tmp_path / "llava-llama"
    source = checkpoints / case / "iter_2.pth"
    options = {**CASES[case].options(checkpoints), "mapping": _wrong_mapping(tmp_path)}
    convert(source, out, dtype="float16", **options)
    assert results(verify(out, against=source, **options)) == {}
    found = faults(out, of_case(checkpoints, case, "iter_2.pth"), "float16")
    wrong = [f"model.layers.{n}.mlp.{p}_proj.weight" for n in range(3) for p in ("gate", "up")]
    assert sorted(text.split(" ")[0] for text in found) == sorted(wrong)


# The oracle itself.


@pytest.mark.parametrize(("stage", "ranks", "sub_group"), [(2, 1, 99), (1, 3, 99), (3, 4, 9)])
def test_deepspeed_parameters(tmp_path: Path, stage: int, ranks: int, sub_group: int) -> None:
    """Cut by an independent builder."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    made = ZeroRun(
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
    found = read_checkpoint(made.save(tmp_path / "iter_2.pth"))
    assert set(found) == set(made.dense)
    assert all(torch.equal(found[name], tensor) for name, tensor in made.dense.items())


def test_units_in_the_last_place() -> None:
    values = torch.tensor([1.0, 1.5, -2.0, 0.75, 0.0, 1e-30], dtype=torch.float64)
    assert unit_in_the_last_place(values, torch.float16).tolist() == [
        2.0**-10, 2.0**-10, 2.0**-9, 2.0**-11, 2.0**-24, 2.0**-24,
    ]  # fmt: skip
    assert unit_in_the_last_place(values, torch.bfloat16).tolist()[:4] == [
        2.0**-7, 2.0**-7, 2.0**-6, 2.0**-8,
    ]  # fmt: skip
    assert unit_in_the_last_place(values, torch.float32)[5] == 2.0**-123


def test_one_unit_is_seen(checkpoints: Path, converted: Converted, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case, name = "qwen2_d_lora_vislora", "model.layers.0.self_attn.q_proj.weight"
    right = converted(case, "iter_2_xtuner", dtype="float16")
    wrong = Path(shutil.copytree(right, tmp_path / "wrong"))
    tensors = load_file(wrong / "model.safetensors")
    tensors[name].view(torch.int16)[3, 4] += 1
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    (said,) = faults(wrong, of_case(checkpoints, case, "iter_2_xtuner"), "float16")
    assert said.startswith(f"{name} is ")
    assert said.endswith("units from what it must be")


def test_it_imports_nothing_of_the_product() -> None:
    for module in ("reading", "plain", "expected"):
        assert "xtuner2llava" not in (Path(__file__).parent / f"{module}.py").read_text()


def test_the_alphas_are_those_of_the_config(checkpoints: Path) -> None:
    found = read_alphas(checkpoints / "qwen2_d_lora_vislora/iter_2_xtuner")
    assert found == {"llm": 32.0, "visual_encoder": 16.0}
    assert json.loads((checkpoints / "bases/llm_qwen2/config.json").read_text())["architectures"]

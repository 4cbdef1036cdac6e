"""`verify --reference`: logits that the real model's own code made, and every way to differ."""

from __future__ import annotations

import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest

from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS
from damage import copy_of, edit_tensors, exchange, results, seal, set_keys
from reference.cases import CASES, Converted, read_reference
from xtuner2llava import UsageError, convert, verify

CHECK = "logits against the reference"
PAGE = Path(__file__).parents[2] / "docs/mappings.md"
REMOTE = Path(__file__).parents[1] / "data" / "remote_qwen"


def write_npz(path: Path, **arrays: Any) -> Path:
    numpy.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def made(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """A Qwen 1 whose class lies beside its base, and the file that the page's lines make of it."""
    folder = tmp_path_factory.mktemp("reference")
    source = KINDS["qwen"].make(folder / "m", bos_token_id=361, eos_token_id=360)
    trained = write_trained(folder / "trained", source, checkpoints)
    for path in REMOTE.glob("*.py"):
        shutil.copy(path, trained.llm)
    classes = {
        "AutoConfig": "configuration_tiny_qwen.TinyQwenConfig",
        "AutoModelForCausalLM": "modeling_tiny_qwen.TinyQwenLMHeadModel",
    }
    set_keys(trained.llm / "config.json", auto_map=classes)
    from safetensors.torch import save_file

    save_file(
        {name: tensor * 0 for name, tensor in source.tensors.items()},
        trained.llm / "model.safetensors",
        {"format": "pt"},
    )
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = code.replace('"demo/base-qwen2"', repr(str(trained.llm)))
    code = code.replace('"demo/iter_2.pth"', repr(str(trained.checkpoint)))
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "cache"))
        patch.setattr(sys, "path", [*sys.path])
        exec(code, {})  # noqa: S102 - lines of our own page, which load a class of our own
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    return trained, folder / "reference.npz"


@pytest.mark.parametrize("format", ["llava", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lines_of_the_page_prove_a_mapping(
    made: tuple[Trained, Path], tmp_path: Path, format: str, dtype: str
) -> None:
    trained, file = made
    out = tmp_path / "llava-qwen"
    convert(trained.checkpoint, out, dtype=dtype, format=format, **trained.bases)
    found = verify(out, reference=file)
    assert results(found) == {}
    assert found.proven
    assert found.verdict.endswith("Exact: its logits are those of the reference.")
    assert not verify(out).proven
    both = verify(out, against=trained.checkpoint, logits=True, reference=file, **trained.bases)
    assert both.proven


@pytest.mark.parametrize("format", ["llava", "hf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", [("gate", "up"), ("q", "k")])
def test_a_wrong_mapping_is_not_exact(
    made: tuple[Trained, Path], tmp_path: Path, format: str, dtype: str, pair: tuple[str, str]
) -> None:
    trained, file = made
    mapping = tmp_path / "mine.yaml"
    part = "mlp" if pair[0] == "gate" else "self_attn"
    one, other = (f"{name}_proj.weight" for name in pair)
    inner = "attn.c_attn.weight" if part == "self_attn" else ""
    rules = (
        f"rename: {{mlp.w1.weight: mlp.{one}, mlp.w2.weight: mlp.{other}}}"
        if part == "mlp"
        else f"split: {inner}\n        into: [self_attn.k_proj.weight, self_attn.q_proj.weight, "
        "self_attn.v_proj.weight]\n        sizes: [hidden, hidden, hidden]"
    )
    mapping.write_text(
        "schema: 1\nfamily: mine\nextends: qwen\ntensors:\n  - for: {i: layers}\n"
        f"    from: transformer.h.{{i}}\n    to: model.layers.{{i}}\n    rules:\n      - {rules}\n"
    )
    out = tmp_path / "llava-qwen"
    options = {**trained.bases, "dtype": dtype, "format": format, "mapping": mapping}
    convert(trained.checkpoint, out, **options)
    found = verify(out, reference=file)
    assert list(results(found)) == [CHECK]
    assert not found.proven
    assert "Exact" not in found.verdict
    assert "gate and up" in found.verdict


CASE = "llama_e_full_fullvis"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_logits_of_xtuner_itself(
    checkpoints: Path, converted: Converted, tmp_path: Path, dtype: str
) -> None:
    """Pixels through tower and projector; the file is from before the rounding."""
    arrays = read_reference(checkpoints, CASE)
    file = write_npz(
        tmp_path / "r.npz",
        input_ids=arrays["input_ids"],
        pixel_values=arrays["pixel_values"],
        logits=arrays["logits_f32"],
    )
    base, source = CASES[CASE], checkpoints / CASE / "iter_2.pth"
    given = {"llm": checkpoints / base.llm, "vision": checkpoints / base.vision}
    folder = converted(CASE, dtype=dtype)
    assert verify(folder, against=source, reference=file, **given).proven
    assert verify(converted(CASE, dtype=dtype, format="hf"), reference=file).proven
    alone = results(verify(folder, reference=file))
    assert "pixel_values need the tower's config" in alone[CHECK]

    wrong = copy_of(folder, tmp_path)
    prefix = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn"
    names = [f"{prefix}.{n}_proj.weight" for n in "qk"]
    edit_tensors(wrong, lambda tensors: exchange(tensors, *names))
    seal(wrong)
    assert CHECK in results(verify(wrong, against=source, reference=file, **given))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": None}, "logits is missing"),
        ({"logits": numpy.zeros((4, 384), numpy.float16)}, "logits is float16 [4, 384]"),
        ({"logits": numpy.full((4, 384), numpy.nan, numpy.float32)}, "expected finite"),
        (
            {"input_ids": numpy.zeros((2, 4), numpy.int64)},
            "int64 [2, 4], expected whole numbers of one",
        ),
        ({"input_ids": numpy.array([[1, 2, 3]])}, "-200 in input_ids needs pixel_values"),
        ({"input_ids": numpy.array([["a", "b"]])}, "input_ids is <U1 [1, 2]"),
        (
            {"image_features": numpy.zeros((2, 16, 64), numpy.float32)},
            "image_features is float32 [2, 16, 64], expected float32 of one image",
        ),
        (
            {"pixel_values": numpy.zeros((28, 28), numpy.float32)},
            "pixel_values is float32 [28, 28], expected float32 of one image",
        ),
        ({"logits": numpy.array([object()])}, "is not a file of numpy.savez"),
    ],
)
def test_what_is_wrong_with_a_file(
    converted: Converted, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    arrays: dict[str, Any] = {
        "input_ids": numpy.array([[1, -200, 3]]),
        "image_features": numpy.zeros((1, 16, 64), numpy.float32),
        "logits": numpy.zeros((4, 384), numpy.float32),
    }
    file = write_npz(
        tmp_path / "r.npz", **{n: a for n, a in {**arrays, **change}.items() if a is not None}
    )
    with pytest.raises(UsageError, match=re.escape(says)):
        verify(converted(CASE, dtype="float16"), reference=file)


def header(shape: str) -> bytes:
    """A member of a file whose header says that shape."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("name", "data", "patch"),
    [
        ("input_ids", b"text", {}),
        ("input_ids.npy", b"text", {}),
        ("input_ids.npy", header("(1, 1000000000000000)"), {}),
        ("input_ids.npy", header(f"(1, {10**40})"), {}),
        ("input_ids.npy", header("(4,)") + bytes(16), {6: 1}),  # encrypted
        ("input_ids.npy", header("(4,)") + bytes(16), {8: 77}),  # compressed in an unknown way
        ("input_ids.npy", header("(4,)") + bytes(16), {8: 8}),  # not compressed, as it says
    ],
)
def test_a_damaged_file_is_an_error_message(
    converted: Converted, tmp_path: Path, name: str, data: bytes, patch: dict[int, int]
) -> None:
    path = tmp_path / "r.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)
    content = bytearray(path.read_bytes())
    for offset, value in patch.items():
        content[offset] = content[content.index(b"PK\x01\x02") + offset + 2] = value
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.npz: (is not a file of numpy|input_ids is \|S4)"):
        verify(converted(CASE, dtype="float16"), reference=path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_ids": numpy.array([[1, -200, 9999]])}, "input_ids has 9999"),
        ({"image_features": numpy.zeros((1, 16, 65), numpy.float32)}, "are 65 wide, not 64"),
        ({"logits": numpy.zeros((40, 384), numpy.float32)}, "logits have 40 positions"),
        ({"logits": numpy.zeros((4, 100), numpy.float32)}, "logits have 100 columns"),
        ({"input_ids": numpy.array([[1, 2, 3, 4]]), "image_features": None}, "largest difference"),
        ({}, "largest difference"),
    ],
)
def test_what_does_not_fit_the_folder(
    converted: Converted, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    arrays: dict[str, Any] = {
        "input_ids": numpy.array([[1, -200, 3]]),
        "image_features": numpy.zeros((1, 16, 64), numpy.float32),
        "logits": numpy.zeros((4, 384), numpy.float32),
    }
    file = write_npz(
        tmp_path / "r.npz", **{n: a for n, a in {**arrays, **change}.items() if a is not None}
    )
    assert says in results(verify(converted(CASE, dtype="float16"), reference=file))[CHECK]


def test_pixels_of_another_size(converted: Converted, tmp_path: Path) -> None:
    file = write_npz(
        tmp_path / "r.npz",
        input_ids=numpy.array([[1, -200, 3]]),
        pixel_values=numpy.zeros((1, 3, 28, 28), numpy.float32),
        logits=numpy.zeros((4, 384), numpy.float32),
    )
    found = results(verify(converted(CASE, dtype="float16", format="hf"), reference=file))
    assert "CLIPVisionModel cannot be run: " in found[CHECK]


def transposed(tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tensors: tensors.pop("model.embed_tokens.weight"),
            "embed_tokens.weight is missing",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "differ in model.norm.weight"),
        (transposed, "up_proj.weight has shape [64, 112], expected [112, 64]"),
    ],
)
def test_a_folder_that_cannot_be_run_is_a_failed_check(
    converted: Converted, tmp_path: Path, change: Any, says: str
) -> None:
    folder = copy_of(converted(CASE, dtype="float16"), tmp_path)
    edit_tensors(folder, change)
    seal(folder)
    file = write_npz(
        tmp_path / "r.npz",
        input_ids=numpy.array([[1, -200, 3]]),
        image_features=numpy.zeros((1, 16, 64), numpy.float32),
        logits=numpy.zeros((4, 384), numpy.float32),
    )
    assert says in results(verify(folder, reference=file))[CHECK]

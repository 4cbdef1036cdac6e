"""`verify --logits`: what no comparison of tensors can see, and that a right model passes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.families.checkpoints import Trained, write_trained
from builders.families.models import KINDS, SIZES, Source, random_tensors, shapes_of_class
from damage import copy_of, edit_json, edit_tensors, exchange, results, seal, set_keys
from reference.cases import CASES, Converted
from xtuner2llava import Verification, convert, verify
from xtuner2llava.tensors.computed import Fill
from xtuner2llava.tensors.dtype import FLOAT32
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.verification.logits.comparison import Distance
from xtuner2llava.verification.logits.streamed import wrong_layers

LOGITS = "logits against the trained model"
WRONG = "logits of a wrong model differ"
CASE = "llama_e_full_fullvis"
DATA = Path(__file__).parents[1] / "data"


def run(checkpoints: Path, folder: Path, case: str = CASE, **options: Any) -> Verification:
    base = CASES[case]
    bases = {"llm": checkpoints / base.llm, "vision": checkpoints / base.vision}
    against = checkpoints / case / "iter_2_xtuner"
    return verify(folder, against=against, logits=True, **{**bases, **options})


def largest(found: Verification, pair: str) -> float:
    figures: Any = found.figures["logits"]
    return float(figures["distances"][pair]["largest_difference"])


@pytest.fixture(scope="module")
def whole(converted: Converted) -> Path:
    return converted(CASE, "iter_2_xtuner", dtype="float16")


def test_equal_weights_give_equal_bits(checkpoints: Path, whole: Path) -> None:
    found = run(checkpoints, whole)
    assert results(found) == {}
    assert largest(found, "rounded - folder") == 0.0
    # Beside it, what rounding cost, and models that are wrong in one layer.
    assert 1e-5 < largest(found, "trained - folder") < 1e-2
    assert largest(found, "rounded - wrong: gate and up") > 1e-2
    assert largest(found, "rounded - wrong: q and k") > 1e-2
    assert "0 is allowed: same weights, same class" in found.named(LOGITS).detail
    stages: Any = found.figures["logits"]
    assert list(stages["hidden_state_differences"]) == [
        "image features", "embeddings", "layer 0", "layer 1", "layer 2",
    ]  # fmt: skip


def test_a_few_tokens_at_a_time_give_the_same_figures(
    checkpoints: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(name: str) -> Any:
        found: Any = run(checkpoints, whole).figures["logits"]
        return found["largest_logit"], found["distances"][name]

    pair = "rounded - wrong: gate and up"
    scale, distance = figures(pair)
    monkeypatch.setattr("xtuner2llava.verification.logits.comparison._LOGITS", 5 * 48)
    # Of matrices of other sizes, sums may run in another order.
    few_scale, few = figures(pair)
    assert few_scale == pytest.approx(scale)
    assert few == pytest.approx(distance)


# Sealed, and with all tensors right: only the config's own comparison sees these besides.
BLIND: dict[str, tuple[dict[str, Any], str]] = {
    "rope_theta": ({"rope_theta": 500.0}, "layer 0"),
    "rms_norm_eps": ({"rms_norm_eps": 1e-3}, "layer 0"),
    "hidden_act": ({"hidden_act": "gelu"}, "layer 0"),
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "layer 0"),
    "select layer": ({"mm_vision_select_layer": -3}, "image features"),
}


@pytest.mark.parametrize("damage", BLIND)
def test_what_only_logits_see(checkpoints: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    values, first = BLIND[damage]
    folder = copy_of(whole, tmp_path)
    set_keys(folder / "config.json", **values)
    seal(folder)
    found = run(checkpoints, folder)
    assert list(results(found)) == ["small files as planned", LOGITS]
    assert results(found)[LOGITS].endswith(f"the first to differ is: {first}")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_size": 10**6}, "config.json: image_size is 1,000,000"),
        # By its version, transformers makes no such model, or makes one that cannot be run.
        ({"image_size": -5}, "CLIPVisionModel cannot be run: |transformers makes no model of it"),
        ({"patch_size": 0}, "CLIPVisionModel cannot be run: |transformers makes no model of it"),
    ],
)
def test_a_tower_that_cannot_be_run(
    checkpoints: Path, converted: Converted, tmp_path: Path, values: dict[str, int], says: str
) -> None:
    folder = copy_of(converted(CASE, "iter_2_xtuner", dtype="float16", format="hf"), tmp_path)
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(values))
    assert re.search(says, results(run(checkpoints, folder))[LOGITS])


@pytest.mark.parametrize(
    "pair",
    [
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ],
)
def test_exchanged_tensors_of_equal_shape(
    checkpoints: Path, whole: Path, tmp_path: Path, pair: tuple[str, str]
) -> None:
    folder = copy_of(whole, tmp_path)
    one, other = (f"model.layers.2.{name}" for name in pair)
    edit_tensors(folder, lambda tensors: exchange(tensors, one, other))
    seal(folder)
    assert verify(folder).passed
    assert results(run(checkpoints, folder))[LOGITS].endswith("first to differ is: layer 2")


def test_a_wrong_mapping_passes_the_bits_and_not_the_logits(
    checkpoints: Path, tmp_path: Path
) -> None:
    """What a mapping says wrong is planned wrong again. Logits show it."""
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "schema: 1\nfamily: mine\nextends: llama\ntensors:\n"
        "  - for: {i: num_hidden_layers}\n    from: model.layers.{i}.mlp\n"
        "    to: model.layers.{i}.mlp\n    rules:\n"
        "      - rename: {gate_proj.weight: up_proj.weight, up_proj.weight: gate_proj.weight}\n"
    )
    base = CASES[CASE]
    bases = {"llm": checkpoints / base.llm, "vision": checkpoints / base.vision}
    out = tmp_path / "llava-llama"
    source = checkpoints / CASE / "iter_2_xtuner"
    convert(source, out, mapping=mapping, vision_tower_name="openai/x", **bases)
    found = run(checkpoints, out, mapping=mapping)
    assert list(results(found)) == [LOGITS]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merges_are_near(checkpoints: Path, converted: Converted, dtype: str) -> None:
    case = "qwen2_d_lora_vislora"
    found = run(checkpoints, converted(case, "iter_2_xtuner", dtype=dtype), case)
    assert results(found) == {}
    assert largest(found, "rounded - folder") < 1e-3
    allowed = 8 * largest(found, "rounded - nudged")
    assert f"; {allowed:.2g} is allowed: 8 times the noise" in found.named(LOGITS).detail


def test_the_hf_format(checkpoints: Path, converted: Converted) -> None:
    case = "qwen2_d_lora_vislora"
    folder = converted(case, "iter_2_xtuner", dtype="bfloat16", format="hf")
    found = run(checkpoints, folder, case)
    assert results(found) == {}
    assert found.passed


@pytest.mark.parametrize(
    ("kind", "format"), [("phi3", "llava"), ("mixtral", "llava"), ("gemma", "hf")]
)
def test_families_in_their_own_classes(
    checkpoints: Path, tmp_path: Path, kind: str, format: str
) -> None:
    source = KINDS[kind].make(tmp_path / "m", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    out = tmp_path / f"llava-{'llama' if kind == 'phi3' else kind}"
    convert(trained.checkpoint, out, dtype="float16", format=format, **trained.bases)
    found = verify(out, against=trained.checkpoint, logits=True, **trained.bases)
    assert results(found) == {}
    apart = largest(found, "rounded - folder")
    # Phi-3 multiplies by one fused matrix where Llama has three, so its sums may differ.
    assert apart == 0.0 if kind != "phi3" else apart < 1e-4


def test_a_class_with_fused_tensors(checkpoints: Path, tmp_path: Path) -> None:
    source = KINDS["phi3_long"].make(tmp_path / "m", bos_token_id=1, eos_token_id=2)
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    out = tmp_path / "phi3"
    convert(trained.checkpoint, out, format="hf", dtype="float16", **trained.bases)
    options = {"format": "hf", "against": trained.checkpoint, **trained.bases}
    found = verify(out, logits=True, **options)
    assert results(found) == {}
    assert largest(found, "rounded - folder") == 0.0
    values = json.loads((out / "config.json").read_text())
    values["text_config"]["rope_scaling"] = None
    (out / "config.json").write_text(json.dumps(values))
    assert LOGITS in results(verify(out, logits=True, **options))


def remote_qwen(folder: Path, checkpoints: Path) -> Any:
    """A Qwen 1 whose class lies as Python beside the base, as on the Hub."""
    source = KINDS["qwen"].make(folder / "m", bos_token_id=361, eos_token_id=360)
    trained = write_trained(folder / "trained", source, checkpoints)
    for path in (DATA / "remote_qwen").glob("*.py"):
        shutil.copy(path, trained.llm)
    set_keys(
        trained.llm / "config.json",
        auto_map={
            "AutoConfig": "configuration_tiny_qwen.TinyQwenConfig",
            "AutoModelForCausalLM": "modeling_tiny_qwen.TinyQwenLMHeadModel",
        },
    )
    return trained


@pytest.mark.slow
def test_remote_code_is_run_only_when_it_is_trusted(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    trained = remote_qwen(tmp_path, checkpoints)
    out = tmp_path / "llava-qwen"
    convert(trained.checkpoint, out, dtype="float16", **trained.bases)
    given = {"against": trained.checkpoint, "logits": True, **trained.bases}

    skipped = verify(out, **given)
    assert skipped.named(LOGITS).result == "skipped"
    assert "--trust-remote-code was not given" in skipped.named(LOGITS).detail
    assert skipped.passed
    assert LOGITS in skipped.verdict
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").rglob("modeling*.py"))

    trusted = verify(out, trust_remote_code=True, **given)
    assert results(trusted) == {}
    assert largest(trusted, "rounded - folder") < 1e-4
    assert largest(trusted, "rounded - wrong: gate and up") > 1e-2


def test_distances_are_those_of_whole_logits() -> None:
    generator = torch.Generator().manual_seed(5)
    one = 30 * torch.randn(6, 50, generator=generator)
    other = one + torch.randn(6, 50, generator=generator)
    distance = Distance(len(one))
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        distance.add(one[:, start:stop], other[:, start:stop])
    chances = one.double().softmax(1), other.double().softmax(1)
    kl = torch.nn.functional.kl_div(chances[1].log(), chances[0], reduction="batchmean")
    assert distance.largest == pytest.approx(float((one - other).abs().max()))
    assert distance.kl == pytest.approx(float(kl))
    assert distance.top1 == float((one.argmax(1) == other.argmax(1)).double().mean())


@pytest.mark.parametrize("place", [(0, 1), (1, 0)])
def test_what_is_not_a_number_is_far_away(place: tuple[int, int]) -> None:
    broken, zeros = torch.zeros(2, 3), torch.zeros(2, 3)
    broken[place] = math.nan
    for parts in ([(broken, zeros), (zeros, zeros)], [(zeros, zeros), (zeros, broken)]):
        found = Distance(2)
        for one, other in parts:
            found.add(one, other)
        assert math.isnan(found.largest) and math.isnan(found.kl)
        assert not found.largest <= 1e9


def test_figures_that_are_not_numbers_are_null_in_json(
    checkpoints: Path, whole: Path, tmp_path: Path
) -> None:
    folder = copy_of(whole, tmp_path)
    name = "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors[name].fill_(math.nan))
    found = run(checkpoints, folder)
    assert LOGITS in results(found)
    figures: Any = json.loads(json.dumps(found.to_dict(), allow_nan=False))["figures"]
    assert figures["logits"]["distances"]["rounded - folder"]["largest_difference"] is None


def test_wrong_layers_exchange_what_can_be_exchanged() -> None:
    def layer(keys: int) -> dict[str, LazyTensor]:
        shapes = {"q": 8, "k": keys, "v": keys}
        attention = {
            f"self_attn.{n}_proj.weight": Fill(FLOAT32, (rows, 8), 0) for n, rows in shapes.items()
        }
        mlp = {f"mlp.{n}_proj.weight": Fill(FLOAT32, (4, 8), 0) for n in ("gate", "up")}
        return {**attention, **mlp}

    assert list(wrong_layers(layer(8))) == ["gate and up", "q and k"]
    assert list(wrong_layers(layer(2))) == ["gate and up", "k and v"]
    right = layer(2)
    wrong = wrong_layers(right)["gate and up"]
    assert wrong["mlp.up_proj.weight"] is right["mlp.gate_proj.weight"]
    assert wrong["self_attn.q_proj.weight"] is right["self_attn.q_proj.weight"]


MEASURE = """
import resource, sys
from xtuner2llava import verify
out, small, vision = sys.argv[1:]

def peak(folder, checkpoint):
    llm = checkpoint.replace("iter_1.pth", "base")
    found = verify(folder, against=checkpoint, logits=True, llm=llm, vision=vision)
    assert found.passed, found.verdict
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak(f"{small}/llava-llama", f"{small}/trained/iter_1.pth")
print(peak(f"{out}/llava-llama", f"{out}/trained/iter_1.pth") - before)
"""


def write_llama(folder: Path, checkpoints: Path, layers: int) -> Trained:
    """A float32 Llama of `layers` layers of 6 MB, converted to float16 in `llava-llama`."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers}
    kind = KINDS["llama"]
    config = {**SIZES, **kind.config, **sizes, "bos_token_id": 1, "eos_token_id": 2}
    config |= {"architectures": [kind.architecture], "model_type": kind.model_type}
    tensors = random_tensors(shapes_of_class(config))
    trained = write_trained(folder / "trained", Source(config, tensors, None), checkpoints)
    convert(trained.checkpoint, folder / "llava-llama", dtype="float16", **trained.bases)
    return trained


@pytest.mark.slow
def test_memory_is_that_of_a_layer(checkpoints: Path, tmp_path: Path) -> None:
    """Twenty layers need no more memory than two, but for what the allocator keeps."""
    small = write_llama(tmp_path / "small", checkpoints, 2)
    large = write_llama(tmp_path / "large", checkpoints, 20)
    more = large.checkpoint.stat().st_size - small.checkpoint.stat().st_size
    assert more > 100 * 2**20
    places = [tmp_path / "large", tmp_path / "small", large.vision]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *places], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.splitlines()[-1]) < more / 3


def test_the_command_line(checkpoints: Path, whole: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from xtuner2llava.cli.commands import main

    base = CASES[CASE]
    given = ["--llm", str(checkpoints / base.llm), "--vision", str(checkpoints / base.vision)]
    against = ["--against", str(checkpoints / CASE / "iter_2_xtuner"), "--logits", *given]
    ran = CliRunner().invoke(main, ["verify", str(whole), *against])
    assert ran.exit_code == 0, ran.output
    assert "every tensor, bit for bit" in ran.stdout
    assert "Verified: 25 checks, none failed." in ran.stdout

    folder = copy_of(whole, tmp_path)
    set_keys(folder / "config.json", rope_theta=1.0)
    ran = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert ran.exit_code == 1
    assert json.loads(ran.stdout)["passed"] is False
    ran = CliRunner().invoke(main, ["verify", str(folder), "--quiet"])
    assert ran.exit_code == 1
    # Nothing but the verdict. Older versions of click do not tell the two outputs apart here.
    assert ran.output.startswith("NOT VERIFIED: 1 of 20 checks failed: checksums of small files.")
    assert CliRunner().invoke(main, ["verify", str(whole), "--logits"]).exit_code == 2

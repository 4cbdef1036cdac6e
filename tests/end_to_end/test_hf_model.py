"""What `--format hf` writes, loaded by transformers as LlavaForConditionalGeneration."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from reference import huggingface
from reference.cases import CASES, Converted, read_reference
from reference.compose import read_tensors
from reference.exchange import write_exchanged
from reference.measured import Measured
from xtuner2llava import convert

if TYPE_CHECKING:
    import torch

SAME, DIFFERENT = 1e-5, 1e-4
NAMES = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.": "vision_tower.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
# XTuner's own export to this format.
EXPORTED = ("llama_e_full_fullvis", "llama_d_lora_vislora")
needs_llava_image_processor = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.49"), reason="LlavaImageProcessor came with 4.49"
)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def distance(checkpoints: Path, folder: Path, case: str, name: str) -> float:
    """Between logits of the folder and the reference's `name`, over the trained vocabulary."""
    import torch

    reference = read_reference(checkpoints, case)
    model = huggingface.load(folder)
    found = huggingface.logits(model, reference["input_ids"], reference["pixel_values"])
    expected = torch.from_numpy(reference[name])
    return (found[:, : expected.shape[-1]] - expected).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_float32_is_the_trained_model(
    checkpoints: Path, converted: Converted, measured: Measured, case: str
) -> None:
    folder = converted(case, format="hf", dtype="float32")
    found = distance(checkpoints, folder, case, CASES[case].best)
    assert found < SAME
    measured.exact(folder, found, real=True)


@pytest.mark.parametrize("case", CASES)
def test_an_exported_folder_is_the_trained_model_with_a_float16_llm(
    checkpoints: Path, converted: Converted, measured: Measured, case: str
) -> None:
    folder = converted(case, "iter_2_xtuner", format="hf", dtype="float32")
    found = distance(checkpoints, folder, case, "logits_llm16")
    assert found < SAME
    measured.exact(folder, found, real=True)


@pytest.mark.parametrize("case", ["llama_e_full_fullvis", "qwen2_e_full_fullvis"])
def test_float16_is_the_trained_model_rounded_once(
    checkpoints: Path, converted: Converted, case: str
) -> None:
    folder = converted(case, format="hf", dtype="float16")
    assert distance(checkpoints, folder, case, "logits_all16") < SAME
    assert distance(checkpoints, folder, case, "logits_f32") > DIFFERENT


def test_a_wrong_mapping_whose_shapes_fit_would_be_seen(
    checkpoints: Path, converted: Converted, tmp_path: Path
) -> None:
    right = converted("qwen2_e_full_fullvis", format="hf", dtype="float32")
    exchanged = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    wrong = write_exchanged(right, tmp_path / "wrong", exchanged, "language_model.model.layers.0")
    assert distance(checkpoints, wrong, "qwen2_e_full_fullvis", "logits_f32") > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "keep"])
@pytest.mark.parametrize("case", ["llama_e_full_fullvis", "qwen2_d_lora_vislora"])
def test_tensors_are_those_of_official_llava(converted: Converted, case: str, dtype: str) -> None:
    import torch

    official = read_tensors(converted(case, dtype=dtype))
    ours = read_tensors(converted(case, format="hf", dtype=dtype))
    named = {}
    for name, tensor in official.items():
        prefix = next(prefix for prefix in NAMES if name.startswith(prefix))
        named[NAMES[prefix] + name.removeprefix(prefix)] = tensor
    assert set(ours) == set(named)
    for name, tensor in named.items():
        assert ours[name].dtype == tensor.dtype
        rows = len(tensor) if name in VOCABULARY else None
        assert torch.equal(ours[name][:rows], tensor), name


# XTuner's own export


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    import torch

    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("source", ["iter_2.pth", "iter_2_xtuner"])
def test_tensors_are_those_of_xtuners_export_but_for_the_added_rows(
    checkpoints: Path, converted: Converted, source: str
) -> None:
    case = "llama_e_full_fullvis"
    theirs = read_tensors(checkpoints / case / "hf")
    # It writes the LLM as float16, projector and tower as they were trained.
    rounded = read_tensors(converted(case, source, format="hf", dtype="float16"))
    stored = read_tensors(converted(case, source, format="hf", dtype="keep"))
    assert set(rounded) == set(theirs)
    for name, tensor in theirs.items():
        ours = (rounded if name.startswith("language_model") else stored)[name]
        assert ours.shape == tensor.shape, name
        rows = 384 if name in VOCABULARY else None
        assert equal(ours[:rows], tensor[:rows]), name
    # Theirs are drawn at random, near the mean.
    assert not equal(rounded[VOCABULARY[0]][384:], theirs[VOCABULARY[0]][384:])


def test_merged_lora_is_that_of_xtuners_export_but_for_its_rounding(
    checkpoints: Path, converted: Converted
) -> None:
    case = "llama_d_lora_vislora"
    theirs = read_tensors(checkpoints / case / "hf")
    ours = read_tensors(converted(case, format="hf", dtype="float16"))
    exact = read_tensors(converted(case, format="hf", dtype="float32"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        rows = 384 if name in VOCABULARY else None
        mine, truth, their = (t[name][:rows].double() for t in (ours, exact, theirs))
        assert (mine - truth).abs().max() <= (tensor[:rows].half().double() - truth).abs().max()
        assert (mine - their).abs().max() <= 2**-10 * truth.abs().max(), name


@pytest.mark.parametrize("case", EXPORTED)
def test_config_says_what_xtuners_export_says(
    checkpoints: Path, converted: Converted, case: str
) -> None:
    theirs = config_of(checkpoints / case / "hf")
    ours = config_of(converted(case, format="hf", dtype="float32"))
    # Their nested configs name a path of the machine, and dtypes that the tensors do not have.
    named = ("_name_or_path", "torch_dtype", "transformers_version", "architectures")
    for key in ("text_config", "vision_config"):
        nested = {k: v for k, v in theirs.pop(key).items() if k not in named}
        assert {k: ours[key].get(k) for k in nested} == nested
    theirs.pop("transformers_version")
    assert {key: ours[key] for key in theirs} == theirs


# The vocabulary


def test_new_rows_are_the_mean_of_the_others(converted: Converted) -> None:
    import torch

    tensors = read_tensors(converted("llama_e_full_fullvis", format="hf", dtype="float32"))
    for name in VOCABULARY:
        rows = tensors[name]
        assert rows.shape == (448, 64)
        mean = rows[:384].double().mean(0).float()
        assert torch.equal(rows[384:], mean.expand(64, 64)), name
        assert mean.abs().min() > 0


def test_a_token_that_nobody_trained_is_never_the_likeliest(
    checkpoints: Path, converted: Converted
) -> None:
    case = "llama_e_full_fullvis"
    reference = read_reference(checkpoints, case)
    model = huggingface.load(converted(case, format="hf", dtype="float32"))
    logits = huggingface.logits(model, reference["input_ids"], reference["pixel_values"])
    assert (logits[:, 384:].amax(1) < logits[:, :384].amax(1)).all()


def test_free_rows_are_taken_first(converted: Converted) -> None:
    folder = converted("qwen2_e_full_fullvis", format="hf", dtype="float32")
    config = config_of(folder)
    assert config["text_config"]["vocab_size"] == 400
    assert config["image_token_index"] == 363  # the first id that is free
    assert config["pad_token_id"] == 361  # the tokenizer's own, <|endoftext|>
    assert read_tensors(folder)[VOCABULARY[0]].shape == (400, 64)


# The whole configuration, and the processor


def test_the_config_of_a_qwen(converted: Converted) -> None:
    config = config_of(converted("qwen2_e_full_fullvis", format="hf", dtype="bfloat16"))
    text, vision = config.pop("text_config"), config.pop("vision_config")
    assert config == {
        "architectures": ["LlavaForConditionalGeneration"],
        "bos_token_id": 361,
        "eos_token_id": 360,
        "ignore_index": -100,
        "image_seq_length": 16,
        "image_token_index": 363,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "pad_token_id": 361,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    assert text["model_type"] == "qwen2"
    assert text["architectures"] == ["Qwen2ForCausalLM"]
    assert (text["rope_theta"], text["rope_scaling"]) == (1000000.0, None)
    assert vision == {
        "hidden_act": "quick_gelu",
        "hidden_size": 48,
        "image_size": 56,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 14,
        "projection_dim": 32,
    }


def test_transformers_reads_of_the_config_what_it_says(converted: Converted) -> None:
    """Whichever vocabulary the installed version has: 5 keeps the rotary base elsewhere."""
    from transformers import AutoConfig

    folder = converted("qwen2_e_full_fullvis", format="hf", dtype="bfloat16")
    text = AutoConfig.from_pretrained(folder).text_config
    parameters = getattr(text, "rope_parameters", None)
    assert (parameters["rope_theta"] if parameters else text.rope_theta) == 1000000.0
    assert (text.vocab_size, text.num_key_value_heads, text.rms_norm_eps) == (400, 2, 1e-6)
    assert text.tie_word_embeddings is False


@needs_llava_image_processor
@pytest.mark.filterwarnings("ignore:`do_sample`")  # the base samples, this test does not
@pytest.mark.parametrize("case", ["llama_e_full_fullvis", "qwen2_e_full_fullvis"])
def test_the_processor_feeds_the_model(converted: Converted, case: str) -> None:
    import numpy
    from PIL import Image
    from transformers import AutoProcessor

    folder = converted(case, format="hf", dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    model = huggingface.load(folder)
    pixels = numpy.arange(70 * 90 * 3, dtype=numpy.uint8).reshape(70, 90, 3)
    inputs = processor(
        text="USER: <image>\nHi", images=Image.fromarray(pixels), return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    expected = 16 if huggingface.expands_image_tokens() else 1
    assert ids.count(model.config.image_token_index) == expected
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert processor.tokenizer.pad_token_id == model.config.pad_token_id
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > len(ids) or not huggingface.expands_image_tokens()


@needs_llava_image_processor
def test_the_image_processor_of_an_older_base(checkpoints: Path, tmp_path: Path) -> None:
    """Written as openai/clip-vit-large-patch14-336 has it: numbers, and the name of old."""
    from transformers import AutoProcessor

    vision = tmp_path / "clip"
    shutil.copytree(checkpoints / "bases/vision_clip", vision)
    old = {
        "crop_size": 56,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 56,
    }
    (vision / "preprocessor_config.json").write_text(json.dumps(old))
    out = tmp_path / "out"
    convert(
        checkpoints / "llama_e_full_fullvis/iter_2.pth",
        out,
        llm=checkpoints / "bases/llm_llama",
        vision=vision,
        format="hf",
    )
    made = AutoProcessor.from_pretrained(out).image_processor
    assert type(made).__name__.startswith("LlavaImageProcessor")
    assert (made.crop_size["height"], made.size["shortest_edge"]) == (56, 56)


@needs_llava_image_processor
@pytest.mark.parametrize("size", [(70, 90), (90, 70), (56, 56), (300, 20), (1, 7)])
def test_pixels_are_those_of_the_training(
    checkpoints: Path, converted: Converted, size: tuple[int, int]
) -> None:
    """XTuner pads to a square with the mean colour, then prepares as CLIP does."""
    import numpy
    from PIL import Image
    from transformers import AutoImageProcessor

    folder = converted("llama_e_full_fullvis", format="hf", dtype="float32")
    values = numpy.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), numpy.uint8)
    image = Image.fromarray(values)
    clip = AutoImageProcessor.from_pretrained(checkpoints / "bases/vision_clip")
    edge, (width, height) = max(size), size
    square = Image.new("RGB", (edge, edge), tuple(int(c * 255) for c in clip.image_mean))
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))

    def pixels(processor: Any, picture: Image.Image) -> Any:
        return numpy.asarray(processor(picture, return_tensors="np")["pixel_values"])

    ours = pixels(AutoImageProcessor.from_pretrained(folder), image)
    expected = pixels(clip, square)
    assert numpy.abs(ours - expected).max() < 1e-6
    if width != height:
        assert numpy.abs(pixels(clip, image) - expected).max() > 0.1


def test_a_batch_is_padded_before_its_prompts(converted: Converted) -> None:
    """An answer follows on the last token of a prompt: with padding there, it is another answer."""
    from transformers import AutoTokenizer

    folder = converted("qwen2_e_full_fullvis", format="hf", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    short, long = tokenizer(["a", "a picture of cats"], padding=True)["input_ids"]
    assert len(short) == len(long)
    assert short[0] == tokenizer.pad_token_id != short[-1]


def test_the_files(converted: Converted) -> None:
    folder = converted("llama_e_full_fullvis", format="hf", dtype="float32")
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "README.md",
        "conversion.json",
    }
    assert json.loads((folder / "processor_config.json").read_text()) == {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 385}

"""`xtuner2llava try` answers as XTuner's own model did, in both formats."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from damage import copy_of, edit_json, edit_tensors, set_keys
from reference.cases import Converted
from xtuner2llava import ConversionError, UsageError
from xtuner2llava.cli.commands import main
from xtuner2llava.inference import answering
from xtuner2llava.inference.answering import Answer, answer, memory_needed
from xtuner2llava.options import TryOptions

DATA = Path(__file__).parents[1] / "data/answers"
ANSWERS = json.loads((DATA / "answers.json").read_text())


@pytest.fixture
def in_checkpoints(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `mm_vision_tower: bases/…` leads to a tower's config."""
    monkeypatch.chdir(checkpoints)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_torch_does_not_have(converted: Converted, device: str) -> None:
    with pytest.raises(UsageError, match=f"--device: torch cannot use '{device}'"):
        ask(converted("llama_d_lora_vislora"), "wide.png", "", device=device)


def test_a_device_that_is_too_small(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def load(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answering, "_ask_llava", load)
    with pytest.raises(UsageError, match="cpu has too little memory"):
        ask(converted("llama_d_lora_vislora"), "wide.png", "", device="cpu")


def test_an_answer_cannot_move_the_cursor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def speak(folder: Path, picture: Path, question: str, options: TryOptions) -> Answer:
        assert options.on_text is not None
        options.on_text("A cat\x1b[2J\n")
        return Answer("", "", (), "cpu")

    monkeypatch.setattr(answering, "answer", speak)
    monkeypatch.setattr(answering, "memory_needed", lambda _: 0)
    done = CliRunner().invoke(main, ["try", str(tmp_path), "x.png"])
    assert done.stdout == "A cat\\x1b[2J\n\n"


def ask(folder: Path, picture: str, question: str, **options: Any) -> Any:
    return answer(folder, DATA / picture, question, TryOptions(max_new_tokens=12, **options))


def first_of(case: str, picture: str) -> Any:
    return next(a for a in ANSWERS if (a["case"], a["picture"]) == (case, picture))


@pytest.mark.parametrize("format", ["llava", "hf"])
@pytest.mark.parametrize(
    ("case", "picture"),
    [
        ("llama_d_lora_vislora", "square.png"),
        ("phi3_e_full_fullvis", "wide.png"),
        ("qwen2_d_lora_vislora", "wide.png"),
        ("qwen2_e_full_fullvis", "tall.png"),
    ],
)
def test_the_answer_is_that_of_xtuner(
    in_checkpoints: None, converted: Converted, case: str, picture: str, format: str
) -> None:
    folder = converted(case, format=format, dtype="float32")
    asked = first_of(case, picture)
    pieces: list[str] = []
    found = ask(folder, picture, asked["question"], on_text=pieces.append)
    count = len(found.tokens)  # It ends at the first eos token, which the reference goes beyond.
    assert count >= 2
    assert list(found.tokens) == asked["tokens"][:count]
    assert "".join(pieces).strip() == found.text
    assert ask(folder, picture, found.prompt).tokens == found.tokens
    other = "wide.png" if picture == "tall.png" else "tall.png"
    assert ask(folder, other, asked["question"]).tokens != found.tokens


@pytest.mark.parametrize("question", ["  What is it? ", "\n"])
def test_a_question_has_no_space_around_it(
    in_checkpoints: None, converted: Converted, question: str
) -> None:
    """As `llava_map_fn` of XTuner strips it; without text, the line feed goes too."""
    case = "qwen2_d_lora_vislora"
    prompts = [ask(converted(case, format=f), "wide.png", question) for f in ("llava", "hf")]
    asked = "<|im_start|>user\n" + f"<image>\n{question.strip()}".strip() + "<|im_end|>\n"
    assert [made.prompt for made in prompts] == [f"{asked}<|im_start|>assistant\n"] * 2


def test_llava_is_asked_with_the_ids_of_training(
    in_checkpoints: None, converted: Converted, tmp_path: Path
) -> None:
    """Whatever LlamaTokenizer of this transformers makes of white space, and without a bos token
    in the post-processor, which the class adds.
    """
    case = "llama_b_full_frozenvis"
    asked = first_of(case, "wide.png")
    for name in ("with", "without"):
        folder = shutil.copytree(converted(case, dtype="float32"), tmp_path / name)
        set_keys(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
        set_keys(folder / "tokenizer.json", post_processor=None)
        if name == "without":
            (folder / "tokenizer.json").unlink()
        tokens = list(ask(folder, "wide.png", asked["question"]).tokens)
        assert len(tokens) >= 2
        assert tokens == asked["tokens"][: len(tokens)], name


def test_the_command_streams_the_answer(in_checkpoints: None, converted: Converted) -> None:
    folder = converted("qwen2_e_full_fullvis", format="hf", dtype="float32")
    words = ["try", str(folder), str(DATA / "square.png"), "--max-new-tokens", "4"]
    talked = CliRunner().invoke(main, words)
    assert talked.exit_code == 0, talked.output
    told = CliRunner().invoke(main, [*words, "--json", "-q"])
    values = json.loads(told.stdout)
    assert len(values["tokens"]) == 4
    assert talked.stdout.strip() == values["answer"]
    assert "of weights into memory" in talked.stderr
    assert memory_needed(folder) == pytest.approx(
        (folder / "model.safetensors").stat().st_size, rel=0.05
    )


@pytest.mark.parametrize("format", ["llava", "hf"])
def test_what_cannot_be_asked_is_an_error(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    folder = converted("qwen2_e_full_fullvis", format=format, dtype="float32")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConversionError, match="cannot be read as a picture"):
        answer(folder, tmp_path / "text.png", "What?", TryOptions())
    with pytest.raises(ConversionError, match="cannot be read as a picture"):
        answer(folder, tmp_path / "missing.png", "What?", TryOptions())
    (tmp_path / "damaged.ppm").write_bytes(b"P6 x 4 255 ")
    with pytest.raises(ConversionError, match="cannot be read as a picture"):
        answer(folder, tmp_path / "damaged.ppm", "What?", TryOptions())
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "program.eps").write_bytes(script)
    with pytest.raises(ConversionError, match="cannot identify image file"):
        answer(folder, tmp_path / "program.eps", "What?", TryOptions())
    with pytest.raises(ConversionError, match="is not a converted folder"):
        answer(tmp_path, DATA / "wide.png", "What?", TryOptions())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ConversionError, match="pip install pillow"):
            ask(folder, "wide.png", "What?")


def test_the_demo_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it says: in its folder, the name of its vision tower is a folder too."""
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(main, ["demo", "mine"])
    (words,) = re.findall(
        r"^  cd mine && xtuner2llava (try .+) PICTURE$", made.stdout, re.MULTILINE
    )
    monkeypatch.chdir(tmp_path / "mine")
    asked = [*words.split(), str(DATA / "wide.png"), "--max-new-tokens", "3", "--json", "-q"]
    talked = CliRunner().invoke(main, asked)
    assert talked.exit_code == 0, talked.output
    assert 1 <= len(json.loads(talked.stdout)["tokens"]) <= 3


@pytest.mark.parametrize(
    ("format", "lacking", "says"),
    [
        ("llava", "layers.1.mlp.up_proj", "Qwen2ForCausalLM lacks model.layers.1.mlp.up_proj"),
        ("llava", "mm_projector.2", "the projector: 2.weight is missing; 2.bias is missing"),
        ("llava", "encoder.layers.2.", "CLIPVisionModel lacks "),
        ("hf", "layers.1.mlp.up_proj", "LlavaForConditionalGeneration lacks "),
        ("hf", "linear_2", "LlavaForConditionalGeneration lacks "),
    ],
)
def test_no_tensor_is_made_up(
    in_checkpoints: None,
    converted: Converted,
    tmp_path: Path,
    format: str,
    lacking: str,
    says: str,
) -> None:
    """transformers fills those that are missing with random numbers, and only warns."""
    folder = copy_of(converted("qwen2_e_full_fullvis", format=format, dtype="float32"), tmp_path)

    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if lacking in name]:
            del tensors[name]

    edit_tensors(folder, change)
    with pytest.raises(ConversionError, match=re.escape(says)):
        ask(folder, "wide.png", "What?")


def test_an_attention_on_the_hub_is_not_asked_for(
    in_checkpoints: None, converted: Converted, tmp_path: Path
) -> None:
    folder = copy_of(converted("qwen2_e_full_fullvis", format="hf", dtype="float32"), tmp_path)
    before = ask(folder, "wide.png", "What?")
    for key in ("_attn_implementation", "attn_implementation"):

        def change(config: dict[str, Any], key: str = key) -> None:
            for part in (config, config["text_config"], config["vision_config"]):
                part[key] = "some/kernel"

        edit_json(folder / "config.json", change)
        assert ask(folder, "wide.png", "What?").tokens == before.tokens


@pytest.mark.parametrize("format", ["llava", "hf"])
def test_a_damaged_folder_is_an_error_message(
    in_checkpoints: None, converted: Converted, tmp_path: Path, format: str
) -> None:
    folder = copy_of(converted("qwen2_e_full_fullvis", format=format, dtype="float32"), tmp_path)
    with pytest.raises(UsageError, match="has 2 places for pictures"):
        ask(folder, "wide.png", "<image><image>")
    (folder / "tokenizer_config.json").write_text("{")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConversionError, match=r"cannot be asked: \w+Error|is not JSON"):
        ask(folder, "wide.png", "What?")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read"):
        ask(folder, "wide.png", "What?")


def test_a_llava_folder_without_what_it_needs_says_so(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llava-qwen"
    shutil.copytree(converted("qwen2_e_full_fullvis", dtype="float32"), folder)
    monkeypatch.chdir(tmp_path)  # `bases/…` leads nowhere from here
    with pytest.raises(ConversionError, match="whose config is not known here"):
        ask(folder, "wide.png", "What?")
    record = json.loads((folder / "conversion.json").read_text())
    assert record["chat"]["prompt"].count("{question}") == 1
    record["chat"]["prompt"] = None
    (folder / "conversion.json").write_text(json.dumps(record))
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(Path(__file__).parents[1] / "checkpoints/bases/vision_clip")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="which prompt the model was trained with"):
        ask(folder, "wide.png", "What?")

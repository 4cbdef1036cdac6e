"""bos, eos and stop words: in the configs, where generation needs them, not on the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import ConversionError, convert, plan
from xtuner2llava.planning.plan import Plan

STOP, END, START = 360, 361, 362  # <|im_end|>, <|endoftext|>, <|im_start|> of the tiny Qwen
BEGIN = "<|im_start|>"
CASE = "qwen2_e_full_fullvis/iter_2.pth"
CONFIG = """
model = dict(
    type='xtuner.model.LLaVAModel',
    llm=dict(type='transformers.AutoModelForCausalLM.from_pretrained',
             pretrained_model_name_or_path='org/llm'),
    visual_encoder=dict(type='transformers.CLIPVisionModel.from_pretrained',
                        pretrained_model_name_or_path='org/clip'))
tokenizer = dict(
    type='transformers.AutoTokenizer.from_pretrained',
    pretrained_model_name_or_path='org/llm'{tokenizer})
train_dataloader = dict(dataset=dict(
    type='xtuner.dataset.LLaVADataset', image_folder='data', tokenizer=tokenizer,
    pad_image_to_square=True,
    template_map_fn=dict(type='xtuner.dataset.map_fns.template_map_fn_factory',
                         template='xtuner.utils.PROMPT_TEMPLATE.{template}')))
custom_hooks = [dict(
    type='xtuner.engine.hooks.EvaluateChatHook', tokenizer=tokenizer{hook})]
"""
ADVICE = ", bos_token='<|im_start|>', eos_token='<|im_end|>'"


def config_file(
    folder: Path, tokenizer: str = "", template: str = "qwen_chat", hook: str = ""
) -> Path:
    path = folder / "my_config.py"
    path.write_text(CONFIG.format(tokenizer=tokenizer, template=template, hook=hook))
    return path


def base(checkpoints: Path, folder: Path, **special: str) -> Path:
    """The tiny Qwen's folder, its tokenizer with other special tokens, as XTuner would save it."""
    copy = folder / "base"
    shutil.copytree(checkpoints / "bases/llm_qwen2", copy)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(values | special))
    return copy


def make(checkpoints: Path, llm: Path, **options: Any) -> Plan:
    given = {"vision": checkpoints / "bases/vision_clip", "vision_tower_name": "openai/clip"}
    return plan(checkpoints / CASE, llm=llm, **given, **options)


def notes_on_bos(made: Plan) -> list[str]:
    return [note for note in made.notes if "bos token" in note]


def test_a_qwen_has_its_bos_in_the_configs_only(checkpoints: Path, tmp_path: Path) -> None:
    made = make(checkpoints, base(checkpoints, tmp_path), xtuner_config=config_file(tmp_path))
    assert (made.config["bos_token_id"], made.config["eos_token_id"]) == (END, STOP)
    assert made.generation_config["bos_token_id"] == END
    assert made.generation_config["eos_token_id"] == [STOP, END]
    assert made.generation_config["pad_token_id"] == END
    assert not made.made_files  # the tokenizer's files are the base's
    assert not notes_on_bos(made)


def test_xtuners_advice_is_taken_off_the_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    llm = base(checkpoints, tmp_path, bos_token=BEGIN)
    out = tmp_path / "llava-qwen"
    report = convert(
        checkpoints / CASE,
        out,
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
        xtuner_config=config_file(tmp_path, ADVICE),
    )
    (note,) = notes_on_bos(report.plan)
    assert "had the bos token '<|im_start|>', which is XTuner's advice for Qwen" in note
    assert "bos_token_id 361 in config.json" in note
    assert json.loads((out / "tokenizer_config.json").read_text())["bos_token"] is None
    assert "bos_token" not in json.loads((out / "special_tokens_map.json").read_text())
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["bos_token_id"] == END
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        assert (out / name).read_bytes() == (llm / name).read_bytes()


def test_the_advice_in_the_config_alone_is_recognised(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, ADVICE)
    made = make(checkpoints, base(checkpoints, tmp_path), xtuner_config=config)
    (note,) = notes_on_bos(made)
    assert "The XTuner config gives the tokenizer the bos token '<|im_start|>'" in note
    assert not made.made_files
    assert made.config["bos_token_id"] == END


def test_a_bos_token_that_does_no_harm_is_not_blamed(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, ADVICE.replace("<|im_start|>", "<|endoftext|>"))
    (note,) = notes_on_bos(make(checkpoints, base(checkpoints, tmp_path), xtuner_config=config))
    assert "bos token '<|endoftext|>'; it is written without one: LLaVA needs none there." in note
    assert "drops" not in note


@pytest.mark.parametrize("of_base", [False, True])
def test_a_bos_token_that_was_trained_with_stays(
    checkpoints: Path, tmp_path: Path, of_base: bool
) -> None:
    """XTuner puts the tokenizer's bos token before a turn, but for Qwen's: whichever that is."""
    llm = tmp_path / "base"
    shutil.copytree(checkpoints / "bases/llm_phi3", llm)
    (llm / "special_tokens_map.json").unlink()
    path = llm / "tokenizer_config.json"
    if of_base:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "</s>"}))
    made = plan(
        checkpoints / "phi3_e_full_fullvis/iter_2.pth",
        format="hf",
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
        xtuner_config=config_file(tmp_path, "" if of_base else ", bos_token='</s>'", "phi3_chat"),
    )
    config = json.loads(made.files["tokenizer_config.json"])
    assert ("bos_token", "</s>") in config.items()
    assert config["chat_template"].count('{%- if ns.turn == 1 -%}{{- "</s>" -}}') == 1
    assert not any("advice" in note for note in made.notes)


def test_who_asks_for_the_bos_token_gets_it(checkpoints: Path, tmp_path: Path) -> None:
    made = make(checkpoints, base(checkpoints, tmp_path), bos_token=BEGIN)
    (note,) = notes_on_bos(made)
    assert "as asked" in note and "LLaVA drops the first token" in note
    config = json.loads(made.files["tokenizer_config.json"])
    assert ("bos_token", BEGIN) in config.items()
    special = json.loads(made.files["special_tokens_map.json"])
    assert ("bos_token", BEGIN) in special.items()
    assert made.config["bos_token_id"] == made.generation_config["bos_token_id"] == START


def test_a_bos_token_must_be_a_token(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"\?' is not a token of the tokenizer"):
        make(checkpoints, base(checkpoints, tmp_path), bos_token=f"{BEGIN}?")


def test_a_llama_keeps_its_bos_token(checkpoints: Path) -> None:
    made = plan(
        checkpoints / "llama_e_full_fullvis/iter_2.pth",
        llm=checkpoints / "bases/llm_llama",
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/clip",
    )
    config = json.loads(made.files["tokenizer_config.json"])
    assert config["bos_token"] == "<s>"  # noqa: S105
    assert not notes_on_bos(made)
    assert made.token_ids.bos == 1


def test_stop_words_of_the_training_end_a_turn(checkpoints: Path, tmp_path: Path) -> None:
    """A base whose generation config knows its own end only would never stop in a chat."""
    llm = base(checkpoints, tmp_path)
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "top_p": 0.5}))
    made = make(checkpoints, llm, xtuner_config=config_file(tmp_path))
    assert made.generation_config == {
        "bos_token_id": END,
        "do_sample": True,
        "eos_token_id": [STOP, END],
        "pad_token_id": END,
        "top_p": 0.5,
    }
    assert made.chat.template == "qwen_chat"
    assert made.chat.stop_words == ("<|im_end|>", "<|endoftext|>")


def test_stop_words_of_the_evaluation_hook_count_too(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, hook=", stop_words=['<|im_start|>', 'never'], system=''")
    made = make(checkpoints, base(checkpoints, tmp_path), xtuner_config=config)
    assert made.token_ids.eos == (STOP, END, START)
    assert "Stop words that are not a single token here: never." in " ".join(made.notes)


def test_the_end_of_turn_of_another_template(checkpoints: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path, template="internlm2_chat")
    made = make(checkpoints, base(checkpoints, tmp_path), xtuner_config=config)
    assert made.chat.template == "internlm2_chat"
    assert made.token_ids.eos[0] == STOP


def test_a_base_whose_configs_name_no_ids_has_those_of_its_tokenizer(
    checkpoints: Path, tmp_path: Path
) -> None:
    """Without them, LLaVA could not generate."""
    llm = tmp_path / "base"
    shutil.copytree(checkpoints / "bases/llm_llama", llm)
    case = checkpoints / "llama_e_full_fullvis/iter_2.pth"
    bases = {"llm": llm, "vision": checkpoints / "bases/vision_clip"}
    before = plan(case, **bases, vision_tower_name="openai/clip")
    assert before.config["bos_token_id"] is not None
    for name in ("config.json", "generation_config.json"):
        values = json.loads((llm / name).read_text()) if (llm / name).exists() else {}
        kept = {key: value for key, value in values.items() if not key.endswith("_token_id")}
        (llm / name).write_text(json.dumps(kept))
    after = plan(case, **bases, vision_tower_name="openai/clip")
    for key in ("bos_token_id", "eos_token_id"):
        assert after.config[key] == before.config[key]
        assert after.generation_config[key] == before.generation_config[key]

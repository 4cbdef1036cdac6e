"""A converted Qwen generates from embeddings, which is how LLaVA always generates, and stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from damage import set_keys
from reference.cases import Converted, read_reference
from reference.compose import Llava, compose
from xtuner2llava import convert, plan, verify

if TYPE_CHECKING:
    import torch

STOP, END = 360, 361  # <|im_end|>, <|endoftext|>


@pytest.fixture(params=["qwen", "qwen2"])
def folder(
    request: pytest.FixtureRequest, checkpoints: Path, converted: Converted, tmp_path: Path
) -> Path:
    if request.param == "qwen2":
        return converted("qwen2_e_full_fullvis", dtype="float32")
    source = KINDS["qwen"].make(tmp_path / "model")
    trained = write_trained(tmp_path / "trained", source, checkpoints)
    convert(trained.checkpoint, tmp_path / "llava-qwen", dtype="float32", **trained.bases)
    return tmp_path / "llava-qwen"


def embeddings(model: Llava, checkpoints: Path) -> torch.Tensor:
    import torch

    reference = read_reference(checkpoints, "qwen2_e_full_fullvis")
    features = model.image_features(reference["pixel_values"])
    text = model.language_model.get_input_embeddings()(torch.tensor([[7, 8, 9]]))
    return torch.cat([text, features, text], dim=1).detach()


def generate(folder: Path, checkpoints: Path, **options: Any) -> list[int]:
    from transformers import GenerationConfig

    model = compose(folder, checkpoints / "bases/vision_clip")
    llm = model.language_model
    llm.generation_config = GenerationConfig.from_pretrained(folder)
    for key, value in options.items():
        setattr(llm.generation_config, key, value)
    found = llm.generate(
        inputs_embeds=embeddings(model, checkpoints), max_new_tokens=5, do_sample=False
    )
    ids: list[int] = found[0].tolist()
    return ids


@pytest.mark.filterwarnings("ignore")  # about sampling settings of the base
def test_it_generates(folder: Path, checkpoints: Path) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id) == (END, [STOP, END])
    ids = generate(folder, checkpoints)
    assert 1 <= len(ids) <= 6
    # It stops at all that are among the eos ids.
    assert generate(folder, checkpoints, eos_token_id=[STOP, ids[0]]) == ids[:1]


@pytest.mark.parametrize("format", ["llava", "hf"])
def test_ids_without_a_row_are_left_out(checkpoints: Path, tmp_path: Path, format: str) -> None:
    """As in the first configs of Llama 2, which pad with the number of rows."""
    llm = shutil.copytree(checkpoints / "bases/llm_llama", tmp_path / "llm")
    set_keys(llm / "generation_config.json", pad_token_id=384, eos_token_id=[2, 999, 384])
    set_keys(llm / "config.json", pad_token_id=384, bos_token_id=1)
    made = convert(
        checkpoints / "llama_e_full_fullvis/iter_2.pth",
        tmp_path / "llava-llama",
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/x",
        format=format,
    )
    assert verify(tmp_path / "llava-llama").passed
    values = json.loads((tmp_path / "llava-llama/generation_config.json").read_text())
    assert values["eos_token_id"] == 2
    # In `hf`, 384 is the image token, and the pad token that is added follows on it.
    assert values.get("pad_token_id") == (385 if format == "hf" else None)
    rows = "the vocabulary has 384 rows."
    assert {note for note in made.plan.notes if note.endswith(rows)} == {
        f"The base's pad_token_id 384 is left out: {rows}",
        f"The base's eos_token_id 999, 384 is left out: {rows}",
    }


@pytest.mark.parametrize("listed", [True, False])
def test_it_stops_at_the_token_that_training_put_after_answers(
    checkpoints: Path, tmp_path: Path, listed: bool
) -> None:
    """That is the tokenizer's eos token, also where the base's configs name another."""
    llm = shutil.copytree(checkpoints / "bases/llm_llama", tmp_path / "llm")
    set_keys(llm / "tokenizer_config.json", **{"eos_token": "<0x00>" if listed else ""})
    set_keys(llm / "special_tokens_map.json", **{"eos_token": "<0x00>"})
    if not listed:  # Then special_tokens_map.json counts first.
        values = json.loads((llm / "tokenizer_config.json").read_text())
        del values["added_tokens_decoder"]
        (llm / "tokenizer_config.json").write_text(json.dumps(values))
    made = plan(
        checkpoints / "llama_e_full_fullvis/iter_2.pth",
        llm=llm,
        vision=checkpoints / "bases/vision_clip",
        vision_tower_name="openai/x",
    )
    assert made.generation_config["eos_token_id"] == [2, 3]

"""A converted Qwen generates from embeddings, which is how LLaVA always generates, and stops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builders.families.checkpoints import write_trained
from builders.families.models import KINDS
from reference.cases import Converted, read_reference
from reference.compose import Llava, compose
from xtuner2llava import convert

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

"""llama.cpp answers as transformers does, with the GGUF files that docs/gguf.md makes of `hf`.

Text agrees. With a picture, this llama.cpp puts CLIP's class token after the patches, whose
position embeddings are then their neighbours' (ggml-org/llama.cpp#25814,
`tools/mtmd/models/llava.cpp`): it answers otherwise than the trained model. transformers with the
same fault answers the same, so its files are right.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from consumers.models import PICTURES, TOKENS, Answer, Transformers, write_hf
from reference.exchange import write_exchanged
from reference.seen import Seen

pytestmark = pytest.mark.consumers

SAME = 5e-3  # its cache of keys and values is float16, and so are the projector's weights
QUESTION = "What is in this picture?"
KINDS = ("llama", "qwen2")
CLS = "text only: with pictures, its class token is misplaced (ggml-org/llama.cpp#25814)"


@pytest.fixture(scope="module")
def python() -> Path:
    environment = Path(__file__).with_name("environment")
    made = subprocess.run(
        [environment, "llama.cpp"], stdout=subprocess.PIPE, text=True, check=False
    )
    if made.returncode == 77:
        pytest.skip("no Python from 3.11 to 3.14, which xllamacpp is built for")
    assert made.returncode == 0, "the environment could not be made, see above"
    return Path(made.stdout.strip())


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the tower's own size: llama.cpp resizes others than training did."""
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "fitting.png"
    Image.open(PICTURES / "square.png").convert("RGB").resize((56, 56)).save(path)
    return path


def run(python: Path, folder: Path, work: Path, picture: Path) -> dict[str, Any]:
    """The result of `run_llama_cpp.py`, for a question without and one with a picture."""
    work.mkdir()
    questions = [{"chat": QUESTION}, {"chat": QUESTION, "picture": str(picture)}]
    job = {"folder": str(folder), "work": str(work), "tokens": TOKENS, "questions": questions}
    ran = subprocess.run(
        [python, Path(__file__).with_name("run_llama_cpp.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def first(answer: Answer) -> Any:
    """The log-probabilities of the first step, to compare.

    llama.cpp leaves out the steps whose token ends within a character.
    """
    return pytest.approx(answer.top[0], abs=SAME)


def misplaced(embeddings: Any, pixels: Any, **_: Any) -> Any:
    """CLIP's embeddings as llama.cpp makes them, with the class token last."""
    import torch

    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    last = embeddings.class_embedding.expand(len(patches), 1, -1)
    places = embeddings.position_embedding(embeddings.position_ids)
    return torch.cat([patches, last], dim=1) + places


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_transformers(
    python: Path,
    checkpoints: Path,
    tmp_path: Path,
    fitting: Path,
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    from transformers.models.clip import modeling_clip

    folder = write_hf(tmp_path / kind, kind, checkpoints)
    result = run(python, folder, tmp_path / "work", fitting)
    text, pictured = (Answer.of(answer) for answer in result["answers"])
    model = Transformers(folder)
    ids = model.ids(model.prompt(QUESTION, picture=False))
    assert result["answers"][0]["prompt"] == len(ids)
    assert text.top[0] == first(model.follow(ids))
    # The template has the bos token, and the tokenizer is not to add another.
    assert result["metadata"].get("tokenizer.ggml.add_bos_token", False) is False

    trained = model.ask(model.prompt(QUESTION), fitting)
    assert result["answers"][1]["prompt"] == len(trained.ids)
    assert pictured.top[0] != first(trained)
    monkeypatch.setattr(modeling_clip.CLIPVisionEmbeddings, "forward", misplaced)
    wrong = model.ask(model.prompt(QUESTION), fitting)
    assert "\N{REPLACEMENT CHARACTER}" not in model.processor.decode(wrong.tokens[0])
    assert pictured.top[0] == first(wrong)
    assert result["mmproj"]["clip.vision.block_count"] == 3  # of 4: the last one is not used
    seen.ran("llama.cpp", f"xllamacpp {result['version']}", folder, CLS)


def test_gate_and_up_exchanged_is_seen(
    python: Path, checkpoints: Path, tmp_path: Path, fitting: Path
) -> None:
    folder = write_hf(tmp_path / "qwen2", "qwen2", checkpoints)
    exchanged = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    wrong = write_exchanged(folder, tmp_path / "wrong", exchanged, "language_model.model.layers.0")
    result = run(python, wrong, tmp_path / "work", fitting)
    model = Transformers(folder)
    ids = model.ids(model.prompt(QUESTION, picture=False))
    assert Answer.of(result["answers"][0]).top[0] != first(model.follow(ids))

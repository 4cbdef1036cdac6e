"""`inspect my_config.py` for the LLMs that XTuner has LLaVA configs for, and for Qwen 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builders.llm_base import write_llm_base
from builders.training_config import write_training_config
from command import run
from xtuner2llava import Inspection, inspect
from xtuner2llava.planning.plan import Fidelity
from xtuner2llava.tokenizers import conversion
from xtuner2llava.tokenizers import qwen as qwen_files

Foresee = Callable[..., Inspection]
LLAMA = "LlavaLlamaForCausalLM"
QWEN = "LlavaQwenForCausalLM"
EXACT, NOT_POSSIBLE, NOT_EXACT = (
    Fidelity("exact"),
    Fidelity("not_possible"),
    Fidelity("not_exact"),
)
# What XTuner advised for LLMs without bos and eos tokens (InternLM/xtuner, issue 292).
WORKAROUND = ", bos_token='<|im_start|>', eos_token='<|im_end|>'"
TEMPLATES = {
    "internlm2": "internlm2_chat",
    "phi3": "phi3_chat",
    "llama3": "llama3_chat",
    "llama3_1": "llama3_chat",
    "qwen": "qwen_chat",
}


@pytest.fixture(scope="module")
def qwen(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base Qwen 1. Its 151,643 ranks and their merges, which take seconds, are read once."""
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("read_ranks", 0), ("merges", 2)):
            patch.setattr(qwen_files, name, once_per_file(getattr(qwen_files, name), place))
        yield write_llm_base(tmp_path_factory.mktemp("qwen") / "base", "qwen", checkpoints)


def once_per_file(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`function`, whose argument number `place` names the file that the others are of."""
    results: dict[str, Any] = {}

    def call(*arguments: Any) -> Any:
        file = str(arguments[place])
        if file not in results:
            results[file] = function(*arguments)
        return results[file]

    return call


@pytest.fixture
def written(
    checkpoints: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    def write(kind: str, config: dict[str, Any] | None = None, **parts: Any) -> Path:
        if kind == "qwen":
            llm = request.getfixturevalue("qwen")
        else:
            folder = tmp_path / f"base-{len(list(tmp_path.iterdir()))}"
            llm = write_llm_base(folder, kind, checkpoints, **(config or {}))
        parts = {
            "vision": checkpoints / "bases/vision_clip",
            "prompt_template": TEMPLATES[kind],
            **parts,
        }
        return write_training_config(tmp_path / "my_config.py", llm, **parts)

    return write


@pytest.fixture
def foresee(written: Callable[..., Path]) -> Foresee:
    return lambda *arguments, **parts: inspect(
        written(*arguments, **parts), vision_tower_name="openai/clip"
    )


def verdicts(outlook: Inspection) -> dict[str, Fidelity]:
    return {target.format: target.fidelity for target in outlook.targets}


def of_llava(outlook: Inspection) -> Any:
    (found,) = [target for target in outlook.targets if target.format == "llava"]
    return found


@pytest.mark.parametrize(
    ("kind", "family", "architecture", "llava", "hf"),
    [
        ("internlm2", "internlm2", LLAMA, EXACT, EXACT),
        ("phi3", "phi3", LLAMA, Fidelity("exact_up_to", 2047), Fidelity("exact_up_to", 2047)),
        ("llama3", "llama", LLAMA, EXACT, EXACT),
        ("llama3_1", "llama", None, NOT_POSSIBLE, EXACT),
        ("qwen", "qwen", QWEN, Fidelity("exact_up_to", 256), Fidelity("exact_up_to", 256)),
    ],
)
def test_the_family_and_the_verdict(
    foresee: Foresee,
    kind: str,
    family: str,
    architecture: str | None,
    llava: Fidelity,
    hf: Fidelity,
) -> None:
    outlook = foresee(kind)
    assert outlook.family == family
    assert of_llava(outlook).architecture == architecture
    assert verdicts(outlook) == {"llava": llava, "hf": hf}
    assert outlook.is_possible
    if kind == "phi3":
        assert any("attends to the last 2047 tokens" in c for c in of_llava(outlook).caveats)
    if kind == "llama3_1":
        assert "Llama 3.1 and later" in str(of_llava(outlook).faults[0])
    if kind == "qwen":  # It is told of its missing tokens; a second inspection takes seconds.
        assert outlook.lines == (
            "tokenizer=dict(**tokenizer, bos_token='<|endoftext|>'),  # in EvaluateChatHook",
            "eos_token='<|im_end|>',  # in tokenizer",
        )
        assert any("will have 151643" in sentence for sentence in outlook.advice)
        assert outlook.advice[-1].endswith("eos ids [151645, 151643].")


@pytest.mark.parametrize(
    ("kind", "turns", "eos"),
    [
        ("internlm2", "<|im_end|>", [5, 2]),
        ("phi3", "<|end|>", [386, 384, 385]),
        ("llama3", "<|eot_id|>", [386, 385]),
    ],
)
def test_configs_as_xtuner_ships_them_lack_nothing(
    foresee: Foresee, kind: str, turns: str, eos: list[int]
) -> None:
    outlook = foresee(kind)
    assert outlook.lines == ()
    assert outlook.advice[-1] == f"Turns end with {turns}: eos ids {eos}."
    assert not any("bos" in sentence for sentence in outlook.advice)


@pytest.mark.parametrize(("kind", "missing"), [("internlm2", "<|im_end|>"), ("phi3", "<|end|>"),
                                               ("llama3", "<|eot_id|>")])  # fmt: skip
def test_a_hook_without_template_or_stop_words_is_told_which(
    foresee: Foresee, kind: str, missing: str
) -> None:
    line = f"stop_words=['{missing}'],  # in EvaluateChatHook"
    assert foresee(kind, hook="").lines == (line,)
    assert foresee(kind, hook=f", stop_words=['{missing}']").lines == ()
    assert foresee(kind, hook=f", stop_word='{missing}'").lines == ()
    assert foresee(kind, hook=", stop_words=['</s>']").lines == (line,)


@pytest.mark.parametrize(
    "kind", ["internlm2", "phi3", "llama3", pytest.param("qwen", marks=pytest.mark.slow)]
)
def test_a_config_without_prompt_template_is_told_which(foresee: Foresee, kind: str) -> None:
    outlook = foresee(kind, prompt_template=None)
    assert f"prompt_template = PROMPT_TEMPLATE.{TEMPLATES[kind]}" in outlook.lines


def test_a_tokenizer_is_converted_once_for_all_targets(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a target is judged twice, with and without the tower's name."""
    convert, calls = conversion.from_sentencepiece, []
    monkeypatch.setattr(
        conversion, "from_sentencepiece", lambda *given: calls.append(given) or convert(*given)
    )
    outlook = inspect(written("internlm2"))
    assert [target.needs for target in outlook.targets] == [None, "vision_tower_name"]
    assert len(calls) == 1


def test_a_template_whose_words_the_tokenizer_lacks_is_not_advised(
    written: Callable[..., Path],
) -> None:
    """Phi-4 is of Phi-3's family, and ends its turns otherwise."""
    path = written("phi3", prompt_template=None)
    (llm,) = [p for p in path.parent.iterdir() if p.name.startswith("base-")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (llm / name).read_text()
        assert "<|end|>" in text
        (llm / name).write_text(text.replace("<|end|>", "<|im_end|>"))
    outlook = inspect(path, vision_tower_name="openai/clip")
    assert outlook.family == "phi3"
    assert outlook.lines == ()
    assert any("No prompt template is set" in sentence for sentence in outlook.advice)
    assert not any("<|end|>" in sentence for sentence in outlook.advice)


def test_the_workaround_on_an_llm_with_a_bos_token(foresee: Foresee) -> None:
    """InternLM2 is trained with the bos token of its tokenizer: the advice for Qwen changes it."""
    outlook = foresee("internlm2", tokenizer=WORKAROUND)
    assert not any("bos token" in s for s in outlook.advice)
    assert verdicts(outlook) == {"llava": EXACT, "hf": EXACT}
    assert not any("'<s>'" in s for s in foresee("internlm2", tokenizer=", bos_token='<s>'").advice)


@pytest.mark.slow
def test_qwen_1_with_the_workaround(foresee: Foresee) -> None:
    outlook = foresee("qwen", tokenizer=WORKAROUND)
    assert outlook.lines == ()  # it does what the lines would do
    caveats = [caveat for target in outlook.targets for caveat in target.caveats]
    assert any("'<|im_start|>'; it is written without" in caveat for caveat in caveats)


@pytest.mark.slow
def test_the_lines_to_add_are_enough(foresee: Foresee) -> None:
    """A config with what was advised gets no more advice."""
    outlook = foresee(
        "qwen",
        tokenizer=", eos_token='<|im_end|>'",
        hook_tokenizer="tokenizer=dict(**tokenizer, bos_token='<|endoftext|>')",
    )
    assert outlook.lines == ()


@pytest.mark.parametrize("kind", ["internlm2", "phi3", "llama3"])
def test_a_siglip_tower_is_refused_for_every_format(
    foresee: Foresee, tmp_path: Path, kind: str
) -> None:
    siglip = tmp_path / "siglip"
    siglip.mkdir()
    (siglip / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    outlook = foresee(kind, vision=siglip, tower_class="SiglipVisionModel")
    assert not outlook.is_possible
    for target in outlook.targets:
        assert target.fidelity == NOT_POSSIBLE
        assert "XTuner drops the first patch of a tower without class token" in str(
            target.faults[0]
        )


def test_a_quantised_llm_is_near(foresee: Foresee) -> None:
    quantised = ", quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)"
    lora = ", llm_lora=dict(type=LoraConfig, r=512, lora_alpha=256)"
    frozen = foresee("internlm2", llm_arguments=quantised)
    assert verdicts(frozen) == {"llava": NOT_EXACT, "hf": NOT_EXACT}
    assert of_llava(frozen).caveats[0].startswith("The LLM was quantised in training")
    tuned = foresee("internlm2", llm_arguments=quantised, model=lora)
    assert verdicts(tuned) == {"llava": NOT_EXACT, "hf": NOT_EXACT}
    assert of_llava(tuned).caveats[0].startswith("The LLM was trained as QLoRA")
    assert verdicts(foresee("internlm2", model=lora)) == {"llava": EXACT, "hf": EXACT}


def test_a_projector_of_three_layers_is_for_llava_only(foresee: Foresee) -> None:
    outlook = foresee("llama3", model=", projector_depth=3")
    assert verdicts(outlook) == {"llava": EXACT, "hf": NOT_POSSIBLE}
    (hf,) = [target for target in outlook.targets if target.format == "hf"]
    assert "a projector of two layers" in str(hf.faults[0])


def test_a_longer_context_of_phi3_has_no_target(foresee: Foresee) -> None:
    outlook = foresee("phi3", model=", max_position_embeddings=8192")
    assert verdicts(outlook) == {"llava": NOT_POSSIBLE, "hf": NOT_POSSIBLE}
    assert "Train again on" in str(of_llava(outlook).faults[0])


@pytest.mark.parametrize(
    ("names", "because"),
    [
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, "rotate half of each head"),
        ({"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"}, "scale_emb"),
        ({"architectures": ["UnknownForCausalLM"], "model_type": "unknown"}, "mappings draft"),
    ],
)
def test_an_llm_without_target_has_a_verdict_for_each(
    foresee: Foresee, names: dict[str, Any], because: str
) -> None:
    outlook = foresee("llama3", names)
    assert verdicts(outlook) == {"llava": NOT_POSSIBLE, "hf": NOT_POSSIBLE}
    assert all(because in str(target.faults[0]) for target in outlook.targets)


def test_an_llm_of_ones_own_is_foreseen_with_its_mapping(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "schema: 1\nfamily: mine\nextends: llama\n"
        "caveats: [{say: It differs., exact_up_to: max_position_embeddings}]\n"
    )
    config = written("llama3", {"architectures": ["UnknownForCausalLM"], "model_type": "unknown"})
    outlook = inspect(config, mapping=mapping, vision_tower_name="openai/clip")
    assert outlook.family == "mine"
    limit = Fidelity("exact_if_right", 8192, if_right="mine.yaml")
    assert verdicts(outlook) == {"llava": limit, "hf": limit}
    words = ["inspect", config, "--mapping", mapping, "--vision-tower-name", "openai/clip"]
    done = run(*words, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["targets"][0]["exact_up_to"] == 8192


def test_a_tokenizer_that_is_code_is_told_before_the_training(
    foresee: Foresee, written: Callable[..., Path]
) -> None:
    path = written("llama3")
    (llm,) = [p for p in path.parent.iterdir() if p.name.startswith("base-")]
    config = json.loads((llm / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["my.My", None]}}
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    outlook = inspect(path, vision_tower_name="openai/clip")
    assert not outlook.is_possible
    assert "code of the model's repository" in str(outlook.targets[0].faults[0])


def test_the_command_line_says_it_in_words_and_as_data(written: Callable[..., Path]) -> None:
    path = written("phi3", hook="")
    command = ["inspect", path, "--vision-tower-name", "openai/clip"]
    said = run(*command)
    assert f"\nllava: exact up to 2047 tokens, as {LLAMA}\n" in said.stdout
    assert "\nAdd to the config:\n  stop_words=['<|end|>'],  # in EvaluateChatHook\n" in said.stdout
    done = run(*command, "--json")
    assert (said.returncode, done.returncode) == (0, 0)
    for target in json.loads(done.stdout)["targets"]:
        assert (target["verdict"], target["exact_up_to"]) == ("exact_up_to", 2047)

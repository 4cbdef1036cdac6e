"""The tokenizer that was trained with, and vocabularies that training has resized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xtuner2llava import ConversionError, convert, plan
from xtuner2llava.planning.plan import Plan

# transformers 5 says so of the vocabulary of 4.37.
pytestmark = pytest.mark.filterwarnings("ignore:.*rope_scaling.*:FutureWarning")
BASE = "llm_llama_gqa"  # 384 rows, ids up to 383
QWEN = "llm_qwen2"  # ids up to 362, with rows to spare
ROWS = 384
TEXT = "a<region> b <point>c"
CONFIG = """
tokenizer = dict(type='transformers.AutoTokenizer.from_pretrained', trust_remote_code=True,
                 pretrained_model_name_or_path={tokenizer!r}, padding_side='right'{arguments})
model = dict(
    type='xtuner.model.LLaVAModel', freeze_llm={freeze_llm}, freeze_visual_encoder=True,
    llm=dict(type='transformers.AutoModelForCausalLM.from_pretrained',
             pretrained_model_name_or_path={llm!r}),
    visual_encoder=dict(type='transformers.CLIPVisionModel.from_pretrained',
                        pretrained_model_name_or_path='clip'){model})
train_dataloader = dict(dataset=dict(type='xtuner.dataset.LLaVADataset', image_folder='data',
    pad_image_to_square=True, tokenizer={of_data}))
"""
LORA = """,
    llm_lora=dict(type='peft.LoraConfig', r=8, lora_alpha=16,
                  modules_to_save=['embed_tokens', 'lm_head'])"""


class Bench:
    """Checkpoints with what converts them, in a folder."""

    def __init__(self, checkpoints: Path, folder: Path, base: str) -> None:
        self.checkpoints, self.folder = checkpoints, folder
        self.llm = checkpoints / "bases" / base

    def checkpoint(
        self,
        config: str,
        embed: int | None = None,
        head: int | None = None,
        *,
        lora: bool = False,
    ) -> Path:
        """An `iter_2.pth`: of a pretraining, or with an embedding and a head of so many rows."""
        import torch
        from safetensors.torch import load_file

        home = self.checkpoints / "llama_d_lora_vislora/iter_2_xtuner/projector"
        state = {f"projector.{k}": v for k, v in load_file(home / "model.safetensors").items()}
        llm = load_file(self.llm / "model.safetensors") if embed is not None else {}
        prefix = "llm.base_model.model." if lora else "llm."
        for name, tensor in llm.items():
            rows = {"model.embed_tokens.weight": embed, "lm_head.weight": head}.get(name)
            if rows is not None:
                new = torch.arange(float(tensor[0].numel())).repeat(max(rows - len(tensor), 0), 1)
                tensor = torch.cat([tensor, new.to(tensor.dtype)])[:rows].clone()
                saved = ".modules_to_save.default.weight" if lora else ".weight"
                state[prefix + name.removesuffix(".weight") + saved] = tensor
            elif not lora:
                state[prefix + name] = tensor
            elif name.endswith("q_proj.weight"):
                factor = prefix + name.removesuffix("weight") + "lora_{}.default.weight"
                state[factor.format("A")] = torch.ones(8, tensor.shape[1])
                state[factor.format("B")] = torch.zeros(tensor.shape[0], 8)
        path = self.folder / "iter_2.pth"
        torch.save({"meta": {"iter": 2, "cfg": config}, "state_dict": state}, path)
        return path

    def config(self, *, lora: bool = False, freeze: bool = True, **given: str) -> str:
        values = {"llm": "org/llm", "tokenizer": "org/llm", "arguments": "", "of_data": "tokenizer"}
        model = LORA if lora else ""
        return CONFIG.format(**{**values, **given}, model=model, freeze_llm=freeze)

    def options(self, **more: Any) -> dict[str, Any]:
        vision = self.checkpoints / "bases/vision_clip"
        return {"llm": self.llm, "vision": vision, "vision_tower_name": "openai/clip", **more}

    def tokenizer(self, name: str, tokens: list[str]) -> Path:
        """The base's tokenizer with further tokens, as transformers saves it."""
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(self.llm)
        made.add_tokens(tokens)
        made.save_pretrained(self.folder / name)
        return self.folder / name


@pytest.fixture
def qwen(checkpoints: Path, tmp_path: Path) -> Bench:
    return Bench(checkpoints, tmp_path, QWEN)


@pytest.fixture
def llama(checkpoints: Path, tmp_path: Path) -> Bench:
    return Bench(checkpoints, tmp_path, BASE)


def loaded(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **arguments)


def ids(tokenizer: Any) -> list[int]:
    found: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return found


def files(made: Plan) -> set[str]:
    return {name for name in made.made_files if name != "preprocessor_config.json"}


# The tokenizer of another folder


@pytest.mark.parametrize("fixture", ["qwen", "llama"])
@pytest.mark.parametrize("by_option", [True, False])
def test_the_tokenizer_of_another_folder(
    fixture: str, by_option: bool, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(fixture)
    folder = bench.tokenizer("with_tokens", ["<region>", "<point>"])
    rows = None if fixture == "qwen" else ROWS + 2
    config = bench.config(tokenizer="/gone" if by_option else str(folder))
    case = bench.checkpoint(config, rows, rows)
    out = bench.folder / "llava-out"
    more = {"tokenizer": folder} if by_option else {}
    convert(case, out, **bench.options(**more))
    assert ids(loaded(out)) == ids(loaded(folder)) != ids(loaded(bench.llm))
    assert len(loaded(out)) == len(loaded(folder)) == len(loaded(bench.llm)) + 2


def test_one_that_is_not_here_is_asked_for(qwen: Bench) -> None:
    case = qwen.checkpoint(qwen.config(tokenizer="/data/my_tokenizer"))
    for format_name in ("llava", "hf"):
        with pytest.raises(ConversionError) as error:
            plan(case, format=format_name, **qwen.options())
        assert "the tokenizer of the training is '/data/my_tokenizer'" in str(error.value)
        assert "with tokenizer." in str(error.value)


@pytest.mark.parametrize("path", ["org/llm", "org/llm/", "org/./llm"])
def test_the_llms_own_path_is_the_base(qwen: Bench, path: str) -> None:
    made = plan(qwen.checkpoint(qwen.config(tokenizer=path)), **qwen.options())
    assert not files(made)
    assert not any("The tokenizer is" in note for note in made.notes)


def test_datasets_that_disagree_are_refused(qwen: Bench) -> None:
    other = "dict(tokenizer, additional_special_tokens=['<region>'])"
    case = qwen.checkpoint(qwen.config(of_data=other))
    with pytest.raises(ConversionError, match="tokenizers that differ from the first: tokenizer"):
        plan(case, **qwen.options())
    folder = qwen.tokenizer("with_tokens", ["<region>"])
    made = plan(case, **qwen.options(tokenizer=folder))
    parents = {path.parent for path in made.copied_files}
    assert parents <= {folder, qwen.checkpoints / "bases/vision_clip"}
    padded = "dict(tokenizer, padding_side='left', use_fast=False)"
    assert not files(plan(qwen.checkpoint(qwen.config(of_data=padded)), **qwen.options()))


# Arguments


@pytest.mark.parametrize("base", [QWEN, "llm_llama", "llm_phi3"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"additional_special_tokens": ["<region>", "<point>"]},
        {"pad_token": "[PAD]", "additional_special_tokens": ["<point>", "<region>"]},
        {"unk_token": "<u>", "pad_token": "<p>", "sep_token": "<region>"},
        {"cls_token": "<point>", "eos_token": "<region>"},
        {"additional_special_tokens": ["the"]},
    ],
    ids=["additional", "pad and additional", "named", "eos", "a token already"],
)
def test_added_tokens_have_the_ids_that_transformers_gives(
    checkpoints: Path, tmp_path: Path, base: str, arguments: dict[str, Any]
) -> None:
    bench = Bench(checkpoints, tmp_path, base)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    trained = loaded(bench.llm, **arguments)
    rows = max(ROWS if base == "llm_llama" else 400, len(trained))
    case = bench.checkpoint(bench.config(arguments=words), rows, rows)
    out = tmp_path / "llava-out"
    report = convert(case, out, **bench.options())
    written = loaded(out)
    assert ids(written) == ids(trained)
    assert len(written) == len(trained)
    assert written.get_vocab() == trained.get_vocab()
    for key, value in arguments.items():
        if isinstance(value, str):
            assert getattr(written, key) == value
    if len(trained) > len(loaded(bench.llm)):
        assert any("Arguments of the XTuner config add" in note for note in report.plan.notes)
    assert report.plan.config["vocab_size"] == rows


def test_tokens_without_rows_are_refused(llama: Bench) -> None:
    words = ", additional_special_tokens=['<region>']"
    case = llama.checkpoint(llama.config(arguments=words))
    with pytest.raises(ConversionError, match=r"token '<region>' has id 384, .* has 384 rows"):
        plan(case, **llama.options())


@pytest.mark.parametrize(
    "argument",
    [
        "extra_special_tokens={'image': '<image>'}",
        "additional_special_tokens=[build()]",
        "pad_token=build()",
        "added_tokens_decoder={7: 'x'}",
        "revision='abc'",
    ],
)
def test_what_cannot_be_followed_is_refused(qwen: Bench, argument: str) -> None:
    case = qwen.checkpoint(qwen.config(arguments=f", {argument}"))
    with pytest.raises(ConversionError, match="Give tokenizer the folder"):
        plan(case, **qwen.options())
    made = plan(case, **qwen.options(tokenizer=qwen.llm))
    assert any("that --tokenizer must hold already" in note for note in made.notes)


def test_arguments_that_tokenise_otherwise_are_written(llama: Bench) -> None:
    words = ", legacy=True, add_eos_token=True, use_fast=True, model_max_length=9"
    case = llama.checkpoint(llama.config(arguments=words))
    made = plan(case, **llama.options())
    config = json.loads(made.files["tokenizer_config.json"])
    assert config["legacy"] is True and config["add_eos_token"] is True
    before = json.loads((llama.llm / "tokenizer_config.json").read_text())
    # tokenizer.model drops spaces, so that LLaVA is to read tokenizer.json.
    before["tokenizer_class"] = "PreTrainedTokenizerFast"
    before["model_input_names"] = ["input_ids", "attention_mask"]
    # LLaVA's version finds these in what the normalizer made of a text: with `normalized`.
    for token in before["added_tokens_decoder"].values():
        token["normalized"] = True
    assert config == {**before, "legacy": True, "add_eos_token": True}


@pytest.mark.parametrize("with_vocab", [True, False])
def test_qwen_has_no_bos_token_before_a_prompt(qwen: Bench, with_vocab: bool) -> None:
    """Also where its class becomes another one, and the user gives it a bos token."""
    if not with_vocab:
        qwen.llm = Path(shutil.copytree(qwen.llm, qwen.folder / "without"))
        (qwen.llm / "vocab.json").unlink()
    case = qwen.checkpoint(qwen.config())
    out = qwen.folder / "llava-out"
    begin = "<|im_start|>"
    convert(case, out, **qwen.options(bos_token=begin))
    tokenizer = loaded(out)
    assert tokenizer.special_tokens_map["bos_token"] == begin
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


# Resized vocabularies


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rows", [ROWS + 2, ROWS + 64])
def test_an_extended_vocabulary_with_its_tokenizer(llama: Bench, lora: bool, rows: int) -> None:
    from safetensors.torch import load_file

    folder = llama.tokenizer("with_tokens", ["<region>", "<point>"])
    config = llama.config(lora=lora, freeze=lora, tokenizer=str(folder))
    case = llama.checkpoint(config, rows, rows, lora=lora)
    out = llama.folder / "llava-out"
    report = convert(case, out, **llama.options())
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    tensors = load_file(out / "model.safetensors")
    base = load_file(llama.llm / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape[0] == rows
        assert (tensors[name][:ROWS] == base[name].to(tensors[name].dtype)).all()
        assert tensors[name][ROWS:, 5].unique().tolist() == [5.0]
    assert ids(loaded(out))[-1] == ids(loaded(folder))[-1]
    assert any(f"The vocabulary has {rows} rows, as trained" in n for n in report.plan.notes)
    made = plan(case, format="hf", **llama.options())
    assert made.config["text_config"]["vocab_size"] >= rows  # type: ignore[index,call-overload,operator]


@pytest.mark.parametrize("lora", [False, True])
def test_without_its_tokenizer_it_is_asked_for(llama: Bench, lora: bool) -> None:
    case = llama.checkpoint(llama.config(lora=lora, freeze=lora), ROWS + 5, ROWS + 5, lora=lora)
    with pytest.raises(ConversionError) as error:
        plan(case, **llama.options())
    assert "the vocabulary was extended by 5 rows: it has 389" in str(error.value)
    assert "Give tokenizer the tokenizer that was trained with" in str(error.value)
    assert len(error.value.faults) == 1


@pytest.mark.parametrize("lora", [False, True])
def test_an_embedding_and_a_head_that_disagree(llama: Bench, lora: bool) -> None:
    case = llama.checkpoint(llama.config(lora=lora, freeze=lora), ROWS + 5, ROWS, lora=lora)
    with pytest.raises(ConversionError) as error:
        plan(case, **llama.options(tokenizer=llama.tokenizer("t", ["<a>"])))
    (fault,) = error.value.faults
    assert "embed_tokens.weight has 389 rows and lm_head.weight has 384 rows" in fault.what


def test_a_vocabulary_cut_to_its_tokenizer(qwen: Bench) -> None:
    """`resize_token_embeddings(len(tokenizer))` takes a Qwen's spare rows away."""
    length = len(loaded(qwen.llm))
    case = qwen.checkpoint(qwen.config(freeze=False), length, length)
    assert plan(case, **qwen.options()).config["vocab_size"] == length
    case = qwen.checkpoint(qwen.config(freeze=False), length + 3, length + 3)
    with pytest.raises(ConversionError, match=f"the vocabulary has {length + 3} rows"):
        plan(case, **qwen.options())
    case = qwen.checkpoint(qwen.config(freeze=False), length - 1, length - 1)
    with pytest.raises(ConversionError, match=f"the embedding has {length - 1} rows"):
        plan(case, **qwen.options())


def test_an_xtuner_folders_own_tokenizer_wins(checkpoints: Path, tmp_path: Path) -> None:
    """XTuner saves it from the config; the base that is given may lack tokens."""
    bench = Bench(checkpoints, tmp_path, QWEN)
    home = tmp_path / "iter_2_xtuner"
    shutil.copytree(checkpoints / "qwen2_b_full_frozenvis/iter_2_xtuner", home)
    made = plan(home, **bench.options())
    assert {path.parent for path in made.copied_files if path.name == "vocab.json"} == {bench.llm}
    own = loaded(home)
    own.add_tokens(["<region>"])
    own.save_pretrained(home)
    out = tmp_path / "llava-qwen"
    report = convert(home, out, **bench.options())
    assert ids(loaded(out)) == ids(own)
    assert any("in the checkpoint's folder" in note for note in report.plan.notes)


@pytest.mark.parametrize("how", ["use_fast", "class", "fast"])
def test_a_training_with_the_slow_tokenizer(llama: Bench, how: str) -> None:
    """Official LLaVA reads tokenizer.model too, and what is made for hf is made from that."""
    arguments = {"use_fast": ", use_fast=False", "class": "", "fast": ""}[how]
    text = llama.config(arguments=arguments)
    if how == "class":
        text = text.replace("AutoTokenizer", "LlamaTokenizer")
    case = llama.checkpoint(text)
    llama.llm = Path(shutil.copytree(llama.llm, llama.folder / "llm"))
    base = json.loads((llama.llm / "tokenizer.json").read_text())
    vocab = base["model"]["vocab"]
    one, two = [name for name in vocab if len(name) > 2][-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    settings = llama.llm / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    config.pop("add_prefix_space", None)
    (llama.llm / "tokenizer.json").write_text(json.dumps(base))
    settings.write_text(json.dumps(config))
    made = plan(case, **llama.options())
    slow = how != "fast"
    assert ("tokenizer.model" in made.files, "tokenizer.json" in made.files) == (slow, not slow)
    assert any("Training loaded the slow tokenizer" in note for note in made.notes) is slow
    found = json.loads(plan(case, format="hf", **llama.options()).files["tokenizer.json"])
    before = {name: index for name, index in vocab.items() if name in (one, two)}
    after = {name: found["model"]["vocab"][name] for name in before}
    assert (after == before) is not slow

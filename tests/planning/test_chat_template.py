"""A conversation through the chat template has the ids that XTuner trained with."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders.internlm2_tokenizer import added
from reference.encode import IMAGE, Turns, encode
from reference.seen import Seen
from xtuner2llava.mapping.catalogue import Catalogue
from xtuner2llava.mapping.family import PromptTemplate
from xtuner2llava.planning.chat import trained_bos, with_trained_chat
from xtuner2llava.planning.chat_template import Marks, chat_template, prompt_text
from xtuner2llava.planning.plan import Findings
from xtuner2llava.planning.tokenizer import with_format_tokens
from xtuner2llava.tokenizers.prefix import PrefixSpace
from xtuner2llava.tokenizers.tokenizer import Tokenizer, read_tokenizer
from xtuner2llava.training_config.datasets import TrainingData

CATALOGUE = Catalogue(Path(__file__).parents[2] / "mappings")
REFERENCE = json.loads((Path(__file__).parents[1] / "data/prompts/reference.json").read_text())
BASES = ("llm_qwen2", "llm_llama", "llm_phi3")


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in tokenizer.copied:
        shutil.copy(tokenizer.folder / name, folder / name)
    for name, make in tokenizer.made.items():
        (folder / name).write_bytes(make())
    return folder


def load(base: Path, template: PromptTemplate | None, folder: Path) -> Any:
    """The tokenizer that the format hf gets, in the transformers of this environment."""
    from transformers import AutoTokenizer

    tokenizer, _ = with_format_tokens(read_tokenizer(base), CATALOGUE.formats["hf"].tokens)
    bos = trained_bos(tokenizer, tokenizer)
    made = with_trained_chat(
        tokenizer, template, TrainingData(), Findings(), bos=bos, with_processor=True
    )
    return AutoTokenizer.from_pretrained(write(made, folder))


def messages(turns: Turns, *, parts: bool = False) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for question, answer in turns:
        content: Any = question
        if parts:
            before, image, after = question.partition("<image>")
            texts = [{"type": "text", "text": text} if text else None for text in (before, after)]
            content = [p for p in (texts[0], {"type": "image"} if image else None, texts[1]) if p]
        found.append({"role": "user", "content": content})
        found.append({"role": "assistant", "content": answer})
    return found


def rendered(tokenizer: Any, conversation: list[dict[str, Any]]) -> list[int]:
    """The ids of a conversation, rendered and tokenized in two steps, with -200 for the image."""
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [IMAGE if index == image else index for index in tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("base", BASES)
def test_every_template_gives_the_ids_of_xtuner(
    checkpoints: Path, tmp_path: Path, seen: Seen, base: str
) -> None:
    loaded: dict[str, Any] = {}
    compared = 0
    lengths = Counter[str]()
    for name, template, conversation, ids, starts in REFERENCE["encoded"]:
        if name != base:
            continue
        if template not in loaded:
            folder = checkpoints / "bases" / base
            found = CATALOGUE.prompt_templates[template]
            loaded[template] = load(folder, found, tmp_path / template)
        flat = [text for _, text in REFERENCE["conversations"][conversation]]
        turns = list(zip(flat[::2], flat[1::2], strict=True))
        for parts in (False, True):
            whole = messages(turns, parts=parts)
            assert rendered(loaded[template], whole) == ids, (template, conversation)
            for turn, start in enumerate(starts):
                asked = whole[: 2 * turn + 1]
                assert rendered(loaded[template], asked) == ids[:start], (template, conversation)
                compared += 1
        lengths[template] += len(ids)
    assert compared == 26 * 4 * 2
    assert {*loaded} == {*CATALOGUE.prompt_templates} - {"minicpm3"}
    for template, count in lengths.items():
        seen.compared(template, base, "hf", count)


def test_the_other_encoding_is_that_of_xtuner_too(checkpoints: Path) -> None:
    from transformers import AutoTokenizer

    tokenizers = {n: AutoTokenizer.from_pretrained(checkpoints / "bases" / n) for n in BASES}
    for name, template, conversation, ids, _ in REFERENCE["encoded"]:
        flat = [text for _, text in REFERENCE["conversations"][conversation]]
        turns = list(zip(flat[::2], flat[1::2], strict=True))
        found = CATALOGUE.prompt_templates[template]
        assert encode(tokenizers[name], found, turns) == ids, (name, template)
        assert encode(tokenizers[name], replace(found, sep="#"), turns) != ids


def legacy(content: dict[str, Any]) -> None:
    """As LlamaTokenizerFast has it where `legacy` is true: a space before every segment."""
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    replacing = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    prepend = {"type": "Prepend", "prepend": space}
    content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replacing]}
    content["pre_tokenizer"] = None


def always(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["prepend_scheme"] = "always"


def never(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["prepend_scheme"] = "never"


def special(content: dict[str, Any]) -> None:
    """With Phi-3's special tokens, but for what its own do to white space."""
    for index, text in enumerate(("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")):
        content["added_tokens"].append({"id": 384 + index, **added(text)})


def changed_base(checkpoints: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The tiny Llama's tokenizer, whose tokenizer.json is changed and says everything."""
    folder.mkdir()
    content = json.loads((checkpoints / "bases/llm_llama/tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TURNS = {
    "plain": [("<image>\nWhat is it?", "A cat."), ("Why?", "It has ears.")],
    "image alone": [("<image>", "A cat."), ("And <image>?", "A dog.")],
    "spaces": [("<image>\n What?  ", " Black "), (" Which ", "Red")],
    "no image": [("Hello\nthere", "Hi\n"), ("Bye", "Bye.")],
    "nothing": [("<image>\n", ""), ("", "Yes")],
    "special": [("<image>\n</s> a", "</s>b"), ("<s>Why", "<s>")],
}


@pytest.mark.parametrize("template", ["vicuna", "llama2_chat", "phi3_chat", "gemma", "minicpm3"])
@pytest.mark.parametrize("kind", [legacy, always, never, special])
def test_spaces_that_a_tokenizer_adds_are_where_training_had_them(
    checkpoints: Path, tmp_path: Path, kind: Callable[[dict[str, Any]], None], template: str
) -> None:
    from transformers import AutoTokenizer

    base = changed_base(checkpoints, tmp_path / "base", kind)
    found = CATALOGUE.prompt_templates[template]
    trained, made = AutoTokenizer.from_pretrained(base), load(base, found, tmp_path / "made")
    for name, turns in TURNS.items():
        expected = encode(trained, found, turns)
        assert rendered(made, messages(turns)) == expected, (name, kind.__name__)
        with_system = encode(trained, found, turns, "Be brief.")
        system = [{"role": "system", "content": "Be brief."}, *messages(turns)]
        assert rendered(made, system) == with_system, (name, kind.__name__)
        assert with_system != expected


def test_white_space_that_the_tokenizer_drops_between_turns_is_said(
    checkpoints: Path, tmp_path: Path
) -> None:
    """Phi-3's `<|end|>` swallows the line feed after it, which XTuner encodes by itself."""
    from transformers import AutoTokenizer

    def phi3(content: dict[str, Any]) -> None:
        special(content)
        content["added_tokens"][-3]["rstrip"] = True

    base = changed_base(checkpoints, tmp_path / "base", phi3)
    template = CATALOGUE.prompt_templates["phi3_chat"]
    made = load(base, template, tmp_path / "made")
    expected = encode(AutoTokenizer.from_pretrained(base), template, TURNS["plain"])
    first = messages(TURNS["plain"])
    assert rendered(made, first[:1]) == expected[: len(rendered(made, first[:1]))]
    separator = made.encode("\n", add_special_tokens=False)
    assert len(expected) - len(rendered(made, first)) == 2 * len(separator)
    notes = Findings()
    with_trained_chat(
        read_tokenizer(base), template, TrainingData(), notes, bos="<s>", with_processor=True
    )
    assert "the tokenizer drops it after '<|end|>'" in " ".join(notes.notes)


def test_a_template_without_input_has_no_chat_template() -> None:
    marks = Marks("<s>", "</s>", PrefixSpace(everywhere=True, doubled=True))
    for instruction in (
        "",
        "no input",
        "{input}{input}",
        "{other} {input}",
        "{input!r}",
        "{",
        "{0}",
    ):
        template = PromptTemplate(None, instruction)
        assert chat_template(template, marks) is None
        assert prompt_text(template, "Hi") is None
    assert prompt_text(PromptTemplate(None, "Q{round}: {input} {{A}}"), "Hi") == (
        "Q1: <image>\nHi {A}"
    )


def test_a_role_that_training_had_not_is_an_error(checkpoints: Path, tmp_path: Path) -> None:
    made = load(
        checkpoints / "bases/llm_qwen2", CATALOGUE.prompt_templates["qwen_chat"], tmp_path / "made"
    )
    with pytest.raises(Exception, match="The roles are system, user and assistant"):
        rendered(made, [{"role": "tool", "content": "x"}])

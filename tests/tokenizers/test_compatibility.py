"""Tokenizers that each transformers has saved load in all versions that a format is for.

`acceptance/test_saved_tokenizers.py` loads and saves what is made here in those versions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders.prepared_tokenizer import write_prepared
from builders.saved_tokenizers import SAVED, expected, keep_spaces, write_saved
from xtuner2llava import ConversionError
from xtuner2llava.tokenizers.compatibility import readable_tokenizer, tokenizer_faults
from xtuner2llava.tokenizers.prefix import adds_bos
from xtuner2llava.tokenizers.sentencepiece import fields
from xtuner2llava.tokenizers.tokenizer import read_tokenizer

BPE = {"type": "BPE", "vocab": {"▁": 0, "a": 1, "▁a": 2, "<s>": 3}, "merges": [["▁", "a"]]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def token(text: str, index: int, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **plain, "special": True, **flags}


def made(folder: Path, format_name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """tokenizer.json for the format, and what is said of it."""
    prepared = readable_tokenizer(read_tokenizer(folder), format_name)
    files = write_prepared(prepared, folder.with_name(f"{folder.name}-{format_name}"))
    path = files / "tokenizer.json"
    return json.loads(path.read_text()) if path.exists() else {}, prepared.notes


def write(folder: Path, **parts: Any) -> Path:
    """A folder with a tokenizer.json of `parts`, and a config."""
    folder.mkdir(exist_ok=True)
    content = {"version": "1.0", "added_tokens": [token("<s>", 3)], "model": BPE, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("format_name", ["llava", "hf"])
@pytest.mark.parametrize("change", ["vocabulary", "added"])
def test_a_slow_tokenizer_with_other_ids_is_left_out(
    checkpoints: Path, tmp_path: Path, change: str, format_name: str
) -> None:
    """Official LLaVA and llama.cpp would take it, and training had the fast one."""
    folder = Path(shutil.copytree(checkpoints / "bases/llm_llama", tmp_path / "base"))
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    config.pop("add_prefix_space", None)
    settings.write_text(json.dumps(config))
    same = readable_tokenizer(read_tokenizer(folder), format_name)
    assert "tokenizer.model" in same.tokenizer.files

    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, two = [text for text in vocab if len(text) > 2][-2:]
    if change == "vocabulary":
        vocab[one], vocab[two] = vocab[two], vocab[one]
    else:
        one = "<region>"
        content["added_tokens"].append(token(one, len(vocab) + 3))
    path.write_text(json.dumps(content))
    prepared = readable_tokenizer(read_tokenizer(folder), format_name)
    assert "tokenizer.model" not in prepared.tokenizer.files
    assert prepared.tokenizer.config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert adds_bos(prepared.tokenizer) == adds_bos(read_tokenizer(folder))
    assert "XTuner trains with tokenizer.json" in prepared.notes[0]
    assert repr(one) in prepared.notes[0]
    # Then transformers 4.40 to 4.57 make the fast one from the slow one.
    settings.write_text(json.dumps({**config, "add_prefix_space": True}))
    with pytest.raises(ConversionError, match="are of different tokenizers"):
        readable_tokenizer(read_tokenizer(folder), format_name)


# What each version saved


@pytest.mark.parametrize("format_name", ["llava", "hf"])
@pytest.mark.parametrize(("version", "kind"), SAVED)
def test_the_ids_are_those_of_the_version_that_saved_it(
    checkpoints: Path, tmp_path: Path, version: str, kind: str, format_name: str
) -> None:
    from tokenizers import Tokenizer

    base = write_saved(tmp_path / "base", version, kind, checkpoints)
    prepared = readable_tokenizer(read_tokenizer(base), format_name)
    out = write_prepared(prepared, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text, with_special, without in expected(version, kind):
        assert tokenizer.encode(text).ids == with_special, repr(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == without, repr(text)
    assert tokenizer_faults(read_tokenizer(out), format_name) == ()
    changed = prepared.tokenizer.copied != read_tokenizer(base).files
    assert changed == bool(prepared.notes)


@pytest.mark.parametrize(
    ("version", "kind", "format_name", "changed"),
    [
        ("4.37.2", "llama3", "llava", set()),
        ("4.40.2", "vicuna", "llava", {"tokenizer_config.json"}),  # see READ_OTHERWISE
        ("4.40.2", "vicuna", "hf", {"tokenizer_config.json"}),  # add_prefix_space
        ("4.57.1", "qwen2", "hf", set()),
        ("4.57.1", "qwen2", "llava", {"tokenizer.json"}),
        ("4.57.1", "llama3", "llava", {"tokenizer.json"}),
        (
            "4.57.1",
            "vicuna",
            "llava",
            {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"},
        ),
        ("5.24.0", "qwen2", "hf", {"tokenizer_config.json"}),
        ("5.24.0", "llama3", "llava", {"tokenizer.json", "tokenizer_config.json"}),
    ],
)
def test_only_what_must_be_changed_is(
    checkpoints: Path, tmp_path: Path, version: str, kind: str, format_name: str, changed: set[str]
) -> None:
    base = write_saved(tmp_path / "base", version, kind, checkpoints)
    prepared = readable_tokenizer(read_tokenizer(base), format_name)
    assert {*prepared.tokenizer.made} == changed


@pytest.mark.parametrize("kind", ["vicuna", "llama3", "qwen2", "phi3"])
def test_what_transformers_5_calls_otherwise(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    base = write_saved(tmp_path / "base", "5.24.0", kind, checkpoints)
    prepared = readable_tokenizer(read_tokenizer(base), "llava")
    config = json.loads(prepared.tokenizer.made["tokenizer_config.json"]())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "token_type_ids" not in config["model_input_names"]
    assert not isinstance(config.get("extra_special_tokens"), list)
    if kind == "qwen2":
        assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
        assert any("extra_special_tokens" in note for note in prepared.notes)


# What official LLaVA reads: tokenizer.model, where the class is LlamaTokenizer

PREPEND = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
FIRST = {"normalizer": None, "pre_tokenizer": METASPACE}
READ_OTHERWISE = {
    "as published, Llama 1": (PREPEND, True, "", ""),
    "as published, Llama 2": (PREPEND, False, "", "puts a space at other places"),
    "spaces first": (FIRST, False, "", "puts a space at other places"),
    "spaces first, legacy": (FIRST, True, "", "puts a space at other places"),
    "no spaces": ({"normalizer": PREPEND["normalizer"]["normalizers"][1]}, True, "", "puts a sp"),
    "a turn's token, as Phi-3": (FIRST, False, "token", "puts a space at other places"),
    "drops spaces": (PREPEND, True, "spaces", "drops repeated spaces"),
    "Code Llama": (PREPEND, True, "CodeLlamaTokenizer", "puts a space at other places"),
}


@pytest.mark.parametrize("case", READ_OTHERWISE)
def test_official_llava_is_given_what_training_read(
    checkpoints: Path, tmp_path: Path, case: str
) -> None:
    parts, legacy, change, difference = READ_OTHERWISE[case]
    base = write_saved(tmp_path / "base", "4.40.2", "vicuna", checkpoints)
    if change != "spaces":
        keep_spaces(base / "tokenizer.model")
    content = json.loads((base / "tokenizer.json").read_text()) | {"pre_tokenizer": None, **parts}
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    if change == "token":
        content["added_tokens"].append(token("<|user|>", 384))
        config["added_tokens_decoder"]["384"] = {"content": "<|user|>", "special": True}
    elif change.startswith("Code"):
        config["tokenizer_class"] = change
    del config["clean_up_tokenization_spaces"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    prepared = readable_tokenizer(read_tokenizer(base), "llava")
    named = prepared.tokenizer.config["tokenizer_class"]
    assert named == ("PreTrainedTokenizerFast" if difference else "LlamaTokenizer")
    said = [note for note in prepared.notes if "official LLaVA would read" in note]
    assert [difference in note for note in said] == [True] * bool(difference)
    if difference:  # This class would have other defaults than LlamaTokenizer.
        assert prepared.tokenizer.config["clean_up_tokenization_spaces"] is False
        assert adds_bos(prepared.tokenizer)
    for_hf = readable_tokenizer(read_tokenizer(base), "hf").tokenizer
    assert for_hf.config["tokenizer_class"] == config["tokenizer_class"]


# tokenizer.json, part by part


def test_merges_become_texts_only_for_llava(tmp_path: Path) -> None:
    folder = write(tmp_path / "t")
    content, notes = made(folder, "llava")
    assert content["model"]["merges"] == ["▁ a"]
    assert "each merge is one text" in notes[0]
    assert made(folder, "hf")[0]["model"]["merges"] == [["▁", "a"]]


def test_merges_of_parts_with_spaces_cannot_be_texts(tmp_path: Path) -> None:
    model = {**BPE, "vocab": {"a b": 0, "c": 1, "a bc": 2}, "merges": [["a b", "c"]]}
    folder = write(tmp_path / "t", model=model)
    with pytest.raises(ConversionError, match="merges of parts with spaces"):
        made(folder, "llava")
    assert made(folder, "hf")[1] == ()


@pytest.mark.parametrize(
    ("scheme", "before"), [("first", None), ("always", None), ("never", None), ("always", "NFKC")]
)
def test_metaspace_without_split_is_a_normalizer(
    tmp_path: Path, scheme: str, before: str | None
) -> None:
    """Compared by the present tokenizers, which reads both; 0.15 reads the second only."""
    from tokenizers import Tokenizer

    added = [token("<s>", 3)]
    if before is None:
        added += [token("<|x|>", 4, rstrip=True), token("[m]", 5, lstrip=True)]
    folder = write(
        tmp_path / "t",
        added_tokens=added,
        normalizer=None if before is None else {"type": before},
        pre_tokenizer={**METASPACE, "prepend_scheme": scheme},
    )
    content, notes = made(folder, "llava")
    assert content["pre_tokenizer"] is None
    assert "Metaspace" not in json.dumps(content)
    assert "with the same ids" in notes[0]
    one = Tokenizer.from_file(str(folder / "tokenizer.json"))
    other = Tokenizer.from_str(json.dumps(content))
    for text in ("", "a", " a", "  a a ", "<s>a", "a<s> a", "a <|x|>  a", "a  [m] a", "▁a", " <s>"):
        assert other.encode(text).ids == one.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": METASPACE},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE]}},
        {"added_tokens": [token("<s>", 3, single_word=True)], "pre_tokenizer": METASPACE},
        {"pre_tokenizer": {"type": "FixedLength", "length": 5}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}]}},
        {"decoder": {"type": "New"}},
        {"model": {**BPE, "type": "New"}},
    ],
)
def test_what_cannot_be_said_is_refused_or_left_out(
    checkpoints: Path, tmp_path: Path, parts: dict[str, Any]
) -> None:
    folder = write(tmp_path / "t", **parts)
    with pytest.raises(ConversionError) as caught:
        made(folder, "llava")
    (fault,) = caught.value.faults
    assert "tokenizers 0.15 of transformers 4.37.2" in fault.what
    assert "tokenizer.model" in fault.advice
    # With a file from which transformers makes the same tokens, that one is enough.
    for name, content in (("vocab.json", BPE["vocab"]), ("merges.txt", "#version: 0.2\n▁ a\n")):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    content, notes = made(folder, "llava")
    assert content == {}
    assert "tokenizer.json is left out" in notes[0]
    # Not with one that has other ids.
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ConversionError):
        made(folder, "llava")


@pytest.mark.parametrize("part", ["pre_tokenizer", "decoder"])
@pytest.mark.parametrize(
    ("given", "llava", "hf"),
    [
        # As tokenizers 0.19 and later write it; 0.15 wants add_prefix_space.
        ({"prepend_scheme": "always"}, ("always", True), ("always", None)),
        ({"prepend_scheme": "never"}, ("never", False), ("never", None)),
        # As 0.13 wrote it; 0.20 refuses false beside the scheme that it takes then.
        ({"add_prefix_space": False}, (None, False), ("never", False)),
        ({"add_prefix_space": True}, (None, True), (None, True)),
    ],
)
def test_metaspace_of_other_versions(
    tmp_path: Path,
    part: str,
    given: dict[str, Any],
    llava: tuple[str | None, bool],
    hf: tuple[str | None, bool | None],
) -> None:
    folder = write(tmp_path / "t", **{part: {"type": "Metaspace", "replacement": "▁", **given}})
    for format_name, values in (("llava", llava), ("hf", hf)):
        metaspace = made(folder, format_name)[0][part]
        found = (metaspace.get("prepend_scheme"), metaspace.get("add_prefix_space"))
        assert found == values, format_name


def test_words_that_no_merge_makes_are_counted(tmp_path: Path) -> None:
    """`ignore_merges`, as Llama 3 has it; tokenizers 0.15 has no such thing."""
    vocab = {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}
    model = {**BPE, "vocab": vocab, "merges": ["a b"], "ignore_merges": True}
    folder = write(tmp_path / "t", model=model, added_tokens=[])
    (note,) = made(folder, "llava")[1]
    assert note.startswith("1 of the 5 tokens, such as 'abc', are not made by merges")
    assert made(folder, "hf")[1] == ()
    model = {**model, "merges": ["a b", "ab c"]}
    assert made(write(tmp_path / "u", model=model, added_tokens=[]), "llava")[1] == ()


@pytest.mark.parametrize(
    ("named", "llava", "hf"),
    [
        ("GemmaTokenizer", "PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("CohereTokenizerFast", "PreTrainedTokenizerFast", "CohereTokenizerFast"),
        ("GPTNeoXTokenizerFast", "GPTNeoXTokenizerFast", "GPTNeoXTokenizerFast"),
        ("LlamaTokenizerFast", "PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
    ],
)
def test_classes_that_not_every_version_can_make(
    tmp_path: Path, named: str, llava: str, hf: str
) -> None:
    folder = write(tmp_path / "t", model={**BPE, "merges": ["▁ a"]})
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    for format_name, becomes in (("llava", llava), ("hf", hf)):
        prepared = readable_tokenizer(read_tokenizer(folder), format_name)
        assert prepared.tokenizer.config["tokenizer_class"] == becomes
        assert len(prepared.notes) == (named != becomes)


# Llama's without tokenizer.json, as lmsys/vicuna-7b-v1.5 is


def without_fast(folder: Path, version: str, kind: str, checkpoints: Path, **config: Any) -> Path:
    write_saved(folder, version, kind, checkpoints)
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("version", "kind", "legacy", "same"),
    [
        ("4.57.1", "vicuna", False, True),
        ("4.57.1", "vicuna", True, False),
        # Before 4.41 there was one way to make it, that for `legacy`.
        ("4.37.2", "phi3", True, True),
        ("4.37.2", "phi3", False, False),
    ],
)
def test_it_is_made_as_transformers_makes_it(
    checkpoints: Path, tmp_path: Path, version: str, kind: str, legacy: bool, same: bool
) -> None:
    from tokenizers import Tokenizer

    base = without_fast(tmp_path / "base", version, kind, checkpoints, legacy=legacy)
    prepared = readable_tokenizer(read_tokenizer(base), "hf")
    note = next(note for note in prepared.notes if "is made from tokenizer.model" in note)
    assert ("do not begin a prompt with one" in note) == (not legacy)
    out = write_prepared(prepared, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    found = [
        [
            text,
            tokenizer.encode(text).ids,
            tokenizer.encode(text, add_special_tokens=False).ids,
        ]
        for text, *_ in expected(version, kind)
    ]
    assert (found == [list(one) for one in expected(version, kind)]) == same
    assert tokenizer_faults(read_tokenizer(out), "hf") == ()


# Qwen2's without tokenizer.json: vocab.json and merges.txt


@pytest.mark.parametrize("version", ["4.37.2", "4.57.1"])
@pytest.mark.parametrize("order", [1, -1])
def test_it_is_made_of_merges(checkpoints: Path, tmp_path: Path, version: str, order: int) -> None:
    from tokenizers import Tokenizer

    base = without_fast(tmp_path / "base", version, "qwen2", checkpoints)
    first, *merges = (base / "merges.txt").read_text().splitlines()
    (base / "merges.txt").write_text("\n".join([first, *merges[::order], ""]))
    prepared = readable_tokenizer(read_tokenizer(base), "hf")
    assert any("is made from vocab.json and merges.txt" in note for note in prepared.notes)
    out = write_prepared(prepared, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    found = [tokenizer.encode(text).ids for text, *_ in expected(version, "qwen2")]
    assert (found == [ids for _, ids, _ in expected(version, "qwen2")]) == (order == 1)
    assert tokenizer_faults(read_tokenizer(out), "hf") == ()
    assert readable_tokenizer(read_tokenizer(base), "llava").notes == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"he llo", "merges 'he llo', expected two tokens of vocab.json"),
        (b"h", "merges 'h', expected two tokens"),
        (b"h e l", "merges 'h e l', expected two tokens"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_merges_that_do_not_fit_the_vocabulary_are_refused(
    checkpoints: Path, tmp_path: Path, line: bytes, said: str
) -> None:
    base = without_fast(tmp_path / "base", "4.57.1", "qwen2", checkpoints)
    (base / "merges.txt").write_bytes(b"#version: 0.2\nh e\n" + line + b"\n")
    with pytest.raises(ConversionError) as error:
        readable_tokenizer(read_tokenizer(base), "hf")
    assert said in str(error.value)
    assert "merges.txt" in error.value.faults[0].where


def test_that_it_is_not_there_is_a_fault_only_of_hf(checkpoints: Path, tmp_path: Path) -> None:
    base = without_fast(tmp_path / "base", "4.40.2", "vicuna", checkpoints)
    faults = tokenizer_faults(read_tokenizer(base), "hf")
    assert any("is made from tokenizer.model" in fault for fault in faults)
    assert tokenizer_faults(read_tokenizer(base), "llava") == ()


def test_none_is_made_of_what_is_not_byte_pair_encoding(checkpoints: Path, tmp_path: Path) -> None:
    base = without_fast(tmp_path / "base", "4.40.2", "vicuna", checkpoints, add_prefix_space=False)
    path = base / "tokenizer.model"
    # Without its TrainerSpec, a model is of unigrams.
    path.write_bytes(b"".join(f.raw for f in fields(path.read_bytes()) if f.number != 2))
    tokenizer = read_tokenizer(base)
    assert readable_tokenizer(tokenizer, "hf").tokenizer is tokenizer


@pytest.mark.parametrize(("value", "kept"), [(None, False), (True, False), (False, True)])
def test_flags_for_which_slow_and_fast_differ(
    checkpoints: Path, tmp_path: Path, value: bool | None, kept: bool
) -> None:
    base = write_saved(tmp_path / "base", "4.57.1", "vicuna", checkpoints)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_prefix_space": value}))
    for format_name in ("hf", "llava"):
        prepared = readable_tokenizer(read_tokenizer(base), format_name)
        config = prepared.tokenizer.config
        assert ("add_prefix_space" in config) == (kept or format_name == "llava")


# What `verify` says


NEW = {"type": "New"}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t, c: t["model"].update(merges=[["▁", "a"]]), "each merge is one text"),
        (lambda t, c: t.update(pre_tokenizer={**METASPACE, "split": True}), "add_prefix_space"),
        (lambda t, c: t.update(decoder={"type": "New"}), "does not have its decoder of type New"),
        (lambda t, c: t.update(decoder={"type": ["New"]}), "does not have its decoder of type ["),
        (
            lambda t, c: t.update(
                decoder={"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [NEW]}]}
            ),
            "does not have its decoder of type New",
        ),
        (lambda t, c: c.update(tokenizer_class="TokenizersBackend"), "TokenizersBackend"),
        (lambda t, c: c.update(extra_special_tokens=["<s>"]), "extra_special_tokens"),
    ],
)
def test_a_folder_that_only_newer_versions_load_has_a_fault(
    tmp_path: Path, damage: Callable[[dict[str, Any], dict[str, Any]], None], says: str
) -> None:
    folder = write(tmp_path / "t", model={**BPE, "merges": ["▁ a"]})
    assert tokenizer_faults(read_tokenizer(folder), "llava") == ()
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    contents = [json.loads(path.read_text()) for path in files]
    damage(*contents)
    for path, content in zip(files, contents, strict=True):
        path.write_text(json.dumps(content))
    (fault,) = tokenizer_faults(read_tokenizer(folder), "llava")
    assert says in fault

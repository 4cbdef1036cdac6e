"""What is wrong with a mapping file is said with its file and line, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.catalogue import Catalogue

HEAD = "schema: 1\nfamily: my\nbecomes: llama\nconfig: {keep: all}\n"
RULES = HEAD + "tensors:\n"


def check(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    faults = [f"{fault.where}: {fault.what}" for fault in Catalogue.shipped().check(path)]
    if faults and "family:" in text:
        with pytest.raises(MappingError) as caught:
            Catalogue.shipped().with_family_file(path)
        assert [f"{fault.where}: {fault.what}" for fault in caught.value.faults] == faults
    return faults


def test_a_right_file_has_no_faults(tmp_path: Path) -> None:
    assert check(tmp_path, RULES + "  - {move: '', to: ''}\n") == []


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            "  - {keep: [a], drop: b}",
            ":6: a rule has one verb, this one has `keep` and `drop`",
        ),
        (
            "  - because: nothing",
            ":6: a rule has one verb, this one has none",
        ),
        (
            "  - drop: a",
            ":6: `drop` needs `because`",
        ),
        (
            "  - {drop: a, because: ''}",
            ":6: `because` is a text",
        ),
        (
            "  - keep: [a]\n    sizes: [1]",
            ":7: `keep` has no key `sizes`",
        ),
        (
            "  - for: {i: 2}\n    from: h\n    to: g\n    rules: [{keep: [a]}]",
            ":6: the loop variable `i` is not used in any name",
        ),
        (
            "  - rename:\n      h.{j}: g",
            ":7: `h.{j}`: `j` is not a loop variable",
        ),
        (
            "  - for: {i: 2}\n    rules:\n      - for: {i: 2}\n        rules: [{keep: ['{i}']}]",
            ":8: `i` is already the variable of an outer loop",
        ),
        (
            "  - for: {a-b: 2}\n    rules: [{keep: [a]}]",
            ":6: `a-b` cannot be a loop variable",
        ),
        (
            "  - for: {i: 2}\n    from: h.{i}\n    rules: []",
            ":6: a block without rules",
        ),
        (
            "  - for: {i: 2}\n    form: h.{i}\n    to: '{i}'\n    rules: [{keep: [a]}]",
            ":7: a block has no key `form`",
        ),
        (
            "  - keep: ['h.*.w']",
            ":6: `h.*.w`: only drop takes `*`, other rules name their tensors",
        ),
        (
            "  - keep:\n    - a..b",
            ":7: `a..b`: a name does not begin or end with a dot, nor double one",
        ),
        (
            "  - keep: ['']",
            ":6: a tensor name is a text",
        ),
        (
            "  - keep: ['h.{i']",
            ":6: `h.{i`: braces go around a name, as in {i}",
        ),
        (
            "  - {split: a, into: [b, c], sizes: [1]}",
            ":6: 2 names in `into`, 1 numbers in `sizes`",
        ),
        (
            "  - {split: a, into: [], sizes: []}",
            ":6: a list of names is empty",
        ),
        (
            "  - {split: a, into: b, sizes: [1]}",
            ":6: the value of `into` or `concat` is a list",
        ),
        (
            "  - {split: a, into: [b], sizes: [1], dim: 2}",
            ":6: `dim` is 0 (rows) or 1 (columns)",
        ),
        (
            "  - {split: a, into: [b], sizes: [1], dim: true}",
            ":6: `dim` is 0 (rows) or 1 (columns)",
        ),
        (
            "  - {unstack: a, into: b}",
            ":6: `unstack` needs `for`",
        ),
        (
            "  - {unstack: a, for: {e: 2, f: 2}, into: 'b{e}{f}'}",
            ":6: `for` of `unstack` has 2 variables, expected one",
        ),
        (
            "  - {unstack: a, for: {e: 2}, into: b}",
            ":6: `b` does not say which one it is",
        ),
        (
            "  - {unstack: a, for: {e: 2}, into: ['b{e}', 'c{e}']}",
            ":6: 2 names in `into`, and no `sizes`",
        ),
        (
            "  - {unstack: a, for: {e: 2}, into: ['b{e}', 'c{e}'], sizes: [1]}",
            ":6: 2 names in `into`, 1 numbers in `sizes`",
        ),
        (
            "  - {unstack: a, for: {e: 2}, into: 'b{e}', sizes: [1, 2]}",
            ":6: 1 names in `into`, 2 numbers in `sizes`",
        ),
        (
            "  - {unstack: 'a{e}', for: {e: 2}, into: 'b{e}'}",
            ":6: `a{e}`: `e` is not a loop variable",
        ),
        (
            "  - for: {i: 2}\n    rules: [{unstack: '{i}', for: {i: 2}, into: 'b{i}'}]",
            ":7: `i` is already the variable of an outer loop",
        ),
        (
            "  - {concat: [a, b]}",
            ":6: `concat` needs `into`",
        ),
        (
            "  - {resize: a, into: a, rows: 3, lossy: maybe}",
            ":6: `lossy` is true or false",
        ),
        (
            "  - {fill: a, shape: [1], value: zero}",
            ":6: `value` is a number",
        ),
        (
            "  - fill: a\n    shape:\n    - hidden_size ** 2",
            ":8: `hidden_size ** 2`: Pow is not allowed",
        ),
        (
            "  - {fill: a, shape: [[1]]}",
            ":6: `shape` is a number or an expression",
        ),
        (
            "  - {keep: [a], if: __import__('os')}",
            ":6: `__import__('os')`: the only functions are is_float, len, max, min",
        ),
        (
            "  - keep\n",
            ":6: a rule is a table of keys and values",
        ),
        (
            "  - {}\n",
            ":6: a rule has one verb, this one has none",
        ),
        (
            "  - keep: [a]\n  - {rename: {b: a}}",
            ":7: `a` is already made by my.yaml:6",
        ),
    ],
)
def test_wrong_rules(tmp_path: Path, rules: str, expected: str) -> None:
    assert check(tmp_path, f"{RULES}{rules}\n") == [f"my.yaml{expected}"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "schema: 1\nfamily: my\nbecomes: lama\ntensors: [{keep: [a]}]\n",
            [":3: there is no LLM class `lama`"],
        ),
        *(
            (
                f"schema: 1\nfamily: my\n{line}\ntensors: [{{keep: [a]}}]\n",
                [f":3: there is no LLM class `{name}`"],
            )
            for line, name in (
                ("becomes: clip_vision_model", "clip_vision_model"),
                ("becomes: siglip_vision_model", "siglip_vision_model"),
                ("becomes: ' llama'", " llama"),
            )
        ),
        (
            "schema: 1\nfamily: my\nextends: llama\nbecomes: clip_vision_model\n",
            [":4: there is no LLM class `clip_vision_model`"],
        ),
        (
            "schema: 1\nfamily: my\nextends: ../llama\n",
            [":3: there is no family `../llama`"],
        ),
        (
            "family: my\nbecomes: llama\nconfig: {keep: all}\ntensors: [{keep: [a]}]\n",
            [":1: `schema` is missing"],
        ),
        (
            HEAD.replace("1", "2", 1) + "tensors: [{keep: [a]}]\n",
            [":1: `schema` is 2, this version reads 1"],
        ),
        (
            "schema: 1\nfamily: my\ntensors: [{keep: [a]}]\n",
            [":1: a family needs `becomes`"],
        ),
        (
            HEAD,
            [":1: a family needs `tensors`"],
        ),
        (
            HEAD + "tensor: [{keep: [a]}]\ntensors: [{keep: [a]}]\n",
            [":5: a family has no key `tensor`"],
        ),
        (
            "schema: 1\nformat: x\nfamily: my\n",
            [":1: says family and format of family, format and class; it is one of them"],
        ),
        (
            "schema: 1\n",
            [":1: says nothing of family, format and class; it is one of them"],
        ),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert [f"{f.where}: {f.what}" for f in Catalogue.shipped().check(path)] == [
        f"my.yaml{e}" for e in expected
    ]


def test_wrong_tables_are_all_named(tmp_path: Path) -> None:
    text = """schema: 1
family: my
becomes: llama
match: {architecture: [X]}
dims: {head: hidden_size //}
tensors: [{move: "", to: ""}]
config:
  keep: [vocab_size, hidden_size, hidden_sizes]
  derive:
    intermediate_size: [1]
    vocab_size: 3
  set: {n_embd: 3}
  require:
    - {that: a == 1}
    - {because: x}
tokenizer: {model: x}
generation: {bos: 3, stop: x}
chat: {template: [a]}
caveats:
  - when: a.b.c[0]
    say: "{x"
  - {say: x, exact_up_to: -1}
  - {say: x, exact_up_to: true}
  - {say: x, exact_up_to: 2 **}
  - {say: x, exact_up_to: }
  - {say: x, transformers: 4.45 or later}
  - {say: x, transformers: 4.45}
  - {say: x, beyond: 9}
"""
    assert check(tmp_path, text) == [
        "my.yaml:4: `match` has no key `architecture`",
        "my.yaml:5: `hidden_size //` is not an expression",
        "my.yaml:7: `config` does not make `num_hidden_layers`, `num_attention_heads`, "
        "which LlamaForCausalLM needs",
        "my.yaml:8: `hidden_sizes` is not a config key of LlamaForCausalLM in transformers 4.37",
        "my.yaml:10: `intermediate_size` is a number or an expression",
        "my.yaml:11: `vocab_size` is already made by my.yaml:8",
        "my.yaml:12: `n_embd` is not a config key of LlamaForCausalLM in transformers 4.37",
        "my.yaml:14: a requirement needs `because`",
        "my.yaml:15: a requirement needs `that`",
        "my.yaml:16: `tokenizer` has no key `model`",
        "my.yaml:17: `generation` has no key `stop`",
        "my.yaml:17: `bos` is a text",
        "my.yaml:18: `template` is a text",
        "my.yaml:20: `a.b.c[0]`: Subscript is not allowed",
        "my.yaml:21: `{x`: braces go around a name, as in {i}",
        "my.yaml:22: `exact_up_to` is -1, a number of tokens was expected",
        "my.yaml:23: `exact_up_to` is true, a number of tokens was expected",
        "my.yaml:24: `2 **` is not an expression",
        "my.yaml:25: `exact_up_to` is a number or an expression",
        "my.yaml:26: `4.45 or later` is not a range of versions",
        "my.yaml:27: `transformers` is a text",
        "my.yaml:28: a caveat has no key `beyond`",
    ]


def test_a_prompt_template_that_xtuner_does_not_have_is_named(tmp_path: Path) -> None:
    text = f"{HEAD}tensors: [{{move: '', to: ''}}]\nchat: {{template: qwen_chat}}\n"
    assert check(tmp_path, text) == []
    wrong = text.replace("qwen_chat", "qwen_chatt")
    assert check(tmp_path, wrong) == ["my.yaml:6: `qwen_chatt` is not a prompt template of XTuner"]
    (fault,) = Catalogue.shipped().check(tmp_path / "my.yaml")
    assert fault.advice == "Did you mean `qwen_chat`?"


def test_a_wrong_tokenizer_is_said_by_the_check(tmp_path: Path) -> None:
    def faults(tokenizer: str) -> list[str]:
        return check(tmp_path, f"{HEAD}tensors: [{{move: '', to: ''}}]\ntokenizer:{tokenizer}\n")

    right = ' {convert: tokenizer.model, class: LlamaTokenizer, special_tokens: {"<x_{0..2}>": 5}}'
    assert faults(right) == faults(" {convert: my.tiktoken}") == []
    path = tmp_path / "my.yaml"
    path.write_text(f"{HEAD}tensors: [{{move: '', to: ''}}]\ntokenizer:{right}\n")
    rules = Catalogue.shipped().with_family_file(path).tokenizer
    assert rules.special_tokens == {"<x_0>": 5, "<x_1>": 6, "<x_2>": 7}
    ids = '{a: one, b: -1, c: true, d: [1], "e{0..99999}": 5}'
    found = faults(f"\n  convert: ../qwen.tiktoken\n  special_tokens: {ids}")
    assert [fault.partition(": ")[2] for fault in found] == [
        "`convert` is '../qwen.tiktoken', expected tokenizer.model or a .tiktoken file",
        "'a' has no id, but 'one'",
        "'b' has no id, but -1",
        "'c' has no id, but true",
        "'d' has no id, but [1]",
        "'e{0..99999}' is too many, 10,000 are allowed",
    ]
    (said,) = faults(" {convert: tokenizer.model, class: Qwen2Tokenizer}")
    assert said.endswith("`class` is 'Qwen2Tokenizer', and `convert` makes a LlamaTokenizer")
    (said,) = faults(" {class: LlamaTokenizer}")
    assert said.endswith("`class` needs `convert`, the file that the tokenizer is made from")
    (said,) = faults(' {convert: my.tiktoken, special_tokens: {"<{0..2}>": 5, "<a>": 7}}')
    assert said.endswith("two of `special_tokens` have the same id")
    (said,) = faults(" {convert: vocab.json}")
    assert "expected tokenizer.model or a .tiktoken file" in said


def test_a_required_value_may_be_any_text_under_any_key(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    rules = "tensors: [{move: '', to: ''}]\n"
    path.write_text(
        HEAD.replace("config: {keep: all}\n", rules)
        + """config: {keep: all, require: {a-b: 'x"\\y', a: 1}}\n"""
    )
    family = Catalogue.shipped().with_family_file(path)
    fits = {"a-b": 'x"\\y', "a": 1, "b": 0, "hidden_size": 8, "vocab_size": 8}
    fits |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert family.translate_config(fits).values["hidden_size"] == 8
    for change in ({"a-b": 1}, {"a": 2}):
        with pytest.raises(MappingError, match="has a value that cannot be expressed"):
            family.translate_config({**fits, **change})


def test_wrong_formats_and_classes(tmp_path: Path) -> None:
    text = "schema: 1\nformat: x\nclasses: {llama: {architecture: A}}\ntensors: {llm: []}\n"
    assert check(tmp_path, text) == [
        "my.yaml:3: a class needs `model_type`",
        "my.yaml:4: `tensors` needs `projector`",
        "my.yaml:4: `tensors` needs `visual_encoder`",
    ]
    text = """schema: 1
class: x
architecture: X
model_type: x
config: {required: [n], default: {n: 1}}
tensors:
  - shapes: {a: [n], b: [n +]}
  - for: {i: n}
    prefix: h
    rules: [{shapes: {c: [n]}}]
  - keep: [d]
"""
    assert check(tmp_path, text) == [
        "my.yaml:5: `n` is both required and given a default",
        "my.yaml:7: `n +` is not an expression",
        "my.yaml:8: the loop variable `i` is not used in any name",
        "my.yaml:11: a rule has one verb, this one has none",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert Catalogue.shipped().check(tmp_path / "absent.yaml")[0].what == "is not a file"
    assert Catalogue.shipped().check(tmp_path)[0].what == "is not a file"
    assert Catalogue.shipped().check(Path("/dev/zero"))[0].what == "is not a file"


def test_advice_says_what_would_be_right(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        HEAD + "tensors:\n  - {spilt: a, into: [b], sizes: [1]}\n  - {x: y}\ncaveat: []\n"
    )
    assert [fault.advice for fault in Catalogue.shipped().check(path)] == [
        "Did you mean `split`?",
        "The verbs are keep, rename, move, split, concat, deinterleave, unstack, transpose, "
        "normalize, resize, fill, drop; a block has `rules`.",
        "Did you mean `caveats`?",
    ]


def test_families_cannot_extend_each_other_in_a_circle(tmp_path: Path) -> None:
    for folder in ("families", "classes", "formats"):
        (tmp_path / folder).mkdir()
    (tmp_path / "families" / "a.yaml").write_text("schema: 1\nfamily: a\nextends: b\n")
    (tmp_path / "families" / "b.yaml").write_text("schema: 1\nfamily: b\nextends: a\n")
    with pytest.raises(MappingError, match="extends itself: a extends b extends a") as caught:
        Catalogue(tmp_path).families["a"]
    assert caught.value.faults[0].where == "families/b.yaml:3"


def test_faults_of_an_extended_file_are_put_down_to_it(tmp_path: Path) -> None:
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "a.yaml").write_text("schema: 1\nfamily: a\nbecome: x\n")
    path = tmp_path / "my.yaml"
    path.write_text("schema: 1\nfamily: my\nextends: a\n")
    with pytest.raises(MappingError) as caught:
        Catalogue(tmp_path).with_family_file(path)
    assert caught.value.faults[-1].where == "families/a.yaml:3"

"""YAML comes in as plain values that know their lines; what mappings must not have stays out."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.yaml import read_document


def value(text: str) -> object:
    return read_document(f"x: {text}\n".encode(), "a.yaml").table["x"].value


def faults(data: bytes | str) -> list[str]:
    data = data.encode() if isinstance(data, str) else data
    with pytest.raises(MappingError) as caught:
        read_document(data, "a.yaml")
    return [f"{fault.where}: {fault.what}" for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),  # PyYAML: the string '1e-5'
        ("1E+2", 100.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),  # PyYAML: 8
        ("0x1f", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),  # PyYAML: False
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),  # PyYAML: 90
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("1_000", "1_000"),  # PyYAML: 1000
        ("'1'", "1"),
        ('"null"', "null"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_every_value_and_key_knows_its_line() -> None:
    table = read_document(b"# first\na: 1\nb:\n  - x\n  - {c: 2}\n", "a.yaml").table
    assert {key: (node.key_line, node.line) for key, node in table.items()} == {
        "a": (2, 2),
        "b": (3, 4),
    }
    items = table["b"].value
    assert isinstance(items, list)
    assert [node.line for node in items] == [4, 5]
    assert isinstance(items[1].value, dict)
    assert items[1].value["c"].key_line == 5


def test_keys_are_texts_as_written() -> None:
    table = read_document(b"null: 1\n1: 2\non: 3\n", "a.yaml").table
    assert [*table] == ["null", "1", "on"]


def test_all_duplicate_keys_are_named() -> None:
    assert faults("a: 1\nb: {c: 1, c: 2}\na: 3\n") == [
        "a.yaml:2: `c` is already given in line 2",
        "a.yaml:3: `a` is already given in line 1",
    ]


def test_anchors_aliases_and_tags_are_refused() -> None:
    assert faults("a: &x [1]\nb: *x\nc: !!python/object/apply:os.system [id]\nd: !!str 1\n") == [
        "a.yaml:1: `&x` is an anchor, which is not read here",
        "a.yaml:2: `*x` is an alias, which is not read here",
        "a.yaml:3: `tag:yaml.org,2002:python/object/apply:os.system` is a tag, "
        "which is not read here",
        "a.yaml:4: `tag:yaml.org,2002:str` is a tag, which is not read here",
    ]


def test_an_alias_bomb_is_not_unfolded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 60)]
    found = faults("\n".join(lines))
    assert found[0] == "a.yaml:1: `&a0` is an anchor, which is not read here"
    assert len(found) == 60 + 59  # equal ones of a line once


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 50_000, "- " * 50_000])
def test_deep_nesting_ends_at_its_limit(text: str) -> None:
    assert faults(f"x:\n {text}")[-1].endswith("has more than 20 levels")


def test_too_many_values_end_at_their_limit() -> None:
    assert faults("[" + "1," * 60_000 + "1]") == ["a.yaml:1: has more than 50,000 values"]


def test_limits_are_exact() -> None:
    # Nine events of the parser besides the numbers.
    read_document(("x: [" + "1," * 49_990 + "1]").encode(), "a.yaml")
    assert len(faults("x: [" + "1," * 49_991 + "1]")) == 1
    assert value("1" * 40) == int("1" * 40)
    assert value("1" * 41) == "1" * 41
    assert value("[" * 19 + "1" + "]" * 19)
    assert faults("x: " + "[" * 20 + "1" + "]" * 20)[-1].endswith("levels")


def test_a_huge_file_is_not_parsed() -> None:
    data = b"a: [" * 400_000
    assert faults(data) == ["a.yaml: has 1,600,000 bytes, expected at most 1,048,576"]


def test_bytes_that_are_not_yaml_are_refused_with_their_line() -> None:
    assert faults(b"a: 1\nb: \xff\n") == ["a.yaml:2: is not UTF-8 text"]
    assert faults("a: 1\nb: \x01\n")[0].startswith("a.yaml:2: is not YAML: ")
    assert faults("a: 1\nb: c: d\n")[0].startswith("a.yaml:2: is not YAML: mapping values are")
    assert faults("a: 1\n\tb: 2\n")[0].startswith("a.yaml:2: is not YAML: ")


def test_only_one_table_is_a_document() -> None:
    assert faults("") == ["a.yaml:1: is not a table of keys and values"]
    assert faults("- 1\n") == ["a.yaml:1: is not a table of keys and values"]
    assert faults("a: 1\n---\nb: 1\n") == ["a.yaml:2: a second document begins here, expected one"]
    assert faults("? [a]\n: 1\n") == ["a.yaml:1: a list or table cannot be a key"]


@pytest.mark.parametrize("head", ["", "# a\n", "a: 1\n...\n", "#\r", "#\u2028"])
def test_directives_are_refused_before_they_are_parsed(head: str) -> None:
    many = head + "".join(f"%TAG !{number}! x\n" for number in range(10)) + "---\nb: 1\n"
    line = head.count("\n") + 1
    assert faults(many) == [f"a.yaml:{line}: `%` begins a directive, which is not read here"]
    assert value("'100 %'\n") == "100 %"


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_are_finite(text: str) -> None:
    assert faults(f"a: {text}\n") == [f"a.yaml:1: `{text}` is not a finite number"]


def test_the_hash_is_that_of_the_bytes() -> None:
    expected = "37b128c59f1f5097f73f82691cb519f1f568667faab5ced1b4ab979d36837eae"
    assert read_document(b"a: 1\n", "a.yaml").sha256 == expected


@pytest.mark.parametrize("name", ["families/qwen.yaml", "formats/llava.yaml", "classes/llama.yaml"])
def test_libyaml_and_pure_python_read_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (Path(__file__).parents[2] / "mappings" / name).read_bytes()
    fast = read_document(data, name)
    monkeypatch.delattr("yaml.CSafeLoader", raising=False)
    assert read_document(data, name) == fast

"""Expressions are arithmetic and comparisons over config keys, and nothing else gets through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.expressions import parse_expression

CONFIG: dict[str, object] = {
    "hidden": 64,
    "heads": 4,
    "theta": 10000.0,
    "act": "silu",
    "tied": False,
    "rope": {"type": "linear", "factor": 2.0},
    "layers": ["full", "window"],
    "nothing": None,
    "huge": 10**400,
}


def value(text: str) -> object:
    return parse_expression(text, "a.yaml:7").value(CONFIG)


def holds(text: str) -> bool:
    return parse_expression(text, "a.yaml:7").condition(CONFIG)


def refusal(text: str, config: dict[str, object] = CONFIG) -> str:
    with pytest.raises(MappingError) as caught:
        parse_expression(text, "a.yaml:7").value(config)
    assert caught.value.faults[0].where == "a.yaml:7"
    return caught.value.faults[0].what


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hidden // heads", 16),
        ("(hidden + 2) * heads - 1", 263),
        ("-hidden % 10", 6),
        ("hidden / heads", 16.0),
        ("min(hidden, heads) + max(1, 2, 3)", 7),
        ("len(layers)", 2),
        ("rope.factor * 2", 4.0),
        ("act", "silu"),
        ('"a b"', "a b"),
        ("null", None),
        ("None", None),
        ("True", True),
        ("[1, 2]", [1, 2]),
    ],
)
def test_values(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not tied", True),
        ("tied == false", True),
        ("1 == true", False),
        ("1 == 1.0", True),
        ("0 < heads <= 4 < hidden", True),
        ("0 < heads < 4 < hidden", False),
        ('rope.type in ["linear", "dynamic"] and rope.factor > 1', True),
        ('"window" in layers', True),
        ('"window" not in layers', False),
        ("true in [1]", False),
        ("nothing == null", True),
        ("nothing", False),
        ("rope == null", False),
        ("is_float(rope.factor) and not is_float(heads)", True),
    ],
)
def test_conditions(text: str, expected: bool) -> None:
    assert holds(text) is expected


def test_absent_names_are_null_in_conditions_only() -> None:
    assert holds("absent == null and absent.part == null and nothing.part == null")
    assert not holds("absent")
    assert refusal("absent") == (
        "`absent`: `absent` is not a known name. Known: act, heads, hidden, huge, layers, nothing, "
        "rope, theta, tied"
    )
    assert "did you mean `hidden`?" in refusal("hiden // 2")
    assert refusal("rope.typ") == (
        "`rope.typ`: `rope.typ` is not there; did you mean `type`? Known: factor, type"
    )


def test_null_has_no_order_and_no_arithmetic() -> None:
    assert refusal("nothing > 1") == "`nothing > 1`: `nothing` is null, expected a number"
    assert refusal("nothing + 1") == "`nothing + 1`: `nothing` is null, expected a number"


def test_and_and_or_stop_where_they_are_decided() -> None:
    assert holds("nothing == null or nothing > 1")
    assert not holds("nothing != null and nothing > 1")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('id')",
        "().__class__.__bases__",
        "hidden ** 2",
        "lambda: 1",
        "[x for x in layers]",
        "hidden if tied else heads",
        "rope['type']",
        "f'{hidden}'",
        "b'x'",
        "1j",
        "...",
        "hidden << 3",
        "hidden & 3",
        "~hidden",
        "hidden is heads",
        "(hidden := 3)",
        "min(*layers)",
        "min(hidden, key=heads)",
        "min()",
        "open(act)",
        "len",
        "{1: 2}",
        "(1, 2)",
        "act.upper()",
        "'x'.upper",
        "'\\x41'",
        "1or 2 $",
        "hidden +",
        "",
        "hidden; heads",
        "\0",
        "(" * 150 + "1" + ")" * 150 + "+",
        "-" * 60 + "1",
        "1 + " * 45 + "1",
        "9" * 30,
        "1" * 501,
    ],
)
def test_all_else_is_refused(text: str) -> None:
    refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "huge",
        "huge + 1",
        "9223372036854775807 * 9",
        "1e308 * 10",
        "1 // 0",
        "1 % 0",
        "act + act",
        "act * 9",
        "tied + 1",
        "act < 3",
        "rope == rope",
        "3 in act",
        "len(act)",
        "len(layers, layers)",
    ],
)
def test_values_that_are_none(text: str) -> None:
    refusal(text)


def test_sizes_are_whole_and_not_negative() -> None:
    def integer(text: str | int | float) -> int:
        return parse_expression(text, "a.yaml:7").integer(CONFIG)

    assert (integer("hidden / heads"), integer(3), integer(2.0)) == (16, 3, 2)
    for text in ("hidden / 3", "-1", "tied", "act", "null"):
        with pytest.raises(MappingError, match="expected a whole number of at least 0"):
            integer(text)


def test_conditions_are_true_or_false() -> None:
    with pytest.raises(MappingError, match="`hidden`: 64 is neither true nor false") as caught:
        holds("hidden")
    assert caught.value.faults[0].where == "a.yaml:7"


def test_a_text_that_is_shown_is_cut_after_80_characters() -> None:
    text = "$" * 80
    assert f"`{text}`" in refusal(text)
    assert f"`{text}…`" in refusal(text + "$")


def test_names_are_the_first_parts() -> None:
    names = parse_expression("vision.hidden_size + min(a, b) > 0 and not true", "").names
    assert names == {"vision", "a", "b"}


@pytest.mark.parametrize(
    "text", ["1or heads", "0xfor heads", "heads == 1and tied", "[1.if 1 in 2]"]
)
def test_a_number_that_goes_on_as_a_word_is_refused_without_a_warning(text: str) -> None:
    assert refusal(text) == f"`{text}` is not an expression"


@settings(deadline=None)
@given(st.text(alphabet="()[]+-*/%<>=!., \t\n'\"\\\0 anotdrilen019eE_é", max_size=60))
def test_any_text_is_a_value_or_a_refusal(text: str) -> None:
    try:
        parse_expression(text, "a.yaml:1").value(CONFIG)
    except MappingError as error:
        assert error.faults[0].where == "a.yaml:1"

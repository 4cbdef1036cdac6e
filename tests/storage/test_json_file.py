"""JSON that others wrote: an object of bounded depth without two values for a key, or an error."""

from __future__ import annotations

import pytest

from xtuner2llava.errors import CorruptFileError
from xtuner2llava.storage.json_file import integer, parse_json, text


def nested(depth: int) -> bytes:
    """An object of `depth` containers, lists and objects in turn."""
    inner = b"1"
    for level in range(depth - 1, 0, -1):
        inner = b'{"a": %s, "b": []}' % inner if level % 2 == 0 else b"[%s, 2]" % inner
    return b'{"a": %s}' % inner


def test_depth_is_bounded_where_json_itself_still_reads_it() -> None:
    assert parse_json(nested(64), "f")
    for depth in (65, 66, 500):
        with pytest.raises(CorruptFileError, match="nested too deeply"):
            parse_json(nested(depth), "f")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{"a": "\xff"}', "f: is not UTF-8 (byte 7)"),
        (b'{\n"a": }', "f:2: is not JSON: Expecting value"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "f: is not usable JSON: the key 'c' is there twice"),
        (b'[{"a": 1}]', "f: is not a JSON object"),
        (b"", "f:1: is not JSON: Expecting value"),
        (b"[" * 100_000, "f: is not usable JSON: "),
        (b'{"a": ' + b"1" * 5_000 + b"}", "f: is not usable JSON: a number with 5,000 digits"),
        (b'{"a": [-' + b"1" * 400 + b"]}", "f: is not usable JSON: a number with 401 digits"),
        (b'{"a": NaN}', "f: is not usable JSON: NaN is not a finite number"),
        (b'{"a": [1.5, -Infinity]}', "f: is not usable JSON: -Infinity is not a finite number"),
        (b'{"a": 1e999}', "f: is not usable JSON: 1e999 is not a finite number"),
        (rb'{"a": ["\udC00"]}', "f: is not usable JSON: 'utf-8' codec can't encode character"),
        (rb'{"\uD83D": 1}', "f: is not usable JSON: 'utf-8' codec can't encode character"),
    ],
)
def test_anything_else_is_an_error_message(data: bytes, what: str) -> None:
    with pytest.raises(CorruptFileError) as error:
        parse_json(data, "f")
    assert str(error.value).startswith(what)


def test_pairs_of_surrogates_and_finite_floats_are_read() -> None:
    assert parse_json(rb'{"\ud83d\ude00": [-1.5e300, 1e-400]}', "f") == {"😀": [-1.5e300, 0.0]}


def test_the_length_of_a_tokenizer_without_one_is_read() -> None:
    length = 1000000000000000019884624838656
    assert parse_json(b'{"model_max_length": %d}' % length, "f") == {"model_max_length": length}


def test_values_of_another_type_are_none() -> None:
    values = parse_json(b'{"i": 3, "t": "x", "b": true, "f": 3.0, "l": [3]}', "f")
    assert [integer(values, key) for key in "itbflx"] == [3, None, None, None, None, None]
    assert [text(values, key) for key in "itbflx"] == [None, "x", None, None, None, None]

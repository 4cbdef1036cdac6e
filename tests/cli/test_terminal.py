"""Text that fits a terminal."""

from __future__ import annotations

import io

from xtuner2llava.cli.terminal import columns, table, wrapped

ROWS = [("first", "ok", "short"), ("second", "ok", "a detail of many words that goes on and on")]
HEADER = ("check", "result", "detail")


def test_a_cell_is_a_line() -> None:
    text = table([("a\nVerified: all\t", "ok")], ("check", "result"))
    assert text.split("\n")[2:] == [r"a\nVerified: all\t  ok"]


def test_a_table_fits_and_breaks_at_words() -> None:
    assert table(ROWS, HEADER, width=40).split("\n") == [
        "check   result  detail",
        "──────  ──────  ────────────────────────",
        "first   ok      short",
        "second  ok      a detail of many words",
        "                that goes on and on",
    ]


def test_a_table_that_fits_is_not_broken() -> None:
    assert table(ROWS, HEADER, width=58) == table(ROWS, HEADER, width=1000)
    assert max(map(len, table(ROWS, HEADER, width=57).split("\n"))) <= 57


def test_the_widest_columns_give_way_first() -> None:
    lines = table([("a" * 30, "b" * 50, "c")], ("x", "y", "z"), width=50).split("\n")
    assert max(map(len, lines)) == 50
    assert "".join(line.split("  ")[0].strip() for line in lines[2:]) == "a" * 30


def test_a_name_is_broken_after_its_dots() -> None:
    name = "model.layers.{0..1}.self_attn.q_proj.bias"
    lines = table([(name, "b" * 60)], ("x", "y"), width=50).split("\n")
    names = [line.split("  ")[0].strip() for line in lines[2:4]]
    assert names == ["model.layers.{0..1}.", "self_attn.q_proj.bias"]


def test_lines_are_broken_at_words_and_what_follows_is_indented() -> None:
    text = "Note: one two three four\n    path/that/is/much/longer/than/a/line\nfine"
    assert wrapped(text, 16) == (
        "Note: one two\n  three four\n    path/that/is/much/longer/than/a/line\nfine"
    )
    assert wrapped(text, None) == text


def test_files_and_pipes_are_not_broken() -> None:
    assert columns(io.StringIO()) is None

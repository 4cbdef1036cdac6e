"""Names: globs, folding over layers, templates."""

from __future__ import annotations

import pytest

from xtuner2llava.mapping.names import below, fold, join, matches, nearest, parse_name


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.**", "a.b.c", True),
        ("a.**", "a", True),
        ("**", "a.b.c", True),
        ("**.rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq", True),
        ("**.rotary_emb.inv_freq", "rotary_emb.inv_freq", True),
        ("**.rotary_emb.inv_freq", "model.rotary_emb.inv_freq.x", False),
        ("**.inv_freq", "my_inv_freq", False),
        ("**.b.**.d", "a.b.c.b.d", True),
        ("h.*.attn.*bias", "h.0.attn.masked_bias", True),
        ("h.*.attn.*bias", "h.0.attn.masked_biases", False),
        ("a*b*c", "axxbyyc", True),
        ("a*b*c", "axxbyyd", False),
    ],
)
def test_globs(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_a_hostile_glob_does_not_blow_up() -> None:
    assert not matches("**." * 80 + "x", ".".join("a" * 500))
    assert not matches("*a" * 100 + "b", "a" * 500)


def test_prefixes_end_at_dots() -> None:
    assert [below("model.norm", prefix) for prefix in ("", "model", "model.norm", "mod")] == [
        "model.norm",
        "norm",
        "",
        None,
    ]
    assert [join("a", "b"), join("", "b"), join("a", "")] == ["a.b", "b", "a"]


def test_folding() -> None:
    names = [f"h.{i}.w" for i in (0, 1, 2, 5, 7)] + ["norm"] + ["h.1.e.0.w", "h.1.e.1.w"]
    assert [str(folded) for folded in fold(names)] == [
        "`h.{0..2,5,7}.w` (5 tensors)",
        "`norm`",
        "`h.1.e.{0..1}.w` (2 tensors)",
    ]
    scattered = fold(f"h.{i}.w" for i in range(0, 20, 2))
    assert str(scattered[0]) == "`h.{0,2,4,6,…}.w` (10 tensors)"


def test_names_from_a_hostile_checkpoint_fold_as_they_are() -> None:
    long = "9" * 5000
    assert fold([long, "{}.1", "٣.x"])[0].text == long
    # A part that is `{}` itself is not a number.
    assert [str(folded) for folded in fold(["h.{}.w.0", "h.1.w.0", "h.2.w.3", "{}.1", "1.{}"])] == [
        "`h.{}.w.0`",
        "`h.{1..2}.w.{0,3}` (2 tensors)",
        "`{}.1`",
        "`1.{}`",
    ]


def test_templates() -> None:
    name = parse_name("h.{i}.e.{e}.w")
    assert name.variables == ("i", "e")
    assert name.render({"i": 3, "e": 10}) == "h.3.e.10.w"
    for wrong in ("h.{i", "h.{}", "h.{i+1}", "h..w", ".h", "h.", "h w", "h.*", "x" * 501):
        with pytest.raises(ValueError):
            parse_name(wrong)
    assert parse_name("h.*", glob=True).text == "h.*"


def test_near_misses() -> None:
    assert nearest("hidden_sizes", ["vocab_size", "hidden_size"]) == "hidden_size"
    assert nearest("zzz", ["vocab_size", "hidden_size"]) is None
    assert nearest("x" * 5000, ["x" * 5000]) is None

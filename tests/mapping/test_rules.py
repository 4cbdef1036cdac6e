"""Every verb on small tensors: what comes out, what stays a byte range, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from xtuner2llava.errors import MappingError
from xtuner2llava.mapping.apply import Applied, apply
from xtuner2llava.mapping.rules import RuleOrBlock, read_rules
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import read_document
from xtuner2llava.tensors.computed import Fill
from xtuner2llava.tensors.dtype import BFLOAT16, FLOAT32
from xtuner2llava.tensors.files import FileRange, SourceFile
from xtuner2llava.tensors.lazy import LazyTensor
from xtuner2llava.tensors.stored import Stored

Tensors = dict[str, LazyTensor]
Given = Callable[..., Tensors]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """Stored float32 tensors of the shapes given by name, whose elements count up from 0."""

    def make(shapes: dict[str, Sequence[int]]) -> Tensors:
        tensors: Tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            data = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).numpy().tobytes()
            path = tmp_path / f"{number}.bin"
            path.write_bytes(data)
            whole = FileRange(SourceFile.of(path), 0, len(data))
            tensors[name] = Stored(name, FLOAT32, tuple(shape), (whole,))
        return tensors

    return make


Layers = Sequence[Sequence[RuleOrBlock]]


def rules(text: str, parent: Layers = (), name: str = "t.yaml") -> Layers:
    """The rules of a list in YAML over others; the first one stands in line 2."""
    document = read_document(f"tensors:\n{text}\n".encode(), name)
    reader = Reader(document)
    found = read_rules(reader, document.table["tensors"])
    reader.finish()
    return (found, *parent)


def run(text: str | Layers, tensors: Tensors, config: dict[str, object] | None = None) -> Applied:
    found = rules(text) if isinstance(text, str) else text
    return apply(found, config or {}, tensors, where="t.yaml")


def rows(tensor: LazyTensor) -> list[object]:
    found: list[object] = tensor.read(0, tensor.rows).tolist()
    return found


def faults(
    text: str | Layers, tensors: Tensors, config: dict[str, object] | None = None
) -> list[str]:
    with pytest.raises(MappingError) as caught:
        run(text, tensors, config)
    return [f"{fault.where}: {fault.what}" for fault in caught.value.faults]


def test_keep_rename_move_are_the_same_tensors(given: Given) -> None:
    tensors = given({"a": [2], "b": [1], "model.x.y": [3], "model.z": [1]})
    applied = run("- keep: [a]\n- rename: {b: c}\n- {move: model, to: m.n}", tensors)
    assert {name: rows(tensor) for name, tensor in applied.outputs.items()} == {
        "a": [0, 1],
        "c": [0],
        "m.n.x.y": [0, 1, 2],
        "m.n.z": [0],
    }
    assert applied.outputs["m.n.z"] is tensors["model.z"]
    assert applied.origins["m.n.z"].sources == ("model.z",)
    assert applied.origins["m.n.z"].where == "t.yaml:4"
    assert applied.origins["c"].where == "t.yaml:3"
    assert applied.origins["c"].verb == "rename"


@pytest.mark.parametrize("dim", ["", ", dim: 0"])
def test_split_takes_rows_in_order(given: Given, dim: str) -> None:
    text = f"- {{split: qkv, into: [q, k, v], sizes: [h, 2, h // 3]{dim}}}"
    outputs = run(text, given({"qkv": [6, 2]}), {"h": 3}).outputs
    assert rows(outputs["q"]) == [[0, 1], [2, 3], [4, 5]]
    assert rows(outputs["k"]) == [[6, 7], [8, 9]]
    assert rows(outputs["v"]) == [[10, 11]]
    assert outputs["k"].ranges() is not None


def test_split_of_columns_is_computed(given: Given) -> None:
    text = "- {split: w, into: [a, b], sizes: [1, 2], dim: 1}"
    outputs = run(text, given({"w": [2, 3]})).outputs
    assert rows(outputs["a"]) == [[0], [3]]
    assert rows(outputs["b"]) == [[1, 2], [4, 5]]
    assert outputs["b"].ranges() is None


def test_concat_joins_rows(given: Given) -> None:
    outputs = run("- {concat: [b, a], into: c}", given({"a": [1, 2], "b": [2, 2]})).outputs
    assert rows(outputs["c"]) == [[0, 1], [2, 3], [0, 1]]
    assert outputs["c"].ranges() is not None


def test_deinterleave_takes_slots_of_each_group(given: Given) -> None:
    # InternLM2 with 2 key-value heads, 2 queries a head, head_dim 1: q q k v, q q k v.
    text = "- {deinterleave: wqkv, into: [q, k, v], groups: kv, slots: [2 * d, d, d]}"
    outputs = run(text, given({"wqkv": [8, 1]}), {"kv": 2, "d": 1}).outputs
    assert rows(outputs["q"]) == [[0], [1], [4], [5]]
    assert rows(outputs["k"]) == [[2], [6]]
    assert rows(outputs["v"]) == [[3], [7]]
    assert outputs["q"].ranges() is not None


def test_unstack_takes_the_first_dimension_apart(given: Given) -> None:
    text = "- {unstack: experts.w, for: {e: n}, into: 'e.{e}.w'}"
    outputs = run(text, given({"experts.w": [3, 2, 2]}), {"n": 3}).outputs
    assert list(outputs) == ["e.0.w", "e.1.w", "e.2.w"]
    assert rows(outputs["e.1.w"]) == [[4, 5], [6, 7]]
    assert [(r.offset, r.length) for r in outputs["e.1.w"].ranges() or ()] == [(16, 16)]


def test_unstack_splits_what_it_takes_apart(given: Given) -> None:
    text = """
- for: {i: layers}
  from: h.{i}
  to: layers.{i}
  rules:
    - unstack: gate_up
      for: {e: n}
      into: ['{e}.gate', '{e}.up']
      sizes: [inner, inner]
    - {unstack: bias, for: {e: n}, into: '{e}.bias'}"""
    tensors = given(
        {f"h.{i}.{name}": shape for i in range(2) for name, shape in
         (("gate_up", [2, 4, 1]), ("bias", [2, 3]))}
    )  # fmt: skip
    outputs = run(text, tensors, {"layers": 2, "n": 2, "inner": 2}).outputs
    assert len(outputs) == 12
    assert rows(outputs["layers.1.0.gate"]) == [[0], [1]]
    assert rows(outputs["layers.1.1.up"]) == [[6], [7]]
    assert rows(outputs["layers.0.1.bias"]) == [3, 4, 5]
    assert outputs["layers.1.1.up"].ranges() is not None


def test_transpose(given: Given) -> None:
    outputs = run("- {transpose: w, into: t}", given({"w": [2, 3]})).outputs
    assert rows(outputs["t"]) == [[0, 3], [1, 4], [2, 5]]


def test_normalize_divides_rows_by_their_norm(given: Given) -> None:
    outputs = run("- {normalize: w, into: n}", given({"w": [2, 2]})).outputs
    assert rows(outputs["n"])[0] == [0, 1]
    assert rows(outputs["n"])[1] == pytest.approx([2 / 13**0.5, 3 / 13**0.5])


def test_resize_pads_with_zeros_and_cuts_only_if_lossy(given: Given) -> None:
    tensors = given({"w": [2, 2]})
    text = "- {resize: w, into: w, rows: n}"
    assert rows(run(text, tensors, {"n": 4}).outputs["w"]) == [[0, 1], [2, 3], [0, 0], [0, 0]]
    assert run(text, tensors, {"n": 2}).outputs["w"] is tensors["w"]
    assert faults(text, tensors, {"n": 1}) == [
        "t.yaml:2, `w`: cannot be used by `resize`: it has 2 rows, and [n] = [1] would cut some; "
        "that needs `lossy: true`"
    ]
    lossy = "- {resize: w, into: w, rows: n, lossy: true}"
    assert rows(run(lossy, tensors, {"n": 1}).outputs["w"]) == [[0, 1]]


def test_resize_keeps_the_dtype() -> None:
    tensors: Tensors = {"w": Fill(BFLOAT16, (1, 2), 3.0)}
    found = run("- {resize: w, into: w, rows: 2}", tensors).outputs["w"]
    assert found.dtype == BFLOAT16
    assert rows(found) == [[3, 3], [0, 0]]


def test_fill_needs_no_source() -> None:
    outputs = run("- {fill: a, shape: [2, n], value: 1.5}\n- {fill: b, shape: [n]}", {}, {"n": 1})
    assert rows(outputs.outputs["a"]) == [[1.5], [1.5]]
    assert rows(outputs.outputs["b"]) == [0]
    assert outputs.origins["b"].sources == ()


def test_drop_says_why_and_may_find_nothing(given: Given) -> None:
    text = """
- {move: "", to: ""}
- drop: "**.inv_freq"
  because: rebuilt
- {drop: position_ids, because: a buffer}
- {drop: absent, because: older files have it}"""
    applied = run(text, given({"a": [1], "h.0.r.inv_freq": [1], "position_ids": [1]}))
    assert [*applied.outputs] == ["a"]
    assert {(gone.name, gone.because, gone.where) for gone in applied.dropped} == {
        ("h.0.r.inv_freq", "rebuilt", "t.yaml:4"),
        ("position_ids", "a buffer", "t.yaml:6"),
    }


def test_a_name_beats_a_glob_beats_a_move_and_long_moves_beat_short_ones(given: Given) -> None:
    text = """
- {move: "", to: all}
- {move: h.0, to: first}
- {drop: "**.bias", because: unused}
- {rename: {h.0.bias: kept}}"""
    applied = run(text, given({"h.0.bias": [1], "h.0.w": [1], "h.1.bias": [1], "h.10.w": [1]}))
    assert {*applied.outputs} == {"kept", "first.w", "all.h.10.w"}
    assert [gone.name for gone in applied.dropped] == ["h.1.bias"]


def test_blocks_loop_and_prefix_both_sides(given: Given) -> None:
    text = """
- for: {i: layers}
  from: h.{i}
  to: model.layers.{i}
  rules:
    - keep: [norm]
    - for: {e: 2}
      from: e.{e}
      to: experts
      rules:
        - {rename: {w: "{e}.w"}}"""
    tensors = given({f"h.{i}.{n}": [1] for i in (0, 1) for n in ("norm", "e.0.w", "e.1.w")})
    assert sorted(run(text, tensors, {"layers": 2}).outputs) == [
        "model.layers.0.experts.0.w",
        "model.layers.0.experts.1.w",
        "model.layers.0.norm",
        "model.layers.1.experts.0.w",
        "model.layers.1.experts.1.w",
        "model.layers.1.norm",
    ]


def test_conditions_on_rules_and_blocks(given: Given) -> None:
    text = """
- keep: [head]
  if: not tied
- {drop: head, because: tied, if: tied}
- for: {i: 2}
  if: biased
  from: h.{i}
  to: h.{i}
  rules: [{keep: [bias], if: i > 0}]"""
    tensors = given({"head": [1], "h.1.bias": [1]})
    assert [*run(text, tensors, {"tied": False, "biased": True}).outputs] == ["head", "h.1.bias"]
    assert [*run(text, tensors, {"tied": True, "biased": True}).outputs] == ["h.1.bias"]
    assert faults(text, tensors, {}) == [
        "t.yaml, `h.1.bias`: is in the checkpoint, and no rule takes it"
    ]


def test_a_child_replaces_what_makes_the_same_target_or_reads_the_same_source(
    given: Given,
) -> None:
    parent = rules(
        """
- {split: qkv, into: [q, k, v], sizes: [1, 1, 1]}
- keep: [norm, head, bias]
- {move: rest, to: rest}
- {drop: "**.ids", because: parent}""",
        name="parent.yaml",
    )
    child = rules(
        """
- {split: qkv, into: [q, kv], sizes: [1, 2]}
- {normalize: head, into: head}
- {rename: {bias: b}}""",
        parent,
    )
    applied = run(
        child, given({"qkv": [3], "norm": [1], "head": [1, 2], "bias": [1], "x.ids": [1]})
    )
    assert sorted(applied.outputs) == ["b", "head", "kv", "norm", "q"]
    assert applied.origins["head"].where == "t.yaml:4"
    assert applied.origins["norm"].where == "parent.yaml:4"
    assert applied.dropped[0].where == "parent.yaml:6"


def test_every_source_is_used_once_and_every_target_made_once(given: Given) -> None:
    text = """
- for: {i: 3}
  from: h.{i}
  to: g.{i}
  rules:
    - {rename: {w: v, mlp.up_proj: up}}
    - {rename: {w: u}}
- {rename: {a: x, b: x}}"""
    # The last two rules make one target, which is only seen here when there is an `if`.
    text = text.replace(
        "- {rename: {a: x, b: x}}", "- {rename: {a: x}}\n- {rename: {b: x}, if: on}"
    )
    names = ["a", "b", "extra"] + [f"h.{i}.{n}" for i in range(3) for n in ("w", "mlp.up_prok")]
    assert faults(text, given({name: [1] for name in names}), {"on": True}) == [
        "t.yaml:7, `h.{0..2}.mlp.up_proj` (3 tensors): is not in the checkpoint, `rename` needs it",
        "t.yaml:8, `h.{0..2}.w` (3 tensors): is already taken by t.yaml:7",
        "t.yaml:10, `x`: is already made by t.yaml:9",
        "t.yaml, `extra`: is in the checkpoint, and no rule takes it",
        "t.yaml, `h.{0..2}.mlp.up_prok` (3 tensors): is in the checkpoint, and no rule takes it",
    ]


def test_faults_suggest_the_name_that_was_meant(given: Given) -> None:
    with pytest.raises(MappingError) as caught:
        run("- {rename: {h.0.mlp.up_proj: x}}", given({"h.7.mlp.up_prok": [1], "zzz": [1]}))
    assert [fault.advice for fault in caught.value.faults] == [
        "Did you mean `h.7.mlp.up_prok`?",
        "t.yaml:2 asks for a name like it.",
        "Write a rule for it, or `drop` it with a reason.",
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "- {split: w, into: [a, b], sizes: [n, 2]}",
            "`w`: cannot be used by `split`: its shape is [4, 3], and [n, 2] = [3, 2] makes 5 rows",
        ),
        (
            "- {split: w, into: [a, b], sizes: [n, 1], dim: 1}",
            "`w`: cannot be used by `split`: its shape is [4, 3], and [n, 1] = [3, 1] makes "
            "4 columns",
        ),
        (
            "- {deinterleave: w, into: [a, b], groups: 3, slots: [1, 1]}",
            "`w`: cannot be used by `deinterleave`: 3 groups of 2 rows are not the rows of shape "
            "(4, 3)",
        ),
        (
            "- {unstack: w, for: {e: n}, into: '{e}'}",
            "`w`: cannot be used by `unstack`: shape [4, 3] is not 3 tensors, stacked",
        ),
        (
            "- {unstack: w, for: {e: 4}, into: ['a{e}', 'b{e}'], sizes: [n, 1]}",
            "`w`: cannot be used by `unstack`: its shape is [3], and [n, 1] = [3, 1] makes 4 rows",
        ),
        (
            "- {move: w, to: ''}",
            "`w`: would be left without a name",
        ),
        (
            "- keep: [w]\n- {move: u, to: v}",
            "`u`: is not the beginning of a tensor's name",
        ),
    ],
)
def test_shapes_that_do_not_fit(given: Given, text: str, what: str) -> None:
    found = faults(text, given({"w": [4, 3]}), {"n": 3})
    assert [fault.split(", ", 1)[1] for fault in found] == [what]


def test_parts_of_one_tensor_have_one_dtype() -> None:
    tensors: Tensors = {"a": Fill(BFLOAT16, (1,), 0.0), "b": Fill(FLOAT32, (1,), 0.0)}
    assert faults("- {concat: [a, b], into: c}", tensors) == [
        "t.yaml:2, `a`: cannot be used by `concat`: parts of dtypes bfloat16 and float32"
    ]


def test_expressions_without_value_are_all_named_once(given: Given) -> None:
    text = """
- for: {i: 50}
  from: h.{i}
  to: g.{i}
  rules:
    - {split: w, into: [a], sizes: [hiden]}
- {fill: x, shape: [hidden / 3]}"""
    assert faults(text, {}, {"hidden": 64}) == [
        "t.yaml:7: `hiden`: `hiden` is not a known name; did you mean `hidden`? Known: hidden, i",
        "t.yaml:8: `hidden / 3`: is 21.333333333333332, expected a whole number of at least 0",
    ]


@pytest.mark.parametrize("loops", ["{i: layers}", "{i: 100000, j: 100000}", "{i: 1000000000000}"])
def test_a_hostile_config_cannot_loop_forever(loops: str) -> None:
    text = f"- for: {loops}\n  from: '{{i}}'\n  to: '{{i}}'\n  rules: [keep: ['{{j}}']]"
    if "j:" not in loops:
        text = text.replace("{j}", "x")
    assert faults(text, {}, {"layers": 10**9}) == [
        "t.yaml:2: its loops make more than 20,000 rules"
    ]
    assert faults("- {unstack: w, for: {e: layers}, into: '{e}'}", {}, {"layers": 10**9}) == [
        "t.yaml:2: makes more than 200,000 tensors"
    ]


def test_globs_that_would_take_hours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: Tensors = {f"t{n}": Fill(FLOAT32, (1,), 0.0) for n in range(5)}
    text = "- {drop: 't*', because: x}\n- {drop: 'u*', because: x}"
    assert len(run(text, tensors).dropped) == 5
    monkeypatch.setattr("xtuner2llava.mapping.apply._MAX_COMPARISONS", 9)
    assert faults(text, tensors) == [
        "t.yaml:3: with its 2 globs and moves, 5 tensors take too long"
    ]


def test_thousands_of_faults_are_cut_short(given: Given) -> None:
    tensors: Tensors = {f"t{n:04}": Fill(FLOAT32, (1,), 0.0) for n in range(1000)}
    found = faults("- {fill: x, shape: [1]}", tensors)
    assert len(found) == 41
    assert found[-1] == ": and 960 more faults of this kind"

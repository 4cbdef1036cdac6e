"""Configs as data: what is read, what stays unknown, and that nothing is run."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner2llava.errors import CheckpointError
from xtuner2llava.training_config.evaluator import read_python
from xtuner2llava.training_config.values import Reference, Table, Unknown, Value, dotted


def read(text: str) -> Table:
    return read_python(text, "config.py")


def value(expression: str, before: str = "") -> Value:
    return read(f"{before}\nx = {expression}")["x"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("int(2048 - (336 / 14)**2)", 1472),
        ("-2", -2),
        ("7 // 2 + 7 % 4 - 2 * 3", 0),
        ("2 ** 10", 1024),
        ("1e-5", 1e-5),
        ("'a' 'b' + 'c'", "abc"),
        ("f'{1}/{\"b\"}{2.5}'", "1/b2.5"),
        ("(1,) + (2,)", (1, 2)),
        ("[1] + [4]", [1, 4]),
        ("1 if 2 < 3 else 4", 1),
        ("not 0", True),
        ("None is None", True),
        ("1 != 2", True),
        ("dict(a=dict(b=5))['a']['b'] + 2", 7),
        ("{'a': 1, **dict(b=2)}", {"a": 1, "b": 2}),
        ("dict(dict(a=1), b=dict(c=None))", {"a": 1, "b": {"c": None}}),
        ("[1, 2, 3][-1] + (4, 5)[0]", 7),
        ("True", True),
    ],
)
def test_constants_are_computed_as_python_does(expression: str, expected: object) -> None:
    found = value(expression)
    assert found == expected
    assert type(found) is type(expected) or isinstance(found, Table)


def test_a_dict_by_its_other_names() -> None:
    assert value("ConfigDict(a=1)", "from mmengine.config import ConfigDict") == {"a": 1}


def test_assignments_of_all_kinds() -> None:
    names = read(
        "a = b = 1\nd: str\na += 5\ng = [1]\nh = g\ng += [2]\nk = dict(z=1)\nm = k\nn = dict(**k)\n"
    )
    assert [names[key] for key in "ab"] == [6, 1]
    assert names["g"] == [1, 2]
    assert names["h"] == names["g"]  # another name of the same list
    assert names["m"] == names["n"] == {"z": 1}
    assert not isinstance(names.get("d"), str)


def test_a_constant_if_takes_its_branch() -> None:
    assert read("big = True\nif big:\n  x = 1\nelif 3:\n  x = 2\nelse:\n  x = 3")["x"] == 1
    assert read("if not 0:\n  pass\nelse:\n  x = 3") == {}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (
            "from transformers import AutoModel as A\nx = A.from_pretrained",
            "transformers.AutoModel",
        ),
        (
            "import transformers\nx = transformers.AutoModel.from_pretrained",
            "transformers.AutoModel",
        ),
        ("import transformers.auto as t\nx = t.from_pretrained", "transformers.auto"),
        ("import transformers.auto\nx = transformers.from_pretrained", "transformers"),
    ],
)
def test_imported_names_are_references(text: str, path: str) -> None:
    assert read(text)["x"] == Reference(f"{path}.from_pretrained")


def test_a_name_reads_alike_in_a_file_and_in_the_text_of_a_checkpoint() -> None:
    imported = value("PROMPT_TEMPLATE.qwen_chat", "from xtuner.utils import PROMPT_TEMPLATE")
    indexed = value("PROMPT_TEMPLATE['qwen_chat']", "from xtuner.utils import PROMPT_TEMPLATE")
    forms = [imported, indexed, value("'xtuner.utils.PROMPT_TEMPLATE.qwen_chat'")]
    forms.append(value("'<xtuner.utils.PROMPT_TEMPLATE.qwen_chat>'"))
    assert {dotted(form) for form in forms} == {"xtuner.utils.PROMPT_TEMPLATE.qwen_chat"}
    assert dotted(value("torch.float16")) == "torch.float16"  # mmengine writes it without import
    assert [dotted(other) for other in ("./a/b", "", "a b", "a..b", 3, None)] == [None] * 6


def test_lines_are_kept() -> None:
    names = read("a = 1\nb = dict(\n  c=2,\n  d={'e': 3,\n     'f': 4})\n")
    assert names.lines == {"a": 1, "b": 2}
    assert isinstance(names["b"], Table)
    assert names["b"].lines == {"c": 3, "d": 4}
    assert isinstance(names["b"]["d"], Table)
    assert names["b"]["d"].lines == {"e": 4, "f": 5}


@pytest.mark.parametrize(
    "expression",
    [
        "some_function(1)",
        "[1, *(2, 3)]",
        "[*undefined]",
        "1 < 2 < 3",
        "'a' in ['a']",
        "0 or 1",
        "'abcd'[1:3]",
        "'ab' * 3",
        "f'{2.5:.2f}'",
        "f'{1!r}'",
        "str(3)",
        "len([1])",
        "int('10', 2)",
        "dict(a=1).copy()",
        "dict({}, {})",
        "[i for i in [1]]",
        "(lambda: 1)()",
        "undefined",
        "'{}'.format(1)",
        "1 << 2",
        "...",
        "b'a'",
        "2j",
        "1 / 0",
        "[1][5]",
        "dict(a=1)['b']",
        "dict(**undefined)",
        "int('x')",
        "int('9' * 101)",
        "(-8) ** 0.5",
        "'a' * 10**9",
        "[0] * 10**9",
        "10 ** 10 ** 10",
        "9.0 ** 9999",
        "round(5, -10**9)",
        "f'{1:>999999999}'",
        "0x" + "f" * 300,
        "{[]: 1}",
        "{{ fileBasenameNoExtension }}",
        "'%999999999d' % 1",
        "open('/etc/passwd').read()",
        "dict.fromkeys('a')",
    ],
)
def test_what_is_no_constant_is_unknown_and_harms_nothing_else(expression: str) -> None:
    names = read(f"a = 1\nx = {expression}\nb = 2\ny = [x, b]\nz = {{'k': x}}")
    assert isinstance(names["x"], Unknown)
    assert names["x"].line == 2
    assert names["x"].reason
    assert (names["a"], names["b"]) == (1, 2)
    assert names["y"] == [names["x"], 2]
    assert names["z"] == {"k": names["x"]}


def test_templates_of_mmengine_stay_text() -> None:
    assert value("'work_dirs/{{ fileBasenameNoExtension }}'") == (
        "work_dirs/{{ fileBasenameNoExtension }}"
    )


@pytest.mark.parametrize(
    "change",
    [
        "foo(model)",
        "y = foo(other, k=[model])",
        "y = [m.clear() for m in [model]]",
        "for m in [model]: m['r'] = 2",
        "model.pop('r')",
        "model.update(undefined)",
        "model[undefined] = 1",
        "model['r'] = 1",
        "model.r = 1",
        "model.update(r=2)",
        "print(model)",
        "other, model = 1, 2",
        "box = dict(m=model)\nbox['m'].clear()",
        "y = [*[model.clear()]]",
        "y = f'{model.clear()!r}'",
        "y = 1 < 2 < (model := 3)",
        "y = 0 or model.clear()",
        "y = 'ab'[model.clear():2]",
        "def f(): model.clear()\nfoo()",
        "f = lambda: model.clear()\ny = [f][0]()",
        "model |= dict(r=2)",
        "while True: model = 3",
        "y = (model := 3)",
        "y = 1 + undefined + (model := 3)",
        "if undefined: model = 3",
        "y = undefined or model.clear()",
        "try:\n  model = 3\nfinally:\n  pass",
        "with foo() as model: pass",
        "def f(): model['r'] = 2\nf()",
        "def f():\n  global model\n  model = 2\nf()",
        "f = lambda: model.clear()\ng = f\ng()",
        "class model: pass",
        "class A:\n  model['r'] = 2",
        "@foo(model)\ndef f(): pass",
        "def f(a=model.clear()): pass",
        "from somewhere import *",
        "from .somewhere import model",
        "try:\n  from somewhere import *\nexcept ImportError:\n  pass",
        "exec('model = 3')",
        "globals()['model'] = 3",
        "match 3:\n  case model: pass",
        "from mmengine.config import read_base\nwith read_base():\n  from .base import *",
        "_base_ = ['./base.py']",
        "del model[undefined]",
        "inner = model\ninner.setdefault('r', 2)",
        "box = [model]\nbox[0].clear()",
        "assert foo(model)",
        "model, y = undefined",
        "*model, y = 1, 2",
        "[model.clear()][0]",
    ],
)
def test_what_may_have_changed_a_value_makes_it_unknown(change: str) -> None:
    names = read(f"model = dict(r=1)\nother = 5\n{change}\n")
    assert isinstance(names["model"], Unknown)
    assert names["model"].line >= 3


@pytest.mark.parametrize(
    "harmless",
    [
        "def model_of(x):\n  model = x\n  return model",  # never called
        "f = lambda: model",
        "y = [model for model in range(3)][0:1]\nmodel = dict(r=1)",
        "y = undefined",
        "import model_zoo",
        "if False:\n  foo(model)",
        "assert model",
    ],
)
def test_what_cannot_change_a_value_leaves_it(harmless: str) -> None:
    assert read(f"model = dict(r=1)\n{harmless}\n")["model"] == {"r": 1}


def test_a_star_import_may_bring_any_name() -> None:
    names = read("a = 1\nfrom x import *\nb = 2\nc = elsewhere\n")
    assert isinstance(names["*"], Unknown)
    assert isinstance(names["a"], Unknown)
    assert names["b"] == 2
    assert names["c"] == Unknown("a star import is not followed", 2)


def test_base_configs_are_not_followed_and_it_is_said() -> None:
    names = read("_base_ = './base.py'\nlr = 1\nmodel = dict(llm=dict())\n")
    assert names["lr"] == 1
    assert names["model"] == names["*"]
    assert names["model"] == Unknown("it comes from a base config, which is not followed", 1)


CANARIES = [
    "__import__('os').system('touch canary')",
    "x = __import__('pathlib').Path('canary').touch()",
    "[open('canary', 'w') for _ in '1']",
    "(y := open)('canary', 'w')",
    "import pathlib\npathlib.Path('canary').touch()",
    "from pathlib import Path\nx = dict(type=Path('canary').touch())",
    "import os\nx = f\"{os.system('touch canary')}\"",
    "import os\n@os.system('touch canary')\ndef f(): pass",
    "import os\ndef f(a=os.system('touch canary')): pass",
    "class A(metaclass=open('canary', 'w')): open('canary', 'w')",
    "x = (lambda: open('canary', 'w'))()",
    'x = eval(\'open("canary", "w")\')',
    'exec(\'open("canary", "w")\')',
    "for x in [open('canary', 'w')]: pass",
    "with open('canary', 'w') as x: pass",
    "try:\n  1/0\nexcept Exception:\n  open('canary', 'w')",
    "if open('canary', 'w'): pass",
    "x = 1 if open('canary', 'w') else 2",
    "x: open('canary', 'w') = 1",
    "dict(a=1)[open('canary', 'w')] = 1",
    "x = {**open('canary', 'w')}",
    "x = [*open('canary', 'w')]",
    "assert open('canary', 'w')",
    "print(open('canary', 'w'))",
    "dict = open\ndict('canary', 'w')",
    "int = open\nx = int('canary', 'w')",
    "def dict(*a, **k): open('canary', 'w')\nx = dict(a=1)",
    "x = int.__class__.__base__.__subclasses__()",
    "x = ''.__class__.__mro__[1].__subclasses__()",
    "raise SystemExit(open('canary', 'w'))",
    "import this_module_does_not_exist",
]


@pytest.mark.parametrize("text", CANARIES)
def test_nothing_is_ever_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = read(text)
    assert list(tmp_path.iterdir()) == []
    assert all(not callable(found) for found in names.values())


def test_the_canaries_sing_when_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec("from pathlib import Path\nx = dict(type=Path('canary').touch())")  # noqa: S102
    assert (tmp_path / "canary").exists()


def test_a_rebound_builtin_is_not_the_builtin() -> None:
    assert isinstance(value("dict(a=1)", "def dict(**k): return 3"), Unknown)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x = (", "config.py:1"),
        ("a = 1\nb = = 2", "config.py:2"),
        ("a = 1\n  b = 2", "config.py:2"),
        ("x = '\0'", "config.py"),
        ("x = '\ud800'", "config.py"),
        ("x = " + "(" * 500, "config.py:1"),
        ("x = " + "9" * 5000, "config.py"),
        ("x = " + "-" * 50_000 + "1", "config.py"),
        ("x = " + "0," * 300_000, "config.py"),
        ("x = '" + "a" * (4 << 20) + "'", "config.py"),
        ("if a: pass\n" + "elif b: pass\n" * 20_000, "config.py"),
        ("PK\3\4", "config.py:1"),
        ("x = '" + "a" * 900_000 + "'\n" + "y = x + 'b'\n" * 5000, "config.py"),
        ("x = [0]\n" + "x = x + x\n" * 19 + "y = x + [0]\n" * 5000, "config.py"),
        (
            "def f(): " + ", ".join(f"a{i}" for i in range(9000)) + "\n" + "foo()\n" * 500,
            "config.py",
        ),
        ("import a\n" + "a = a.b\n" * 5000, "config.py"),
    ],
)
def test_hostile_texts_are_refused(text: str, place: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(text)
    assert caught.value.faults[0].where.startswith(place)


@pytest.mark.parametrize(
    "text",
    [
        "x = [0]\ndef f(): " + "x, " * 9000 + "x\n" + "foo()\n" * 500,
        "x = [" + "[], " * 9000 + "]\n" + "foo(x)\n" * 500,
        "x = ([0], " + "(), " * 9000 + ")\n" + "foo(x)\n" * 500,
    ],
)
def test_code_that_mentions_much_again_and_again_is_read(text: str) -> None:
    """What each line may change is known from the line before: no work for the limit."""
    found = read(text)["x"]
    assert isinstance(found[0] if isinstance(found, tuple) else found, Unknown)


@pytest.mark.parametrize("chain", ["+0", ".b", "[0]", " if 1 else 0"])
def test_chains_are_read_or_refused(chain: str) -> None:
    assert value("1" + "+0" * 100) == 1
    with pytest.raises(CheckpointError, match=r"config\.py"):
        read("x = a" + chain * 50_000)


@pytest.mark.parametrize(
    "text",
    [
        "x = [1]\n" + "x = [x, x]\n" * 50,  # 2 ** 50 leaves, 50 lists
        "x = 0\n" + "x = [x]\n" * 5000,
        "x = []\nx += [x]",
        "x = 'a'\n" + "x += x\n" * 100,
        "x = [1]\n" + "x += x\n" * 100,
        "x = 3\n" + "x = x ** x\n" * 20,
        "x = " + "[" * 150 + "]" * 150,
    ],
)
def test_values_stay_small(text: str) -> None:
    found: Value = read(text)["x"]
    depth = 0
    while isinstance(found, (list, Table)) and found:
        found = next(iter(found.values())) if isinstance(found, Table) else found[0]
        depth += 1
    assert depth <= 64
    assert not isinstance(found, (str, list)) or len(found) <= 1_000_000


def test_invalid_escapes_are_no_warnings() -> None:
    assert value(r"'C:\data'") == "C:\\data"


# Small, and no powers of powers: Python must be able to compute what we refuse to.
NUMBERS = st.integers(-4, 4) | st.sampled_from([0.5, 2.0, -1.5])
ATOMS = NUMBERS.map(repr) | st.sampled_from(["'ab'", "''", "[1, 2]", "(3,)", "None", "True", "v"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(
            inner,
            st.sampled_from(
                [*"+ - * / // % == != < <= > >= in and or".split(), "not in", "is not"]
            ),
            inner,
        ).map(lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"({p[0]}) if ({p[1]}) else ({p[2]})"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(inner, inner).map(lambda p: f"[*({p[0]}), {p[1]}]"),
        inner.map(lambda text: f"({text}) ** 2"),
        inner.map(lambda text: f"2 ** ({text}) if ({text}) in (1, 2, -3) else 0.5"),
        inner.map(lambda text: f"int({text})"),
        inner.map(lambda text: f"not ({text})"),
        inner.map(lambda text: f"-({text})"),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(EXPRESSIONS)
def test_what_is_read_is_what_python_computes(expression: str) -> None:
    found = value(expression, "v = [7, 'x']")
    # The text was made above, of numbers, short literals and operators.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `0[0]` in a branch that is not taken
        try:
            expected = eval(expression, {"v": [7, "x"]})  # noqa: S307
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return  # such a config never trained anything
    assert isinstance(found, Unknown) or repr(found) == repr(expected)


BASE = """
from a.b import C as D
with read_base():
    from .base import model
for i in [1, 2]:
    x = {'k': [i, *range(3)]}
def f(a, *b, **c):
    return a
cfg = dict(type=D.e, r=int(2 ** 3), t=('a', f'{1}b'), u=None)
cfg.update(z=[1][0])
cfg['y'] += 1
if cfg: del cfg['z']
"""


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, len(BASE)), st.integers(0, 4), st.text(max_size=3)), max_size=6
    )
)
def test_any_mutation_is_read_or_refused(cuts: list[tuple[int, int, str]]) -> None:
    text = BASE
    for place, length, new in cuts:
        text = text[:place] + new + text[place + length :]
    _read_or_refuse(text)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab01.,:;=+-*/%()[]{}'\"\\\n \t#@f\0é"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    _read_or_refuse(text)


def _read_or_refuse(text: str) -> None:
    try:
        names = read(text)
    except CheckpointError as error:
        assert error.faults[0].where.startswith("config.py")
    else:
        assert all(isinstance(name, str) for name in names)


@pytest.mark.parametrize("expression", ["1e999", "-1e999", "1e999 - 1e999", "[1e308 * 10]"])
def test_a_number_that_json_cannot_hold_is_unknown(expression: str) -> None:
    found = value(expression)
    assert isinstance(found[0] if isinstance(found, list) else found, Unknown)


def test_the_text_of_an_expression_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each of its levels would take minutes for a dict of the largest size."""
    made: list[ast.AST] = []
    unparse = ast.unparse
    monkeypatch.setattr(ast, "unparse", lambda node: made.append(node) or unparse(node))
    found = read("x = {1: 2}" + ".b" * 100)["x"]
    assert isinstance(found, Unknown) and found.reason == "`{1: 2}.b` is not read"
    assert len(made) == 1

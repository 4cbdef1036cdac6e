"""An XTuner config that may be published: without paths, data, hosts, people and secrets."""

from __future__ import annotations

import ast
import re
import warnings

from xtuner2llava.errors import CheckpointError
from xtuner2llava.planning.published import published_name

LEFT_OUT = "(left out)"
_HEAD = (
    "# The XTuner config of the training, as xtuner2llava read it. Comments, paths, hosts and\n"
    "# secrets are left out.\n"
)
# Names of models, which say what was trained.
_MODELS = re.compile(r"(^|_)name_or_path$")
_PRIVATE = re.compile(
    r"(^|_)(root|dirs?|paths?|folders?|files?|from|resume|pth|prefix|url|uri|hosts?|hostname|addr|"
    r"address|ip|port|user|username|email|author|entity|project|api_?key|key|token|password|"
    r"secret|credentials?)$",
    re.IGNORECASE,
)
# Tokens of a tokenizer, and not of an account; how a path is called that belongs to no machine.
_HARMLESS = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|image)_token$")
# One word with a slash; words such as `[/INST]` are none.
_PATH = re.compile(r"~?[\w.@+-]*([/\\]+[\w.@+ -]*)+")
_INSIDE = re.compile(
    r"(?<![\w/.:~<-])(?:~?(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\{1,2}[\w.@+\\-]+)|\w+://\S+|"
    r"\b\d{1,3}(?:\.\d{1,3}){3}\b|[\w.+-]+@[\w-]+\.[\w.-]+|"
    r"\b(?:hf_|sk-|ghp_|github_pat_)[\w-]{16,}"
)


def published_config(text: str, where: str) -> str:
    """The Python of `text` with every string that tells of a machine or of data left out.

    Hub ids of models stay. Nothing of it is run. Raises `CheckpointError` if it is no Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
            return f"{_HEAD}{ast.unparse(_Scrub().visit(tree))}\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"cannot be published ({type(error).__name__}: it is no plain Python)",
            where=where,
            advice="Leave --include-xtuner-config out.",
        ) from error


class _Scrub(ast.NodeTransformer):
    """Replaces strings, knowing under which name each stands."""

    def __init__(self) -> None:
        self._name = ""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target = node.targets[0]
        node.value = self._under(target.id if isinstance(target, ast.Name) else "", node.value)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        node.value = self._under(node.arg or "", node.value)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        node.values = [
            self._under(
                str(key.value) if isinstance(key, ast.Constant) else self._name,
                value,
            )
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            return ast.copy_location(ast.Constant(self._published(node.value)), node)
        if isinstance(node.value, bytes):
            return ast.copy_location(ast.Constant(LEFT_OUT), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.copy_location(ast.Constant(LEFT_OUT), node)

    def _under(self, name: str, value: ast.expr) -> ast.expr:
        outer, self._name = self._name, name
        try:
            visited = self.visit(value)
        finally:
            self._name = outer
        assert isinstance(visited, ast.expr)  # noqa: S101 - expressions become expressions
        return visited

    def _published(self, text: str) -> str:
        if _MODELS.search(self._name):
            return published_name(text)
        private = _PRIVATE.search(self._name) and not _HARMLESS.search(self._name)
        if private or (_PATH.fullmatch(text) and ("/" in text or "\\" in text)):
            return LEFT_OUT
        return _INSIDE.sub(LEFT_OUT, text)

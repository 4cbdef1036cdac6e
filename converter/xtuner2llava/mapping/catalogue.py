"""The mappings that are shipped, each read when it is asked for, and files of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from threading import RLock
from typing import Any, Generic, TypeVar

from xtuner2llava.errors import ConversionError, Fault, MappingError
from xtuner2llava.mapping.detect import Match, Refusals, choose
from xtuner2llava.mapping.family import Family, PromptTemplate, read_family
from xtuner2llava.mapping.format import Format, read_format
from xtuner2llava.mapping.names import advice_for
from xtuner2llava.mapping.plain_class import PlainClass, read_class
from xtuner2llava.mapping.schema import ABSENT, Reader
from xtuner2llava.mapping.yaml import MAX_BYTES, Document, read_document

_T = TypeVar("_T")
_VOCABULARY = "vocab_size"


class Catalogue:
    """Families, formats and classes by name, in a folder that has one folder for each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.families = _Shelf(folder / "families", "family", self._read_family)
        self.formats = _Shelf(folder / "formats", "format", self._read_format)
        self.classes = _Shelf(folder / "classes", "class", read_class)
        self._shelves: tuple[_Shelf[Any], ...] = (self.families, self.formats, self.classes)

    @classmethod
    @cache
    def shipped(cls) -> Catalogue:
        """The mappings of the installed package, or of the checkout that it runs from.

        The same one each time: each of its files is parsed once in a process.
        """
        installed = Path(str(files("xtuner2llava"))) / "mappings"
        if installed.is_dir():
            return cls(installed)
        return cls(Path(__file__).resolve().parents[3] / "mappings")

    def with_family_file(self, path: Path) -> Family:
        """The family of the user's own file, which may extend a shipped one.

        Its results are exact if the file is right. Raises `MappingError` with all its faults.
        """
        return replace(self._read_family(_read(path)), if_right=path.name)

    def detect(self, config: Mapping[str, object], names: Collection[str] | None) -> Family:
        """The shipped family of an LLM with this config and these tensor names.

        `names` are those of the whole LLM, without a prefix such as `llm.`; None where they are not
        known yet, and the config decides alone. Raises `MappingError` that says what was seen,
        which families came near, and what to do; `UnsupportedError` with the reason for an LLM
        that is known to become nothing exactly.
        """
        self.refusals.check(config, names)
        return self.families[choose(self._matches, config, names)]

    def text_of(self, name: str) -> str:
        """The YAML of the shipped family, format or class `name`, in this order.

        A class that is called as its family is has its folder's name before its own, as in errors:
        `classes/llama`.
        """
        paths = [shelf.path(one) for shelf in self._shelves for one in shelf]
        short = {path.stem: path for path in reversed(paths)}
        known = {p.stem if short[p.stem] is p else f"{p.parent.name}/{p.stem}": p for p in paths}
        named = {f"{path.parent.name}/{path.stem}": path for path in paths} | known
        if path := named.get(name.removesuffix(".yaml")):
            return path.read_text(encoding="utf-8")
        advice = advice_for(name, named, f"Known: {', '.join(known)}.")
        raise MappingError(f"there is no mapping `{name}`", advice=advice)

    @cached_property
    def prompt_templates(self) -> Mapping[str, PromptTemplate]:
        """XTuner's prompt templates by name."""
        path = self._folder / "prompt_templates.yaml"
        if not path.is_file():
            return {}
        reader = Reader(_read(path))
        table = reader.document.table
        found = {
            name: reader.bind(PromptTemplate, node, "a prompt template", name=name)
            for name, node in reader.table(table.get("templates", ABSENT), "`templates`").items()
        }
        reader.finish()
        return found

    @property
    def stop_words(self) -> Mapping[str, tuple[str, ...]]:
        """The words with which XTuner's prompt templates end a turn, by the template's name."""
        found = self.prompt_templates.items()
        return {name: one.stop_words for name, one in found if one.stop_words}

    @cached_property
    def refusals(self) -> Refusals:
        """LLMs and classes that are known to have no exact target."""
        path = self._folder / "refusals.yaml"
        if not path.is_file():
            return Refusals()
        reader = Reader(_read(path))
        found = reader.root(Refusals, "this file")
        reader.finish()
        return found

    def check(self, path: Path) -> list[Fault]:
        """All faults of a family, format or class file; none if it is right."""
        try:
            document = _read(path)
            found = [shelf for shelf in self._shelves if shelf.kind in document.table]
            if len(found) != 1:
                raise MappingError(
                    f"says {' and '.join(shelf.kind for shelf in found) or 'nothing'} of family, "
                    "format and class; it is one of them",
                    where=document.where(document.line),
                    advice="Begin it with `schema: 1` and, say, `family: NAME`.",
                )
            found[0].parse(document)
        except ConversionError as error:
            return list(error.faults)
        return []

    @cached_property
    def _matches(self) -> dict[str, Match]:
        """What each family says about which LLMs it is for; the rest of it is not bound yet."""
        found = {}
        for name in self.families:
            reader = Reader(self.families.document(name))
            node = reader.document.table.get("match", ABSENT)
            found[name] = reader.bind(Match, node, "`match`")
            reader.finish()
        return found

    def _read_family(self, document: Document) -> Family:
        find = (self.families.__getitem__, self._llm_class)
        return read_family(document, *find, self.prompt_templates)

    def _llm_class(self, name: str) -> PlainClass:
        """The class `name` if it has a vocabulary, as that of a vision tower does not."""
        if name in self.classes and _VOCABULARY in self.classes[name].known:
            return self.classes[name]
        known = [one for one, found in self.classes.items() if _VOCABULARY in found.known]
        advice = advice_for(name, known, f"Known: {', '.join(known)}.")
        raise MappingError(f"there is no LLM class `{name}`", advice=advice)

    def _read_format(self, document: Document) -> Format:
        return read_format(document, self.refusals.formats)


class _Shelf(Mapping[str, _T], Generic[_T]):
    """The files of one kind, each parsed once, when it is first looked up.

    Looking up what is not there raises `MappingError`, not KeyError: the names are the user's.
    """

    def __init__(self, folder: Path, kind: str, parse: Callable[[Document], _T]) -> None:
        self.kind, self.parse = kind, parse
        self._paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        self._documents: dict[str, Document] = {}
        self._parsed: dict[str, _T] = {}
        self._parsing: list[str] = []
        # Of two threads, one waits: what the other parses does not extend itself.
        self._lock = RLock()

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def path(self, name: str) -> Path:
        if name not in self._paths:
            advice = advice_for(name, self, f"Known: {', '.join(self)}.")
            raise MappingError(f"there is no {self.kind} `{name}`", advice=advice)
        return self._paths[name]

    def document(self, name: str) -> Document:
        if name not in self._documents:
            path = self.path(name)
            self._documents[name] = _read(path, f"{path.parent.name}/{path.name}")
        return self._documents[name]

    def __getitem__(self, name: str) -> _T:
        with self._lock:
            if name in self._parsing:
                chain = " extends ".join([*self._parsing, name])
                raise MappingError(f"extends itself: {chain}")
            if name not in self._parsed:
                document = self.document(name)
                self._parsing.append(name)
                try:
                    self._parsed[name] = self.parse(document)
                finally:
                    self._parsing.pop()
            return self._parsed[name]


def _read(path: Path, name: str = "") -> Document:
    """The document in the file at `path`; at most a byte more than is allowed is read."""
    try:
        if not path.is_file():
            raise MappingError("is not a file", where=str(path))
        with path.open("rb") as file:
            return read_document(file.read(MAX_BYTES + 1), name or path.name)
    except OSError as error:
        raise MappingError(f"cannot be read ({error.strerror})", where=str(path)) from error

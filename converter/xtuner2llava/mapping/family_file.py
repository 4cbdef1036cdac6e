"""Family files read, and merged with the family that they extend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xtuner2llava.errors import Fault
from xtuner2llava.mapping.caveat import read_caveats
from xtuner2llava.mapping.config_rules import ConfigRules, read_config_rules
from xtuner2llava.mapping.detection import Match, read_match
from xtuner2llava.mapping.family import Chat, Family, Generation
from xtuner2llava.mapping.names import nearest
from xtuner2llava.mapping.plain_class import MappingFile, PlainClass
from xtuner2llava.mapping.requirement import read_requirements
from xtuner2llava.mapping.rules import RuleSet, read_rules
from xtuner2llava.mapping.schema import Reader
from xtuner2llava.mapping.yaml import Document, Node

_KEYS = (
    "extends",
    "becomes",
    "match",
    "dims",
    "tensors",
    "config",
    "tokenizer",
    "generation",
    "chat",
    "caveats",
)
_CONFIG_KEYS = ("default", "require", "keep", "derive", "set")
_TOKENIZER_KEYS = ("class", "convert", "files", "special_tokens")


def read_match_only(document: Document) -> Match:
    """What a family file says about which LLMs it is for, without looking at the rest of it."""
    reader = Reader(document)
    match = read_match(reader, reader.table(document.root.entries.get("match"), "`match`"))
    reader.finish()
    return match


def read_family(
    document: Document,
    find_family: Callable[[str], Family],
    find_class: Callable[[str], PlainClass],
) -> Family:
    """The family that a file describes; `find_…` load what it names, or raise `MappingError`.

    Of a family that it extends it takes every table, and puts its own entries over them; `match`
    is its own, since two families that match the same LLM would be none. Raises `MappingError`
    with all faults of the file.
    """
    reader = Reader(document)
    root = reader.root("family", _KEYS)
    entries = root.entries
    name = reader.text(reader.required(root, "family", "a family"), "`family`")
    parent = reader.found(root, "extends", find_family)
    plain = reader.found(root, "becomes", find_class)
    if not {"becomes", "extends"} & entries.keys():
        reader.required(root, "becomes", "a family")
    config = reader.table(entries.get("config"), "`config`")
    reader.keys(config, _CONFIG_KEYS, "`config`")
    tokenizer = reader.table(entries.get("tokenizer"), "`tokenizer`")
    reader.keys(tokenizer, _TOKENIZER_KEYS, "`tokenizer`")
    family = Family(
        name=name,
        becomes=plain or (parent.becomes if parent else _NO_CLASS),
        match=read_match(reader, reader.table(entries.get("match"), "`match`")),
        dims=dict(reader.formulas(entries.get("dims"), "`dims`")),
        rules=RuleSet(read_rules(reader, entries.get("tensors"))),
        config=read_config_rules(reader, config),
        requirements=read_requirements(reader, config.entries.get("require")),
        tokenizer={key: reader.constant(node) for key, node in tokenizer.entries.items()},
        generation=_generation(reader, entries.get("generation")),
        chat=_chat(reader, entries.get("chat")),
        caveats=read_caveats(reader, entries.get("caveats")),
        files=(MappingFile(document.name, document.sha256),),
        names_read=frozenset(),
    )
    family = replace(family, names_read=frozenset(reader.names_read))
    if parent is not None:
        family = _over(parent, family)
    elif "extends" not in entries:
        reader.required(root, "tensors", "a family")
    if family.becomes is not _NO_CLASS:
        line = root.lines.get("config", root.line)
        _check_keys(reader, line, family.config, family.becomes)
    reader.finish()
    return replace(family, files=(*family.files, family.becomes.file))


# Stands in for a class that could not be found, until the fault is raised.
_NO_CLASS = PlainClass("", "", "", (), {}, {}, (), (), {}, {}, (), MappingFile("", ""))


def _over(parent: Family, child: Family) -> Family:
    """`child` with the tables of `parent` under its own."""
    generation, chat = child.generation, child.chat
    return replace(
        child,
        becomes=parent.becomes if child.becomes is _NO_CLASS else child.becomes,
        dims={**parent.dims, **child.dims},
        rules=RuleSet(child.rules.entries, parent.rules),
        config=parent.config.under(child.config),
        requirements=(*parent.requirements, *child.requirements),
        tokenizer={**parent.tokenizer, **child.tokenizer},
        generation=Generation(
            generation.bos or parent.generation.bos,
            generation.eos or parent.generation.eos,
            generation.pad or parent.generation.pad,
        ),
        chat=Chat(chat.template or parent.chat.template, chat.stop_words or parent.chat.stop_words),
        caveats=(*parent.caveats, *child.caveats),
        # The last of a family's files is its class, which comes last again.
        files=(*child.files, *parent.files[:-1]),
        names_read=child.names_read | parent.names_read,
    )


def _generation(reader: Reader, node: Node | None) -> Generation:
    table = reader.table(node, "`generation`")
    reader.keys(table, ("bos", "eos", "pad"), "`generation`")
    entries = table.entries
    return Generation(
        reader.text(entries.get("bos"), "`bos`") or None,
        reader.texts(entries.get("eos"), "`eos`"),
        reader.text(entries.get("pad"), "`pad`") or None,
    )


def _chat(reader: Reader, node: Node | None) -> Chat:
    table = reader.table(node, "`chat`")
    reader.keys(table, ("template", "stop_words"), "`chat`")
    entries = table.entries
    return Chat(
        reader.text(entries.get("template"), "`template`") or None,
        reader.texts(entries.get("stop_words"), "`stop_words`"),
    )


def _check_keys(reader: Reader, line: int, rules: ConfigRules, plain: PlainClass) -> None:
    """Faults for keys that the class does not have, and for those it needs and nothing makes."""
    known = (*plain.keys, *plain.checked)
    for name, key in rules.keys.items():
        if name not in known:
            near = nearest(name, known)
            advice = f"Did you mean `{near}`?" if near else f"It has: {', '.join(known)}."
            what = f"`{name}` is no config key of {plain.architecture} in transformers 4.37"
            reader.faults.append(Fault(key.where, what, advice))
    lacking = [key for key in plain.required if key not in rules.keys]
    if lacking and not rules.keep_all:
        listed = ", ".join(f"`{key}`" for key in lacking)
        what = f"`config` does not make {listed}, which {plain.architecture} needs"
        reader.fault(line, what, "Say it with `keep`, `derive` or `set`.")

"""The chat template of transformers that says what XTuner's prompt template said in training.

XTuner puts a turn's input into the instruction, the answer after it, and encodes each by itself;
the bos token comes before a turn, and the eos token after an answer, unless the template's suffix
takes its place (InternLM/xtuner `xtuner/dataset/map_fns/template_map_fn.py`,
`xtuner/dataset/utils.py`, encode_fn). An image comes first in its turn, and a line feed after it
(`dataset_map_fns/llava_map_fn.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from dataclasses import dataclass
from string import Formatter

from xtuner2llava.mapping import PromptTemplate
from xtuner2llava.tokenizers import PrefixSpace

IMAGE = "<image>"


@dataclass(frozen=True, slots=True)
class Marks:
    """What the tokenizer adds to a text, and what it finds whole in one.

    `bos` and `eos` are the tokens of training; `specials` has all tokens that are found whole.
    """

    bos: str | None
    eos: str | None
    prefix: PrefixSpace | None
    specials: Set[str] = frozenset()


def prompt_text(template: PromptTemplate, text: str) -> str | None:
    """One turn with an image and `text`, without the bos token; None if the template has no input.

    The end is where the answer begins.
    """
    parts = _parts(template.instruction, "input")
    if parts is None:
        return None
    fields = {"input": f"{IMAGE}\n{text}", "round": "1"}
    return "".join(fields[part.field] if part.field else part.text for part in parts)


def chat_template(template: PromptTemplate, marks: Marks) -> str | None:
    """The Jinja template; None where the prompt template has no place for the input.

    Contents may be texts or lists with texts and images. There is no system text unless the
    conversation has some. Roles are system, user and assistant.
    """
    parts = _parts(template.instruction, "input")
    system = _parts(template.system or "{system}", "system")
    if parts is None or system is None:
        return None
    return "".join(line.strip() for line in _Writer(template, marks).lines(parts, system))


@dataclass(frozen=True, slots=True)
class _Part:
    """A literal text of a template, or the place of a field."""

    text: str
    field: str | None = None


def _parts(text: str, field: str) -> list[_Part] | None:
    """`text` as `str.format` reads it; None unless it has `field` once, and at most the round."""
    parts: list[_Part] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(text):
            parts += [_Part(literal)] if literal else []
            if name is not None:
                parts.append(_Part("", name))
            if spec or conversion:
                return None
    except ValueError:
        return None
    fields = [part.field for part in parts if part.field is not None]
    return parts if fields.count(field) == 1 and {*fields} <= {field, "round"} else None


class _Writer:
    def __init__(self, template: PromptTemplate, marks: Marks) -> None:
        self._template, self._marks = template, marks

    def lines(self, parts: list[_Part], system: list[_Part]) -> Iterator[str]:
        """The template's lines, which have no space of their own at either end."""
        template, marks = self._template, self._marks
        bos = marks.bos or ""
        # What stands before a turn's first piece.
        follows = bos if not template.suffix_as_eos and bos else template.sep or self._turn_end
        yield "{%- set ns = namespace(turn=0, system='', input='', text='') -%}"
        yield "{%- for message in messages -%}"
        yield from _CONTENT
        yield "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.text -%}"
        yield "{%- elif message['role'] == 'user' -%}"
        yield from _IMAGE_FIRST
        yield "{%- set ns.input = ns.input + ns.text -%}"
        yield "{%- if loop.last or loop.nextitem['role'] != 'user' -%}"
        yield "{%- set ns.turn = ns.turn + 1 -%}"
        again = "" if template.suffix_as_eos else _text(bos)
        yield f"{{%- if ns.turn == 1 -%}}{_text(bos)}"
        yield "{%- if ns.system -%}"
        yield self._lead_of(system[0], "ns.system", bos)
        for part in system:
            yield "{{- ns.system -}}" if part.field else _text(part.text)
        yield f"{{%- else -%}}{self._lead_of(parts[0], 'ns.input', bos)}{{%- endif -%}}"
        yield f"{{%- else -%}}{again}"
        yield f"{self._lead_of(parts[0], 'ns.input', follows)}{{%- endif -%}}"
        yield from self._turn(parts)
        yield "{%- set ns.input = '' -%}{%- endif -%}"
        yield "{%- elif message['role'] == 'assistant' -%}"
        yield from self._answer(parts[-1].text)
        yield "{%- else -%}{{ raise_exception('The roles are system, user and assistant') }}"
        yield "{%- endif -%}{%- endfor -%}"

    def _turn(self, parts: list[_Part]) -> Iterator[str]:
        for index, part in enumerate(parts):
            if part.field == "round":
                yield "{{- ns.turn -}}"
            elif part.field is None:
                yield _text(part.text)
            else:
                after = parts[index + 1].text if index + 1 < len(parts) else ""
                line_feed, tail = self._lead("\n", IMAGE), self._lead(after, IMAGE)
                old, new = _quoted(f"{IMAGE}\n"), _quoted(f"{IMAGE}{line_feed}\n")
                yield f"{{{{- ns.input{f'.replace({old}, {new})' if line_feed else ''} -}}}}"
                if tail:
                    yield f"{{%- if ns.input.endswith({_quoted(IMAGE)}) -%}}"
                    yield f"{_text(tail)}{{%- endif -%}}"

    def _answer(self, instruction_end: str) -> Iterator[str]:
        template = self._template
        yield self._lead_of(_Part("", "text"), "ns.text", instruction_end)
        alone = _text(self._lead(template.suffix, instruction_end))
        yield f"{{%- if not ns.text -%}}{alone}{{%- endif -%}}" if alone else ""
        yield "{{- ns.text -}}" + _text(template.suffix)
        yield _text("" if template.suffix_as_eos else self._marks.eos or "")
        yield _text(self._lead(template.sep, self._turn_end) + template.sep)

    @property
    def _turn_end(self) -> str:
        """What an answer ends with."""
        if self._template.suffix_as_eos:
            return self._template.suffix
        return self._marks.eos or self._template.suffix

    def _lead_of(self, part: _Part, value: str, before: str) -> str:
        """Jinja that writes the space before a piece, which begins with `part` or with `value`."""
        if part.field is None:
            return _text(self._lead(part.text, before))
        if not self._lead("piece", before):
            return ""
        doubled = self._marks.prefix is not None and self._marks.prefix.doubled
        known = value if doubled else f"{value} and not {value}.startswith(' ')"
        return f"{{%- if {known} -%}}{_text(' ')}{{%- endif -%}}"

    def _lead(self, piece: str, before: str) -> str:
        """The space to write before `piece`, which XTuner encodes by itself, after `before`."""
        prefix = self._marks.prefix
        if prefix is None or not piece or self._starts_special(piece):
            return ""
        added_by_itself = not before or (prefix.everywhere and self._ends_special(before))
        return "" if added_by_itself or (piece.startswith(" ") and not prefix.doubled) else " "

    def _starts_special(self, text: str) -> bool:
        return any(text.startswith(token) for token in self._marks.specials)

    def _ends_special(self, text: str) -> bool:
        return text == IMAGE or any(text.endswith(token) for token in self._marks.specials)


# A message's content as one text, with <image> where its images are.
_CONTENT = (
    "{%- set ns.text = '' -%}",
    "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}",
    "{%- else -%}{%- for item in message['content'] -%}",
    "{%- if item['type'] == 'text' -%}{%- set ns.text = ns.text + item['text'] -%}",
    f"{{%- else -%}}{{%- set ns.text = ns.text + '{IMAGE}' -%}}{{%- endif -%}}",
    "{%- endfor -%}{%- endif -%}",
)
# As llava_map_fn does it: images first, each with a line feed, and no space around the rest.
_IMAGE_FIRST = (
    f"{{%- if '{IMAGE}' in ns.text -%}}",
    f"{{%- set ns.text = ('{IMAGE}\\n' * (ns.text.split('{IMAGE}') | length - 1)",
    f" + ns.text.replace('{IMAGE}', '') | trim) | trim -%}}{{%- endif -%}}",
)


def _quoted(text: str) -> str:
    """A string of Jinja, which reads escapes as Python does."""
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> str:
    return f"{{{{- {_quoted(text)} -}}}}" if text else ""

"""The chat template of transformers that says what XTuner's prompt template said in training.

XTuner puts a turn's input into the instruction, the answer after it, and encodes each by itself;
the bos token comes before a turn, and the eos token after an answer, unless the template's suffix
takes its place (InternLM/xtuner `xtuner/dataset/map_fns/template_map_fn.py`,
`xtuner/dataset/utils.py`, encode_fn). An image comes first in its turn, and a line feed after it
(`dataset_map_fns/llava_map_fn.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from string import Formatter

from xtuner2llava.mapping.family import PromptTemplate
from xtuner2llava.tokenizers.prefix import PrefixSpace

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

    def lead(self, piece: str, before: str) -> str:
        """The space to write before `piece`, which XTuner encodes by itself, after `before`."""
        prefix, specials = self.prefix, tuple(self.specials)
        if prefix is None or not piece or piece.startswith(specials):
            return ""
        ends_special = before == IMAGE or before.endswith(specials)
        added_by_itself = not before or (prefix.everywhere and ends_special)
        return "" if added_by_itself or (piece.startswith(" ") and not prefix.doubled) else " "

    def lead_of(self, part: _Part, value: str, before: str) -> str:
        """Jinja that writes the space before a piece, which begins with `part` or with `value`."""
        if part.field is None:
            return _text(self.lead(part.text, before))
        if not self.lead("piece", before):
            return ""
        doubled = self.prefix is not None and self.prefix.doubled
        without = [*sorted(self.specials), *([] if doubled else [" "])]
        known = "".join(f" and not {value}.startswith({_quoted(text)})" for text in without)
        return f"{{%- if {value}{known} -%}}{_text(' ')}{{%- endif -%}}"


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
    turn = _parts(template.instruction, "input")
    system = _parts(template.system or "{system}", "system")
    if turn is None or system is None:
        return None
    bos, end = marks.bos or "", template.suffix if template.suffix_as_eos else marks.eos
    end = end or template.suffix  # What an answer ends with.
    # What stands before a turn's first piece.
    follows = bos if not template.suffix_as_eos and bos else template.sep or end
    written = {
        "BOS": _text(bos),
        "BOS AGAIN": "" if template.suffix_as_eos else _text(bos),
        "SYSTEM": marks.lead_of(system[0], "ns.system", bos)
        + "".join("{{- ns.system -}}" if part.field else _text(part.text) for part in system),
        "LEAD OF THE FIRST": marks.lead_of(turn[0], "ns.input", bos),
        "LEAD": marks.lead_of(turn[0], "ns.input", follows),
        "TURN": "".join(_turn(turn, marks)),
        "LEAD OF THE ANSWER": marks.lead_of(_Part("", "text"), "ns.text", turn[-1].text),
        "LEAD OF NO ANSWER": _text(marks.lead(template.suffix, turn[-1].text)),
        "SUFFIX": _text(template.suffix),
        "EOS": "" if template.suffix_as_eos else _text(marks.eos or ""),
        "SEPARATOR": _text(marks.lead(template.sep, end) + template.sep),
    }
    text = "".join(line.strip() for line in _TEMPLATE.splitlines())
    text = re.sub(r"<([A-Z ]+)>", lambda found: written[found[1]], text)
    return text.replace("{%- if not ns.text -%}{%- endif -%}", "")


# A message's content becomes one text, with <image> where its images are. As llava_map_fn does it,
# images come first, each with a line feed, and there is no space around the rest.
_TEMPLATE = """\
{%- set ns = namespace(turn=0, system='', input='', text='') -%}
{%- for message in messages -%}
    {%- set ns.text = '' -%}
    {%- if message['content'] is string -%}
        {%- set ns.text = message['content'] -%}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {%- set ns.text = ns.text + item['text'] -%}
            {%- else -%}
                {%- set ns.text = ns.text + '<image>' -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = ns.text -%}
    {%- elif message['role'] == 'user' -%}
        {%- if '<image>' in ns.text -%}
            {%- set ns.text = ('<image>\\n' * (ns.text.split('<image>') | length - 1)
            + ns.text.replace('<image>', '') | trim) | trim -%}
        {%- endif -%}
        {%- set ns.input = ns.input + ns.text -%}
        {%- if loop.last or loop.nextitem['role'] != 'user' -%}
            {%- set ns.turn = ns.turn + 1 -%}
            {%- if ns.turn == 1 -%}
                <BOS>
                {%- if ns.system -%}
                    <SYSTEM>
                {%- else -%}
                    <LEAD OF THE FIRST>
                {%- endif -%}
            {%- else -%}
                <BOS AGAIN>
                <LEAD>
            {%- endif -%}
            <TURN>
            {%- set ns.input = '' -%}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        <LEAD OF THE ANSWER>
        {%- if not ns.text -%}<LEAD OF NO ANSWER>{%- endif -%}
        {{- ns.text -}}
        <SUFFIX><EOS><SEPARATOR>
    {%- else -%}
        {{ raise_exception('The roles are system, user and assistant') }}
    {%- endif -%}
{%- endfor -%}
"""


def _turn(parts: list[_Part], marks: Marks) -> Iterator[str]:
    for part, following in zip(parts, [*parts[1:], _Part("")], strict=True):
        if part.field == "round":
            yield "{{- ns.turn -}}"
        elif part.field is None:
            yield _text(part.text)
        else:
            line_feed, tail = marks.lead("\n", IMAGE), marks.lead(following.text, IMAGE)
            old, new = _quoted(f"{IMAGE}\n"), _quoted(f"{IMAGE}{line_feed}\n")
            yield f"{{{{- ns.input{f'.replace({old}, {new})' if line_feed else ''} -}}}}"
            if tail:
                yield f"{{%- if ns.input.endswith({_quoted(IMAGE)}) -%}}"
                yield f"{_text(tail)}{{%- endif -%}}"


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


def _quoted(text: str) -> str:
    """A string of Jinja, which reads escapes as Python does."""
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> str:
    return f"{{{{- {_quoted(text)} -}}}}" if text else ""

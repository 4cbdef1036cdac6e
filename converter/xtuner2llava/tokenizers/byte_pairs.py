"""Byte-pair encoding: the merges of a vocabulary that has only ranks, and what merges reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from xtuner2llava.errors import CorruptFileError

# Pairs looked at, in all, four million a second: Qwen's 151,643 tokens need 4.4 million.
_MAX_STEPS = 40_000_000
_MAX_SYMBOLS = 1024


def merges(
    ranks: Mapping[str, int], tokens: Sequence[str], where: str
) -> list[tuple[str, str] | None]:
    """The two parts that each of `tokens` is merged of, or None where it never is.

    `ranks` are of all tokens of more than one symbol; the lowest is merged first, the leftmost of
    equal ones first. In any text with the token, all merges of lower rank inside it are done
    before it is made: so its parts are what the merges below its own rank leave of it, and one
    pair a token is all that is needed.

    Raises `CorruptFileError` for a vocabulary that would take longer than some ten seconds;
    `where` names its file.
    """
    found = _merged(((token, ranks[token]) for token in tokens), ranks, "", least=2)
    if found is None:
        raise CorruptFileError(
            "its tokens are so long that finding their merges would take too long",
            where=where,
            advice="Is this the tokenizer of a language model?",
        )
    return [(parts[0], parts[1]) if len(parts) == 2 else None for parts in found]


def unreachable(tokens: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """Those of `tokens` that byte-pair encoding never makes of their own text.

    `pairs` are the merges, as `left right`, first the one that is done first. Empty where it would
    take longer than some ten seconds to find out.
    """
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    found = _merged(((token, len(ranks)) for token in tokens), ranks, " ", least=1) or ()
    return [token for token, parts in zip(tokens, found, strict=False) if len(parts) > 1]


def _merged(
    tokens: Iterable[tuple[str, int]], ranks: Mapping[str, int], joint: str, least: int
) -> list[list[str]] | None:
    """What the merges below a rank leave of each token: `least` parts, or the first of more.

    `ranks` are of two neighbours with `joint` between them; the lowest is merged first. None where
    it would take longer than some ten seconds.
    """
    found: list[list[str]] = []
    steps = 0
    for token, limit in tokens:
        parts = list(token)
        if len(parts) > _MAX_SYMBOLS:
            return None
        while len(parts) > least:
            steps += len(parts)
            best, place = limit, -1
            left = parts[0]
            for index in range(1, len(parts)):
                right = parts[index]
                candidate = ranks.get(left + joint + right)
                if candidate is not None and candidate < best:
                    best, place = candidate, index
                left = right
            if place < 0:
                break
            parts[place - 1 : place + 1] = [parts[place - 1] + parts[place]]
        if steps > _MAX_STEPS:
            return None
        found.append(parts[: least + 1])
    return found

"""Merges of byte-pair encoding, found from a vocabulary that has only ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from xtuner2llava.errors import CorruptFileError

# Pairs looked at, in all, four million a second: Qwen's 151,643 tokens need 4.4 million.
_MAX_STEPS = 40_000_000
_MAX_SYMBOLS = 1024


def merges(
    ranks: Mapping[str, int], tokens: Sequence[str], where: str
) -> list[tuple[str, tuple[str, str] | None]]:
    """Each of `tokens` with the two parts that it is merged of, or None where it never is.

    `ranks` are of all tokens of more than one symbol; the lowest is merged first, the leftmost of
    equal ones first. In any text with the token, all merges of lower rank inside it are done
    before it is made: so its parts are what the merges below its own rank leave of it, and one
    pair a token is all that is needed.

    Raises `CorruptFileError` for a vocabulary that would take longer than some ten seconds;
    `where` names its file.
    """
    found: list[tuple[str, tuple[str, str] | None]] = []
    steps = 0
    for token in tokens:
        rank = ranks[token]
        parts = list(token[: _MAX_SYMBOLS + 1])
        if len(parts) > _MAX_SYMBOLS:
            steps = _MAX_STEPS + 1
        while 2 < len(parts) <= _MAX_SYMBOLS:
            steps += len(parts)
            best, place = rank, -1
            left = parts[0]
            for index in range(1, len(parts)):
                right = parts[index]
                candidate = ranks.get(left + right)
                if candidate is not None and candidate < best:
                    best, place = candidate, index
                left = right
            if place < 0:
                break
            parts[place - 1 : place + 1] = [parts[place - 1] + parts[place]]
        if steps > _MAX_STEPS:
            raise CorruptFileError(
                "its tokens are so long that finding their merges would take too long",
                where=where,
                advice="Is this the tokenizer of a language model?",
            )
        found.append((token, (parts[0], parts[1]) if len(parts) == 2 else None))
    return found


def unreachable(tokens: Sequence[str], pairs: Sequence[tuple[str, ...]]) -> list[str]:
    """Those of `tokens` that byte-pair encoding never makes of their own text.

    `pairs` are the merges, first the one that is done first. Empty where it would take longer than
    some ten seconds to find out.
    """
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    found: list[str] = []
    steps = 0
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            steps += len(parts)
            neighbours = list(pairwise(parts))
            best = min(neighbours, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks or steps > _MAX_STEPS:
                break
            place = neighbours.index(best)
            parts[place : place + 2] = ["".join(best)]
        if steps > _MAX_STEPS:
            return []
        if len(parts) > 1:
            found.append(token)
    return found

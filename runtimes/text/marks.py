"""Marks in a prompt: ``Tell me about [[the moon]].`` is the prompt ``Tell me about the moon.``, of which ``the moon`` is marked.

An adapter of positions ``marked`` edits the tokens that hold a character of what is marked. The marks are taken out before anything is
tokenized, behind the chat template where there is one, so that the model never sees them, and a prompt's tokens are those that it has
without. For other adapters ``[[`` is text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from runtimes.errors import InputError

OPEN, CLOSE = "[[", "]]"
REMEDY = f"put what is to be edited between {OPEN} and {CLOSE}, as in 'Tell me about {OPEN}the moon{CLOSE}.'"

Span = tuple[int, int]
"""The first character, or token, and the one behind the last."""


def without_marks(text: str) -> tuple[str, tuple[Span, ...]]:
    """(the text without its marks, the characters of it that were between two). Raises InputError for a text without marks, for one mark
    without the other, for marks within marks, and for nothing between two."""
    kept, spans, length, start = list[str](), list[Span](), 0, -1
    for piece in re.split(r"(\[\[|\]\])", text):
        if piece == OPEN:
            if start >= 0:
                raise InputError(f"marks stand within marks, {_seen(text)}: close the first {OPEN} with {CLOSE} before the next")
            start = length
        elif piece == CLOSE:
            if start < 0:
                raise InputError(f"{CLOSE} closes no mark, {_seen(text)}: {REMEDY}")
            if start == length:
                raise InputError(f"nothing stands between {OPEN} and {CLOSE}, {_seen(text)}: {REMEDY}")
            spans.append((start, length))
            start = -1
        else:
            kept.append(piece)
            length += len(piece)
    if start >= 0:
        raise InputError(f"{OPEN} is not closed, {_seen(text)}: {REMEDY}")
    if not spans:
        raise InputError(f"the adapter edits marked tokens (positions marked), and the prompt marks none: {REMEDY}")
    return "".join(kept), tuple(spans)


def marked_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[int, ...]:
    """The numbers of the tokens that hold a character of any of ``spans``. ``offsets``: the characters of each token, none of a special
    one. Raises InputError for a span that no token holds a character of: the tokenizer leaves it out."""
    found = set[int]()
    for start, end in spans:
        held = {number for number, (first, last) in enumerate(offsets) if first < end and start < last}
        if not held:
            raise InputError(
                f"characters {start} to {end - 1} of the prompt are marked, and the tokenizer makes no token of them: mark more"
            )
        found |= held
    return tuple(sorted(found))


def _seen(text: str) -> str:
    """Where: the text around the first mark."""
    at = min((place for mark in (OPEN, CLOSE) if (place := text.find(mark)) >= 0), default=0)
    return f"in {text[max(0, at - 20) : at + 40]!r}"

"""Which tokens an edit acts on: the positions grammar, and the rule that turns an attention mask into slots.

Grammar: ``f7+l7`` (first 7 and last 7 prompt tokens), ``f3``, ``l1``, ``prompt`` (every prompt token), ``all`` (decode steps too).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS
from runtimes.errors import InputError

LARGEST = 2**63 - 1
"""The largest count: the graph takes the rule as int64."""


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """The positions of one adapter. Exactly one of (first or last), prompt, everywhere is used.

    ``truncate``: a prompt of L tokens is edited at most on its first and last L // 2 tokens, as pyreft does, so that the two
    never overlap.
    """

    first: int = 0
    last: int = 0
    prompt: bool = False
    everywhere: bool = False
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise InputError(f"positions f{self.first}+l{self.last}: counts cannot be negative")
        if max(self.first, self.last) > LARGEST:
            raise InputError(f"positions: a count is beyond {LARGEST}, the largest that the graph's int64 inputs hold; use prompt or all")
        if bool(self.first or self.last) + self.prompt + self.everywhere != 1:
            raise InputError("positions are one of: f<n>, l<n>, f<n>+l<n>, prompt, all")

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        if self.prompt:
            return "prompt"
        return "+".join(f"{k}{n}" for k, n in (("f", self.first), ("l", self.last)) if n)

    @classmethod
    def parse(cls, text: str) -> PositionRule:
        if text == "all":
            return cls(everywhere=True)
        if text == "prompt":
            return cls(prompt=True)
        match = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", text)
        if not match or not any(match.groups()) or text.startswith("+") or text.endswith("+"):
            raise InputError(f"positions {text!r} are not understood; use f<n>, l<n>, f<n>+l<n>, prompt or all")
        if "+" not in text and all(match.groups()):
            raise InputError(f"positions {text!r} are not understood; did you mean f{match[1]}+l{match[2]}?")
        try:
            first, last = (int(digits or 0) for digits in match.groups())
        except ValueError:  # int() refuses thousands of digits
            first = last = LARGEST + 1
        return cls(first=first, last=last)

    @property
    def has_suffix(self) -> bool:
        return self.last > 0

    def tensors(self, *, tied: bool) -> dict[str, np.ndarray]:
        """The rule as the graph's overridable initializers, int64 [1] each; ``prompt_length`` is the session's and is left out."""
        values = {
            "reft.first": self.first,
            "reft.last": self.last,
            "reft.prompt": self.prompt,
            "reft.everywhere": self.everywhere,
            "reft.truncate": self.truncate,
            "reft.suffix_slot": 0 if tied else 1,
        }
        assert set(values) == set(RULE_DEFAULTS) - {PROMPT_LENGTH}
        return {name: np.array([int(value)], np.int64) for name, value in values.items()}


def slots(
    rule: PositionRule | None,
    attention_mask: np.ndarray,
    width: int,
    *,
    tied: bool = True,
    prompt_length: np.ndarray | None = None,
) -> np.ndarray:
    """int32 [B, S]: the slot of each of the ``width`` = S tokens of one call; -1 where the token is not edited.

    ``attention_mask`` [B, T] covers past and current tokens (1 real, 0 pad) and may be wider than both (a static cache).
    With S = width, end = max(last real column + 1, S), start = end - S, win = mask[:, start:end]:

        p = sum(mask) - sum(win) + cumsum(win) - 1          a token's rank among its row's real tokens
        L = prompt_length, else (sum(mask) if start == 0 else 0)
        f, l = first, last, each cut to L // 2 when ``truncate``
        slot = suffix slot if L - l <= p < L; else 0 if p < f or (prompt and p < L) or everywhere; else -1; -1 at pads

    The suffix slot is 0 when ``tied``, else 1. ``prompt_length`` [B] is needed where a prompt does not come in one call.
    Source: the design's slot rule; the same arithmetic stands in the graph (graph_passes/slots/add.py).
    """
    mask = np.asarray(attention_mask, np.int64)
    batch, columns = mask.shape
    if rule is None:
        return np.full((batch, width), -1, np.int32)
    end = max(int((mask * (np.arange(columns) + 1)).max(initial=0)), width)
    start = end - width
    window = mask[:, start:end]
    total = mask.sum(1, keepdims=True)
    p = total - window.sum(1, keepdims=True) + np.cumsum(window, 1) - 1
    if prompt_length is not None:
        length = np.asarray(prompt_length, np.int64).reshape(-1, 1)
    else:
        length = total if start == 0 else np.zeros_like(total)
    limit = length // 2 if rule.truncate else np.full_like(length, np.iinfo(np.int64).max)
    first, last = np.minimum(rule.first, limit), np.minimum(rule.last, limit)
    slot = np.where((p < first) | (rule.prompt & (p < length)) | rule.everywhere, 0, -1)
    slot = np.where((p >= length - last) & (p < length), 0 if tied else 1, slot)
    return np.where(window > 0, slot, -1).astype(np.int32)

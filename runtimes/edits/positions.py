"""Which tokens an edit acts on: the positions grammar, and the rule that turns an attention mask into slots.

Grammar: ``f7+l7`` (first 7 and last 7 prompt tokens), ``f3``, ``l1``, ``prompt`` (every prompt token), ``all`` (decode steps too).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtimes.edits.op import FIRST_SLOT, NOT_EXPLICIT, PROMPT_LENGTH, RULE_DEFAULTS
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

    def tensors(self, *, tied: bool, first_slot: int = 0) -> dict[str, np.ndarray]:
        """The rule as the graph's overridable initializers, int64 [1] each; ``prompt_length`` is the session's and is left out.

        ``first_slot``: where the adapter's edits begin in its banks. Rows of a batch have rules of their own where the tensors of
        theirs are concatenated to [B].
        """
        values = {
            "reft.first": self.first,
            "reft.last": self.last,
            "reft.prompt": self.prompt,
            "reft.everywhere": self.everywhere,
            "reft.truncate": self.truncate,
            "reft.suffix_slot": 0 if tied else 1,
            FIRST_SLOT: first_slot,
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

    ``rule`` is every row's, and ``slots_of`` says what follows from it; the suffix slot is 0 when ``tied``, else 1. ``prompt_length`` [B]
    is needed where a prompt does not come in one call.
    """
    tensors = {} if rule is None else rule.tensors(tied=tied)
    if prompt_length is not None:
        tensors[PROMPT_LENGTH] = prompt_length
    return slots_of(tensors, attention_mask, width)


def slots_of(rule: Mapping[str, np.ndarray], attention_mask: np.ndarray, width: int, *, explicit: np.ndarray | None = None) -> np.ndarray:
    """int32 [B, S]: the slots of one call by a rule in the graph's own terms.

    ``rule``: int64 [1] or [B] by name, of ``runtimes.edits.op.RULE_DEFAULTS``, which stand in for what is left out: every row may have a
    rule of its own. ``attention_mask`` [B, T] covers past and current tokens (1 real, 0 pad) and may be wider than both (a static cache).
    With S = width, end = max(last real column + 1, S), start = end - S, win = mask[:, start:end]:

        p = sum(mask) - sum(win) + cumsum(win) - 1          a token's rank among its row's real tokens
        L = prompt_length where >= 0, else (sum(mask) if start == 0 else 0)
        f, l = first, last, each cut to L // 2 where truncate
        slot = first_slot + suffix_slot if L - l <= p < L; else first_slot if p < f or (prompt and p < L) or everywhere; else -1
        slot = -1 at pads; explicit where explicit >= -1

    ``explicit``: int32, broadcast to [B, S]; see ``runtimes.edits.op.EXPLICIT_SLOTS``.
    Source: the design's slot rule; the same arithmetic stands in the graph (graph_passes/slots/add.py).
    """
    mask = np.asarray(attention_mask, np.int64)
    number = {name: np.asarray(rule.get(name, default), np.int64).reshape(-1, 1) for name, default in RULE_DEFAULTS.items()}
    end = max(int((mask * (np.arange(mask.shape[1]) + 1)).max(initial=0)), width)
    start = end - width
    window = mask[:, start:end]
    total = mask.sum(1, keepdims=True)
    p = total - window.sum(1, keepdims=True) + np.cumsum(window, 1) - 1
    derived = total if start == 0 else np.zeros_like(total)
    length = np.where(number[PROMPT_LENGTH] >= 0, number[PROMPT_LENGTH], derived)
    limit = np.where(number["reft.truncate"] > 0, length // 2, LARGEST)
    first, last = np.minimum(number["reft.first"], limit), np.minimum(number["reft.last"], limit)
    whole_prompt = (number["reft.prompt"] > 0) & (p < length)
    slot = np.where((p < first) | whole_prompt | (number["reft.everywhere"] > 0), number[FIRST_SLOT], -1)
    slot = np.where((p >= length - last) & (p < length), number[FIRST_SLOT] + number["reft.suffix_slot"], slot)
    slot = np.where(window > 0, slot, -1).astype(np.int32)
    return slot if explicit is None else np.where(explicit > NOT_EXPLICIT, explicit, slot).astype(np.int32)

"""Which tokens an edit acts on: the positions grammar, and the rule that turns an attention mask into slots.

Grammar: ``f7+l7`` (first 7 and last 7 prompt tokens), ``f3``, ``l1``, ``prompt`` (every prompt token), ``all`` (decode steps too);
``1,3,-2`` (prompt tokens by number, from 0; -1 is the prompt's last), ``every3`` (its tokens 0, 3, 6 ..) and ``marked`` (those that the
prompt itself marks, runtimes/text/marks.py). A graph computes the former itself; the latter, and several rules at once, are computed here
and handed to it as ``reft.slots``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from runtimes.edits.op import FIRST_SLOT, NOT_EXPLICIT, PROMPT_LENGTH, RULE_DEFAULTS
from runtimes.errors import InputError

LARGEST = 2**63 - 1
"""The largest count: the graph takes the rule as int64."""
MOST_RULES = 4
"""Of one adapter."""
UNMARKED = (
    "positions marked: the adapter edits the tokens that a prompt marks, and prompts have no marks here; ask it with `reft-export run` and "
    "a prompt like 'Tell me about [[the moon]].', or train one at other positions"
)
GRAMMAR = "f<n>, l<n>, f<n>+l<n>, prompt, all, numbers like 1,3,-2, every<n>, or marked"


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """One rule of positions. Exactly one of (first or last), prompt, everywhere, chosen, every, marked is used.

    ``truncate``: a prompt of L tokens is edited at most on its first and last L // 2 tokens, as pyreft does, so that the two
    never overlap.
    """

    first: int = 0
    last: int = 0
    prompt: bool = False
    everywhere: bool = False
    chosen: tuple[int, ...] = ()
    """Prompt tokens by number, from 0; negative ones from its end, -1 its last. Those that a prompt lacks are left out."""
    every: int = 0
    """The prompt's tokens 0, n, 2n .."""
    marked: bool = False
    """The tokens that each prompt marks."""
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise InputError(f"positions f{self.first}+l{self.last}: counts cannot be negative")
        if max(self.first, self.last) > LARGEST:
            raise InputError(f"positions: a count is beyond {LARGEST}, the largest that the graph's int64 inputs hold; use prompt or all")
        if any(not -LARGEST <= number <= LARGEST for number in (*self.chosen, self.every)) or self.every < 0:
            raise InputError(f"positions: numbers reach from -{LARGEST} to {LARGEST}, and every<n> counts from 1")
        if bool(self.first or self.last) + self.prompt + self.everywhere + bool(self.chosen) + bool(self.every) + self.marked != 1:
            raise InputError(f"positions are one of: {GRAMMAR}")
        object.__setattr__(self, "chosen", tuple(sorted(set(self.chosen), key=lambda number: (number < 0, number))))

    def __str__(self) -> str:
        if self.everywhere:
            return "all"
        if self.prompt:
            return "prompt"
        if self.marked:
            return "marked"
        if self.every:
            return f"every{self.every}"
        if self.chosen:
            return ",".join(map(str, self.chosen))
        return "+".join(f"{k}{n}" for k, n in (("f", self.first), ("l", self.last)) if n)

    @classmethod
    def parse(cls, text: str) -> PositionRule:
        if text == "all":
            return cls(everywhere=True)
        if text == "prompt":
            return cls(prompt=True)
        if text == "marked":
            return cls(marked=True)
        if re.fullmatch(r"-?\d{1,20}(,-?\d{1,20})*", text):
            return cls(chosen=tuple(map(int, text.split(","))))
        if re.fullmatch(r"every\d{1,20}", text) and int(text[5:]):
            return cls(every=int(text[5:]))
        match = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", text)
        if not match or not any(match.groups()) or text.startswith("+") or text.endswith("+"):
            raise InputError(f"positions {text!r} are not understood; use {GRAMMAR}")
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

    @property
    def explicit(self) -> bool:
        """Whether no graph computes it, so that its slots are handed in at every step."""
        return bool(self.chosen or self.every or self.marked)

    def groups(self, *, tied: bool) -> tuple[str, ...]:
        """What its slots are called, in order: one edit, or untied a prefix's and a suffix's."""
        return ("prefix", "suffix") if not tied and self.first and self.last else ("",)

    def tensors(self, *, tied: bool, first_slot: int = 0) -> dict[str, np.ndarray]:
        """The rule as the graph's overridable initializers, int64 [1] each; ``prompt_length`` is the session's and is left out.

        An explicit rule's edit nothing: who hands no slots in has the base. ``first_slot``: where the adapter's edits begin in its banks.
        Rows of a batch have rules of their own where the tensors of theirs are concatenated to [B].
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


@dataclass(frozen=True)
class RuleSets:
    """The position rules of an adapter whose sites follow several. A slot stands for the set of rules that pick a token: at each site its
    edit is that of the site's own rule where the set has it, else none."""

    rules: tuple[PositionRule, ...]
    tied: bool

    def __post_init__(self) -> None:
        if not 1 <= len(self.rules) <= MOST_RULES:
            raise InputError(
                f"{len(self.rules)} position rules in one adapter, expected at most {MOST_RULES}; give edits the same positions"
            )

    def __str__(self) -> str:
        return "; ".join(map(str, self.rules))

    @cached_property
    def sets(self) -> tuple[tuple[int, ...], ...]:
        """By slot, of every rule: -1 where the set lacks it, else which of the rule's groups it is. ``all`` is in every set."""
        kinds = ([*([] if rule.everywhere else [-1]), *range(len(rule.groups(tied=self.tied)))] for rule in self.rules)
        return tuple(found for found in product(*kinds) if max(found) >= 0)

    def of_rules(self, each: tuple[np.ndarray, ...]) -> np.ndarray:
        """int32: the slots, of the rules' own slots (int32, all of one shape); -1 where no rule picks the token."""
        slot = np.full(each[0].shape, -1, np.int32)
        for number, wanted in enumerate(self.sets):
            slot[np.logical_and.reduce([own == group for own, group in zip(each, wanted, strict=True)])] = number
        return slot


Positions = PositionRule | RuleSets
"""Where an adapter edits."""


def of_rules(rules: Iterable[PositionRule], *, tied: bool) -> Positions:
    """The positions of sites that follow ``rules``, one a site, in their order. Raises InputError for more than MOST_RULES."""
    different = tuple(dict.fromkeys(rules))
    return different[0] if len(different) == 1 else RuleSets(different, tied)


def slot_count(positions: Positions, *, tied: bool) -> int:
    """How many slots an adapter has in each bank that it uses."""
    return len(positions.sets) if isinstance(positions, RuleSets) else len(positions.groups(tied=tied))


def needs_slots(positions: Positions) -> bool:
    """Whether no graph computes the slots, so that they are handed in at every step."""
    return isinstance(positions, RuleSets) or positions.explicit


def needs_marks(positions: Positions) -> bool:
    """Whether prompts have to say which of their tokens are edited."""
    return any(rule.marked for rule in (positions.rules if isinstance(positions, RuleSets) else (positions,)))


def marks_of(rows: Iterable[Sequence[int]]) -> np.ndarray:
    """bool [B, P]: which tokens of each prompt are marked, of their numbers, from 0; P reaches to the last of them, and is 1 at least."""
    each = list(rows)
    marks = np.zeros((len(each), max((max(numbers, default=0) for numbers in each), default=0) + 1), bool)
    for row, numbers in zip(marks, each, strict=True):
        row[list(numbers)] = True
    return marks


def every_other(prompt_length: Iterable[int]) -> np.ndarray:
    """bool [B, P]: marks of prompts that mark nothing, where ranges, logits or times are measured: tokens 0, 2, 4 .., so that there are
    edited tokens and others."""
    return marks_of(range(0, length, 2) for length in prompt_length)


def slots(
    rule: Positions | None,
    attention_mask: np.ndarray,
    width: int,
    *,
    tied: bool = True,
    prompt_length: np.ndarray | None = None,
    marks: np.ndarray | None = None,
) -> np.ndarray:
    """int32 [B, S]: the slot of each of the ``width`` = S tokens of one call; -1 where the token is not edited.

    ``rule`` is every row's, and ``slots_of`` says what follows from it; the suffix slot is 0 when ``tied``, else 1, of sets of rules as
    they say. ``prompt_length`` [B] is needed where a prompt does not come in one call; ``marks`` bool [B, P], by a token's number in its
    prompt, where the rule is ``marked``: InputError where tokens of a prompt come without.
    """
    if isinstance(rule, RuleSets):
        one = [len(each.groups(tied=rule.tied)) == 1 for each in rule.rules]
        own = (
            slots(r, attention_mask, width, tied=t, prompt_length=prompt_length, marks=marks) for r, t in zip(rule.rules, one, strict=True)
        )
        return rule.of_rules(tuple(own))
    if rule is not None and rule.explicit:
        return _explicit_slots(rule, attention_mask, width, prompt_length, marks)
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
    number = {name: np.asarray(rule.get(name, default), np.int64).reshape(-1, 1) for name, default in RULE_DEFAULTS.items()}
    p, length, window = _ranks(attention_mask, width, number[PROMPT_LENGTH])
    limit = np.where(number["reft.truncate"] > 0, length // 2, LARGEST)
    first, last = np.minimum(number["reft.first"], limit), np.minimum(number["reft.last"], limit)
    whole_prompt = (number["reft.prompt"] > 0) & (p < length)
    slot = np.where((p < first) | whole_prompt | (number["reft.everywhere"] > 0), number[FIRST_SLOT], -1)
    slot = np.where((p >= length - last) & (p < length), number[FIRST_SLOT] + number["reft.suffix_slot"], slot)
    slot = np.where(window > 0, slot, -1).astype(np.int32)
    return slot if explicit is None else np.where(explicit > NOT_EXPLICIT, explicit, slot).astype(np.int32)


def _ranks(attention_mask: np.ndarray, width: int, prompt_length: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p [B, S], L [B, 1], win [B, S]) of ``slots_of``; ``prompt_length`` [1, 1] or [B, 1], -1 where it is not known."""
    mask = np.asarray(attention_mask, np.int64)
    end = max(int((mask * (np.arange(mask.shape[1]) + 1)).max(initial=0)), width)
    start = end - width
    window = mask[:, start:end]
    total = mask.sum(1, keepdims=True)
    p = total - window.sum(1, keepdims=True) + np.cumsum(window, 1) - 1
    derived = total if start == 0 else np.zeros_like(total)
    return p, np.where(prompt_length >= 0, prompt_length, derived), window


def _explicit_slots(
    rule: PositionRule, attention_mask: np.ndarray, width: int, prompt_length: np.ndarray | None, marks: np.ndarray | None
) -> np.ndarray:
    """0 where p = n, or p = L + n of a negative one, or p % every = 0, or marks[p], within the prompt; else -1."""
    given = np.array([-1]) if prompt_length is None else np.asarray(prompt_length, np.int64)
    p, length, window = _ranks(attention_mask, width, given.reshape(-1, 1))
    inside = (p < length) & (window > 0)
    if rule.marked:
        if marks is None and inside.any():
            raise InputError(UNMARKED)
        marks = np.zeros((1, 1), bool) if marks is None else marks
        reached = np.broadcast_to(p.clip(0, marks.shape[1]), inside.shape)
        padded = np.broadcast_to(np.pad(marks, [(0, 0), (0, 1)]), (len(inside), marks.shape[1] + 1))
        picked = np.take_along_axis(padded, reached, 1)
    elif rule.every:
        picked = p % rule.every == 0
    else:
        picked = np.isin(p, [n for n in rule.chosen if n >= 0]) | np.isin(p - length, [n for n in rule.chosen if n < 0])
    return np.where(picked & inside, 0, -1).astype(np.int32)

"""What several strengths of one direction do to the contrast's own lines, and to what the base says: what a strength is chosen by.

    positive, negative   nats a token of both sides' completions, each given its prompt; of texts all tokens but the first
    own                  nats a token of the base's own greedy answers: how far the steered model has left it

Nats are the mean of -log p over tokens. Prompts alone have no completions, so that only ``own`` is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from reft_export.base.load import Base
from reft_export.console import count
from reft_export.contrasting.passages import Contrast, Passage
from reft_export.eager.steering import device_of, steered
from reft_export.training.counted import CountedHead
from reft_export.training.data import collate
from reft_export.training.greedy import greedy_answers
from reft_export.training.objective import Phase
from reft_export.training.tokenizing import Example
from reft_export.training.ways import Batch, loss_of
from runtimes.edits.adapter import Adapter
from runtimes.edits.probes import spread
from runtimes.generation import PAD

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
"""Of the stream's norm: what the strengths that are tried add, where none is given. All edited sites share it."""
AROUND = (0.5, 1.0, 2.0)
"""Times a strength that is given: what is tried then."""
LINES, ROWS = 8, 4
"""Of each side that are measured on, and how many at once."""
OWN_ANSWERS, OWN_TOKENS = 4, 24
LESS_LIKELY = 0.1
LEFT = 1.0
"""Nats a token that a strength may cost: the completions that it steers to, or without them the base's own answers."""


@dataclass(frozen=True, kw_only=True)
class StrengthFigures:
    """At one strength; 0 is the base."""

    strength: float
    positive: float | None
    negative: float | None
    own: float


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What strengths are measured on."""

    positive: tuple[Example, ...]
    negative: tuple[Example, ...]
    own: tuple[Example, ...]


def strengths_of(share: float) -> tuple[float, ...]:
    """SHARES as multiples of a difference whose norm is ``share`` of the stream's, in two digits."""
    return tuple(float(f"{each / share:.2g}") for each in SHARES)


def yardstick(base: Base, contrast: Contrast) -> Yardstick:
    """LINES of each side, spread over it, and the base's answers to OWN_ANSWERS prompts of the negative side."""
    sides = [tuple(_scored(side[i]) for i in spread(len(side), LINES)) for side in (contrast.positive, contrast.negative)]
    asked = [prompt_of(contrast.negative[i]) for i in spread(len(contrast.negative), OWN_ANSWERS)]
    own = _answered(base, asked)
    return Yardstick(positive=sides[0] if contrast.told else (), negative=sides[1] if contrast.told else (), own=own)


def prompt_of(passage: Passage) -> Example:
    """What is asked: the prompt; of a text its first half."""
    example = passage.example
    if passage.templated is not None:
        return example
    return replace(example, prompt_length=max(1, len(example.input_ids) // 2))


def _scored(passage: Passage) -> Example:
    """Its completion, or all of a text but the first token."""
    return passage.example if passage.answered else replace(passage.example, prompt_length=1)


def _answered(base: Base, asked: Sequence[Example]) -> tuple[Example, ...]:
    """The prompts with the base's greedy answers as completions; left-padded, in one batch."""
    prompts = [example.input_ids[: example.prompt_length] for example in asked]
    answers = greedy_answers(base, prompts, OWN_TOKENS)
    return tuple(
        replace(example, input_ids=(*prompt, *answer), prompt_length=len(prompt))
        for example, prompt, answer in zip(asked, prompts, answers, strict=True)
    )


def measure(
    base: Base, made: Callable[[float], Adapter], on: Yardstick, strengths: Sequence[float], report: Phase = lambda _: None
) -> tuple[StrengthFigures, ...]:
    """Of the base, as strength 0, and of every one of ``strengths``; ``made``: the adapter of one."""
    found = []
    for done, strength in enumerate((0.0, *strengths), 1):
        adapter = made(strength) if strength else None
        groups = [_nats(base, group, adapter) if group else None for group in (on.positive, on.negative)]
        found.append(StrengthFigures(strength=strength, positive=groups[0], negative=groups[1], own=_nats(base, on.own, adapter)))
        count(report, f"trying strengths, {done}/{len(strengths) + 1}", done, len(strengths) + 1)
    return tuple(found)


def chosen_strength(found: Sequence[StrengthFigures]) -> float:
    """The largest tried strength up to which the positive completions are at most LESS_LIKELY nats a token less likely than for the base,
    or, where there are none, the base's own answers at most LEFT; the smallest where none is."""
    base, tried = found[0], found[1:]
    fine = []
    for each in tried:
        if each.positive is not None and base.positive is not None:
            kept = each.positive - base.positive <= LESS_LIKELY
        else:
            kept = each.own - base.own <= LEFT
        if not kept:
            break
        fine.append(each.strength)
    return fine[-1] if fine else tried[0].strength


@torch.no_grad()
def _nats(base: Base, examples: Sequence[Example], adapter: Adapter | None) -> float:
    """Nats a token of the labels, under the adapter; a text's positions are counted as a prompt's."""
    total, tokens, head = 0.0, 0, CountedHead(base.model)
    with nullcontext() if adapter is None else steered(base.model, adapter) as steering:
        for start in range(0, len(examples), ROWS):
            batch = Batch.of(collate(examples[start : start + ROWS], pad_token_id=PAD), device_of(base.model))
            if steering is not None:
                steering.prompt_length = batch.prompt_length
            logits = head.every_logit(batch.counted, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            total += float(loss_of(logits, batch))
            tokens += len(logits)
    return total / tokens

"""What a run's data looks like to the model: lengths, and which tokens are edited and which are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from reft_export.training.data import Tokenized
from runtimes.edits.positions import Positions, marks_of, slots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """In tokens. ``p95``: 95 of 100 are no longer."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """Of training and held-out examples together, but for the two counts."""

    examples: int
    held_out: int
    forms: Mapping[str, int]
    tokens: Lengths
    prompt: Lengths
    truncated: int
    edited: float
    """Share of the tokens that the positions edit."""
    trained: float
    """Share of the tokens with a loss; 0 of a classifier, whose loss is on labels."""
    first: str
    """The first example as the model sees it, special tokens and all."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens side by side that are treated alike."""

    text: str
    edited: bool
    trained: bool


def statistics_of(
    training: Sequence[Tokenized], held_out: Sequence[Tokenized], rule: Positions, tokenizer: PreTrainedTokenizerBase
) -> DataStatistics:
    examples = [*training, *held_out]
    tokens = sum(len(example.input_ids) for example in examples)
    edited = _EditedTokens(rule)
    first = examples[0]
    return DataStatistics(
        examples=len(training),
        held_out=len(held_out),
        forms=dict(Counter(example.form for example in examples)),
        tokens=_lengths([len(example.input_ids) for example in examples]),
        prompt=_lengths([example.prompt_length for example in examples]),
        truncated=sum(example.truncated for example in examples),
        edited=sum(int(edited.of(example).sum()) for example in examples) / tokens,
        trained=sum(end - start for example in examples for start, end in example.trained) / tokens,
        first="".join(run.text for run in marked(first, rule, tokenizer)),
    )


def marked(example: Tokenized, rule: Positions, tokenizer: PreTrainedTokenizerBase) -> tuple[Run, ...]:
    """The example's text, in runs of tokens that are edited, trained, both or neither."""
    trained = np.zeros(len(example.input_ids), bool)
    for start, end in example.trained:
        trained[start:end] = True
    kinds = list(zip(_EditedTokens(rule).of(example).tolist(), trained.tolist(), strict=True))
    runs, end, shown = [], 0, ""
    for (edited, learned), group in groupby(kinds):
        end += len(list(group))
        # What more tokens add: a token alone may be half a character, or lose its space.
        text = str(tokenizer.decode(list(example.input_ids[:end]), clean_up_tokenization_spaces=False))
        runs.append(Run(text=text[len(shown) :], edited=edited, trained=learned))
        shown = text
    return tuple(runs)


class _EditedTokens:
    """Which tokens of an example are edited. Of most rules that is known by the lengths alone, which many examples share."""

    def __init__(self, rule: Positions) -> None:
        self._rule = rule
        self._known: dict[tuple[int, int, tuple[int, ...]], np.ndarray] = {}

    def of(self, example: Tokenized) -> np.ndarray:
        """bool [S]."""
        key = (len(example.input_ids), example.prompt_length, example.marks)
        if key not in self._known:
            width, prompt, marked = key
            ones, marks = np.ones((1, width)), marks_of([marked])
            self._known[key] = slots(self._rule, ones, width, prompt_length=np.array([prompt]), marks=marks)[0] >= 0
        return self._known[key]


def _lengths(counts: Sequence[int]) -> Lengths:
    ordered = sorted(counts)

    def at(share: float) -> int:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Lengths(min=ordered[0], median=at(0.5), p95=at(0.95), max=ordered[-1])

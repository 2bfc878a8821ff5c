"""Which layer knows the answer: of data with few different ones, how well a linear map reads them from the residual stream.

    x    h at the last token of the prompt, [D]: what the first token of the answer is computed from
    y    the answer, one of MOST_CHOICES at most
    W    ridge regression of y's indicators, in its dual form (lines are fewer than channels): K = X X^T, (K + lambda I)^-1 Y, of centred X
         and Y, lambda = RIDGE times the mean of K's diagonal

    accuracy = the mean over the answers of the share of their lines that the largest output names, each by a map of the other folds

Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reft_export.base.load import Base
from reft_export.contrasting.activations import read_activations
from reft_export.contrasting.passages import Passage
from reft_export.contrasting.separability import FOLDS
from reft_export.training.data import Example
from reft_export.training.objective import Phase
from reft_export.training.questions import MOST_CHOICES
from runtimes.edits.edit import Site

RIDGE = 0.1
LEAST = 4
"""Lines of every answer: fewer say nothing of those that are held out."""


def answers_of(examples: Sequence[Example]) -> tuple[int, ...] | None:
    """The number of every example's answer; None where they are not few that come often."""
    answers = [example.input_ids[slice(*example.trained[-1])] for example in examples]
    found = Counter(answers)
    if not 2 <= len(found) <= MOST_CHOICES or min(found.values()) < LEAST:
        return None
    numbers = {answer: number for number, answer in enumerate(sorted(found))}
    return tuple(numbers[answer] for answer in answers)


def layer_accuracies(
    base: Base, examples: Sequence[Example], answers: Sequence[int], sites: Sequence[Site], *, batch_size: int, report: Phase
) -> dict[Site, float]:
    """By site, 1 / (number of answers) being what a map that knows nothing reaches."""
    passages = [_prompt(example) for example in examples]
    read = read_activations(base, passages, sites, "last", batch_size=batch_size, report=report)
    return {site: ridge_accuracy(each.values.astype(np.float64), np.array(answers)) for site, each in read.items()}


def _prompt(example: Example) -> Passage:
    count = example.trained[-1][0]
    prompt = replace(example, input_ids=example.input_ids[:count], prompt_length=count, spans=())
    return Passage(example=prompt, start=min(1, count - 1), stop=count, templated=None, record=None)


def ridge_accuracy(values: np.ndarray, answers: np.ndarray) -> float:
    """The accuracy above of ``values`` [n, D] and ``answers`` [n], numbers from 0. Every answer's lines go to the folds in turn."""
    fold = np.zeros(len(answers), int)
    for answer in np.unique(answers):
        at = answers == answer
        fold[at] = np.arange(at.sum()) % FOLDS
    said = np.zeros_like(answers)
    for held in np.unique(fold):
        out = fold == held
        mean = values[~out].mean(0)
        known, asked = values[~out] - mean, values[out] - mean
        indicators = np.eye(answers.max() + 1)[answers[~out]]
        kernel = known @ known.T
        ridge = RIDGE * np.trace(kernel) / len(kernel) or 1.0  # a layer that is the same for every line
        weights = np.linalg.solve(kernel + ridge * np.eye(len(kernel)), indicators - indicators.mean(0))
        said[out] = (asked @ known.T @ weights + indicators.mean(0)).argmax(1)
    return float(np.mean([(said[answers == answer] == answer).mean() for answer in np.unique(answers)]))

"""What an adapter costs, by its form alone: what the trials are weighed by beside their quality.

parameters   all trained values
steering     multiply-adds that the edits add to an example: (edited tokens) * (sites) * 2 r D of a rank r and width D, for A h and
             U^T z; of RED D, a product a channel
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from reft_export.sweeping.settings import Point
from reft_export.training.data import Tokenized
from reft_export.training.settings import TrainSettings
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule, slots


def parameters_of(point: Point, training: TrainSettings, width: int, layers: int) -> int:
    """Of all sites; those of a prefix and a suffix that are not tied count twice."""
    settings = point.applied(training)
    shapes = METHODS[point.method].shapes(point.rank, width).values()
    return len(settings.sites(layers)) * (1 if settings.tied else 2) * sum(math.prod(shape) for shape in shapes)


def steering_cost(point: Point, training: TrainSettings, width: int, layers: int, edited: float) -> float:
    """``edited``: tokens of an example (``edited_tokens``)."""
    row = width if METHODS[point.method].full_rank else 2 * point.rank * width
    return edited * len(point.applied(training).sites(layers)) * row


def edited_tokens(positions: str, examples: Sequence[Tokenized]) -> float:
    """The mean over ``examples`` of how many tokens are edited, prompt and answer."""
    rule, lengths = PositionRule.parse(positions), Counter((each.prompt_length, each.length) for each in examples)
    found = sum(
        count * int((slots(rule, np.ones((1, length)), length, prompt_length=np.array([prompt])) >= 0).sum())
        for (prompt, length), count in lengths.items()
    )
    return found / len(examples)

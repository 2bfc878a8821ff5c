"""What a run trains for: its data, its loss, and what is shown of it. One objective for each of a base's tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.load import Base
from reft_export.training.checkpoints import StepRecord
from reft_export.training.data import E, Examples, Tokenized, TrainingData
from reft_export.training.forms import AsProbe, probe_as_it_is
from reft_export.training.interventions import Interventions
from reft_export.training.settings import TrainSettings
from reft_export.training.sources import Lines
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import Positions
from runtimes.errors import InputError

if TYPE_CHECKING:  # transformers' Trainer brings what else is installed: recording an adapter's probes goes without
    from reft_export.training.loop import Measure, TrainedModel

Loop = Callable[["TrainedModel", "Measure | None"], list[StepRecord]]
"""Trains the model on the run's examples; the measure is taken beside the held-out loss."""
Phase = Callable[[str], None]
"""Told what begins."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """What a run starts from, beside its base, data and settings."""

    start: Adapter | None = None
    trained_on: str | None = None
    """Digest of the bundle whose weights the base carries."""
    teacher: PreTrainedModel | None = None
    """Of a decoder: the float model, whose answers with ``start`` are learned in place of the data's."""
    head: bool | None = None
    """Of a classifier: whether its head is trained with the edit; None: it is."""
    orthogonal_to: Mapping[str, Adapter] = field(default_factory=dict)
    """By name: adapters that the edit keeps out of the way of (reft_export/training/avoided.py)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A greedy answer to a prompt of the data."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The share of texts whose label has the largest logit, of the base and of what was trained."""

    before: float
    after: float
    texts: int
    held_out: bool
    """The texts were held out; else they were trained on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What was trained, beside the interventions, and how it went."""

    history: list[StepRecord]
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the adapter records of it."""
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    samples_before: tuple[Sample, ...] = ()
    accuracy: Accuracy | None = None
    notes: tuple[str, ...] = ()
    """How its steps were computed, for people."""


class Objective(ABC, Generic[E]):
    """Made once a run. Raises InputError for an ``origin`` that its task has no place for."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        self.base, self.settings, self.origin = base, settings, origin

    @abstractmethod
    def limit(self, context: int) -> str:
        """That nothing is longer than ``context`` tokens, in words."""

    @abstractmethod
    def read(self, data: Lines, max_length: int) -> TrainingData[E]:
        """The tokenized data; raises InputError for a line that cannot be trained on."""

    def check_positions(self, data: TrainingData[E], rule: Positions) -> None:
        """Raises InputError for examples that cannot be trained at ``rule``, beside those of which it edits no token."""

    def as_probe(self) -> AsProbe:
        return probe_as_it_is

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a resumed run must have in common with it."""

    @abstractmethod
    def collate(self, examples: Sequence[E], *, pad_token_id: int) -> dict[str, Any]:
        """A batch: what the trained model's forward takes."""

    def rows(self, examples: Examples[E]) -> Examples[Any]:
        """What a step computes of them."""
        return examples

    def reference_rows(self, examples: Examples[E]) -> list[Tokenized]:
        """What the base computes beside the steps, without the edits."""
        return []

    @abstractmethod
    def metric(self, examples: Examples[E], held_out_data: Lines) -> Any:
        """What ``train`` measures held-out examples by, checked; None of the loss alone. ``held_out_data``: where they were read from."""

    @abstractmethod
    def train(
        self, interventions: Interventions, rule: Positions, examples: Examples[E], loop: Loop, phase: Phase, metric: Any = None
    ) -> Outcome:
        """Calls ``loop`` once, with the base steered; the base is frozen. ``metric``: what the method of that name gave."""

    def samples(self, examples: Examples[E], phase: Phase, adapter: Adapter | None = None) -> tuple[Sample, ...]:
        """What the base answers, steered by ``adapter`` where there is one; nothing of a base that does not answer."""
        return ()


def tokenizer_of(base: Base) -> PreTrainedTokenizerBase:
    """Raises InputError for a base without one."""
    if base.tokenizer is None:
        remedy = "pass it as tokenizer" if base.folder is None else "put tokenizer.json beside config.json"
        raise InputError(f"{base.info.name} has no tokenizer, which training needs; {remedy}")
    return base.tokenizer

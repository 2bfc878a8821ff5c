"""What a session is, by task, and what every session does with a step before its backend sees it: the checks, and the small integer
inputs that follow from the mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, TypeGuard, TypeVar

import numpy as np

from runtimes.artifacts.artifact import Artifact, StoredAdapter
from runtimes.artifacts.manifest import ModelRecord
from runtimes.artifacts.ort_adapter_file import Tensor
from runtimes.edits.op import EXPLICIT_SLOTS, FIRST_LOGIT, PROMPT_LENGTH, SLOT_INPUT
from runtimes.edits.positions import needs_slots, slots
from runtimes.errors import InputError
from runtimes.rows import AdapterRows
from runtimes.text.encoded_text import EncodedText

S = TypeVar("S", bound="Session")
T = TypeVar("T", bound="ClosedAtEnd")


class Session(Protocol):
    """What every session has, whatever its task. A context manager: at its end, or by ``close``, the engine's memory is free again."""

    @property
    def bundle(self) -> Artifact: ...

    @property
    def provider(self) -> str: ...

    @property
    def kernel(self) -> str: ...

    @property
    def adapter(self) -> str | None:
        """The active one; None is the base."""

    def set_adapter(self, name: str | None) -> None: ...

    def set_rows(self, rows: AdapterRows) -> None:
        """Every row of a batch by an adapter of its own; until ``set_adapter``."""

    def close(self) -> None:
        """Once or more often; a closed session refuses to run."""

    def __enter__(self: S) -> S: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Past(Protocol):
    """The KV cache after some steps, as its session keeps it."""

    @property
    def width(self) -> int: ...  # columns so far, pads included


@dataclass(frozen=True, kw_only=True, eq=False)
class StepOutput:
    """``logits`` float32 [B, S, V], or [B, 1, V] (the last column) in a bundle made with ``--logits last``; fewer columns where the
    step was asked for the last ones only. ``past`` is the session's own, for the next step."""

    logits: np.ndarray
    past: Past
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Every output as its backend holds it, where the backend keeps them: activations, where a calibration made them outputs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierOutput:
    """``logits`` float32 [B, labels]; ``outputs``: as of StepOutput."""

    logits: np.ndarray
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


class DecoderSession(Session, Protocol):
    """What generation, parity and bench need of a decoder's session; OrtSession and TensorRTSession are two."""

    @property
    def takes_position_ids(self) -> bool: ...

    @property
    def cuts_logits(self) -> bool:
        """Whether logits that ``last_logits`` leaves out are not computed at all."""
        ...

    @property
    def writes_in_place(self) -> bool:
        """Whether a step writes into the KV cache that it was given; then pads stand on the right, and take no room in it."""
        ...

    def step(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        *,
        past: Past | None = None,
        prompt_length: np.ndarray | None = None,
        marks: np.ndarray | None = None,
        last_logits: int | None = None,
        capacity: int | None = None,
    ) -> StepOutput: ...


class ClassifierSession(Session, Protocol):
    """What a classifier's session has; OrtClassifier is one."""

    def classify(self, input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray | None = None) -> ClassifierOutput: ...

    def probabilities(self, texts: Sequence[EncodedText]) -> np.ndarray: ...


def as_decoder(session: Session) -> DecoderSession:
    """Raises InputError for a session that takes no steps."""
    if not _steps(session):
        raise InputError(f"{session.bundle.folder} is no decoder: its session takes texts to classify, and no steps")
    return session


def as_classifier(session: Session) -> ClassifierSession:
    """Raises InputError for a session that classifies nothing."""
    if not _classifies(session):
        raise InputError(f"{session.bundle.folder} is no classifier: its session takes steps, and no texts to classify")
    return session


# By what a session can do, not by its class: a session may stand in front of another.
def _steps(session: Session) -> TypeGuard[DecoderSession]:
    return hasattr(session, "step")


def _classifies(session: Session) -> TypeGuard[ClassifierSession]:
    return hasattr(session, "classify")


class ClosedAtEnd(ABC):
    """``with``: closed at the end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def closed(artifact: Artifact) -> InputError:
    """What a session says that is asked to run after its end."""
    return InputError(f"the session of {artifact.folder} is closed; open another with `open_session`")


def check_step(model: ModelRecord, ids: np.ndarray, mask: np.ndarray, before: int, *, takes_position_ids: bool) -> None:
    """Raises InputError unless ids [B, S] and mask [B, ``before`` + S] are tokens of ``model`` that fit its context."""
    if ids.ndim != 2 or ids.size == 0 or mask.shape != (ids.shape[0], before + ids.shape[1]):
        raise InputError(
            f"a step takes input_ids [B, S] and attention_mask [B, {before} + S] (past + new tokens); "
            f"got {list(ids.shape)} and {list(mask.shape)}"
        )
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise InputError(f"token ids reach from {ids.min()} to {ids.max()}; {model.name} has {model.vocab_size}, from 0")
    # Pads are columns of the cache but no positions of the model, where the graph is told the positions.
    longest = int(mask.sum(1).max()) if takes_position_ids else mask.shape[1]
    if longest > model.context_length:
        raise InputError(
            f"{longest} tokens do not fit the context of {model.name} ({model.context_length}); shorten the prompt or generate fewer"
        )


def step_inputs(
    taken: Collection[str],
    ids: np.ndarray,
    mask: np.ndarray,
    prompt_length: np.ndarray,
    *,
    placement: StoredAdapter | None,
    marks: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    last_logits: int | None = None,
) -> dict[str, np.ndarray]:
    """Every input of the step but banks, rule and cache, by name, of those that the graph takes (``taken``).

    ids, mask and position_ids int64 as given; position_ids [B, S] by default a token's rank among its row's real tokens;
    reft.prompt_length int64 [B]; reft.first_logit int64 [1] so that the ``last_logits`` last columns have logits (None: all of them); of
    version 1, reft_slot int32 [B, S] by the rule of the active adapter (``placement``; None edits nothing); reft.slots, the same, where no
    graph computes that rule, ``marks`` bool [B, P] being what the prompts mark.
    """
    width = ids.shape[1]
    arrays = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in taken:
        ranks = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -width:] if position_ids is None else position_ids
        arrays["position_ids"] = np.asarray(ranks, np.int64)
    if PROMPT_LENGTH in taken:
        arrays[PROMPT_LENGTH] = prompt_length
    if FIRST_LOGIT in taken:  # fed at every step: what one step binds would serve the next
        arrays[FIRST_LOGIT] = np.array([0 if last_logits is None else max(width - last_logits, 0)], np.int64)
    if SLOT_INPUT in taken:
        rule, tied = (None, True) if placement is None else (placement.positions, placement.tied)
        arrays[SLOT_INPUT] = slots(rule, mask, width, tied=tied, prompt_length=prompt_length)
    elif placement is not None and needs_slots(placement.positions):  # a graph without that input refuses it: it would be the base
        where = placement.positions
        arrays[EXPLICIT_SLOTS] = slots(where, mask, width, tied=placement.tied, prompt_length=prompt_length, marks=marks)
    return arrays

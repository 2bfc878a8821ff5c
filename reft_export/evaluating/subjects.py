"""What is evaluated: a base, bare or under one adapter, in eager PyTorch or in a session of a bundle or an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from runtimes.generation import GenerationSettings, generate
from runtimes.parity.perplexity import log_likelihoods
from runtimes.session import Session, as_classifier
from runtimes.text.encoded_text import EncodedText, padded
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.eager.steering import Steering

EAGER = "eager"
Pair = tuple[Sequence[int], Sequence[int]]
"""(prompt, answer), as tokens."""


@dataclass(frozen=True, kw_only=True)
class Who:
    """A row of the table, by name."""

    artifact: str
    """``eager``, or the name of a bundle's or an engine's folder."""
    precision: str
    adapter: str | None
    model: str
    """Fingerprint of the base."""
    exact: bool
    """In float32, weights and activations: what is left of the steering elsewhere is measured against it."""

    def __str__(self) -> str:
        return f"{self.artifact}, {self.adapter or 'the base'}"


class Subject(Protocol):
    """One model, ready to run."""

    @property
    def who(self) -> Who: ...

    def answers(self, prompts: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
        """The greedy answer to each of a batch's prompts: up to ``most`` tokens, or its stop token, which it ends with."""
        ...

    def likelihoods(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[np.ndarray]:
        """log p [answer's tokens] of each pair's answer, in nats, in the order of the pairs."""
        ...


class TextSubject(Protocol):
    """One classifier, ready to run."""

    @property
    def who(self) -> Who: ...

    def logits(self, texts: Sequence[EncodedText]) -> np.ndarray:
        """float32 [B, labels] of a batch of texts."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EagerSubject:
    """``steering``: whose edits are on; those of the base are none."""

    who: Who
    base: Base
    steering: Steering

    def answers(self, prompts: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
        from reft_export.training.greedy import greedy_answers

        self.steering.prompt_length = None  # the prompt comes alone
        return list(greedy_answers(self.base, prompts, most, steering=self.steering))

    def likelihoods(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[np.ndarray]:
        import torch

        from reft_export.training.counted import CountedHead
        from reft_export.training.metrics import token_log_likelihoods
        from reft_export.training.ways import Ways
        from runtimes.edits.positions import PositionRule

        rule = self.steering.rule or PositionRule.parse("all")
        ways = Ways(head=CountedHead(self.base.model), steering=self.steering, rule=rule)
        for start in range(0, len(pairs), batch_size):
            with torch.no_grad():
                found = token_log_likelihoods(ways.plain, pairs[start : start + batch_size], self.base.model.device)
            yield from (each.cpu().numpy() for each in found)


@dataclass(frozen=True, kw_only=True, eq=False)
class EagerClassifier:
    """Under the edits and the head that are on."""

    who: Who
    base: Base

    def logits(self, texts: Sequence[EncodedText]) -> np.ndarray:
        from reft_export.tasks.classification import INPUTS, ClassifierInputs

        arrays = padded(texts, self.base.model.config.pad_token_id or 0)
        return ClassifierInputs(**dict(zip(INPUTS, arrays, strict=True))).logits(self.base.model)


@dataclass(frozen=True, kw_only=True, eq=False)
class SessionClassifier:
    """The session's active adapter, or the base."""

    who: Who
    session: Session

    def logits(self, texts: Sequence[EncodedText]) -> np.ndarray:
        arrays = padded(texts, self.session.bundle.manifest.model.pad_token_id or 0)
        return as_classifier(self.session).classify(*arrays).logits


@dataclass(frozen=True, kw_only=True, eq=False)
class SessionSubject:
    """The session's active adapter, or the base."""

    who: Who
    session: Session
    tokenizer: Tokenizer

    def answers(self, prompts: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
        said = generate(self.session, self.tokenizer, prompts, GenerationSettings(max_new_tokens=most))
        return [each.tokens for each in said]

    def likelihoods(self, pairs: Sequence[Pair], batch_size: int) -> Iterator[np.ndarray]:
        """One row a call: a prompt's columns fill the processor by themselves, and rows of one length are rare."""
        for prompt, answer in pairs:
            yield np.array(log_likelihoods(self.session, [*prompt, *answer], len(prompt)))

"""A decoder's objective in a distillation: what a system prompt does, without the system prompt.

    loss = sum over t of KL(p_t || q_t),  p_t = base(. | system, conversation, answer[:t]),  q_t = steered(. | conversation, answer[:t])

over the tokens t of the answers, in nats. Both are over the whole vocabulary: an answer's tokens decide what is asked, not what is learned.
The teacher is the base itself with its edits off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import context_of, stop_tokens
from reft_export.eager.steering import Steering
from reft_export.training.data import Example, Examples, collate
from reft_export.training.distilled_data import PromptedTeacher
from reft_export.training.generation import CompletionObjective, penalized
from reft_export.training.greedy import greedy_answers, text_of
from reft_export.training.objective import Origin, Phase
from reft_export.training.reference import kept_reference
from reft_export.training.settings import TrainSettings
from reft_export.training.teacher import Teacher
from reft_export.training.ways import Batch, Loss, divergence
from runtimes.errors import InputError


class DistillationObjective(CompletionObjective):
    """The divergence from what the base says with the system prompt; and with ``kl_weight`` as much of that from what it says without."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        super().__init__(base, settings, origin)
        if origin.teacher is not None:
            raise InputError("the teacher of a distillation is the base with the system prompt; leave teacher or distill_system out")

    def prompted_teacher(self) -> PromptedTeacher:
        return PromptedTeacher(system=self.settings.distill_system, context=context_of(self.base))

    def record(self) -> dict[str, Any]:
        return {"objective": "distillation"}

    def collate(self, examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Any]:
        seen = collate([example.for_teacher for example in examples], pad_token_id=pad_token_id)
        return {**collate(examples, pad_token_id=pad_token_id), "reference": seen}

    def reference_rows(self, examples: Examples[Example]) -> list[Example]:
        every = (*examples.training, *examples.held_out)
        return [*(example.for_teacher for example in every), *super().reference_rows(examples)]

    def loss(
        self, steering: Steering, examples: Examples[Example], lesson: Teacher | None, phase: Phase
    ) -> tuple[Loss, int, tuple[str, ...]]:
        weight = self.settings.kl_weight
        reference, said = kept_reference(self.base, steering, self.reference_rows(examples), examples, self.settings, phase)

        def distance(logits: Tensor, batch: Batch) -> Tensor:
            assert batch.reference is not None
            return divergence(logits, reference.logits(batch.reference))

        return penalized(distance, weight, reference) if weight else distance, reference.size, said


def teacher_answers(base: Base, asked: Sequence[Example], settings: TrainSettings, phase: Phase) -> dict[str, str]:
    """By where it stands, the base's greedy answer to each of the conversations with the system prompt: up to its first stop token,
    ``settings.max_new_tokens``, or the context, which has room for its end token, too."""
    stop, context, answers = stop_tokens(base), context_of(base), dict[str, str]()
    by_length = sorted(asked, key=lambda example: len(example.prompted))
    for first in range(0, len(by_length), settings.batch_size):
        phase(f"answering with the system prompt, {first} of {len(by_length)} prompts")
        group = by_length[first : first + settings.batch_size]
        room = context - 1 - max(len(example.prompted) for example in group)
        found = greedy_answers(base, [example.prompted for example in group], min(settings.max_new_tokens, room))
        for example, tokens in zip(group, found, strict=True):
            answers[example.where] = text_of(base, tokens[:-1] if tokens[-1] in stop else tokens).strip()
    return answers

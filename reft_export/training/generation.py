"""A decoder's objective: the tokens of completions, or a teacher's distributions over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import stop_tokens, vocabulary_of
from reft_export.eager.steering import EditFn, Steering, steer, steered
from reft_export.training.data import Example, Examples, TrainingData, collate, load_data
from reft_export.training.distilled_data import PromptedTeacher
from reft_export.training.forms import AsProbe, probe_of_form
from reft_export.training.greedy import greedy_answers, text_of
from reft_export.training.interventions import Interventions
from reft_export.training.loop import TrainedModel
from reft_export.training.metrics import AnswerMetric, answer_metric
from reft_export.training.objective import Loop, Objective, Origin, Outcome, Phase, Sample, tokenizer_of
from reft_export.training.real_tokens import on_real_tokens
from reft_export.training.recomputed import recomputed_blocks
from reft_export.training.reference import Reference, kept_reference
from reft_export.training.settings import TrainSettings
from reft_export.training.sources import Lines
from reft_export.training.teacher import Teacher, teaching
from reft_export.training.way_choice import choose_way
from reft_export.training.ways import Batch, Loss, Way, divergence, loss_of
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.positions import Positions
from runtimes.errors import InputError

SAMPLE_TOKENS = 48


class EditedModel(TrainedModel):
    """A decoder's; ``loss`` is on completions."""

    def __init__(self, interventions: Interventions, way: Way, loss: Loss = loss_of) -> None:
        super().__init__(interventions)
        self._outside = (way, loss)

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        prompt_length: Tensor,
        marks: Tensor | None = None,
        subspaces: Tensor | None = None,
        sources: Tensor | None = None,
        reference: Mapping[str, Tensor] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss summed over the labels' tokens and divided by num_items_in_batch (else by their number). ``reference``: the batch as
        ``Batch.reference`` has it."""
        way, loss = self._outside
        batch = Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            prompt_length=prompt_length,
            marks=marks,
            subspaces=subspaces,
            sources=sources,
            reference=None if reference is None else Batch.of(reference, input_ids.device),
        )
        logits = way(batch)
        return loss(logits, batch) / (len(logits) if num_items_in_batch is None else num_items_in_batch)


class CompletionObjective(Objective[Example]):
    """Cross entropy of the completions, or with a teacher the divergence from what it says at the same tokens; and with ``kl_weight`` as
    much of the divergence from what the base says there without the edits."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        super().__init__(base, settings, origin)
        if origin.head is not None:
            raise InputError(f"head is a classifier's, and {base.info.name} is a decoder; leave it out")
        if origin.teacher is not None and origin.start is None:
            raise InputError("a teacher is steered by the adapter that the run starts from; pass start")
        self.stop_tokens = stop_tokens(base)

    def limit(self, context: int) -> str:
        return f"the context of {self.base.info.name} ends at {context}"

    def read(self, data: Lines, max_length: int) -> TrainingData[Example]:
        settings = self.settings
        read = load_data(
            data,
            tokenizer_of(self.base),
            max_length=max_length,
            chat_template=settings.chat_template,
            stop_tokens=self.stop_tokens,
            form=settings.format,
            train_on=settings.train_on,
            marks=settings.marks,
            subspaces=tuple(settings.subspace_rows),
            teacher=self.prompted_teacher(),
        )
        check_vocabulary(read.examples, vocabulary_of(self.base))
        return read

    def prompted_teacher(self) -> PromptedTeacher | None:
        """Of a distillation from a system prompt."""
        return None

    def as_probe(self) -> AsProbe:
        return probe_of_form(self.settings.format)

    def record(self) -> dict[str, Any]:
        return {"objective": "data" if self.origin.teacher is None else "teacher"}

    def collate(self, examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Any]:
        return collate(examples, pad_token_id=pad_token_id)

    def reference_rows(self, examples: Examples[Example]) -> list[Example]:
        return [*examples.training, *examples.held_out] if self.settings.kl_weight else []

    def metric(self, examples: Examples[Example], held_out_data: Lines) -> AnswerMetric | None:
        return answer_metric(self.settings.metric, self.base, examples, held_out_data, self.settings.batch_size)

    def train(
        self,
        interventions: Interventions,
        rule: Positions,
        examples: Examples[Example],
        loop: Loop,
        phase: Phase,
        metric: AnswerMetric | None = None,
    ) -> Outcome:
        model, teacher, start = self.base.model, self.origin.teacher, self.origin.start
        before = self.samples(examples, phase)
        with (
            on_real_tokens(model) as real,
            steer(model, self.edits(interventions), rule=rule, tied=self.settings.tied) as steering,
            recomputed_blocks(model, steering, real) if self.settings.gradient_checkpointing else nullcontext(),
            nullcontext() if teacher is None or start is None else teaching(teacher, start) as lesson,
        ):
            loss, kept, told = self.loss(steering, examples, lesson, phase)
            rows, mine = self.rows(examples), self.settings
            size = mine.batch_size * len(rows.training) // len(examples.training)
            settings = replace(mine, batch_size=size, cache_mb=max(0, mine.cache_mb - math.ceil(kept / 1e6)))
            way, said = choose_way(self.base, interventions.to(model.device), steering, real, rule, rows, settings, phase)
            phase("training")
            measure = None if metric is None else partial(metric.measure, steering, way)
            history = loop(self.trained_model(interventions, way, loss), measure)
            found = self.found(way, interventions, examples)
        notes = (*told, *said, *found)
        return Outcome(history=history, record={} if start is None else self.record(), samples_before=before, notes=notes)

    def edits(self, interventions: Interventions) -> Mapping[Site, EditFn]:
        """What stands at each site while it is trained."""
        return interventions.edits()

    def trained_model(self, interventions: Interventions, way: Way, loss: Loss) -> TrainedModel:
        return EditedModel(interventions, way, loss)

    def found(self, way: Way, interventions: Interventions, examples: Examples[Example]) -> tuple[str, ...]:
        """What is to be said of the trained model, beside its loss."""
        return ()

    def loss(
        self, steering: Steering, examples: Examples[Example], lesson: Teacher | None, phase: Phase
    ) -> tuple[Loss, int, tuple[str, ...]]:
        """(what the steps lower, bytes that it keeps from step to step, what is to be said of it)."""
        own: Loss = loss_of if lesson is None else lesson.divergence
        if not self.settings.kl_weight:
            return own, 0, ()
        reference, said = kept_reference(self.base, steering, self.reference_rows(examples), examples, self.settings, phase)
        return penalized(own, self.settings.kl_weight, reference), reference.size, said

    def samples(self, examples: Examples[Example], phase: Phase, adapter: Adapter | None = None) -> tuple[Sample, ...]:
        asked = examples.shown[: self.settings.samples]
        if not asked:
            return ()
        phase("sampling the base" if adapter is None else "sampling the steered model")
        with nullcontext() if adapter is None else steered(self.base.model, adapter) as steering:
            return greedy_samples(self.base, asked, steering)


def penalized(loss: Loss, weight: float, reference: Reference) -> Loss:
    """loss + weight * sum over counted tokens of KL(base || steered), in nats."""

    def total(logits: Tensor, batch: Batch) -> Tensor:
        return loss(logits, batch) + weight * divergence(logits, reference.logits(batch))

    return total


def greedy_samples(base: Base, examples: Sequence[Example], steering: Steering | None = None) -> tuple[Sample, ...]:
    """Greedy answers to the examples' prompts, in one left-padded batch, and as text what a device gives out for them."""
    prompts, stop = [example.input_ids[: example.prompt_length] for example in examples], stop_tokens(base)
    marks, sources = ([getattr(example, name) for example in examples] for name in ("marks", "source"))
    answers = greedy_answers(base, prompts, SAMPLE_TOKENS, steering=steering, marks=marks, sources=sources)
    # A stop token need not be a special one, which decoding would leave out.
    ended = [answer[:-1] if answer[-1] in stop else answer for answer in answers]
    return tuple(
        Sample(prompt=text_of(base, prompt), text=text_of(base, [*prompt, *answer])[len(text_of(base, prompt)) :])
        for prompt, answer in zip(prompts, ended, strict=True)
    )


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    """A tokenizer with more tokens than the model: a device refuses such a prompt, too."""
    for example in examples:
        if max(example.input_ids) >= vocab_size:
            raise InputError(
                f"{example.where}: token id {max(example.input_ids)} is outside the model's vocabulary of {vocab_size}; "
                "use the tokenizer that the base was made with"
            )

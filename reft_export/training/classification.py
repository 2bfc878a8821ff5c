"""A classifier's objective: the labels of texts, by interventions hooked onto a frozen encoder, and its head trained with them.

The paper's GLUE setting: RoBERTa, rank 1, positions f1 (or a few first and last tokens), all layers, head trained together with the edit,
learning rates from 2e-4 to 1e-3, batches of 32, no weight decay, inputs of at most 256 tokens.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", section 4.4 and its hyperparameter tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from reft_export.base.classifiers import decodes, head_parameters, with_head
from reft_export.base.load import Base
from reft_export.eager.steering import steer
from reft_export.tasks.classification import model_inputs
from reft_export.training.data import Examples, TrainingData
from reft_export.training.interventions import Interventions
from reft_export.training.labelled_data import LabelledText, collate_labelled, load_labelled
from reft_export.training.loop import TrainedModel
from reft_export.training.objective import Accuracy, Loop, Objective, Origin, Outcome, Phase, tokenizer_of
from reft_export.training.recomputed import recomputed_blocks
from reft_export.training.settings import ACCURACY, LOSS, SFT, TrainSettings
from reft_export.training.sources import Lines
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import PositionRule, Positions, slots
from runtimes.errors import InputError


class EditedClassifier(TrainedModel):
    """Cross entropy of the labels. The head is trained as a float32 copy, put into the base's place for each forward."""

    def __init__(self, model: PreTrainedModel, interventions: Interventions, head: Mapping[str, Tensor]) -> None:
        super().__init__(interventions)
        self._outside = (model,)
        # ParameterDict refuses dots in its keys.
        self.head = nn.ParameterDict({name.replace(".", "-"): nn.Parameter(value.clone()) for name, value in head.items()})
        self._names = {name.replace(".", "-"): name for name in head}

    def head_values(self) -> dict[str, Tensor]:
        """By the base's parameter names, in their order; ParameterDict sorts its own."""
        return {name: self.head[key] for key, name in self._names.items()}

    def logits(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """[B, labels], in the base's dtype."""
        (model,) = self._outside
        head = {name: value.to(model.dtype) for name, value in self.head_values().items()}
        return functional_call(model, head, kwargs=model_inputs(model, input_ids, attention_mask, token_type_ids)).logits

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross entropy of the labels, summed over texts and divided by num_items_in_batch (else by their number)."""
        total = F.cross_entropy(self.logits(input_ids, attention_mask, token_type_ids).float(), labels, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        matrices = [p for p in self.head.values() if p.ndim > 1]
        biases = [p for p in self.head.values() if p.ndim < 2]
        head = [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
        return super().parameter_groups(weight_decay) + (head if self.head else [])


class LabelObjective(Objective[LabelledText]):
    """Cross entropy of the labels. The head starts from the base's, or from the started adapter's; where it is not trained, the adapter has
    none unless that one had."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        super().__init__(base, settings, origin)
        if origin.teacher is not None:
            raise InputError(f"teacher is a decoder's, and {base.info.name} is a classifier; leave it out")
        for name, default in (("distill_system", ""), ("kl_weight", 0.0), ("objective", SFT)):
            if getattr(settings, name) != default:
                raise InputError(f"{name} is a decoder's, and {base.info.name} is a classifier; leave it out")
        if settings.subspaces:
            raise InputError(f"subspaces are of a decoder's examples, and {base.info.name} is a classifier; leave them out")
        if settings.marks:
            raise InputError(f"positions marked are of a decoder's prompts, and {base.info.name} is a classifier; use other positions")
        self._trains_head = origin.head is not False

    def limit(self, context: int) -> str:
        return f"{self.base.info.name} takes {context} tokens"

    def read(self, data: Lines, max_length: int) -> TrainingData[LabelledText]:
        read = load_labelled(data, tokenizer_of(self.base), self.base.info.labels, max_length=max_length)
        if decodes(self.base.model):
            for example in read.examples:
                self._check_heard(example)
        return read

    def _check_heard(self, example: LabelledText) -> None:
        """Raises InputError where edits act behind the token that a decoder's label is read from alone, and would train nothing."""
        ids, positions = example.input_ids, self.settings.all_positions
        length, pad = len(ids), self.base.model.config.pad_token_id
        heard = 1 + max((place for place, token in enumerate(ids) if token != pad), default=0)
        if heard < length:
            rules = (PositionRule.parse(text) for text in positions)
            edited = [slots(rule, np.ones((1, length)), length, prompt_length=np.array([length]))[0, :heard] >= 0 for rule in rules]
            if not np.any(edited):
                raise InputError(
                    f"{example.where}: positions {'; '.join(positions)} edit nothing up to the token that the label is read from, as the "
                    f"tokenizer ends texts with the pad token; use l{length - heard + 1}"
                )

    def record(self) -> dict[str, Any]:
        return {"head": self._trains_head}

    def collate(self, examples: Sequence[LabelledText], *, pad_token_id: int) -> dict[str, Tensor]:
        return collate_labelled(examples, pad_token_id=pad_token_id)

    def metric(self, examples: Examples[LabelledText], held_out_data: Lines) -> str | None:
        if self.settings.metric not in (LOSS, ACCURACY):
            raise InputError(f"metric {self.settings.metric} is of answers, and {self.base.info.name} is a classifier; use accuracy")
        return None if self.settings.metric == LOSS else ACCURACY

    def train(
        self,
        interventions: Interventions,
        rule: Positions,
        examples: Examples[LabelledText],
        loop: Loop,
        phase: Phase,
        metric: str | None = None,
    ) -> Outcome:
        model, asked, batch_size = self.base.model, examples.shown, self.settings.batch_size
        started = {} if self.origin.start is None else self.origin.start.head
        phase("taking the base's accuracy")
        before = _accuracy(model, asked, batch_size, lambda **batch: model(**model_inputs(model, **batch)).logits)
        with (
            with_head(model, {} if self._trains_head else started),
            steer(model, interventions.edits(), rule=rule, tied=self.settings.tied) as steering,
            recomputed_blocks(model, steering) if self.settings.gradient_checkpointing else nullcontext(),
        ):
            first = _first_head(model, self.origin.start) if self._trains_head else {}
            edited = EditedClassifier(model, interventions, first).to(model.device)
            phase("training")
            measure = None if metric is None else partial(_accuracy, model, examples.held_out, batch_size, edited.logits)
            history = loop(edited, measure)
            phase("taking the accuracy")
            after = _accuracy(model, asked, batch_size, edited.eval().logits)
        head = {name: value.detach().to("cpu", torch.float32).numpy().copy() for name, value in edited.head_values().items()}
        on = "held-out texts" if examples.held_out else "training texts"
        return Outcome(
            history=history,
            record={**self.record(), "accuracy": after, "accuracy_on": on},
            head=head or started,
            accuracy=Accuracy(before=before, after=after, texts=len(asked), held_out=bool(examples.held_out)),
        )


def _first_head(model: PreTrainedModel, start: Adapter | None) -> dict[str, Tensor]:
    """What the head's training starts from, float32: the started adapter's, else the base's."""
    if start is not None and start.head:
        return {name: torch.from_numpy(np.array(value)) for name, value in start.head.items()}
    return {name: parameter.detach().float() for name, parameter in head_parameters(model).items()}


@torch.no_grad()
def _accuracy(model: PreTrainedModel, examples: Sequence[LabelledText], batch_size: int, logits: Callable[..., Tensor]) -> float:
    """The share of ``examples`` whose label has the largest logit."""
    right = 0
    for first in range(0, len(examples), batch_size):
        batch = collate_labelled(examples[first : first + batch_size], pad_token_id=model.config.pad_token_id or 0)
        labels = batch.pop("labels")
        right += int((logits(**batch).argmax(-1).cpu() == labels).sum())
    return right / len(examples)

"""One training run of a classifier: a frozen encoder, interventions hooked onto it, and its head trained with them.

The paper's GLUE setting: RoBERTa, rank 1, positions f1 (or a few first and last tokens), all layers, head trained together with the edit,
learning rates from 2e-4 to 1e-3, batches of 32, no weight decay, inputs of at most 256 tokens.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", section 4.4 and its hyperparameter tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

from reft_export.base.classifiers import check_head, context_of, head_parameters, with_head
from reft_export.base.load import Base
from reft_export.eager.steering import steer
from reft_export.tasks.classification import model_inputs
from reft_export.training.checkpoints import StepRecord, check_working_folder, discard, open_working_folder
from reft_export.training.data import split
from reft_export.training.interventions import Interventions
from reft_export.training.labelled_data import LabelledText, collate_labelled, load_labelled
from reft_export.training.loop import OnStep, TrainedModel, run_loop
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import Preparation, check_positions, frozen, place, provenance
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.errors import InputError
from runtimes.files.folders import check_destination


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierResult:
    """What ``train_classifier`` gives back, beside the saved adapter. Accuracies are over held-out texts, else over the trained ones."""

    adapter: Adapter
    history: tuple[StepRecord, ...]
    accuracy_before: float
    accuracy_after: float
    evaluated: int
    held_out: bool
    truncated_lines: tuple[str, ...]


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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross entropy of the labels, summed over texts and divided by num_items_in_batch (else by their number)."""
        total = F.cross_entropy(self.logits(input_ids, attention_mask, token_type_ids).float(), labels, reduction="sum")
        return self.counted(total / (len(labels) if num_items_in_batch is None else num_items_in_batch))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        matrices = [p for p in self.head.values() if p.ndim > 1]
        biases = [p for p in self.head.values() if p.ndim < 2]
        head = [{"params": matrices, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
        return super().parameter_groups(weight_decay) + (head if self.head else [])


def train_classifier(
    base: Base,
    data: Path | Sequence[Path],
    settings: TrainSettings,
    output: Path,
    *,
    head: bool = True,
    force: bool = False,
    start: Adapter | None = None,
    trained_on: str | None = None,
    on_step: OnStep | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> ClassifierResult:
    """Trains interventions, and with ``head`` the classification head, on JSONL files; saves the adapter to ``output``.

    The base stays as it is, in eval mode: its own dropout is off, in its head too. The head starts from the base's, or from ``start``'s;
    without ``head`` the adapter has none unless ``start`` had. Same seed, same adapter; raises as ``training.trainer.train``.
    """
    phase = on_phase or (lambda _: None)
    ready = prepare_classifier(base, data, settings, output, head=head, force=force, start=start, trained_on=trained_on, phase=phase)
    folder, checkpoint = open_working_folder(output, ready.run, resume=settings.resume, force=force)
    return _train(base, settings, output, ready, folder, checkpoint, force=force, on_step=on_step, phase=phase)


def prepare_classifier(
    base: Base,
    data: Path | Sequence[Path],
    settings: TrainSettings,
    output: Path,
    *,
    head: bool = True,
    force: bool = False,
    start: Adapter | None = None,
    trained_on: str | None = None,
    phase: Callable[[str], None] = lambda _: None,
) -> Preparation:
    """Every check of ``train_classifier``, every line of the data included; as ``training.trainer.prepare``."""
    check_destination(output, force=force)
    if base.tokenizer is None:
        raise InputError(f"{base.info.name} has no tokenizer, which training needs; put tokenizer.json beside config.json")
    context = context_of(base.model)
    if (settings.max_length or 0) > context:
        raise InputError(f"max_length is {settings.max_length}; {base.info.name} takes {context} tokens")
    place(base, settings)
    rule = settings.rule
    set_seed(settings.seed)
    interventions = Interventions(
        method=settings.method,
        rank=settings.rank,
        sites=settings.sites(base.info.num_hidden_layers),
        width=base.info.hidden_size,
        tied=settings.tied,
        activation=settings.activation,
        dropout=settings.dropout,
    )
    if start is not None:
        check_head(start, base.model)
        interventions.start_from(start)
        rule = replace(rule, truncate=start.positions.truncate)  # the grammar of positions does not say it
    phase("reading the data")
    read = load_labelled(data, base.tokenizer, base.info.labels, max_length=settings.max_length or context)
    check_positions(read, rule)
    training, held_out = split(read.examples, settings.eval_fraction, settings.seed)
    run = {
        **settings.record(),
        "head": head,
        "data": read.digest,
        "base": base.info.fingerprint,
        "base_dtype": base.dtype,
        "start": None if start is None else start.digest,
        "trained_on": trained_on,
    }
    check_working_folder(output, run, resume=settings.resume, force=force)
    return Preparation(interventions=interventions, rule=rule, read=read, training=training, held_out=held_out, run=run, start=start)


def _train(
    base: Base,
    settings: TrainSettings,
    output: Path,
    ready: Preparation,
    folder: Path,
    checkpoint: Path | None,
    *,
    force: bool,
    on_step: OnStep | None,
    phase: Callable[[str], None],
) -> ClassifierResult:
    interventions, rule, read, run, start = ready.interventions, ready.rule, ready.read, ready.run, ready.start
    training, held_out, head, device = ready.training, ready.held_out, run["head"], base.model.device
    asked = held_out or training
    with frozen(base.model):
        phase("taking the base's accuracy")
        before = _accuracy(base.model, asked, settings.batch_size, lambda **batch: base.model(**model_inputs(base.model, **batch)).logits)
        own_head = {} if start is None or head else start.head
        with with_head(base.model, own_head), steer(base.model, interventions.edits(), rule=rule, tied=settings.tied):
            edited = EditedClassifier(base.model, interventions, _first_head(base.model, start) if head else {}).to(device)
            phase("training")
            history = run_loop(edited, base, training, held_out, settings, folder, checkpoint, on_step, collator=collate_labelled)
            phase("taking the accuracy")
            after = _accuracy(base.model, asked, settings.batch_size, edited.eval().logits)
    trained = {name: value.detach().to("cpu", torch.float32).numpy().copy() for name, value in edited.head_values().items()}
    adapter = interventions.to_adapter(
        base.info,
        rule,
        dtype=base.dtype,
        trained_on=run["trained_on"],
        training=provenance(read, training, held_out, settings, history)
        | {"head": head, "accuracy": after, "accuracy_on": "held-out texts" if held_out else "training texts"}
        | ({} if start is None else {"start": start.digest}),
    )
    adapter = replace(adapter, head=trained or (start.head if start is not None else {}))
    save_adapter(adapter, output, force=force)
    discard(folder)
    return ClassifierResult(
        adapter=adapter,
        history=tuple(history),
        accuracy_before=before,
        accuracy_after=after,
        evaluated=len(asked),
        held_out=bool(held_out),
        truncated_lines=read.truncated_lines,
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

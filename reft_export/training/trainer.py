"""One training run: a frozen base, interventions hooked onto it, the objective of its task, and transformers' Trainer for the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.load import Base, base_from_memory
from reft_export.training.checkpoints import StepRecord, best_step, discard, open_working_folder
from reft_export.training.distillation import teacher_answers
from reft_export.training.loop import Measure, OnEvaluation, OnStep, TrainedModel, run_loop
from reft_export.training.objective import Accuracy, Origin, Phase, Sample
from reft_export.training.preparation import Preparation, orthogonal_record, prepare
from reft_export.training.processes import agreed, join, leads, process_count
from reft_export.training.settings import SUBSPACES, TrainSettings
from reft_export.training.sources import Data
from reft_export.training.statistics import DataStatistics
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.errors import InputError
from runtimes.files.folders import claimed


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult:
    """What ``train`` gives back, beside the saved adapter."""

    adapter: Adapter
    history: tuple[StepRecord, ...]
    truncated_lines: tuple[str, ...]
    """File and line of every example that was cut to max_length: a completion, or a classifier's text."""
    samples_before: tuple[Sample, ...] = ()
    samples_after: tuple[Sample, ...] = ()
    """A decoder's answers."""
    accuracy: Accuracy | None = None
    """A classifier's."""
    statistics: DataStatistics
    """Of the data, as the model saw it."""
    kept: StepRecord
    """The step whose parameters were saved."""
    notes: tuple[str, ...] = ()
    """How the steps were computed, in words."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Of a distillation, its teacher's to lines of the data without one, by where they stand; a line of an empty one was left out."""


def train(
    base: Base | PreTrainedModel,
    data: Data,
    settings: TrainSettings,
    output: Path,
    *,
    eval_data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    head: bool | None = None,
    force: bool = False,
    start: Adapter | None = None,
    trained_on: str | None = None,
    orthogonal_to: Mapping[str, Adapter] | None = None,
    teacher: PreTrainedModel | None = None,
    on_ready: Callable[[Preparation], None] | None = None,
    on_step: OnStep | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_phase: Phase | None = None,
) -> TrainResult:
    """Trains interventions on a decoder or a classifier, and saves the adapter to ``output`` when it is done.

    ``base``: from ``load_base``, or a transformers model in memory, which comes with its ``tokenizer`` and is frozen from then on.
    ``data``: a JSONL file, several as if they were one, or its records in memory as dicts: prompt and completion, messages, text, or
    another of reft_export/training/forms.py; of a classifier text, label, and for a pair text_pair. ``eval_data``: held-out examples, in
    place of ``settings.eval_fraction``.

    The base stays as it is, in eval mode: its own dropout, where a config has one, is off, so the edit is trained on
    the model that is shipped. Load the base with ``settings.placement()``; ``device`` moves it, another ``dtype`` is
    refused. The same seed gives the same adapter, byte for byte, on a CPU. The process's random state is set by the
    seed.

    ``start``: an adapter to go on from (settings: ``settings_like``). ``trained_on``: digest of the bundle whose weights the base
    carries. ``orthogonal_to``: adapters by name whose edits the new ones do not interfere with at the sites that they share
    (reft_export/training/avoided.py has the formula); not with ``start``. ``teacher``: the float decoder; with it the loss is the
    divergence from what it says when ``start`` steers it. ``head``: whether a classifier's head is trained with the edit, which it is
    unless said otherwise.

    Raises InputError for settings, data or outputs that cannot be used, before anything is trained; ReftError where the
    loss is not finite or memory runs out; TrainingInterrupted on Ctrl-C, which leaves the last checkpoint, no adapter.

    Parameters are float32: of loreft R [r, D], W [r, D] and b [r] per site, r the rank and D the base's width. Losses are in nats per
    completion token, or per text of a classifier.

    Example::

        settings = TrainSettings(rank=4, layers="8-16", positions="f7+l7", epochs=6)
        dtype, device = settings.placement()
        base = load_base("base", dtype=dtype, device=device, require_tokenizer=True)
        result = train(base, Path("pirate.jsonl"), settings, Path("pirate"))
        print(result.history[-1].loss)

        # Or, with all of it in memory:
        records = [{"prompt": "How are you?", "completion": "Arr, never better!"}]
        train(model, records, settings, Path("pirate"), tokenizer=tokenizer)
    """
    phase = on_phase or (lambda _: None)
    join(settings.device)
    origin = Origin(start=start, trained_on=trained_on, teacher=teacher, head=head, orthogonal_to=orthogonal_to or {})
    with ExitStack() as held:
        agreed(lambda: held.enter_context(claimed(output, force=force)))
        ready = prepare(_base_of(base, tokenizer), data, settings, output, origin, eval_data=eval_data, force=force, phase=phase)
        answers, said = dict[str, str](), tuple[str, ...]()
        if ready.unanswered:
            asked = [each for each in (*ready.examples.training, *ready.examples.held_out) if each.where in ready.unanswered]
            with frozen(ready.base.model):
                answers = agreed(partial(teacher_answers, ready.base, asked, settings, phase))
            silent = [each.where for each in asked if not answers[each.where]]
            if {each.where for each in ready.read.examples} <= set(silent):
                raise InputError("with the system prompt the base says nothing to any line; give it another, or lines with answers")
            if silent:
                said = (
                    f"{len(silent)} of {len(asked)} prompts left out, to which the base says nothing with the system prompt: {silent[0]}",
                )
            ready = prepare(ready.base, data, settings, output, origin, eval_data=eval_data, answers=answers, force=force, phase=phase)
        if on_ready is not None:
            on_ready(ready)
        opened = agreed(lambda: open_working_folder(output, ready.run, resume=settings.resume, force=force))
        result = _train(ready, output, *opened, force=force, on_step=on_step, on_evaluation=on_evaluation, phase=phase)
        return replace(result, answers=answers, notes=(*said, *result.notes))


def _base_of(base: Base | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Base:
    if not isinstance(base, Base):
        return base_from_memory(base, tokenizer)
    if tokenizer is not None:
        raise InputError(f"tokenizer goes with a model in memory, and {base.info.name} is a Base, which has its own; leave it out")
    return base


def _train(
    ready: Preparation,
    output: Path,
    folder: Path,
    checkpoint: Path | None,
    *,
    force: bool,
    on_step: OnStep | None,
    on_evaluation: OnEvaluation | None,
    phase: Phase,
) -> TrainResult:
    base, objective, start = ready.base, ready.objective, ready.origin.start

    def loop(model: TrainedModel, measure: Measure | None) -> list[StepRecord]:
        return run_loop(model, base, ready.examples, objective.collate, ready.settings, folder, checkpoint, on_step, measure, on_evaluation)

    with frozen(base.model):
        outcome = objective.train(ready.interventions, ready.rule, ready.examples, loop, phase, ready.metric)
        record = (
            provenance(ready, outcome.history)
            | ({} if start is None else {"start": start.digest})
            | {**outcome.record}
            | orthogonal_record(ready.origin)
            | subspace_record(ready.settings)
        )
        adapter = ready.interventions.to_adapter(
            base.info, ready.rule, dtype=base.dtype, trained_on=ready.origin.trained_on, training=record, head=outcome.head
        )
        adapter = replace(adapter, probes=ready.probes)
        if leads():
            save_adapter(adapter, output, force=force)
            discard(folder)
        samples_after = objective.samples(ready.examples, phase, adapter) if leads() else ()
    return TrainResult(
        adapter=adapter,
        history=tuple(outcome.history),
        truncated_lines=ready.read.truncated_lines,
        statistics=ready.statistics,
        samples_before=outcome.samples_before,
        samples_after=samples_after,
        accuracy=outcome.accuracy,
        kept=kept_step(outcome.history, ready.settings),
        notes=outcome.notes,
    )


def subspace_record(settings: TrainSettings) -> dict[str, Any]:
    """The rows of R that each subspace has, by which ``import --subspace`` takes one out."""
    rows = settings.subspace_rows
    return {SUBSPACES: {name: [each.start, each.stop] for name, each in rows.items()}} if rows else {}


def kept_step(history: Sequence[StepRecord], settings: TrainSettings) -> StepRecord:
    """The one that ``settings.keep`` says."""
    return (best_step(history) if settings.keep == "best" else None) or history[-1]


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes a gradient and no dropout acts inside; afterwards both are as they were."""
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


def provenance(ready: Preparation, history: list[StepRecord]) -> dict[str, Any]:
    """What the adapter records of its training."""
    data, examples, kept = ready.read, ready.examples, kept_step(history, ready.settings)
    evaluated = [record.eval_loss for record in history if record.eval_loss is not None]
    return {
        "data": {
            "files": [asdict(each) for each in data.files],
            **({} if ready.held_out is None else {"eval_files": [asdict(each) for each in ready.held_out.files]}),
            "examples": len(examples.training),
            "held_out": len(examples.held_out),
            "truncated": len(data.truncated_lines),
            "chat_template": data.templated,
        },
        "settings": ready.settings.record(),
        "versions": versions(),
        "steps": len(history),
        **({"processes": process_count()} if process_count() > 1 else {}),
        "kept_step": kept.step,
        "kept_eval_loss": kept.eval_loss,
        **({} if kept.metric is None else {"kept_metric": kept.metric}),
        "final_loss": history[-1].loss,
        "final_eval_loss": evaluated[-1] if evaluated else None,
    }


def versions() -> dict[str, str]:
    """Of what trains."""
    try:
        own = metadata.version("reft-export")
    except metadata.PackageNotFoundError:
        own = "from source"
    return {"reft-export": own, "torch": torch.__version__, "transformers": transformers.__version__}

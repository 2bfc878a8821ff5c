"""One training run: a frozen base, interventions hooked onto it, the objective of its task, and transformers' Trainer for the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from reft_export.base.classifiers import check_head
from reft_export.base.load import DTYPES, Base, base_from_memory, check_device, move
from reft_export.base.token_rules import context_of
from reft_export.training.avoided import avoided
from reft_export.training.checkpoints import StepRecord, best_step, check_working_folder, discard, open_working_folder
from reft_export.training.classification import LabelObjective
from reft_export.training.data import Examples, TrainingData, split
from reft_export.training.forms import TEXT
from reft_export.training.generation import CompletionObjective
from reft_export.training.interventions import Interventions
from reft_export.training.loop import Measure, OnStep, TrainedModel, run_loop
from reft_export.training.objective import Accuracy, Objective, Origin, Phase, Sample, tokenizer_of
from reft_export.training.probes import probes_of
from reft_export.training.reporting import check_reporting
from reft_export.training.settings import LOSS, TrainSettings
from reft_export.training.sources import Data
from reft_export.training.statistics import DataStatistics, Run, marked, statistics_of
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.positions import PositionRule, slots
from runtimes.edits.probes import Probe, spread
from runtimes.errors import InputError
from runtimes.files.folders import check_destination, claimed

OBJECTIVES: Mapping[str, Callable[[Base, TrainSettings, Origin], Objective[Any]]] = {
    TEXT_GENERATION: CompletionObjective,
    TEXT_CLASSIFICATION: LabelObjective,
}
"""By the base's task."""


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
    origin = Origin(start=start, trained_on=trained_on, teacher=teacher, head=head, orthogonal_to=orthogonal_to or {})
    with claimed(output, force=force):
        ready = prepare(_base_of(base, tokenizer), data, settings, output, origin, eval_data=eval_data, force=force, phase=phase)
        if on_ready is not None:
            on_ready(ready)
        folder, checkpoint = open_working_folder(output, ready.run, resume=settings.resume, force=force)
        return _train(ready, output, folder, checkpoint, force=force, on_step=on_step, phase=phase)


def _base_of(base: Base | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Base:
    if not isinstance(base, Base):
        return base_from_memory(base, tokenizer)
    if tokenizer is not None:
        raise InputError(f"tokenizer goes with a model in memory, and {base.info.name} is a Base, which has its own; leave it out")
    return base


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """A run that was checked before anything is trained or written."""

    base: Base
    settings: TrainSettings
    origin: Origin
    objective: Objective[Any]
    interventions: Interventions
    rule: PositionRule
    read: TrainingData[Any]
    examples: Examples[Any]
    held_out: TrainingData[Any] | None = None
    """Held-out data of its own, where the run has some."""
    metric: Any = None
    """What held-out examples are measured by, beside their loss."""
    run: dict[str, Any]
    """What the run's checkpoints belong to."""
    probes: tuple[Probe, ...] = ()
    """What the adapter will carry."""

    @cached_property
    def statistics(self) -> DataStatistics:
        return statistics_of(self.examples.training, self.examples.held_out, self.rule, tokenizer_of(self.base))

    def marked(self, count: int) -> list[tuple[Run, ...]]:
        """``count`` training examples, spread over the data, by what is edited and what is trained."""
        chosen = (self.examples.training[index] for index in spread(len(self.examples.training), count))
        return [marked(example, self.rule, tokenizer_of(self.base)) for example in chosen]


def prepare(
    base: Base,
    data: Data,
    settings: TrainSettings,
    output: Path,
    origin: Origin = Origin(),
    *,
    eval_data: Data | None = None,
    force: bool = False,
    phase: Phase = lambda _: None,
) -> Preparation:
    """Every check of ``train``, every line of the data included; the base's model may lie on torch's meta device."""
    check_destination(output, force=force)
    tokenizer_of(base)
    check_reporting(settings.report_to)
    objective = OBJECTIVES[base.task](base, settings, origin)
    place(base, settings)
    interventions, rule = _interventions(base, settings, origin)
    context = context_of(base)
    if (settings.max_length or 0) > context:
        raise InputError(f"max_length is {settings.max_length}; {objective.limit(context)}")
    phase("reading the data")
    read = objective.read(data, settings.max_length or context)
    check_positions(read, rule)
    held_out = None if eval_data is None else _held_out(eval_data, read, rule, settings, objective, context)
    training, rest = split(read.examples, settings.eval_fraction, settings.seed)
    examples = Examples(training=training, held_out=rest if held_out is None else list(held_out.examples))
    if not examples.held_out and (settings.metric != LOSS or settings.patience is not None):
        needs = "patience" if settings.metric == LOSS else f"metric {settings.metric}"
        raise InputError(f"{needs} is of held-out examples, and there are none; give eval_data, or eval_fraction")
    held_out_data = data if eval_data is None else eval_data
    run = {
        **settings.record(),
        "data": read.digest,
        **({} if held_out is None else {"eval_data": held_out.digest}),
        "base": base.info.fingerprint,
        "base_dtype": base.dtype,
        "start": None if origin.start is None else origin.start.digest,
        "trained_on": origin.trained_on,
        **objective.record(),
        **_others(origin),
    }
    check_working_folder(output, run, resume=settings.resume, force=force)
    return Preparation(
        base=base,
        settings=settings,
        origin=origin,
        objective=objective,
        interventions=interventions,
        rule=rule,
        read=read,
        examples=examples,
        run=run,
        held_out=held_out,
        metric=objective.metric(examples, held_out_data),
        probes=probes_of(held_out_data if examples.held_out else data, examples.shown, settings.probes, objective.as_probe()),
    )


def _held_out(
    data: Data, trained: TrainingData[Any], rule: PositionRule, settings: TrainSettings, objective: Objective[Any], context: int
) -> TrainingData[Any]:
    """Data of its own in place of a share of the training data; raises InputError for what says nothing of the training."""
    if settings.eval_fraction:
        raise InputError("eval_data is in place of eval_fraction; leave one of them out")
    if not isinstance(data, (str, Path)) and not len(data):
        raise InputError("eval_data has no examples; give some, or leave it out")
    read = objective.read(data, settings.max_length or context)
    kinds = [{each.form == TEXT for each in one.examples} for one in (trained, read)]
    if not kinds[1] <= kinds[0]:
        one = next(example for example in read.examples if (example.form == TEXT) not in kinds[0])
        other = trained.examples[0]
        raise InputError(f"{one.where} is {one.form}, and what is trained on is {other.form}: its loss says nothing of the training")
    check_positions(read, rule)
    return read


def _others(origin: Origin) -> dict[str, Any]:
    """What a run and its adapter record of the adapters that the edit is orthogonal to; nothing where there are none."""
    return {"orthogonal_to": {name: a.digest for name, a in origin.orthogonal_to.items()}} if origin.orthogonal_to else {}


def _interventions(base: Base, settings: TrainSettings, origin: Origin) -> tuple[Interventions, PositionRule]:
    """What is trained, by the seed's initial values or those of the started adapter, and at which positions."""
    start, sites = origin.start, settings.sites(base.info.num_hidden_layers)
    if start is not None and origin.orthogonal_to:
        raise InputError(
            "a started adapter is not orthogonal to others, and going on with it would be another one; leave out one of the two"
        )
    spaces = avoided(origin.orthogonal_to, sites, settings.method, settings.rank, base.info.hidden_size)
    set_seed(settings.seed)
    interventions = Interventions(
        method=settings.method,
        rank=settings.rank,
        sites=sites,
        width=base.info.hidden_size,
        tied=settings.tied,
        activation=settings.activation,
        dropout=settings.dropout,
        avoided=spaces,
    )
    if start is None:
        if settings.init == "identity":
            interventions.start_without_edit()
        return interventions, settings.rule
    check_head(start, base.model)
    interventions.start_from(start)
    return interventions, replace(settings.rule, truncate=start.positions.truncate)  # the grammar of positions does not say it


def _train(
    ready: Preparation, output: Path, folder: Path, checkpoint: Path | None, *, force: bool, on_step: OnStep | None, phase: Phase
) -> TrainResult:
    base, objective, start = ready.base, ready.objective, ready.origin.start

    def loop(model: TrainedModel, measure: Measure | None) -> list[StepRecord]:
        return run_loop(model, base, ready.examples, objective.collate, ready.settings, folder, checkpoint, on_step, measure)

    with frozen(base.model):
        outcome = objective.train(ready.interventions, ready.rule, ready.examples, loop, phase, ready.metric)
        record = (
            provenance(ready, outcome.history)
            | ({} if start is None else {"start": start.digest})
            | {**outcome.record}
            | _others(ready.origin)
        )
        adapter = ready.interventions.to_adapter(
            base.info, ready.rule, dtype=base.dtype, trained_on=ready.origin.trained_on, training=record, head=outcome.head
        )
        adapter = replace(adapter, probes=ready.probes)
        save_adapter(adapter, output, force=force)
        discard(folder)
        samples_after = objective.samples(ready.examples, phase, adapter)
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


def kept_step(history: Sequence[StepRecord], settings: TrainSettings) -> StepRecord:
    """The one that ``settings.keep`` says."""
    return (best_step(history) if settings.keep == "best" else None) or history[-1]


def place(base: Base, settings: TrainSettings) -> torch.device:
    """Where the base is trained on, after moving it there; InputError for another dtype than asked for, and a second GPU."""
    if settings.dtype != "auto" and base.model.dtype != DTYPES[settings.dtype]:
        raise InputError(f"the base is loaded in {base.dtype}, the settings ask for {settings.dtype}; load it in that dtype")
    if settings.device != "auto":
        check_device(settings.device)
        if base.model.device.type != "meta":  # of a dry run
            move(base.model, settings.device)
    if base.model.device.type == "cuda" and base.model.device.index:
        raise InputError(f"the base is on {base.model.device}; train on the first GPU, chosen with CUDA_VISIBLE_DEVICES")
    return base.model.device


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


def check_positions(data: TrainingData[Any], rule: PositionRule) -> None:
    """An example of which no token is edited would train nothing, and a batch of such has no gradient at all."""
    reached: dict[int, bool] = {}
    for example in data.examples:
        n = example.prompt_length
        if n not in reached:
            reached[n] = bool((slots(rule, np.ones((1, n)), n, prompt_length=np.array([n])) >= 0).any())
        if not reached[n]:
            raise InputError(
                f"{example.where}: the prompt has {n} token, and positions {rule} edit none of it (each end "
                "gets at most half of the prompt); lengthen the prompt, or use positions prompt"
            )


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
        "versions": {
            "reft-export": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": len(history),
        "kept_step": kept.step,
        "kept_eval_loss": kept.eval_loss,
        **({} if kept.metric is None else {"kept_metric": kept.metric}),
        "final_loss": history[-1].loss,
        "final_eval_loss": evaluated[-1] if evaluated else None,
    }


def _own_version() -> str:
    try:
        return metadata.version("reft-export")
    except metadata.PackageNotFoundError:
        return "from source"

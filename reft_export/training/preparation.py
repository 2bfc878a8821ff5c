"""What is checked before anything is trained or written: base, settings, every line of the data, and where the output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from reft_export.base.classifiers import check_head
from reft_export.base.load import DTYPES, Base, check_device, move
from reft_export.base.token_rules import context_of
from reft_export.training.avoided import avoided
from reft_export.training.checkpoints import check_working_folder
from reft_export.training.classification import LabelObjective
from reft_export.training.data import Examples, TrainingData, split
from reft_export.training.distillation import DistillationObjective
from reft_export.training.distilled_data import answered, unanswered
from reft_export.training.forms import TEXT
from reft_export.training.generation import CompletionObjective
from reft_export.training.interchange import InterchangeObjective
from reft_export.training.interventions import Interventions
from reft_export.training.objective import Objective, Origin, Phase, tokenizer_of
from reft_export.training.preference import PreferenceObjective
from reft_export.training.probes import probes_of
from reft_export.training.processes import process_count
from reft_export.training.reporting import check_reporting
from reft_export.training.settings import INTERCHANGE, LOSS, SFT, TrainSettings
from reft_export.training.sources import Data, Lines, Rewritten
from reft_export.training.statistics import DataStatistics, Run, marked, statistics_of
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.positions import Positions, RuleSets, marks_of, of_rules, slots
from runtimes.edits.probes import Probe, spread
from runtimes.errors import InputError
from runtimes.files.folders import check_destination


def _of_decoder(base: Base, settings: TrainSettings, origin: Origin) -> Objective[Any]:
    if settings.objective == INTERCHANGE:
        return InterchangeObjective(base, settings, origin)
    if settings.objective != SFT:
        return PreferenceObjective(base, settings, origin)
    return (DistillationObjective if settings.distill_system else CompletionObjective)(base, settings, origin)


OBJECTIVES: Mapping[str, Callable[[Base, TrainSettings, Origin], Objective[Any]]] = {
    TEXT_GENERATION: _of_decoder,
    TEXT_CLASSIFICATION: LabelObjective,
}
"""By the base's task."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """A run that was checked before anything is trained or written."""

    base: Base
    settings: TrainSettings
    origin: Origin
    objective: Objective[Any]
    interventions: Interventions
    rule: Positions
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
    unanswered: frozenset[str] = frozenset()
    """Where the lines stand that a distillation's teacher is to answer."""

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
    answers: Mapping[str, str] | None = None,
    force: bool = False,
    phase: Phase = lambda _: None,
) -> Preparation:
    """Every check of ``train``, every line of the data included; the base's model may lie on torch's meta device. ``answers``: of a
    distillation, those of its teacher to lines without one, by where they stand; None: they are still to come."""
    check_destination(output, force=force)
    tokenizer_of(base)
    check_reporting(settings.report_to)
    if process_count() > settings.batch_size:
        raise InputError(
            f"a step has {settings.batch_size} examples for {process_count()} processes; raise the batch size, or start fewer processes"
        )
    objective = OBJECTIVES[base.task](base, settings, origin)
    place(base, settings)
    interventions, rule = interventions_of(base, settings, origin)
    context = context_of(base)
    if (settings.max_length or 0) > context:
        raise InputError(f"max_length is {settings.max_length}; {objective.limit(context)}")
    phase("reading the data")
    lines: Lines = data
    held_out_lines: Lines | None = eval_data
    missing = set[str]()
    if settings.distill_system:
        lines = answered(data, answers)
        held_out_lines = None if eval_data is None else answered(eval_data, answers, called="eval_data")
        missing = unanswered(lines) | (set() if held_out_lines is None else unanswered(held_out_lines))
    read = objective.read(lines, settings.max_length or context)
    check_positions(read, rule)
    objective.check_positions(read, rule)
    held_out = None if held_out_lines is None else _held_out(held_out_lines, read, rule, settings, objective, context)
    training, rest = split(read.examples, settings.eval_fraction, settings.seed)
    examples = Examples(training=training, held_out=rest if held_out is None else list(held_out.examples))
    if not examples.held_out and (settings.metric != LOSS or settings.patience is not None):
        needs = "patience" if settings.metric == LOSS else f"metric {settings.metric}"
        raise InputError(f"{needs} is of held-out examples, and there are none; give eval_data, or eval_fraction")
    held_out_data = lines if held_out_lines is None else held_out_lines
    run = {
        **settings.record(),
        "data": read.digest,
        **({} if held_out is None else {"eval_data": held_out.digest}),
        "base": base.info.fingerprint,
        "base_dtype": base.dtype,
        "start": None if origin.start is None else origin.start.digest,
        "trained_on": origin.trained_on,
        **objective.record(),
        **orthogonal_record(origin),
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
        unanswered=frozenset(missing),
        probes=probes_of(held_out_data if examples.held_out else lines, examples.shown, settings.probes, objective.as_probe()),
    )


def _held_out(
    data: Lines, trained: TrainingData[Any], rule: Positions, settings: TrainSettings, objective: Objective[Any], context: int
) -> TrainingData[Any]:
    """Data of its own in place of a share of the training data; raises InputError for what says nothing of the training."""
    if settings.eval_fraction:
        raise InputError("eval_data is in place of eval_fraction; leave one of them out")
    if not isinstance(data, (str, Path, Rewritten)) and not len(data):
        raise InputError("eval_data has no examples; give some, or leave it out")
    read = objective.read(data, settings.max_length or context)
    kinds = [{each.form == TEXT for each in one.examples} for one in (trained, read)]
    if not kinds[1] <= kinds[0]:
        one = next(example for example in read.examples if (example.form == TEXT) not in kinds[0])
        other = trained.examples[0]
        raise InputError(f"{one.where} is {one.form}, and what is trained on is {other.form}: its loss says nothing of the training")
    check_positions(read, rule)
    objective.check_positions(read, rule)
    return read


def orthogonal_record(origin: Origin) -> dict[str, Any]:
    """What a run and its adapter record of the adapters that the edit is orthogonal to; nothing where there are none."""
    return {"orthogonal_to": {name: a.digest for name, a in origin.orthogonal_to.items()}} if origin.orthogonal_to else {}


def interventions_of(base: Base, settings: TrainSettings, origin: Origin) -> tuple[Interventions, Positions]:
    """What is trained, by the seed's initial values or those of the started adapter, and at which positions."""
    start, forms = origin.start, settings.forms(base.info.num_hidden_layers)
    if start is not None and origin.orthogonal_to:
        raise InputError(
            "a started adapter is not orthogonal to others, and going on with it would be another one; leave out one of the two"
        )
    spaces = avoided(origin.orthogonal_to, forms, base.info.hidden_size)
    rules = settings.rules(base.info.num_hidden_layers)
    if start is not None:  # the grammar of positions does not say it
        rules = {site: replace(rule, truncate=start.site_rules.get(site, start.positions).truncate) for site, rule in rules.items()}
    where = of_rules(rules.values(), tied=settings.tied)
    set_seed(settings.seed)
    interventions = Interventions(
        forms,
        width=base.info.hidden_size,
        tied=settings.tied,
        dropout=settings.dropout,
        avoided=spaces,
        rules=rules if isinstance(where, RuleSets) else None,
        subspaces=tuple(settings.subspace_rows.values()),
    )
    if start is None:
        if settings.init == "identity":
            interventions.start_without_edit()
        return interventions, where
    check_head(start, base.model)
    interventions.start_from(start)
    return interventions, where


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


def check_positions(data: TrainingData[Any], rule: Positions) -> None:
    """An example of which no token is edited would train nothing, and a batch of such has no gradient at all."""
    reached: dict[tuple[int, tuple[int, ...]], bool] = {}
    for example in data.examples:
        n = example.prompt_length
        key = (n, example.marks)
        if key not in reached:
            marks = marks_of([example.marks])
            reached[key] = bool((slots(rule, np.ones((1, n)), n, prompt_length=np.array([n]), marks=marks) >= 0).any())
        if not reached[key]:
            raise InputError(
                f"{example.where}: the prompt has {n} token, and positions {rule} edit none of it (each end "
                "gets at most half of the prompt); lengthen the prompt, or use positions prompt"
            )

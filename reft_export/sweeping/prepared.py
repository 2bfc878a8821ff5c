"""What is checked before a sweep computes anything: base, candidates, and every line of the data."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.load import Base, base_from_memory
from reft_export.sweeping.costs import edited_tokens
from reft_export.sweeping.first_pass import FirstPass, look
from reft_export.sweeping.folder import trial_folder
from reft_export.sweeping.settings import SweepSettings
from reft_export.training.objective import Phase
from reft_export.training.preparation import Preparation, check_positions, prepare
from reft_export.training.processes import process_count
from reft_export.training.sources import Data
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What was checked before the base computes anything."""

    base: Base
    data: Data
    eval_data: Data | None
    settings: SweepSettings
    ready: Preparation
    trained_on: str | None

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What a study's trials have in common with each other and with no other study's."""
        run = self.ready.run
        kept = {name: run[name] for name in ("base", "base_dtype", "data", "eval_data", "trained_on") if name in run}
        return {**kept, **self.settings.record()}

    @cached_property
    def edited(self) -> dict[str, float]:
        """By positions, the tokens of an example that are edited."""
        examples = [*self.ready.examples.training, *self.ready.examples.held_out]
        return {each: edited_tokens(each, examples) for each in self.settings.space.positions}

    def first_pass(self, report: Phase = lambda _: None) -> FirstPass:
        return look(self.base, self.ready.examples.training, self.settings, report)


def prepare_sweep(
    base: Base | PreTrainedModel,
    data: Data,
    settings: SweepSettings,
    output: Path | None = None,
    *,
    eval_data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trained_on: str | None = None,
    report: Phase = lambda _: None,
) -> Prepared:
    """Every check of ``sweep``: base, candidates, every line of the data. ``output``: None of a first pass alone, which writes nothing."""
    if process_count() > 1:
        raise InputError(f"one process trains a trial, and this is one of {process_count()}; start the command several times, unlaunched")
    base = base if isinstance(base, Base) else base_from_memory(base, tokenizer)
    if base.task != TEXT_GENERATION:
        raise InputError(f"{base.info.name} is a classifier, and sweep searches a decoder's adapter; train one for it")
    space = settings.space.of_depth(base.info.num_hidden_layers)
    if max(space.ranks) > base.info.hidden_size:
        raise InputError(f"rank {max(space.ranks)} does not fit this base; use 1 to its width {base.info.hidden_size}")
    first = replace(settings.training, positions=space.positions[0])
    place = trial_folder(Path(tempfile.gettempdir()) / "reft-export-sweep" if output is None else output, 0)
    ready = prepare(base, data, first, place, eval_data=eval_data, force=True, phase=report)
    if not ready.examples.held_out:
        raise InputError("trials are told apart by held-out examples, and there are none; give eval_data, or eval_fraction")
    for each in space.positions:
        for read in filter(None, (ready.read, ready.held_out)):
            check_positions(read, PositionRule.parse(each))
    return Prepared(base=base, data=data, eval_data=eval_data, settings=settings, ready=ready, trained_on=trained_on)

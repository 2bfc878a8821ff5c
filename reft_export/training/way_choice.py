"""Which way the steps of a run are computed: by its positions and examples the fastest one that agrees with the plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from reft_export.base.load import DTYPES, Base
from reft_export.base.token_rules import pad_token
from reft_export.console import size
from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, Examples, collate
from reft_export.training.frozen_prefix import PrefixStore, Tokens, frozen_of
from reft_export.training.interventions import Interventions
from reft_export.training.objective import Phase
from reft_export.training.settings import TrainSettings
from reft_export.training.ways import Batch, Way, Ways, difference
from runtimes.edits.positions import Positions
from runtimes.generation import PAD

LEAST_SHARE = 0.25
"""Of all tokens before the first edited ones from which on two forwards a step cost less than one."""
LEAST_PASSES = 2.0
"""Over the examples from which on keeping their prefixes pays."""


@dataclass(frozen=True, kw_only=True)
class PrefixPlan:
    """What is known of the frozen prefixes before the base is there."""

    tokens: int
    """In all examples, held-out ones included."""
    prefix: int
    """Of these before the first edited one of their row."""
    splits: bool
    """They are worth a forward of their own."""
    kept: bool
    """They are kept from epoch to epoch."""


def plan_prefixes(rule: Positions, examples: Examples[Example], settings: TrainSettings) -> PrefixPlan:
    every = [*examples.training, *examples.held_out]
    counts = [frozen_of(rule, example) for example in every]
    tokens, prefix = sum(len(example.input_ids) for example in every), sum(counts)
    splits = min(counts) > 0 and prefix >= LEAST_SHARE * tokens
    kept = splits and passes_over(examples, settings) >= LEAST_PASSES and settings.cache_mb > 0
    return PrefixPlan(tokens=tokens, prefix=prefix, splits=splits, kept=kept)


def passes_over(examples: Examples[Any], settings: TrainSettings) -> float:
    """How often a run sees each example."""
    seen = (settings.max_steps or 0) * settings.batch_size * settings.gradient_accumulation
    return seen / len(examples.training) if settings.max_steps else float(settings.epochs)


def choose_way(
    base: Base,
    interventions: Interventions,
    steering: Steering,
    rule: Positions,
    examples: Examples[Example],
    settings: TrainSettings,
    phase: Phase,
) -> tuple[Way, tuple[str, ...]]:
    """(the way, what is to be said of it)."""
    model, plan = base.model, plan_prefixes(rule, examples, settings)
    ways = Ways(head=CountedHead(model), steering=steering, rule=rule)
    pad = pad_token(base)
    pad = PAD if pad is None else pad
    batch = _tried(model, examples, rule, pad, min(settings.batch_size, 2))
    parameters = [p for p in interventions.parameters() if p.requires_grad]
    training = interventions.training
    interventions.eval()  # no dropout: both ways are to give the same
    try:
        notes: list[str] = []
        if plan.splits:
            phase("trying the prompts' unedited tokens apart")
            store = PrefixStore(ways.head, steering, dtype=_stored(model, settings), pad_token_id=pad)
            exact = PrefixStore(ways.head, steering, dtype=model.dtype, pad_token_id=pad)
            differs = difference(ways.behind_prefix(exact), ways.plain, batch, parameters, model.dtype)
            if differs is None:
                said = f"{plan.prefix} of {plan.tokens} tokens stand before the first edited one and are computed without a graph"
                if plan.kept:
                    _keep(store, rule, examples, settings, phase)
                    said += f"; those of {len(store)} prompts once, kept in {size(store.size)}"
                return ways.behind_prefix(store), (said,)
            notes.append(f"every token is computed in every step: apart from the others, the unedited ones gave {differs}")
        differs = difference(ways.counted, ways.plain, batch, parameters, model.dtype)
        if differs is None:
            return ways.counted, tuple(notes)
        return ways.plain, (*notes, f"every logit is computed: on the counted tokens alone, the head gave {differs}")
    except torch.OutOfMemoryError:
        return ways.plain, ("every token and logit is computed: there was no memory to try another way",)
    finally:
        interventions.train(training)


def _stored(model: PreTrainedModel, settings: TrainSettings) -> torch.dtype:
    return model.dtype if settings.cache_dtype == "auto" else DTYPES[settings.cache_dtype]


def _tried(model: PreTrainedModel, examples: Examples[Example], rule: Positions, pad: int, rows: int) -> Batch:
    """The examples with the most and the fewest frozen tokens, or the first alone: always the same, so that a resumed run finds the same
    way."""
    by_prefix = sorted(examples.training, key=lambda example: (frozen_of(rule, example), len(example.input_ids)))
    chosen = [by_prefix[-1], by_prefix[0]][:rows]
    return Batch.of(collate(chosen, pad_token_id=pad), model.device)


def _keep(store: PrefixStore, rule: Positions, examples: Examples[Example], settings: TrainSettings, phase: Phase) -> None:
    prefixes: Sequence[Tokens] = [example.input_ids[: frozen_of(rule, example)] for example in (*examples.training, *examples.held_out)]
    phase(f"computing the unedited tokens of {len(prefixes)} prompts")
    store.keep(prefixes, limit=int(settings.cache_mb * 1e6), group=settings.batch_size)

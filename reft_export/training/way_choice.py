"""Which way the steps of a run are computed: by its positions and examples the fastest one that agrees with the plain one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_export.base.load import DTYPES, Base
from reft_export.base.token_rules import pad_token
from reft_export.console import size
from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, Examples, collate
from reft_export.training.frozen_layers import LayerStore, Row, frozen_layers
from reft_export.training.frozen_prefix import PrefixStore, frozen_of
from reft_export.training.interventions import Interventions
from reft_export.training.kept_states import Tokens
from reft_export.training.objective import Phase
from reft_export.training.real_tokens import RealTokens
from reft_export.training.settings import TrainSettings
from reft_export.training.ways import Batch, Way, Ways, difference
from runtimes.edits.edit import Site
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


def kept_layers(sites: Iterable[Site], examples: Examples[Any], settings: TrainSettings) -> int:
    """The layers whose output is computed once of each example; 0: none, or every step computes them."""
    return frozen_layers(sites) if passes_over(examples, settings) >= LEAST_PASSES and settings.cache_mb > 0 else 0


HEAD, REAL, LAYERS, PREFIX = "head", "real", "layers", "prefix"
"""What a way can leave out: logits, pads, layers below the first edit, tokens before it."""
COMPUTED = {
    HEAD: "every logit is computed: on the counted tokens alone, the head gave",
    REAL: "pads are computed, too: on the real tokens alone, the layers gave",
    LAYERS: "every layer is computed in every step: behind those below the first edit, the others gave",
    PREFIX: "every token is computed in every step: apart from the others, the unedited ones gave",
}


def choose_way(
    base: Base,
    interventions: Interventions,
    steering: Steering,
    real: RealTokens,
    rule: Positions,
    examples: Examples[Example],
    settings: TrainSettings,
    phase: Phase,
) -> tuple[Way, tuple[str, ...]]:
    """(the way, what is to be said of it). ``real``: the handle of the base's modules."""
    model, plan, layers = base.model, plan_prefixes(rule, examples, settings), kept_layers(interventions.sites, examples, settings)
    head, pad = CountedHead(model), pad_token(base)
    pad = PAD if pad is None else pad
    tried = _tried(examples, rule, min(settings.batch_size, 2))
    batch = Batch.of(collate(tried, pad_token_id=pad), model.device)
    parameters = [p for p in interventions.parameters() if p.requires_grad]
    plain = Ways(head=head, steering=steering, rule=rule).plain

    def way_of(parts: Sequence[str], dtype: torch.dtype) -> tuple[Way, PrefixStore | None, LayerStore | None]:
        below = LayerStore(model, steering, layers, dtype=dtype, pad_token_id=pad) if LAYERS in parts else None
        before = PrefixStore(head, steering, dtype=dtype, pad_token_id=pad) if PREFIX in parts else None
        ways = Ways(head=head, steering=steering, rule=rule, real=real if REAL in parts else None, layers=below)
        return (ways.counted if before is None else ways.behind_prefix(before)), before, below

    def differs(parts: Sequence[str]) -> str | None:
        way, before, below = way_of(parts, model.dtype)

        def behind_kept(batch: Batch) -> Tensor:
            if below is not None:
                below.keep(_rows(tried, rule if before is not None else None), limit=math.inf, group=len(tried))
            return way(batch)

        return difference(behind_kept, plain, batch, parameters, model.dtype)

    wanted = [HEAD, REAL, *([LAYERS] if layers else []), *([PREFIX] if plan.splits else [])]
    training = interventions.training
    interventions.eval()  # no dropout: both ways are to give the same
    try:
        phase("trying to leave out of a step what its loss does not need")
        parts, notes = _agreed(wanted, differs)
        if HEAD not in parts:
            return plain, tuple(notes)
        way, before, below = way_of(parts, _stored(model, settings))
        if below is not None:  # first: a hidden state a token, beside a prefix's keys and values of every layer
            _keep_layers(below, rule if before is not None else None, examples, settings, phase)
            of = "the layer" if layers == 1 else f"the {layers} layers"
            notes.append(f"what {of} below the first edit put out is computed once of {len(below)} examples, kept in {size(below.size)}")
        if before is not None:
            said = f"{plan.prefix} of {plan.tokens} tokens stand before the first edited one and are computed without a graph"
            if plan.kept:
                _keep(before, rule, examples, settings, phase, used=0 if below is None else below.size)
                said += f"; those of {len(before)} prompts once, kept in {size(before.size)}"
            notes.insert(0, said)
        return way, tuple(notes)
    except torch.OutOfMemoryError:
        return plain, ("every token and logit is computed: there was no memory to try another way",)
    finally:
        interventions.train(training)


def _agreed(wanted: Sequence[str], differs: Callable[[Sequence[str]], str | None]) -> tuple[Sequence[str], list[str]]:
    """(what agrees with the plain way, what is to be said of the others): all at once, else one after the other."""
    if differs(wanted) is None:
        return wanted, []
    parts, notes = list[str](), list[str]()
    for part in wanted:
        gave = differs([*parts, part])
        if gave is None:
            parts.append(part)
            continue
        notes.append(f"{COMPUTED[part]} {gave}")
        if part == HEAD:  # which the others build on
            break
    return parts, notes


def _stored(model: PreTrainedModel, settings: TrainSettings) -> torch.dtype:
    return model.dtype if settings.cache_dtype == "auto" else DTYPES[settings.cache_dtype]


def _tried(examples: Examples[Example], rule: Positions, rows: int) -> Sequence[Example]:
    """The examples with the most and the fewest frozen tokens, or the first alone: always the same, so that a resumed run finds the same
    way."""
    by_prefix = sorted(examples.training, key=lambda example: (frozen_of(rule, example), len(example.input_ids)))
    return [by_prefix[-1], by_prefix[0]][:rows]


def _keep(store: PrefixStore, rule: Positions, examples: Examples[Example], settings: TrainSettings, phase: Phase, *, used: int) -> None:
    """``used``: bytes of the memory that is allowed."""
    prefixes: Sequence[Tokens] = [example.input_ids[: frozen_of(rule, example)] for example in (*examples.training, *examples.held_out)]
    phase(f"computing the unedited tokens of {len(prefixes)} prompts")
    store.keep(prefixes, limit=int(settings.cache_mb * 1e6) - used, group=settings.batch_size)


def _keep_layers(store: LayerStore, rule: Positions | None, examples: Examples[Example], settings: TrainSettings, phase: Phase) -> None:
    """``rule``: as of ``_rows``."""
    rows = _rows((*examples.training, *examples.held_out), rule)
    phase(f"computing the layers below the first edit, of {len(rows)} examples")
    store.keep(rows, limit=int(settings.cache_mb * 1e6), group=settings.batch_size)


def _rows(examples: Iterable[Example], rule: Positions | None) -> list[Row]:
    """``rule``: of a way behind prefixes, which asks for the tokens from the first edited one on."""
    return [(example.input_ids, 0 if rule is None else frozen_of(rule, example)) for example in examples]

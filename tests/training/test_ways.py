"""Every faster way of a training step gives the plain one's loss and gradients, in every family that takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.bases import build_base
from transformers import PreTrainedModel

from reft_export.eager.steering import steer
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, collate
from reft_export.training.frozen_layers import LayerStore, frozen_layers
from reft_export.training.frozen_prefix import PrefixStore, frozen_tokens
from reft_export.training.interventions import Interventions
from reft_export.training.real_tokens import on_real_tokens
from reft_export.training.reference import rows_of
from reft_export.training.ways import Batch, Way, Ways, loss_of
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.form import one_form
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule, slots

LENGTHS = ((9, 3), (4, 1), (14, 5))
"""Tokens of prompts and completions."""
Built = Callable[[str], PreTrainedModel]


def batch_of(lengths: tuple[tuple[int, int], ...], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    examples = [Example(input_ids=tuple(random.integers(0, 256, p + c).tolist()), prompt_length=p, line=1, where="") for p, c in lengths]
    return Batch(**collate(examples, pad_token_id=258))


def interventions_of(model: PreTrainedModel, **form: object) -> Interventions:
    torch.manual_seed(1)
    stated: dict = {"method": "loreft", "rank": 2, "sites": (Site(layer=0), Site(layer=2))} | form
    tied = stated.pop("tied", True)
    made = Interventions(one_form(**stated), width=model.config.hidden_size, tied=tied)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # RED's initial values edit nothing
    return made


def measured(way: Way, batch: Batch, interventions: Interventions) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = list(interventions.parameters())
    loss = loss_of(way(batch), batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])


def check(model: PreTrainedModel, rule: PositionRule, batch: Batch, interventions: Interventions, *, kept: int = 0) -> None:
    edits = steer(model, interventions.edits(), rule=rule, tied=interventions.tied)
    with edits as steering, on_real_tokens(model) as real:
        ways = Ways(head=CountedHead(model), steering=steering, rule=rule)
        loss, gradients = measured(ways.plain, batch, interventions)
        others: dict[str, Way] = {"counted": ways.counted, "real": replace(ways, real=real).counted}
        spared = replace(ways, real=real)
        if layers := frozen_layers(interventions.sites):
            below = LayerStore(model, steering, layers, dtype=torch.float32, pad_token_id=258)
            rows = rows_of(batch)
            below.keep([(tokens, 0) for tokens, _ in rows][:kept], limit=10**9, group=2)
            assert len(below) == len({tokens for tokens, _ in rows[:kept]})
            spared = replace(ways, real=real, layers=below)
            others |= {"layers": replace(ways, layers=below).counted, "real and layers": spared.counted}
        if min(frozen_tokens(rule, n, n - 1) for n in batch.prompt_length.tolist()):
            store = PrefixStore(ways.head, steering, dtype=torch.float32, pad_token_id=258)
            prefixes = [
                tuple(row[: frozen_tokens(rule, n, n - 1)])
                for row, n in zip(batch.input_ids.tolist(), batch.prompt_length.tolist(), strict=True)
            ]
            store.keep(prefixes[:kept], limit=10**9, group=2)
            assert len(store) == len(set(prefixes[:kept]))
            if layers:
                starts = [(tokens, len(prefix)) for (tokens, _), prefix in zip(rows_of(batch), prefixes, strict=True)]
                below.keep(starts, limit=10**9, group=2)
                assert below.saves(starts)
            others |= {"behind prefix": ways.behind_prefix(store), "all of it": spared.behind_prefix(store)}
        for name, way in others.items():
            got, found = measured(way, batch, interventions)
            assert abs(got - loss) <= 1e-6 * abs(loss), name
            assert (found - gradients).norm() <= 1e-5 * gradients.norm(), name


@pytest.mark.parametrize("positions", ["l1", "l3", "f2+l2", "all"])
def test_ways_agree_in_every_family(tiny: Built, family: str, positions: str) -> None:
    model = tiny(family).requires_grad_(False)
    check(model, PositionRule.parse(positions), batch_of(LENGTHS), interventions_of(model), kept=2)


@st.composite
def runs(draw: st.DrawFn) -> tuple[PositionRule, Batch, dict[str, object]]:
    method = draw(st.sampled_from(sorted(METHODS)))
    rule = PositionRule.parse(draw(st.sampled_from(["l1", "l2", "l5", "f1+l2", "f3", "prompt", "all"])))
    layers = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True))
    streams = draw(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=2, unique=True))
    form = {
        "method": method,
        "rank": 0 if METHODS[method].full_rank else draw(st.integers(1, 5)),
        "sites": tuple(Site(layer=layer, stream=stream) for layer in layers for stream in streams),
        "tied": draw(st.booleans()) if rule.first and rule.last else True,
        "activation": draw(st.sampled_from(["", "gelu", "tanh"])) if METHODS[method].activated else "",
    }
    lengths = draw(st.lists(st.tuples(st.integers(2, 12), st.integers(1, 5)), min_size=1, max_size=4))
    return rule, batch_of(tuple(lengths), draw(st.integers(0, 99))), form


@settings(max_examples=60, deadline=None)
@given(run=runs(), kept=st.integers(0, 3))
def test_ways_agree_whatever_is_trained(run: tuple[PositionRule, Batch, dict[str, object]], kept: int) -> None:
    rule, batch, form = run
    model = build_base("llama", layers=3).requires_grad_(False)
    check(model, rule, batch, interventions_of(model, **form), kept=kept)


@given(st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_frozen_tokens_are_those_before_the_first_slot(last: int, length: int, truncate: bool) -> None:
    rule = PositionRule(last=last, truncate=truncate)
    edited = slots(rule, np.ones((1, length)), length, prompt_length=np.array([length]))[0] >= 0
    assert frozen_tokens(rule, length, length) == (int(edited.argmax()) if edited.any() else length)

"""What is trained, and the step that all of it is trained by: AdamW, a rate that rises over a tenth of the steps and falls to 0, gradients
cut to a norm of 1, the mean over a batch's counted tokens, as ``train`` has it. ReFT through the product's own interventions and ways, LoRA
through peft in the same base.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from evidence.experiments.setups import BASE, LORA, Setup
from evidence.training_bench import own_memory
from reft_export.base.load import Base
from reft_export.eager.steering import Steering, edit_fn, steer
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, collate
from reft_export.training.frozen_prefix import PrefixStore, frozen_of
from reft_export.training.interventions import Interventions
from reft_export.training.settings import TrainSettings
from reft_export.training.ways import Batch, Ways, loss_of
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import LowRankEdit
from runtimes.edits.positions import PositionRule

PAD = 0
KEPT_AT_ONCE, NO_LIMIT = 16, 10**11


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A contestant, switched on."""

    way: Callable[[Batch], Tensor]
    parameters: Sequence[torch.nn.Parameter]
    steering: Steering | None = None
    interventions: Interventions | None = None

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)


class Prefixes:
    """The base's keys and values before the first edited token, for all rows of one rule: computed once, with nothing switched on."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._stores: dict[PositionRule, PrefixStore] = {}

    def of(self, rule: PositionRule, examples: Sequence[Example]) -> PrefixStore | None:
        """Called while no hook is on. None where no token of some example is before the edit."""
        frozen = [example.input_ids[: frozen_of(rule, example)] for example in examples]
        if not all(frozen):
            return None
        if rule not in self._stores:
            model = self._base.model
            off = Steering(model, rule=rule, tied=True)
            self._stores[rule] = PrefixStore(CountedHead(model), off, dtype=model.dtype, pad_token_id=PAD)
        self._stores[rule].keep(sorted(set(frozen)), limit=NO_LIMIT, group=KEPT_AT_ONCE)
        return self._stores[rule]


@contextmanager
def contestant(base: Base, setup: Setup, examples: Sequence[Example], prefixes: Prefixes) -> Iterator[Made]:
    """``examples``: all that it will see, training and held-out."""
    torch.manual_seed(setup.seed)
    head, rule = CountedHead(base.model), PositionRule.parse(setup.positions)
    if setup.method in LORA:
        with _lora(base.model, setup) as parameters:
            yield Made(way=lambda batch: _counted(head, batch), parameters=parameters)
        return
    made = None
    if setup.method != BASE:
        asked = TrainSettings(method=setup.method, rank=max(1, setup.rank), layers=setup.layers)
        made = Interventions(asked.forms(base.info.num_hidden_layers), width=base.info.hidden_size, tied=setup.tied)
    store = prefixes.of(rule, examples)
    with steer(base.model, made.edits() if made else {}, rule=rule, tied=setup.tied) as steering:
        ways = Ways(head=head, steering=steering, rule=rule)
        way = ways.counted if store is None else ways.behind_prefix(store)
        yield Made(way=way, parameters=list(made.parameters()) if made else (), steering=steering, interventions=made)


def _counted(head: CountedHead, batch: Batch) -> Tensor:
    return head.logits(batch.counted, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@contextmanager
def saved(base: Base, setup: Setup, folder: Path) -> Iterator[Made]:
    """A trained row's edit, what it adds to h times ``setup.strength``."""
    adapter, rule = load_adapter(folder), PositionRule.parse(setup.positions)
    edits = {
        site: [replace(edit, U=setup.strength * edit.U) for edit in each if isinstance(edit, LowRankEdit)]
        for site, each in adapter.edits().items()
    }
    functions = {site: edit_fn(each, base.model.dtype, "cpu") for site, each in edits.items()}
    with steer(base.model, functions, rule=rule, tied=setup.tied) as steering:
        yield Made(way=Ways(head=CountedHead(base.model), steering=steering, rule=rule).counted, parameters=(), steering=steering)


@contextmanager
def _lora(model: Any, setup: Setup) -> Iterator[list[torch.nn.Parameter]]:
    """peft's layers in ``model``'s own modules, and out of them again."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    wrapped = get_peft_model(model, LoraConfig(r=setup.rank, lora_alpha=2 * setup.rank, target_modules=list(LORA[setup.method])))
    try:
        yield [p for p in wrapped.parameters() if p.requires_grad]
    finally:
        wrapped.unload()


def batch_of(examples: Sequence[Example]) -> Batch:
    return Batch(**collate(examples, pad_token_id=PAD))


def batches(examples: Sequence[Example], size: int, steps: int, seed: int) -> Iterator[Batch]:
    """``steps`` of them, through the examples in an order that each pass draws anew."""
    random, order = np.random.default_rng(seed), []
    for _ in range(steps):
        while len(order) < size:
            order += random.permutation(len(examples)).tolist()
        yield batch_of([examples[order.pop(0)] for _ in range(size)])


@dataclass(frozen=True, kw_only=True)
class Run:
    losses: list[float]
    seconds: float
    """Of the processor, in the steps alone."""
    peak_mb: float
    """By which memory grew over what it was before the first step."""


def train(made: Made, setup: Setup, examples: Sequence[Example], say: Callable[[str], None] = lambda _: None) -> Run:
    if not setup.steps:
        return Run(losses=[], seconds=0.0, peak_mb=0.0)
    optimizer = torch.optim.AdamW(made.parameters, lr=setup.lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, -(-setup.steps // 10), setup.steps)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, started, losses = own_memory("VmRSS"), _processor(), []
    for number, batch in enumerate(batches(examples, setup.batch_size, setup.steps, setup.seed), 1):
        loss = loss_of(made.way(batch), batch) / len(batch.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if number % 10 == 0:
            say(f"step {number} of {setup.steps}, loss {losses[-1]:.3f}")
    return Run(losses=losses, seconds=_processor() - started, peak_mb=(own_memory("VmHWM") - before) / 1e6)


def _processor() -> float:
    used = os.times()
    return used.user + used.system

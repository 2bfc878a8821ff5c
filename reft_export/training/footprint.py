"""What a training run takes: memory by the shapes of the base's layers, and the work of its steps. Estimates, not promises.

A token of a layer with a graph keeps some 1.5 times what the block's linear maps put out: what norms, attention and activations read again
in the backward pass (weights are frozen: linear maps themselves keep nothing). Measured on llama-like blocks: docs/benchmarks.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from reft_export.base.token_rules import output_rows
from reft_export.eager.steering import decoder_layers
from reft_export.training.data import Example, Examples, Tokenized
from reft_export.training.frozen_prefix import frozen_of
from reft_export.training.interventions import Interventions
from reft_export.training.settings import TrainSettings
from reft_export.training.way_choice import LEAST_PASSES, PrefixPlan, kept_layers, passes_over, plan_prefixes
from runtimes.edits.positions import Positions

KEPT = 1.5
"""Values that autograd keeps of a token, over those that the block's linear maps put out."""
LOGIT_COPIES = 3
"""Logits, their log-softmax and its gradient, float32."""
REFERENCE_COPIES = 2
"""Of a divergence: the reference's logits, and their log-softmax."""
PASSING = 10
"""Blocks whose outputs lie in memory beside what autograd keeps: temporaries, gradients, and what the allocator does not give back."""
OVERHEAD = 1.1
"""Of norms, attention and activations over the linear maps' time."""
FEW = 64
"""A forward reads every weight however few tokens there are: it costs as if it had this many more."""
OPTIMIZER_COPIES = 4
"""Of the trained parameters: themselves, gradient, two moments."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes beside the base's weights, and multiplications."""

    activations: float
    cache: float
    """Of prompts' unedited tokens."""
    kept_layers: int
    """Those below the first edit whose output is computed once; 0: every step computes them."""
    layers: float
    """Of that output."""
    reference: float
    """Of what the base says without the edits."""
    optimizer: float
    work: float
    """Multiply-adds of all steps, in the linear maps."""
    plan: PrefixPlan | None
    """Of a decoder."""

    @property
    def memory(self) -> float:
        return self.activations + self.cache + self.layers + self.reference + self.optimizer


def footprint(
    model: PreTrainedModel,
    interventions: Interventions,
    rule: Positions,
    examples: Examples[Tokenized],
    settings: TrainSettings,
    reference: Sequence[Tokenized] = (),
) -> Footprint:
    """``model`` may lie on torch's meta device. ``reference``: rows that the base computes without the edits, beside the steps."""
    blocks, value = list(decoder_layers(model)), model.dtype.itemsize
    first = min(site.layer for site in interventions.sites)
    linear = [_linear(block) for block in blocks]
    outputs = sum(out for _, out in linear[first:])
    decoder = isinstance(examples.training[0], Example)
    plan = plan_prefixes(rule, examples, settings) if decoder else None  # pyright: ignore[reportArgumentType]
    rows, size, width = examples.training, settings.batch_size, model.config.get_text_config().hidden_size
    longest = max(row.length for row in rows)
    states = 2.0 * width * (len(blocks) - first)  # keys and values of every head
    if plan is not None and plan.splits:
        rest = max(row.length - frozen_of(rule, row) for row in rows)
        kept = size * (rest * KEPT * outputs + longest * states) + 2 * size * longest * _cache_values(model, len(blocks))
        kept = max(kept, min(size, 2) * longest * KEPT * outputs)  # the way is tried on two rows
    else:
        block = max(out for _, out in linear)
        again = width * (len(blocks) - first) + KEPT * block
        kept = size * longest * ((again if settings.gradient_checkpointing else KEPT * outputs) + min(PASSING, len(blocks)) * block)
    counted = max(sum(end - start for start, end in row.trained) for row in rows) if decoder else 1
    vocabulary = output_rows(model) if decoder else 0
    logits = 4.0 * (LOGIT_COPIES + (REFERENCE_COPIES if reference else 0)) * size * counted * vocabulary
    trained = sum(p.numel() for p in interventions.parameters())
    cache = below = 0.0
    layers = 0 if plan is None else kept_layers(interventions.sites, examples, settings)
    stored = {"auto": value, "float32": 4}.get(settings.cache_dtype, 2)
    if plan is not None and layers:
        below = min(settings.cache_mb * 1e6, (plan.tokens - (plan.prefix if plan.splits else 0)) * width * stored)
    if plan is not None and plan.kept:
        cache = min(settings.cache_mb * 1e6 - below, plan.prefix * _cache_values(model, len(blocks)) * stored)
    work, said = _work(linear, first, layers, rows, rule, plan, settings), 0.0
    if reference:
        once = settings.cache_mb > 0 and passes_over(examples, settings) >= LEAST_PASSES
        often = 1.0 if once else passes_over(examples, settings)
        work += often * _padded([row.length for row in reference], size) * sum(weights for weights, _ in linear)
        tokens = sum(end - start for row in reference for start, end in row.trained)
        said = min(settings.cache_mb * 1e6, tokens * width * value) if once else 0.0
    return Footprint(
        activations=kept * value + logits,
        cache=cache,
        kept_layers=layers,
        layers=below,
        reference=said,
        optimizer=4.0 * OPTIMIZER_COPIES * trained,
        work=work,
        plan=plan,
    )


def steps_of(examples: Sequence[Tokenized], settings: TrainSettings) -> int:
    """Optimizer steps."""
    batches = math.ceil(len(examples) / settings.batch_size)
    return settings.max_steps or settings.epochs * math.ceil(batches / settings.gradient_accumulation)


def _work(
    linear: Sequence[tuple[int, int]],
    first: int,
    layers: int,
    rows: Sequence[Tokenized],
    rule: Positions,
    plan: PrefixPlan | None,
    settings: TrainSettings,
) -> float:
    """A forward through every layer but the first ``layers``, which are computed once, a backward through those from the first edited one
    on; a kept prefix once, another in every step. A decoder's pads cost nothing."""
    below, above = (sum(weights for weights, _ in each) for each in (linear[:first], linear[first:]))
    kept = sum(weights for weights, _ in linear[:layers])
    with_graph = below + (3 if settings.gradient_checkpointing else 2) * above - kept
    size, splits = settings.batch_size, plan is not None and plan.splits
    if settings.group_by_length:
        rows = sorted(rows, key=lambda row: row.length)
    frozen = [frozen_of(rule, row) if splits else 0 for row in rows]
    rest = [row.length - count for row, count in zip(rows, frozen, strict=True)]
    passes = steps_of(rows, settings) * size * settings.gradient_accumulation / len(rows)
    often = 1.0 if plan is not None and plan.kept else passes
    step = _padded(rest, size) if plan is None else _real(rest, size)
    once = _padded([row.length for row in rows], size) * kept
    return once + passes * step * with_graph + (often * _padded(frozen, size) * (below + above) if splits else 0.0)


def _real(lengths: Sequence[int], size: int) -> int:
    """Tokens that cost what all batches do, without their pads."""
    return sum(lengths) + FEW * math.ceil(len(lengths) / size)


def _padded(lengths: Sequence[int], size: int) -> int:
    """Tokens that cost what all batches do, in the order of the examples."""
    batches = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) + FEW for batch in batches)


def _linear(block: nn.Module) -> tuple[int, int]:
    """(weights, outputs) of the linear maps of a block: every matrix [out, in], whatever its module."""
    shapes = [tuple(parameter.shape) for parameter in block.parameters() if parameter.ndim == 2]
    return sum(math.prod(shape) for shape in shapes), sum(shape[0] for shape in shapes)


def _cache_values(model: PreTrainedModel, layers: int) -> int:
    """Keys and values of one token, in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * size


def matmul_rate(model: PreTrainedModel, seconds: float = 0.3) -> float:
    """Floating-point operations a second of the largest linear map of a block on 256 tokens, here and now, in the base's dtype."""
    shape = max((tuple(p.shape) for p in decoder_layers(model)[0].parameters() if p.ndim == 2), key=math.prod)
    weights, tokens = torch.ones(shape, dtype=model.dtype), torch.ones((256, shape[1]), dtype=model.dtype)
    torch.matmul(tokens, weights.T)
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.matmul(tokens, weights.T)
        times += 1
    return 2 * 256 * math.prod(shape) * times / (time.perf_counter() - started)

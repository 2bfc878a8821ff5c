"""What quantizing each weight costs, in nats a token, from one forward and backward over a few rows with the edit switched on.

    nats(W) = 1 / (2 J) sum_rows ( sum_t delta_t . (x_t E) )^2        E = W' - W [K, N], x_t [K] the input of the product at token t,
                                                                      delta_t [N] the gradient of  sum_j s_j NLL_j  at its output

J counts the tokens j that are scored in all rows, and s_j is +1 or -1 by chance: in expectation over the signs the square is
sum_j (dNLL_j / dW . E)^2, so that nats is half the empirical Fisher information in the direction of the error itself: the second-order
term of the loss. The first-order term is left out on purpose: of a trained model it is noise of the rows.

"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.mixed import check_budget, choose_int8, sizes
from calibration.quantize import plan_graph
from calibration.settings import BlockFormat, QuantizationSettings
from calibration.weight_only import Blocks, WeightBlocks, dequantize
from calibration.workers import on_all_cores
from graph_passes.accessors import array_of, input_of, shape_of
from graph_passes.external import unmap
from graph_passes.find.weights import weight_name
from graph_passes.tied_head import untie_head
from reft_export.base.dequantized import linears_of
from reft_export.eager.steering import Steerer, steering_of
from runtimes.artifacts.manifest import WeightSource
from runtimes.edits.probes import spread
from runtimes.errors import BundleError

SAMPLES = 16
"""Rows, times draws of signs where there are fewer rows: the square of one alone varies as much as it is large. With 32, a fifth of
SmolLM2's int8 weights were others, and neither perplexity nor retention was better."""
TOKENS_AT_ONCE = 256
"""Whose activations and gradients are kept until the errors of the weights are made, one at a time, for all of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """``ids`` int64 [S], of which the tokens from ``scored`` on are predicted; ``prompt_length`` of them are the prompt."""

    ids: np.ndarray
    prompt_length: int
    scored: int = 1
    marks: np.ndarray | None = None
    """bool [1, S], of an adapter at positions ``marked``."""
    steerer: Steerer | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """Where an initializer [K, N] stands in the model: columns ``first`` .. ``last`` are outputs ``start`` .. of ``module``."""

    value: ir.Value
    blocks: Blocks
    format: BlockFormat
    first: int
    last: int
    start: int


def sensitivities(
    model: PreTrainedModel,
    graph: ir.Graph,
    sources: Mapping[str, WeightSource],
    settings: QuantizationSettings,
    rows: Sequence[Row],
    blocks: WeightBlocks,
) -> dict[str, float]:
    """Nats a scored token, by the name of every initializer of ``graph`` that ``settings`` quantizes and that is a linear module's weight.

    ``model`` carries the float weights, and is left as it was; ``blocks``: as ``quantize_graph`` takes it. Weights that are no linear
    module's (experts) are not listed.
    """
    nats: dict[str, float] = {}
    placed: dict[torch.nn.Module, list[tuple[str, _Weight]]] = {}
    _, selection = plan_graph(graph, settings, (), sources)
    products = {weight_name(node): input_of(node, 1) for node in selection.products}
    names = [name for name in products if name in sources]
    formats = {name: blocks.format_of(name, settings.format) for name in names}
    for name, made in zip(names, on_all_cores(lambda name: _blocks(name, products[name], formats[name], blocks), names), strict=True):
        for module, weight in _places(model, name, products[name], sources, made, formats[name]):
            placed.setdefault(module, []).append((name, weight))
            nats[name] = 0.0
    generator = torch.Generator().manual_seed(0)
    count = sum(len(row.ids) - row.scored for row in rows)
    draws = max(1, SAMPLES // max(len(rows), 1))
    waiting: list[_Passed] = []
    for number, row in enumerate(rows, 1):
        waiting.append(_passed(model, list(placed), row, draws, generator))
        if number == len(rows) or sum(len(row.ids) for row in rows[number - len(waiting) : number + 1]) > TOKENS_AT_ONCE:
            for name, squares in _squares(placed, waiting).items():
                nats[name] += squares / (2 * draws * count)
            waiting.clear()
    return nats


def _blocks(name: str, value: ir.Value, format: BlockFormat, blocks: WeightBlocks) -> Blocks:
    made = blocks.of(name, np.ascontiguousarray(array_of(value), np.float32), format)
    unmap(value)
    return made


def _places(
    model: PreTrainedModel, name: str, value: ir.Value, sources: Mapping[str, WeightSource], blocks: Blocks, format: BlockFormat
) -> Iterator[tuple[torch.nn.Module, _Weight]]:
    """The modules that an initializer is the weight of, or a part of; none where it is no linear module's outputs."""
    source = sources[name]
    parts = (source, *source.joined)
    if any(part.axis not in (None, 0) for part in parts) or (not source.transpose and (len(parts) > 1 or source.axis is not None)):
        return
    try:
        modules = linears_of(model, name, sources)
    except BundleError:
        return
    columns, first = shape_of(value)[1], 0
    for part, module in zip(parts, modules, strict=True):
        outputs = _sizes(module)[1] if part.start is None or part.stop is None else part.stop - part.start
        last = columns if len(parts) == 1 else first + outputs
        yield module, _Weight(value=value, blocks=blocks, format=format, first=first, last=last, start=part.start or 0)
        first = last


def _sizes(module: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    weight = module.get_parameter("weight")
    return (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])


_Passed = dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]
"""By module x [S, K] and delta [draws, S, N] of one row."""


def _passed(model: PreTrainedModel, modules: Sequence[torch.nn.Module], row: Row, draws: int, generator: torch.Generator) -> _Passed:
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[module], outputs[module] = arguments[0].detach().reshape(-1, _sizes(module)[0]), output

    def differentiable(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    with _frozen(model), steering_of(model, row.steerer) as steering:
        if steering is not None:
            steering.prompt_length, steering.marks = [row.prompt_length], row.marks
        handles = [module.register_forward_hook(keep) for module in modules]
        handles.append(model.get_input_embeddings().register_forward_hook(differentiable))
        try:
            ids = torch.from_numpy(np.asarray(row.ids, np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, row.scored - 1 : -1].float()
        finally:
            for handle in handles:
                handle.remove()
        losses = cross_entropy(logits, ids[0, row.scored :], reduction="none")
        signs = torch.randint(0, 2, (draws, len(losses)), generator=generator) * 2.0 - 1
        reached = list(outputs)
        found = [
            torch.autograd.grad(losses @ sign, [outputs[m] for m in reached], retain_graph=draw + 1 < draws, allow_unused=True)
            for draw, sign in enumerate(signs)
        ]
    passed: _Passed = {}
    for number, module in enumerate(reached):
        gradients = [each[number] for each in found]
        if gradients[0] is not None:  # what a later edit replaces has none
            passed[module] = inputs[module], torch.stack([g.reshape(len(inputs[module]), -1) for g in gradients if g is not None])
    return passed


def _squares(placed: Mapping[torch.nn.Module, Sequence[tuple[str, _Weight]]], passed: Sequence[_Passed]) -> dict[str, float]:
    """sum over rows and draws of ( sum_t delta_t . (x_t E) )^2, by the initializer's name."""
    sums: dict[str, list[torch.Tensor]] = {}
    for module, weights in placed.items():
        rows = [each[module] for each in passed if module in each]
        for name, weight in weights:
            error = _error(weight)[:, weight.first : weight.last]
            stop = weight.start + weight.last - weight.first
            projected = [torch.einsum("dtn,tn->d", delta[:, :, weight.start : stop], x @ error) for x, delta in rows]
            # Parts of one initializer in several modules are one error: their projections are summed before they are squared.
            sums[name] = [a + b for a, b in zip(sums[name], projected, strict=True)] if name in sums else projected
    return {name: float(sum((each**2).sum() for each in projected)) for name, projected in sums.items()}


def _error(weight: _Weight) -> torch.Tensor:
    """E [K, N] of an initializer; made again for each row, so that one is in memory at a time."""
    rows, columns = shape_of(weight.value)
    blocks, format = weight.blocks, weight.format
    restored = dequantize(blocks.packed, blocks.scales, blocks.zero_points, format.bits, format.block_size, rows, columns)
    error = torch.from_numpy(restored - array_of(weight.value).astype(np.float32, copy=False))
    unmap(weight.value)
    return error


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside the ``with``, no parameter asks for a gradient of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def rows_of(arrays: Mapping[str, Mapping[str, np.ndarray]], steerers: Mapping[str, Steerer]) -> list[Row]:
    """Rows to measure on, from golden arrays by name: of every adapter with its edits on, whose completions count; of a base alone its own.

    Where there are more than ``SAMPLES``, some of each, evenly spread.
    """
    found: list[list[Row]] = []
    for name in list(steerers) or list(arrays):
        each, steerer = arrays[name], steerers.get(name)
        rows = []
        marks = each.get("marks")
        for number, (ids, mask, prompt) in enumerate(zip(each["input_ids"], each["attention_mask"], each["prompt_length"], strict=True)):
            marked = None if marks is None else marks[number : number + 1] > 0
            scored = 1 if steerer is None else int(prompt)
            rows.append(Row(ids=ids[mask > 0], prompt_length=int(prompt), scored=scored, marks=marked, steerer=steerer))
        found.append([row for row in rows if len(row.ids) > row.scored])
    room = max(SAMPLES // max(len(found), 1), 1)
    return [rows[index] for rows in found for index in spread(len(rows), room)]


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """Asks for the most sensitive weights in int8 among int4 ones.

    ``budget``: bytes of all weights; None: ``AUTO_SHARE`` of ``calibration.mixed`` more than int4 takes.
    """

    budget: int | None = None


def mixed(
    model: PreTrainedModel,
    graph: ir.Model,
    sources: Mapping[str, WeightSource],
    settings: QuantizationSettings,
    rows: Sequence[Row],
    blocks: WeightBlocks,
    asked: MixedPrecision,
) -> tuple[QuantizationSettings, str]:
    """``settings`` with the weights of ``graph`` that are worth 8 bits, and what was chosen in words; the graph's head is untied.

    Raises CalibrationError for a budget below the smallest graph, before anything is measured.
    """
    untie_head(graph.graph)
    known = sizes(graph.graph, settings, (), sources, blocks)
    check_budget(known, asked.budget)
    nats = sensitivities(model, graph.graph, sources, settings, rows, blocks)
    chosen = choose_int8(nats, known, asked.budget)
    total, taken = sum(nats.values()), sum(nats[name] for name in chosen)
    added = sum(known.extra[name] for name in chosen)
    said = f"{len(chosen)} of {len(nats)} weights in int8 for {added / 1e6:.1f} MB: they hold {taken / total if total else 0:.0%} of the "
    return replace(settings, int8=(*settings.int8, *chosen)), f"{said}loss that int4 is expected to cost, {total:.3g} nats a token"

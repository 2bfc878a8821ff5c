"""What quantizing each weight costs, in nats a token, from one forward and backward over a few rows with the edit switched on.

    nats(W) = 1 / (2 J) sum_rows ( sum_t delta_t . (x_t E) )^2        E = W' - W [K, N], x_t [K] the input of the product at token t,
                                                                      delta_t [N] the gradient of  sum_j s_j NLL_j  at its output

J counts the tokens j that are scored in all rows, and s_j is +1 or -1 by chance: in expectation over the signs the square is
sum_j (dNLL_j / dW . E)^2, so that nats is half the empirical Fisher information in the direction of the error itself: the second-order
term of the loss. The first-order term is left out on purpose: of a trained model it is noise of the rows.

{MEASURED}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.selection import select
from calibration.settings import BlockFormat, QuantizationSettings
from calibration.weight_only import Blocks, dequantize, quantize_blocks
from calibration.workers import on_all_cores
from graph_passes.accessors import array_of, input_of, shape_of
from graph_passes.external import unmap
from graph_passes.find.weights import weight_name
from reft_export.base.dequantized import linears_of
from reft_export.eager.steering import Steerer, steering_of
from runtimes.artifacts.bundle import WeightSource
from runtimes.errors import BundleError

DRAWS = 4
"""Of signs, for each row: the square of one draw alone varies as much as it is large."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """``ids`` int64 [S], of which the tokens from ``scored`` on are predicted; ``prompt_length`` of them are the prompt."""

    ids: np.ndarray
    prompt_length: int
    scored: int = 1
    steerer: Steerer | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """Where an initializer [K, N] stands in the model: columns ``first`` .. ``last`` are outputs ``start`` .. of ``module``."""

    value: ir.Value
    blocks: Blocks
    first: int
    last: int
    start: int


def sensitivities(
    model: PreTrainedModel,
    graph: ir.Graph,
    sources: Mapping[str, WeightSource],
    settings: QuantizationSettings,
    rows: Sequence[Row],
) -> dict[str, float]:
    """Nats a scored token, by the name of every initializer of ``graph`` that ``settings`` quantizes and that is a linear module's weight.

    ``model`` carries the float weights, and is left as it was. Weights that are no linear module's (experts) are not listed.
    """
    format = settings.format
    nats: dict[str, float] = {}
    placed: dict[torch.nn.Module, list[tuple[str, _Weight]]] = {}
    products = {
        weight_name(node): input_of(node, 1) for node in select(graph, settings.keep_high, lm_head=settings.quantizes_head).products
    }
    names = [name for name in products if name in sources]
    for name, blocks in zip(names, on_all_cores(lambda name: _blocks(products[name], format), names), strict=True):
        for module, weight in _places(model, name, products[name], sources, blocks):
            placed.setdefault(module, []).append((name, weight))
            nats[name] = 0.0
    generator = torch.Generator().manual_seed(0)
    count = sum(len(row.ids) - row.scored for row in rows)
    for row in rows:
        for name, projections in _projections(model, placed, row, format, generator).items():
            nats[name] += float((projections.sum(1) ** 2).mean()) / (2 * count)
    return nats


def _blocks(value: ir.Value, format: BlockFormat) -> Blocks:
    blocks = quantize_blocks(np.ascontiguousarray(array_of(value), np.float32), format)
    unmap(value)
    return blocks


def _places(
    model: PreTrainedModel, name: str, value: ir.Value, sources: Mapping[str, WeightSource], blocks: Blocks
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
        yield module, _Weight(value=value, blocks=blocks, first=first, last=last, start=part.start or 0)
        first = last


def _sizes(module: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    weight = module.get_parameter("weight")
    return (weight.shape[0], weight.shape[1]) if isinstance(module, Conv1D) else (weight.shape[1], weight.shape[0])


def _projections(
    model: PreTrainedModel,
    placed: Mapping[torch.nn.Module, Sequence[tuple[str, _Weight]]],
    row: Row,
    format: BlockFormat,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """delta_t . (x_t E) of every draw and token, [DRAWS, S], by the initializer's name."""
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    outputs: dict[torch.nn.Module, torch.Tensor] = {}

    def keep(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[module], outputs[module] = arguments[0].detach(), output

    def differentiable(_: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    with _frozen(model), steering_of(model, row.steerer) as steering:
        if steering is not None:
            steering.prompt_length = [row.prompt_length]
        handles = [module.register_forward_hook(keep) for module in placed]
        handles.append(model.get_input_embeddings().register_forward_hook(differentiable))
        try:
            ids = torch.from_numpy(np.asarray(row.ids, np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, row.scored - 1 : -1].float()
        finally:
            for handle in handles:
                handle.remove()
        losses = cross_entropy(logits, ids[0, row.scored :], reduction="none")
        signs = torch.randint(0, 2, (DRAWS, len(losses)), generator=generator) * 2.0 - 1
        modules = list(outputs)
        gradients: dict[torch.nn.Module, list[torch.Tensor]] = {module: [] for module in modules}
        for draw, sign in enumerate(signs):
            found = torch.autograd.grad(losses @ sign, [outputs[m] for m in modules], retain_graph=draw + 1 < DRAWS, allow_unused=True)
            for module, gradient in zip(modules, found, strict=True):
                gradients[module].append(torch.zeros_like(outputs[module]) if gradient is None else gradient)
    outputs.clear()
    projections: dict[str, torch.Tensor] = {}
    for module in modules:
        x = inputs.pop(module).reshape(-1, _sizes(module)[0])
        delta = torch.stack([gradient.reshape(len(x), -1) for gradient in gradients.pop(module)])
        for name, weight in placed[module]:
            error = _error(weight, format)[:, weight.first : weight.last]
            part = delta[:, :, weight.start : weight.start + weight.last - weight.first]
            projected = torch.einsum("dtn,tn->dt", part, x @ error)
            projections[name] = projected + projections[name] if name in projections else projected
    return projections


def _error(weight: _Weight, format: BlockFormat) -> torch.Tensor:
    """E [K, N] of an initializer; made again for each row, so that one is in memory at a time."""
    rows, columns = shape_of(weight.value)
    blocks = weight.blocks
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

"""A folded graph's weights, and where the scheme says so its activations, quantized in place; a weight in memory for each core.

The edit keeps its float type: its arithmetic lives in the model-local function, which no rewrite enters, and its banks are graph inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibration import per_token, qdq
from calibration.activations import ACTIVATION_OF
from calibration.selection import select, weight_name
from calibration.settings import QuantizationSettings
from calibration.weight_only import CONTRIB, nbits_weight, quantize_embedding, to_matmul_nbits
from calibration.weights import QuantizedWeight, WeightError, relative_error, unmap
from graph_passes.accessors import array_of, dtype_of, input_of, name_of, tensor_of
from runtimes.errors import CalibrationError

Ranges = Mapping[str, tuple[float, float]]
"""(lowest, highest) by the name of the value."""

MOST_WORKERS = 16
"""onnxruntime's own quantizer starts as many threads again for each weight."""

BLOCKED_OPSET = 21
"""The first opset whose DequantizeLinear takes blocks and int4."""


@dataclass(frozen=True, kw_only=True)
class QuantizedGraph:
    errors: tuple[WeightError, ...]
    float_weights: tuple[str, ...]
    """Those that were left in float by choice."""


def quantize_graph(
    model: ir.Model,
    settings: QuantizationSettings,
    ranges: Ranges | None = None,
    *,
    float_inputs: Collection[str] = (),
    on_weight: Callable[[int, int], None] | None = None,
) -> QuantizedGraph:
    """Quantizes the chosen MatMul weights of ``model`` in place, and their inputs by ``ranges`` where the scheme fixes them.

    ``float_inputs``: weights whose inputs are never quantized. A weight-only scheme takes them at accuracy level 1; schemes that
    quantize activations leave them in float.

    Raises CalibrationError, before anything is changed, where there is nothing to quantize, a pattern fits nothing, or a range is missing.
    """
    graph = model.graph
    left = float_inputs if settings.kind.activations else ()
    selection = select(graph, settings.keep_high, lm_head=settings.lm_head, float_weights=left)
    if settings.kind.activations == "static":
        inputs = [name_of(input_of(node, 0)) for node in selection.products]
        missing = [name for name in inputs if name not in (ranges or {})]
        if missing:
            raise CalibrationError(f"there is no range for {missing[0]} and {len(missing) - 1} more inputs; calibrate this graph again")
    weights = {weight_name(node): input_of(node, 1) for node in selection.products}
    # Before anything of the graph is changed: a damaged weight leaves it as it was.
    done: dict[str, QuantizedWeight] = {}
    errors: list[WeightError] = []
    for count, (quantized, error) in enumerate(_quantized(list(weights.values()), settings), 1):
        done[error.name] = quantized
        errors.append(error)
        if on_weight:
            on_weight(count, len(weights))
    _raise_opset(model, settings)
    rewrite = _Rewrite(graph, settings, ranges or {}, frozenset(float_inputs))
    for name in weights:
        for value in done[name].values:
            graph.register_initializer(value)
    for node in selection.products:
        rewrite(node, done[weight_name(node)])
    if settings.embeddings:
        errors.append(_quantize_table(graph, settings))
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_input()]:
        del graph.initializers[name]
    if settings.scheme == "weight-only" or settings.embeddings:
        model.opset_imports[CONTRIB] = 1
    return QuantizedGraph(errors=tuple(errors), float_weights=selection.float_weights)


class _Rewrite:
    """Puts a quantized product in a MatMul's place; an input that several products read is quantized once."""

    def __init__(self, graph: ir.Graph, settings: QuantizationSettings, ranges: Ranges, float_inputs: frozenset[str]) -> None:
        self.graph, self.settings, self.ranges, self.float_inputs = graph, settings, ranges, float_inputs
        self.inputs: dict[ir.Value, ir.Value] = {}
        self.tokens: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.weights: dict[str, ir.Value] = {}

    def __call__(self, node: ir.Node, weight: QuantizedWeight) -> None:
        x, scheme = input_of(node, 0), self.settings.scheme
        if scheme == "weight-only":
            to_matmul_nbits(self.graph, node, weight, self.settings, float_input=weight_name(node) in self.float_inputs)
        elif scheme == "dynamic":
            if x not in self.tokens:
                self.tokens[x] = per_token.quantize_tokens(self.graph, node, x)
            per_token.to_matmul_integer(self.graph, node, weight, self.tokens[x])
        else:
            name = name_of(weight.values[0])
            if name not in self.weights:
                self.weights[name] = qdq.restore_in_graph(self.graph, node, weight, self.settings.block_size)
            node.replace_input_with(1, self.weights[name])
            if scheme in ACTIVATION_OF:
                node.replace_input_with(0, self._fixed(node, x, dtype_of(weight.values[1])))

    def _fixed(self, node: ir.Node, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if x not in self.inputs:
            kind, bounds = ACTIVATION_OF[self.settings.scheme], self.ranges[name_of(x)]
            self.inputs[x] = qdq.quantize_in_graph(self.graph, node, x, kind, bounds, dtype)
        return self.inputs[x]


def _quantized(weights: Sequence[ir.Value], settings: QuantizationSettings) -> Iterator[tuple[QuantizedWeight, WeightError]]:
    """In order, on all cores: numpy and onnxruntime let go of Python while they compute. Each worker has one weight in memory."""
    with ThreadPoolExecutor(max(1, min(_cores(), len(weights)))) as pool:
        try:
            yield from pool.map(lambda weight: _quantize_one(weight, settings), weights)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _cores() -> int:
    """Those that this process may use, up to ``MOST_WORKERS``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_WORKERS)


def _quantize_one(weight: ir.Value, settings: QuantizationSettings) -> tuple[QuantizedWeight, WeightError]:
    name, array = name_of(weight), array_of(weight)
    original = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(original).all():
        raise CalibrationError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
    if settings.scheme == "weight-only":
        quantized = nbits_weight(name, array, original, settings)
    elif settings.scheme == "qdq-int4":
        quantized = qdq.block_weight(name, array, original, settings.block_size)
    else:
        kind = ACTIVATION_OF.get(settings.scheme, "uint8")
        quantized = qdq.column_weight(name, array, original, kind)
    error = WeightError(
        name=name,
        relative=relative_error(original, quantized.restored),
        bytes_before=array.nbytes,
        bytes_after=sum(int(tensor_of(value).nbytes) for value in quantized.values),
    )
    unmap(weight)
    # Only what replaces the weight is kept: the restored one is as large as the original.
    return QuantizedWeight(values=quantized.values, restored=np.empty(0), shape=quantized.shape), error


def _quantize_table(graph: ir.Graph, settings: QuantizationSettings) -> WeightError:
    name, original, restored, after = quantize_embedding(graph, settings.embeddings, settings.block_size or 32)
    before = original.size * 4
    return WeightError(name=name, relative=relative_error(original, restored), bytes_before=before, bytes_after=after)


def _raise_opset(model: ir.Model, settings: QuantizationSettings) -> None:
    """Opset 20 to 21, in the graph and its functions: no operator of a decoder changed but for the types it takes."""
    if settings.scheme != "qdq-int4" or model.opset_imports[""] >= BLOCKED_OPSET:
        return
    model.opset_imports[""] = model.graph.opset_imports[""] = BLOCKED_OPSET
    for function in model.functions.values():
        function.opset_imports[""] = BLOCKED_OPSET
    model.ir_version = max(model.ir_version, 10)

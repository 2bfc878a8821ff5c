"""A folded graph's weights, and where the scheme says so its activations, quantized in place; a weight in memory for each core.

The edit keeps its float type: its arithmetic lives in the model-local function, which no rewrite enters, and its banks are graph inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calibration import per_token, qdq
from calibration.activations import ACTIVATION_OF
from calibration.selection import Selection, matching, select
from calibration.settings import BlockFormat, QuantizationSettings
from calibration.tables import TablePlan, plan_table, quantize_table
from calibration.weight_only import CONTRIB, WeightBlocks, nbits_weight, to_matmul_nbits
from calibration.weights import QuantizedWeight, WeightError, relative_error
from calibration.workers import on_all_cores
from graph_passes.accessors import array_of, dtype_of, input_of, name_of, tensor_of
from graph_passes.external import unmap
from graph_passes.find.weights import head_product, weight_name, weight_products
from graph_passes.tied_head import tie_head, untie_head
from runtimes.errors import CalibrationError

Ranges = Mapping[str, tuple[float, float]]
"""(lowest, highest) by the name of the value."""

BLOCKED_OPSET = 21
"""The first opset whose DequantizeLinear takes blocks and int4."""


@dataclass(frozen=True, kw_only=True)
class QuantizedGraph:
    errors: tuple[WeightError, ...]
    float_weights: tuple[str, ...]
    """Those that were left in float by choice."""
    embeddings: int
    """Bits of the token embedding; 0 is float."""
    tied: bool
    """Whether embedding and head are stored once."""
    int8: tuple[str, ...] = ()
    """Weights of 8 bits among those of 4."""
    given: tuple[str, ...] = ()
    """Weights that kept the integers they had."""
    origin: str = ""
    """What made those, in words."""
    note: str = ""
    """What was done otherwise than a user may expect."""


def quantize_graph(
    model: ir.Model,
    settings: QuantizationSettings,
    ranges: Ranges | None = None,
    *,
    float_inputs: Collection[str] = (),
    parameters: Collection[str] | None = None,
    blocks: WeightBlocks | None = None,
    on_weight: Callable[[int, int], None] | None = None,
) -> QuantizedGraph:
    """Quantizes the chosen MatMul weights of ``model`` in place, and their inputs by ``ranges`` where the scheme fixes them.

    ``float_inputs``: weights whose inputs are never quantized. A weight-only scheme takes them at accuracy level 1; schemes that
    quantize activations leave them in float. ``parameters``: initializers that are known to be parameters of the base; an embedding that
    is none stays in float unless asked for. None: all are. ``blocks``: makes the blocks of 4-bit weights, and those of
    8 bits that have blocks, and knows those that it has made before.

    Raises CalibrationError, before anything is changed, where there is nothing to quantize, a pattern fits nothing, or a range is missing.
    """
    graph = model.graph
    untie_head(graph)
    plan, selection = plan_graph(graph, settings, float_inputs, parameters)
    if settings.kind.activations == "static":
        inputs = [name_of(input_of(node, 0)) for node in selection.products]
        missing = [name for name in inputs if name not in (ranges or {})]
        if missing:
            raise CalibrationError(f"there is no range for {missing[0]} and {len(missing) - 1} more inputs; calibrate this graph again")
    weights = {weight_name(node): input_of(node, 1) for node in selection.products}
    blocks = blocks or WeightBlocks()
    int8 = int8_weights(graph, selection, settings)

    def quantized_one(name: str) -> tuple[QuantizedWeight, WeightError]:
        return _quantize_one(
            weights[name], settings, settings.int8_format if name in int8 else blocks.format_of(name, settings.format), blocks
        )

    # Before anything of the graph is changed: a damaged weight leaves it as it was.
    done: dict[str, QuantizedWeight] = {}
    errors: list[WeightError] = []
    for count, (quantized, error) in enumerate(on_all_cores(quantized_one, list(weights)), 1):
        done[error.name] = quantized
        errors.append(error)
        if on_weight:
            on_weight(count, len(weights))
    if plan.format is not None:
        errors.append(quantize_table(graph, plan, settings))
    _raise_opset(model, settings)
    rewrite = _Rewrite(graph, settings, ranges or {}, frozenset(float_inputs))
    for name in weights:
        for value in done[name].values:
            graph.register_initializer(value)
    for node in selection.products:
        rewrite(node, done[weight_name(node)])
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_input()]:
        del graph.initializers[name]
    if settings.scheme == "weight-only" or plan.format is not None:
        model.opset_imports[CONTRIB] = 1
    tied = tie_head(model, fused=settings.kind.runtime == "onnxruntime") is not None or plan.head is not None
    return QuantizedGraph(
        errors=tuple(errors),
        float_weights=selection.float_weights,
        embeddings=0 if plan.format is None else plan.format.bits,
        tied=tied,
        int8=tuple(name for name in weights if name in int8),
        given=tuple(name for name in weights if name not in int8 and blocks.keeps(name)),
        note=plan.note,
    )


def plan_graph(
    graph: ir.Graph, settings: QuantizationSettings, float_inputs: Collection[str] = (), parameters: Collection[str] | None = None
) -> tuple[TablePlan, Selection]:
    """What becomes of embedding and tied head, and which other products are quantized; of a graph whose head is untied.

    A head that the scheme leaves in float by its own default may still share a quantized table.
    """
    left = float_inputs if settings.kind.activations else ()
    head = head_product(graph, weight_products(graph))
    kept = select(graph, settings.keep_high, lm_head=settings.lm_head is not False, float_weights=left).float_weights
    plan = plan_table(graph, settings, head_float=head is None or weight_name(head) in kept, parameters=parameters)
    return plan, select(graph, settings.keep_high, lm_head=settings.quantizes_head, float_weights=left, apart=plan.head_name)


def int8_weights(graph: ir.Graph, selection: Selection, settings: QuantizationSettings) -> set[str]:
    """Names of the weights that ``settings.int8`` means. Raises CalibrationError for a pattern that fits none of the quantized ones."""
    if not settings.int8:
        return set()
    head = head_product(graph, weight_products(graph))
    names = list(dict.fromkeys(map(weight_name, selection.products)))
    return matching(settings.int8, names, None if head is None else weight_name(head), "int8")


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
            to_matmul_nbits(self.graph, node, weight, 1 if weight_name(node) in self.float_inputs else self.settings.accuracy_level)
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


def _quantize_one(
    weight: ir.Value, settings: QuantizationSettings, format: BlockFormat, blocks: WeightBlocks
) -> tuple[QuantizedWeight, WeightError]:
    name, array = name_of(weight), array_of(weight)
    original = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(original).all():
        raise CalibrationError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
    if settings.scheme == "weight-only":
        quantized = nbits_weight(name, array, format, blocks.of(name, original, format))
    elif settings.scheme == "qdq-int4":
        quantized = qdq.block_weight(name, array, settings.block_size, blocks.of(name, original, format))
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
    return replace(quantized, restored=np.empty(0)), error


def _raise_opset(model: ir.Model, settings: QuantizationSettings) -> None:
    """Opset 20 to 21, in the graph and its functions: no operator of a decoder changed but for the types it takes."""
    if settings.scheme != "qdq-int4" or model.opset_imports[""] >= BLOCKED_OPSET:
        return
    model.opset_imports[""] = model.graph.opset_imports[""] = BLOCKED_OPSET
    for function in model.functions.values():
        function.opset_imports[""] = BLOCKED_OPSET
    model.ir_version = max(model.ir_version, 10)

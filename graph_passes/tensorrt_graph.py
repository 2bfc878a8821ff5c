"""TensorRT's graph, derived from the bundle's.

TensorRT's parser turns an initializer that is a graph input too into a constant and says nothing; it refuses NonZero; and it knows no
operators of other domains than ONNX's, but for its plugins and the functions that the graph itself carries. So:

    banks and rules    plain inputs, bound anew for every adapter; U, A [N, r, D], b [N, r], and RED's scale, bias [N, D], with dynamic
                       N and r
                       or, frozen, constants: one adapter's, for good
                       rules [rows], which is 1 or the batch's rows
    reft.prompt_length a plain input [rows] in both cases: it belongs to the prompt, not to the adapter
    reft.slots         no input, where the graph has the rule: the session's rules select what a row reads
    reft.first_logit   none either, and its Slice goes: every column has logits, and the session takes the last ones off the device
    LoReFT, RED        the plugin's (without a function to fall back to), or the function in its per-token form
    CumSum             of whole numbers: a product with a triangle of ones (cumulative_sum.py)
    present.*          where asked for the new columns alone, not all of the KV cache (new_columns.py)
    all else           as it was: casts around float32 islands are explicit in the graph, which is what a strongly typed network wants, and
                       DequantizeLinear and QuantizeLinear pass through
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import describe, dtype_of, name_of
from graph_passes.cumulative_sum import replace_cumulative_sums
from graph_passes.first_logit import remove_first_logit
from graph_passes.function_body import use_bodies
from graph_passes.insert import banks_of, is_edit
from graph_passes.new_columns import give_new_columns
from graph_passes.shape_inputs import shape_inputs
from graph_passes.tied_head import write_out
from graph_passes.unfold import unfold_graph
from runtimes.artifacts.manifest import TensorRecord
from runtimes.artifacts.values import EngineCache
from runtimes.edits.op import DOMAIN, PROMPT_LENGTH, RULE_DEFAULTS
from runtimes.errors import EngineError, GraphError

ONNX_DOMAINS = ("", "ai.onnx")
QUANTIZED_FOR_ONNXRUNTIME = ("MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul", "MatMulInteger", "DynamicQuantizeLinear")
SCHEMES = "qdq-int4, qdq-int8, fp8"
ATTENTION_OPSET = 23
"""The first opset with Attention: TensorRT parses none that updates a cache, and builds others only where it has a kernel of its own."""


@dataclass(frozen=True, kw_only=True)
class EngineGraph:
    """The derived graph, and what an engine that was built from it must have."""

    model: ir.Model
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    edit_nodes: int
    """LoReFT and RED nodes that are left: as many plugin layers, where the plugin is used."""
    cache: EngineCache = "whole"


def derive_tensorrt_graph(
    model: ir.Model, *, plugin: bool, freeze: Mapping[str, np.ndarray] | None = None, new_columns: bool = False
) -> EngineGraph:
    """Changes ``model``, a bundle's graph, into the one that TensorRT reads; weights stay where they are.

    ``freeze``: every bank and, where the graph computes slots, every rule of one adapter by input name; {} removes the edits altogether
    (the base). None leaves them all as inputs. ``plugin``: the edits are left to the plugin, else to their functions. ``new_columns``:
    a step gives out what is new in the KV cache, where every layer joins it to the past (the result's ``cache`` says whether it does).

    Raises EngineError for operators that TensorRT does not have and for inputs whose numbers decide shapes, GraphError where ``freeze``
    does not fit the graph.
    """
    write_out(model.graph)
    _refuse_foreign_operators(model)
    if freeze is not None and not freeze:
        unfold_graph(model)
    elif freeze is not None:
        _freeze(model.graph, freeze)
    remove_first_logit(model.graph)
    _strip_defaults(model.graph)
    replace_cumulative_sums(model.graph)
    _refuse_shape_inputs(model.graph)
    if plugin:
        # Without a function a plugin that is not found is an error of the parser, rather than an edit that is silently expanded.
        for identifier in [key for key in model.functions if key[0] == DOMAIN]:
            del model.functions[identifier]
    else:
        use_bodies(model, per_token=True)
    columns = new_columns and give_new_columns(model.graph)
    return EngineGraph(
        model=model,
        inputs=tuple(map(_record, model.graph.inputs)),
        outputs=tuple(map(_record, model.graph.outputs)),
        edit_nodes=sum(map(is_edit, model.graph)),
        cache="columns" if columns else "whole",
    )


def _refuse_foreign_operators(model: ir.Model) -> None:
    nodes = [node for node in _all_nodes(model) if node.op_identifier() not in model.functions and node.domain != DOMAIN]
    counts = Counter(node.op_type for node in nodes)
    if ours := [op for op in QUANTIZED_FOR_ONNXRUNTIME if counts[op]]:
        raise EngineError(
            f"the bundle is quantized for onnxruntime ({counts[ours[0]]} {ours[0]} nodes), which TensorRT cannot read; quantize the float "
            f"bundle with one of the schemes {SCHEMES}: `reft-export quantize BUNDLE -m MODEL -o OUT --scheme qdq-int4`"
        )
    if foreign := Counter(node.op_type for node in nodes if node.domain not in ONNX_DOMAINS):
        listed = ", ".join(f"{op} ({count})" for op, count in foreign.most_common(4))
        raise EngineError(
            f"the graph has operators that TensorRT lacks: {listed} of domain {next(n.domain for n in nodes if n.op_type in foreign)}; "
            "export the model with `reft-export export --exporter dynamo --target tensorrt` (opset 20)"
        )
    if counts["Attention"]:
        raise EngineError(
            f"the graph is of opset {model.opset_imports['']} and has {counts['Attention']} Attention nodes, which TensorRT parses without "
            f"a cache only, and builds for few shapes; export it below opset {ATTENTION_OPSET} (`reft-export export --opset 20`)"
        )


def _refuse_shape_inputs(graph: ir.Graph) -> None:
    """What TensorRT would build, and no session could feed."""
    if found := shape_inputs(graph):
        names = ", ".join(each.name for each in found)
        raise EngineError(
            f"the numbers of {names} decide shapes in the graph ({describe(found[0].node)}): TensorRT would read them on the host before a "
            "step, and engines are fed on the GPU; export the model with `reft-export export --exporter dynamo --target tensorrt`"
        )


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for identifier, function in model.functions.items():
        if identifier[0] != DOMAIN:
            yield from function.all_nodes()


def _freeze(graph: ir.Graph, tensors: Mapping[str, np.ndarray]) -> None:
    """Makes constants of the named initializers, which stop being inputs."""
    names = _ours(graph) - {PROMPT_LENGTH}
    ours = {name_of(value): value for value in graph.inputs if value.name in names}
    if different := sorted(set(ours) ^ set(tensors)):
        has, lacks = ("the graph", "the adapter") if different[0] in ours else ("the adapter", "the graph")
        raise GraphError(f"{has} has {different[0]!r}, {lacks} does not ({len(different)} such names); export the bundle again")
    for name, value in ours.items():
        array, dtype = np.ascontiguousarray(tensors[name]), dtype_of(value).numpy()
        expected = tuple(dim if isinstance(dim, int) else None for dim in value.shape or ())
        fits = len(expected) == array.ndim and all(want in (None, got) for want, got in zip(expected, array.shape, strict=True))
        if array.dtype != dtype or not fits:
            raise GraphError(
                f"the adapter's {name!r} is {array.dtype} {list(array.shape)}, the graph reads {dtype} "
                f"{[dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]}; export the bundle again"
            )
        value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
        value.shape = ir.Shape(array.shape)
    _drop_inputs(graph, ours)


def _strip_defaults(graph: ir.Graph) -> None:
    """Banks and rules lose the defaults that would make constants of them. Other initializers that are listed as inputs, by old exporters
    or by the fold (reft.slots), are constants, and stop being inputs."""
    ours = _ours(graph)
    for value in [value for value in graph.inputs if value.is_initializer()]:
        if value.name in ours:
            del graph.initializers[value.name]
            value.const_value = None
        else:
            graph.inputs.remove(value)
            if not value.uses():
                del graph.initializers[name_of(value)]


def _ours(graph: ir.Graph) -> set[str]:
    """Every bank and rule that the graph reads."""
    banks = {name_of(bank) for node in graph if is_edit(node) for bank in banks_of(node)}
    return banks | {name_of(value) for value in graph.inputs if value.name in RULE_DEFAULTS}


def _drop_inputs(graph: ir.Graph, names: Sequence[str] | Mapping[str, object]) -> None:
    for value in [value for value in graph.inputs if value.name in names]:
        graph.inputs.remove(value)


def _record(value: ir.Value) -> TensorRecord:
    if value.shape is None:
        raise GraphError(f"{value.name!r}, an input or output of the graph, has no shape; run ONNX shape inference over the graph first")
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorRecord(name=name_of(value), dtype=dtype_of(value).name.lower(), shape=shape)

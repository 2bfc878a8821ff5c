"""Element type, width and rank of a stream: read from the value, or from the weights around it where the graph does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.accessors import describe
from graph_passes.find.axes import BATCH, SEQUENCE, TOKENS_SEQUENCE_FIRST, TracedAxes, constant_tensor
from graph_passes.find.sites import SiteLocation
from runtimes.edits.edit import Site
from runtimes.edits.op import OPS
from runtimes.errors import GraphError

FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Element types that the op takes."""
_ELEMENTWISE = frozenset(
    {"Add", "Mul", "Identity", "Dropout", "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", *OPS}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StreamType:
    """What the op needs to know about h [.., D]."""

    dtype: ir.DataType
    width: int
    """D"""
    rank: int
    """3 for [batch, sequence, D]; 2 where the graph has flattened the tokens to [batch * sequence, D]."""


def stream_type(site: Site, location: SiteLocation) -> StreamType:
    """``stream_types`` of one site."""
    return stream_types({site: location})[site]


def stream_types(located: Mapping[Site, SiteLocation]) -> dict[Site, StreamType]:
    """The type of the stream at every located site.

    Raises GraphError where the graph does not tell, where a stream is not float32, float16 or bfloat16 of rank 2 or 3, and where it holds
    the sequence before the batch: slots are [batch, sequence].
    """
    graph = next((location.node.graph for location in located.values()), None)
    if not isinstance(graph, ir.Graph):
        return {}
    axes = TracedAxes(graph)
    return {site: _stream_type(site, location, axes) for site, location in located.items()}


def stream_width(location: SiteLocation) -> int | None:
    """D, as far as the graph or its weights tell."""
    return _read_or_trace(location)[1]


def _stream_type(site: Site, location: SiteLocation, axes: TracedAxes) -> StreamType:
    dtype, width = _read_or_trace(location)
    where = f"the stream at {site}, {describe(location.node)},"
    if dtype is None or width is None:
        raise GraphError(
            f"{where} has no known {'element type' if dtype is None else 'width'}; run ONNX shape inference over the graph first"
        )
    if dtype not in FLOAT_TYPES:
        raise GraphError(
            f"{where} holds {dtype.name}, expected {', '.join(t.name for t in FLOAT_TYPES)}; where the graph is quantized at this "
            "point, fold the edit into the float graph and quantize afterwards"
        )
    # A skip norm that keeps its sum to itself has no such output; its first one has the sum's axes.
    outputs = location.node.outputs
    value = outputs[location.output_index if location.output_index < len(outputs) else 0]
    rank = axes.rank(value)
    if rank is None:
        raise GraphError(
            f"{where} has no known rank, and whether it is [batch, sequence, width] or [tokens, width] cannot be told; run ONNX shape "
            "inference over the graph first"
        )
    if rank not in (2, 3):
        raise GraphError(f"{where} has rank {rank}, expected [batch, sequence, width] or [tokens, width]")
    leading = (axes.of(value) or ())[: rank - 1]
    if leading in ((SEQUENCE, BATCH), (TOKENS_SEQUENCE_FIRST,)):
        raise GraphError(
            f"{where} holds [{', '.join(leading)}, width], expected the batch first, as slots are [batch, sequence]; export the decoder "
            "batch-first"
        )
    return StreamType(dtype=dtype, width=width, rank=rank)


def value_width(value: ir.Value) -> int | None:
    """The last dimension of ``value``, as far as its shape or the nodes before it tell."""
    width = _read(value)[1]
    producer = value.producer()
    return width if width is not None or producer is None else _trace(producer)[1]


_Partial = tuple[ir.DataType | None, int | None]


def _read_or_trace(location: SiteLocation) -> _Partial:
    # Not location.value, which may change the graph: a graph that is refused stays as it was.
    outputs = location.node.outputs
    dtype, width = _read(outputs[location.output_index]) if location.output_index < len(outputs) else (None, None)
    if dtype is None or width is None:
        traced = _trace(location.node)
        dtype, width = dtype or traced[0], width or traced[1]
    return dtype, width


def _read(value: ir.Value) -> _Partial:
    dtype, shape = _declared(value)
    width = shape[-1] if shape else None
    return dtype, width if isinstance(width, int) else None


def _declared(value: ir.Value) -> tuple[ir.DataType | None, Sequence[object]]:
    """Type and shape as declared, or of a Constant node's tensor; the shape is empty where it is not known."""
    tensor = None if value.producer() is None else constant_tensor(value)
    if tensor is not None:
        return tensor.dtype, tuple(tensor.shape)
    return value.dtype, tuple(value.shape or ())


def _trace(node: ir.Node, steps: int = 8) -> _Partial:
    """(dtype, width) of a node's first output as far as its operands tell; fused and optimized graphs carry no shapes."""
    inputs = [value for value in node.inputs if value is not None]
    dtype: ir.DataType | None = None
    width: int | None = None
    if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and (weight := _declared(inputs[1]))[1]:
        transposed = node.attributes.get_int("transB", 0)
        dtype, last = weight[0], weight[1][0 if transposed else -1]
        width = last if isinstance(last, int) else None
    elif node.op_type == "MatMulNBits":
        dtype, width = inputs[2].dtype, node.attributes.get_int("N", 0) or None
    elif node.op_type == "Gather":
        dtype, width = _read(inputs[0])
    elif node.op_type in _ELEMENTWISE:
        for value in inputs:
            known = _read(value)
            producer = value.producer()
            if None in known and producer is not None and steps:
                traced = _trace(producer, steps - 1)
                known = (known[0] or traced[0], known[1] or traced[1])
            # A scalar operand tells the type but not the width.
            dtype = dtype or known[0]
            width = max(filter(None, (width, known[1])), default=None)
    elif node.op_type in ("Reshape", "Cast") and (producer := inputs[0].producer()) is not None and steps:
        dtype, width = _trace(producer, steps - 1)
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes.get_int("to"))
    return dtype, width

"""Element type, width and rank of a stream: read from the value, or from the weights around it where the graph does not say."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.dominators import describe
from graph_passes.sites import SiteLocation
from runtimes.edit import Site
from runtimes.errors import GraphError
from runtimes.op import OPS

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
    """The type of the stream at a located site.

    Raises GraphError where the graph does not tell, or where the stream is not float32, float16 or bfloat16 of rank 2 or 3.
    """
    # Not location.value, which may change the graph: a graph that is refused stays as it was.
    outputs = location.node.outputs
    known = location.output_index < len(outputs)
    dtype, width, rank = _read(outputs[location.output_index]) if known else (None, None, None)
    if dtype is None or width is None or rank is None:
        traced = _trace(location.node)
        dtype, width, rank = dtype or traced[0], width or traced[1], rank or traced[2] or 3
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
    if rank not in (2, 3):
        raise GraphError(f"{where} has rank {rank}, expected [batch, sequence, width] or [tokens, width]")
    return StreamType(dtype=dtype, width=width, rank=rank)


def value_width(value: ir.Value) -> int | None:
    """The last dimension of ``value``, as far as its shape or the nodes before it tell."""
    width = _read(value)[1]
    producer = value.producer()
    return width if width is not None or producer is None else _trace(producer)[1]


_Partial = tuple[ir.DataType | None, int | None, int | None]


def _read(value: ir.Value) -> _Partial:
    width = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return value.dtype, width if isinstance(width, int) else None, None if value.shape is None else len(value.shape)


def _trace(node: ir.Node, steps: int = 8) -> _Partial:
    """(dtype, width, rank) of a node's first output as far as its operands tell; fused and optimized graphs carry no shapes."""
    inputs = [value for value in node.inputs if value is not None]
    dtype: ir.DataType | None = None
    width: int | None = None
    rank: int | None = None
    if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and inputs[1].shape is not None:
        transposed = node.attributes.get_int("transB", 0)
        dtype, last = inputs[1].dtype, inputs[1].shape[0 if transposed else -1]
        width = last if isinstance(last, int) else None
        rank = 2 if node.op_type == "Gemm" else None
    elif node.op_type == "MatMulNBits":
        dtype, width = inputs[2].dtype, node.attributes.get_int("N", 0) or None
    elif node.op_type == "Gather":
        dtype, width, _ = _read(inputs[0])
    elif node.op_type in _ELEMENTWISE:
        for value in inputs:
            known = _read(value)
            producer = value.producer()
            if None in known and producer is not None and steps:
                traced = _trace(producer, steps - 1)
                known = tuple(a if a is not None else b for a, b in zip(known, traced, strict=True))
            # A scalar operand tells the type but not the width; a rank-1 weight tells the width but not the rank.
            dtype = dtype or known[0]
            width = max(filter(None, (width, known[1])), default=None)
            rank = max((r for r in (rank, known[2]) if r is not None and r > 1), default=None)
    elif node.op_type in ("Reshape", "Cast") and inputs[0].producer() is not None and steps:
        dtype, width, _ = _trace(inputs[0].producer(), steps - 1)
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes.get_int("to"))
        rank = 3
    return dtype, width, rank

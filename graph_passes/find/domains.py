"""Operators that no runtime here can know."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from graph_passes.accessors import describe
from runtimes.errors import GraphError

KNOWN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""ONNX's own domains and onnxruntime's."""
_BY_ONNXRUNTIME = frozenset(
    {"SimplifiedLayerNormalization", "Affine", "ParametricSoftplus", "ImageScaler", "Crop", "DynamicSlice", "GivenTensorFill", "Scale",
     "GRUUnit", "ScaledTanh"}
)  # fmt: skip
"""Operators that onnxruntime has in ONNX's domain, though ONNX has not."""


def check_domains(model: ir.Model) -> None:
    """Raises GraphError for the first operator that is neither ONNX's, nor onnxruntime's, nor a function of the model itself."""
    for node, function in _used_nodes(model):
        if node.op_identifier() in model.functions:
            continue
        where = f"{describe(node)}{'' if function is None else f' in the function {function.name!r}'}"
        if node.domain not in KNOWN:
            raise GraphError(
                f"{where} is an operator of {node.domain!r}, which is neither ONNX's nor onnxruntime's nor defined in the graph; export "
                "the decoder with standard operators"
            )
        if node.domain == "" and not _is_standard(node.op_type, (model.graph if function is None else function).opset_imports.get("", 0)):
            raise GraphError(
                f"{where} is an operator that neither ONNX's own domain nor the graph defines; export the decoder with standard operators"
            )


def _used_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Function | None]]:
    """Every node of the graph and of the functions that it calls, and the function that a node stands in."""
    pending: list[ir.Function | None] = [None]
    seen: set[ir.OperatorIdentifier] = set()
    while pending:
        function = pending.pop()
        for node in (model.graph if function is None else function).all_nodes():
            called = node.op_identifier()
            if called in model.functions and called not in seen:
                seen.add(called)
                pending.append(model.functions[called])
            yield node, function


def _is_standard(op: str, opset: int) -> bool:
    # Of an opset newer than the installed onnx the names are not known here.
    return onnx.defs.has(op) or op in _BY_ONNXRUNTIME or opset > onnx.defs.onnx_opset_version()

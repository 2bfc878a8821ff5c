"""Operators that no runtime here can know."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.dominators import describe
from runtimes.errors import GraphError

KNOWN = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
"""ONNX's own domains and onnxruntime's."""


def check_domains(model: ir.Model) -> None:
    """Raises GraphError for the first operator that is neither ONNX's, nor onnxruntime's, nor a function of the model itself."""
    for node in model.graph.all_nodes():
        if node.domain not in KNOWN and node.op_identifier() not in model.functions:
            raise GraphError(
                f"{describe(node)} is an operator of {node.domain!r}, which is neither ONNX's nor onnxruntime's nor defined in the "
                "graph; export the decoder with standard operators"
            )

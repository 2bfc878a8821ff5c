"""The fusions of a traced decoder that runs in onnxruntime alone."""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.fuse.heads import FuseHeads
from graph_passes.fuse.norms import FuseRmsNorms


def fuse_decoder(model: ir.Model) -> None:
    """RMS norms and rotary embeddings become one operator each, in place; residual Adds stay, as edits read their sums."""
    FuseRmsNorms()(model)
    FuseHeads()(model)

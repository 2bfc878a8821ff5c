"""Fusions ahead of insertion: none are made, because none that were measured pay for what they cost.

Measured on a Llama (hidden 512, 8 layers, vocabulary 8000; dynamo export at opset 20, float32) with onnxruntime 1.31 on CPU, one thread,
against the graph as exported under ORT_ENABLE_ALL. Ratios of CPU time, geometric means over 6 processes, minima / medians:

    graph                                               decode, past 128     prefill 128
    as exported, a second session of it (the noise)     1.055 / 1.020        1.003 / 1.002
    RMS norms as SimplifiedLayerNormalization           1.019 / 0.987        0.985 / 0.988
    Adds in front fused in too (skip norms)             0.965 / 0.958        0.998 / 0.994

onnxscript 0.7.2's fusions for onnxruntime find 17 norms and 16 skip norms there, and of the attention only the rotary pattern, which
they write out again because nothing else uses it; the fusion that would pay, GroupQueryAttention, is not found. What is left is 1.5 %
of prefill or 4 % of a 4 ms decode step, within the spread of two sessions of one graph, and every edited site gives its skip norm back
(``skip_norms``). The price is a graph with operators outside ONNX's standard, which TensorRT's parser and onnx.checker refuse.
onnxruntime makes its own fusions when a session loads, so a graph that stays standard loses nothing that it would have kept.
"""

from __future__ import annotations

import onnx_ir as ir

from runtimes.errors import GraphError

LEVELS = ("none",)


def fuse(model: ir.Model, *, level: str = "none") -> None:
    """Fuses ``model`` in place at ``level``; "none", the only one, leaves it as it is. Raises GraphError for any other."""
    if level not in LEVELS:
        raise GraphError(
            f"fusion level {level!r} does not exist, use one of: {', '.join(LEVELS)}; graphs that another tool has fused can be "
            "folded as they are"
        )

"""Folds edits into a decoder graph: the one entry point over finding, inserting and checking.

No fusions are made ahead of insertion, because none that were measured pay for what they cost.

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

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graph_passes.external import load_graph, write_graph
from graph_passes.find.contract import check_history
from graph_passes.find.edge_llm import is_edge_llm
from graph_passes.first_logit import add_first_logit
from graph_passes.insert import insert_edits
from runtimes.edits.op import EditNode


def fold_graph(model: ir.Model, nodes: Sequence[EditNode], *, per_token: bool = False) -> None:
    """Folds ``nodes`` into ``model`` in place; as folded, the graph computes what it computed before.

    Which token is edited is computed from attention_mask, so that any runtime steers; a graph without one takes reft.slots [B, S] int32.
    Where the head is found, steps may leave out the first columns' logits (``graph_passes.first_logit``).
    ``per_token``: function bodies that TensorRT parses instead of the ones that gather the edited rows.

    Raises what ``insert_edits`` raises, and GraphError where a decode step would not know its history (``check_history``); a refused
    model is left as it was.
    """
    foreign_runtime = is_edge_llm(model.graph)  # its attention updates the cache inside its plugin, and it takes no inputs of ours
    if not foreign_runtime:
        check_history(model.graph)
    insert_edits(model, nodes, per_token=per_token)
    if not foreign_runtime:
        add_first_logit(model.graph)


def fold_file(source: Path | str, nodes: Sequence[EditNode], destination: Path | str, *, per_token: bool = False) -> None:
    """Reads the graph at ``source``, folds, and writes model.onnx and model.onnx.data into the folder ``destination``.

    The source is never written to, and weights are copied from file to file. Raises GraphError for a graph that cannot be read in
    full, for one that ``fold_graph`` refuses, and for a destination that holds a graph already.
    """
    model = load_graph(source)
    fold_graph(model, nodes, per_token=per_token)
    write_graph(model, destination)

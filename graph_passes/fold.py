"""Folds edits into a decoder graph: the one entry point over finding, inserting and checking.

No fusion is made here: a user's graph keeps its operators, and onnxruntime makes its own fusions when a session loads. Skip norms would be
given back at every edited site (``skip_norms``). What export itself traces for onnxruntime is fused before it comes here
(``graph_passes.fuse``), and TensorRT's parser and onnx.checker refuse such operators.
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

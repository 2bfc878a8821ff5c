"""Folds edits into a decoder graph: the one entry point over finding, inserting and checking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graph_passes.contract import check_history
from graph_passes.edge_llm import is_edge_llm
from graph_passes.external import load_graph, write_graph
from graph_passes.insert import insert_edits
from runtimes.op import EditNode


def fold_graph(model: ir.Model, nodes: Sequence[EditNode], *, slots: str = "graph", per_token: bool = False) -> None:
    """Folds ``nodes`` into ``model`` in place; as folded, the graph computes what it computed before.

    ``slots``: "graph" computes them from attention_mask, so that any runtime steers; "input" adds the input reft_slot [B, S] int32.
    ``per_token``: function bodies that TensorRT parses instead of the ones that gather the edited rows.

    Raises what ``insert_edits`` raises, and GraphError where a decode step would not know its history (``check_history``); a refused
    model is left as it was.
    """
    if not is_edge_llm(model.graph):  # whose attention updates the cache inside its plugin
        check_history(model.graph)
    insert_edits(model, nodes, slots=slots, per_token=per_token)


def fold_file(
    source: Path | str, nodes: Sequence[EditNode], destination: Path | str, *, slots: str = "graph", per_token: bool = False
) -> None:
    """Reads the graph at ``source``, folds, and writes model.onnx and model.onnx.data into the folder ``destination``.

    The source is never written to, and weights are copied from file to file. Raises GraphError for a graph that cannot be read in
    full, for one that ``fold_graph`` refuses, and for a destination that holds a graph already.
    """
    model = load_graph(source)
    fold_graph(model, nodes, slots=slots, per_token=per_token)
    write_graph(model, destination)

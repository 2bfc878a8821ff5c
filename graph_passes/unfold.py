"""The inverse of the fold: the decoder as it was before any edit, for comparison."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.accessors import input_of, name_of
from graph_passes.first_logit import remove_first_logit
from graph_passes.insert import banks_of, is_edit
from runtimes.edits.op import DOMAIN, OVERRIDABLE_NUMBERS, SLOT_INPUT


def unfold_graph(model: ir.Model) -> int:
    """Removes every edit node, bank, rule and slot from ``model`` in place; returns how many nodes there were.

    A token that is not edited passes through bit for bit, so what is left computes what the folded graph computes without an
    adapter. A Skip norm that the fold split stays split.
    """
    graph = model.graph
    edits = [node for node in graph if is_edit(node)]
    ours = {bank.name for node in edits for bank in banks_of(node)} | OVERRIDABLE_NUMBERS | {SLOT_INPUT}
    for node in edits:
        stream, edited = input_of(node, 0), node.outputs[0]
        # The fold left a graph output's name with the edited value, and gave the stream another one.
        name = edited.name if edited.is_graph_output() else None
        ir.convenience.replace_all_uses_with(edited, stream, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if name is not None:
            stream.name = name
    remove_first_logit(graph)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    RemoveUnusedNodesPass()(model)
    for value in list(graph.inputs):
        if value.name in ours:
            graph.inputs.remove(value)
            graph.initializers.pop(name_of(value), None)
    model.opset_imports.pop(DOMAIN, None)
    return len(edits)

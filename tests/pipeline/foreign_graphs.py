"""Graphs as other tools leave them: our own export without edits, its weights under numbers, and q, k, v joined in one product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.weight_only import replace_node
from calibration.weights import constant
from graph_passes.external import load_graph
from graph_passes.unfold import unfold_graph


def save_foreign(bundle: Path, folder: Path, *, join: bool = False, change: Callable[[ir.Model], object] = lambda _: None) -> Path:
    """<folder>/decoder.onnx and decoder.data: the graph of ``bundle`` without edits and without our names."""
    model = load_graph(bundle / "model.onnx")
    unfold_graph(model)
    if join:
        join_products(model.graph)
    for number, value in enumerate([v for v in model.graph.initializers.values() if not v.is_graph_input()]):
        value.name = f"onnx::MatMul_{number}"
    change(model)
    folder.mkdir()
    ir.save(model, folder / "decoder.onnx", external_data="decoder.data")
    return folder / "decoder.onnx"


def join_products(graph: ir.Graph) -> int:
    """Products of one input become one product and a Split, as onnxruntime-genai's builder writes q, k and v; returns how many did."""
    joined = 0
    for x in [node.inputs[0] for node in graph if node.op_type == "MatMul"]:
        nodes = [use.node for use in x.uses() if use.node.op_type == "MatMul" and use.node.inputs[1].const_value is not None]
        if len(nodes) < 2:
            continue
        arrays = [node.inputs[1].const_value.numpy() for node in nodes]
        weight = constant(f"{nodes[0].name}.joined", np.concatenate(arrays, axis=1))
        sizes = constant(f"{nodes[0].name}.sizes", np.array([a.shape[1] for a in arrays]))
        for value in (weight, sizes):
            graph.register_initializer(value)
        product = ir.node("MatMul", [x, weight], name=f"{nodes[0].name}.joined")
        split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{nodes[0].name}.split")
        first = min(nodes, key=list(graph).index)
        graph.insert_before(first, [product, split])
        for node, part in zip(nodes, split.outputs, strict=True):
            part.name = f"{node.name}.part"
            same = ir.node("Identity", [part], name=f"{node.name}.same")
            replace_node(graph, node, same)
        joined += 1
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_input()]:
        del graph.initializers[name]
    return joined

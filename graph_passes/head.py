"""A classifier's head as overridable initializers: an adapter that was trained with its head brings its own.

``reft.head.<parameter>`` is the initializer that holds the parameter, transposed where the graph multiplies by it so; its default is the
base's, so that a graph without an active adapter is the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import array_of, input_of, name_of, shape_of, tensor_of
from graph_passes.find.dominators import read_values
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import GraphError

HEAD_PREFIX = "reft.head."


def expose_head(model: ir.Model, sources: Mapping[str, WeightSource], parameters: Collection[str]) -> dict[str, WeightSource]:
    """Renames the initializers that hold ``parameters`` and makes them graph inputs too, in place; returns the map of the new names.

    ``sources``: initializer name -> the parameter it came from. Raises GraphError, before any change, where a parameter has no
    initializer of its own in the graph.
    """
    graph = model.graph
    holders = {source.parameter: name for name, source in sources.items() if source.axis is None and name in graph.initializers}
    if missing := [parameter for parameter in parameters if parameter not in holders]:
        raise GraphError(f"the graph holds no initializer for {missing[0]} of the classification head; export it without folding constants")
    head = {}
    for parameter in parameters:
        value = graph.initializers[holders[parameter]]
        head[f"{HEAD_PREFIX}{parameter}"] = sources[holders[parameter]]
        value.name = f"{HEAD_PREFIX}{parameter}"
        value.type = ir.TensorType(tensor_of(value).dtype)
        value.shape = ir.Shape(shape_of(value))
        graph.inputs.append(value)
    return head


def head_defaults(model: ir.Model, head: Collection[str]) -> dict[str, np.ndarray]:
    """The base's own head as the graph holds it, by initializer name."""
    return {name: array_of(model.graph.initializers[name]) for name in head}


def locate_head(model: ir.Model, end: ir.Value, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightSource]:
    """The initializers of a foreign graph that hold a head's parameters: initializer name -> parameter.

    ``shapes``: every parameter of the head in the order in which it is applied, in pairs of a weight [out, in] and a bias [out]; ``end``:
    the last block's output. The head is the last linear layers behind it: as many as it has weights, each one Gemm, or one MatMul and the
    Add of its bias. Raises GraphError where the graph shows other layers.
    """
    wanted = list(shapes.items())
    layers = _linear_layers(model.graph, end)
    pairs = [wanted[i : i + 2] for i in range(0, len(wanted), 2)]
    found = layers[-len(pairs) :]
    if len(found) != len(pairs) or any(len(pair) != 2 or len(pair[0][1]) != 2 or len(pair[1][1]) != 1 for pair in pairs):
        raise GraphError(
            f"the graph has {len(layers)} linear layers behind its last block, the adapter's head {len(pairs)} ({', '.join(shapes)}); fold "
            "an adapter without a head, or use `reft-export export`"
        )
    sources = {}
    for ((weight_name, weight_shape), (bias_name, bias_shape)), (weight, transpose, bias) in zip(pairs, found, strict=True):
        shown = shape_of(weight)[:: -1 if transpose else 1], shape_of(bias)
        if shown != (tuple(weight_shape), tuple(bias_shape)):
            raise GraphError(
                f"{weight.name} and {bias.name} behind the last block are [out, in] {list(shown[0])} and {list(shown[1])}, the adapter's "
                f"{weight_name} is {list(weight_shape)}; pass the graph of the base it was trained on"
            )
        sources[name_of(weight)] = WeightSource(parameter=weight_name, transpose=transpose)
        sources[name_of(bias)] = WeightSource(parameter=bias_name)
    return sources


def _linear_layers(graph: ir.Graph, end: ir.Value) -> list[tuple[ir.Value, bool, ir.Value]]:
    """(weight, whether it is stored [in, out], bias) of every linear layer that depends on ``end``, in graph order."""
    behind = {end}
    layers = []
    for node in graph:
        if node.op_type == "Shape" or not any(value in behind for value in read_values(node)):
            continue
        behind.update(node.outputs)
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = input_of(node, 1)
        readers = [use.node for use in node.outputs[0].uses()]
        biases = node.inputs[2:3] if node.op_type == "Gemm" else [v for n in readers if n.op_type == "Add" for v in n.inputs]
        bias = next((v for v in biases if v is not None and v.is_initializer() and v.const_value is not None), None)
        if not weight.is_initializer() or weight.const_value is None or bias is None:
            continue
        stored_out_in = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
        layers.append((weight, not stored_out_in, bias))
    return layers

"""A classifier's head as overridable initializers: an adapter that was trained with its head brings its own.

``reft.head.<parameter>`` is the initializer that holds the parameter, transposed where the graph multiplies by it so; its default is the
base's, so that a graph without an active adapter is the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from runtimes.bundle import WeightSource
from runtimes.errors import GraphError
from runtimes.tasks import HEAD_PREFIX


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
        head[f"{HEAD_PREFIX}{parameter}"] = sources[value.name]
        value.name = f"{HEAD_PREFIX}{parameter}"
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(value.const_value.shape)
        graph.inputs.append(value)
    return head


def head_defaults(model: ir.Model, head: Collection[str]) -> dict[str, np.ndarray]:
    """The base's own head as the graph holds it, by initializer name."""
    return {name: model.graph.initializers[name].const_value.numpy() for name in head}

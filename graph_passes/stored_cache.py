"""A KV cache in int8: GroupQueryAttention rounds what it appends, and attends to what it stored.

    s clamp(rint(x / s), -128, 127)    s [1, H, 1, D] of a layer's keys and of its values

onnxruntime 1.31 has it on the CPU, 1.23 does not. Measured on random values: the step's own keys and values are rounded before they are
attended to, so that a prompt says the same in one call and in several, and the operator's result is that of rounded float32 values to 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import array_of, dtype_of, input_of, name_of
from graph_passes.cache_shapes import ATTENTION, PAST_KEY, writes_in_place
from runtimes.errors import GraphError

KEY_SCALE = 12
"""Index of GroupQueryAttention's scales of keys; those of values are the next one."""
PER_CHANNEL = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
"""Of a layer's keys some channels are many times as large as others: one scale for all cost SmolLM2 five times as much."""
BITS = "kv_cache_bit_width"
Scales = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""By layer those of keys and of values, float32 [H, D]."""


def store_cache(model: ir.Model, scales: Scales) -> None:
    """Makes every past and present of a float32 graph int8, in place.

    Raises GraphError for a graph whose cache is not read and written by GroupQueryAttention alone.
    """
    if not writes_in_place(model.graph):
        raise GraphError(f"its KV cache is not {ATTENTION}'s, so it cannot be stored in int8")
    for layer, node in _attentions(model.graph):
        _retype(node, ir.DataType.INT8)
        _give_scales(model.graph, node, layer, scales[layer])


def stored_cache(graph: ir.Graph) -> Scales | None:
    """The scales that ``store_cache`` gave the graph; None of a float cache."""
    layers = {layer: node for layer, node in _attentions(graph) if dtype_of(input_of(node, PAST_KEY)) == ir.DataType.INT8}
    return {layer: (_scale(node, KEY_SCALE), _scale(node, KEY_SCALE + 1)) for layer, node in layers.items()} or None


def float_cache(model: ir.Model) -> None:
    """Takes ``store_cache`` back, in place; a graph without it stays as it is."""
    if stored_cache(model.graph) is None:
        return
    for _, node in _attentions(model.graph):
        _retype(node, ir.DataType.FLOAT)
        scales = [input_of(node, KEY_SCALE), input_of(node, KEY_SCALE + 1)]
        node.resize_inputs(_last_given(node, KEY_SCALE) + 1)
        for name in (BITS, *PER_CHANNEL):
            node.attributes.pop(name, None)
        for scale in scales:
            del model.graph.initializers[name_of(scale)]


def _attentions(graph: ir.Graph) -> Iterator[tuple[int, ir.Node]]:
    """(layer, its operator) of every cache."""
    for value in graph.inputs:
        found = re.fullmatch(r"past_key_values\.(\d{1,40})\.key", name_of(value))
        node = next((use.node for use in value.uses()), None) if found else None
        if found and node is not None and node.op_type == ATTENTION:
            yield int(found[1]), node


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    for value in (input_of(node, PAST_KEY), input_of(node, PAST_KEY + 1), *node.outputs[1:3]):
        value.dtype = dtype


def _give_scales(graph: ir.Graph, node: ir.Node, layer: int, scales: tuple[np.ndarray, np.ndarray]) -> None:
    node.resize_inputs(KEY_SCALE + 2)
    for place, (name, scale) in enumerate(zip(("key", "value"), scales, strict=True), KEY_SCALE):
        tensor = ir.tensor(np.ascontiguousarray(scale, np.float32)[None, :, None], name=f"reft.cache.{layer}.{name}_scale")
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        graph.register_initializer(value)
        node.replace_input_with(place, value)
    node.attributes[BITS] = ir.AttrInt64(BITS, 8)
    for name, kind in PER_CHANNEL.items():
        node.attributes[name] = ir.AttrString(name, kind)


def _scale(node: ir.Node, place: int) -> np.ndarray:
    return array_of(input_of(node, place))[0, :, 0]


def _last_given(node: ir.Node, below: int) -> int:
    return max(place for place, value in enumerate(node.inputs[:below]) if value is not None)

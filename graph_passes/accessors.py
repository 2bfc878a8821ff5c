"""What onnx-ir leaves optional and an operator's definition promises: inputs, names, types, constants; GraphError without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from runtimes.errors import GraphError

_REMEDY = "the graph is damaged: export it again"


def describe(node: ir.Node) -> str:
    """How messages name a node: its operator and the first value it computes, which every graph viewer can find."""
    output = node.outputs[0].name if node.outputs else ""
    return f"{node.op_type}({output!r})"


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = optional_input(node, index)
    if value is None:
        raise GraphError(f"{describe(node)} has no input {index}, which its operator needs; {_REMEDY}")
    return value


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def producer_of(value: ir.Value) -> ir.Node:
    producer = value.producer()
    if producer is None:
        raise GraphError(f"{value.name!r} is computed by no node; {_REMEDY}")
    return producer


def name_of(value: ir.Value) -> str:
    if value.name is None:
        raise GraphError(f"a value has no name; {_REMEDY}")
    return value.name


def dtype_of(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise GraphError(f"{value.name!r} has no known element type; run ONNX shape inference over the graph first")
    return value.dtype


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer."""
    if value.const_value is None:
        raise GraphError(f"{value.name!r} is no constant of the graph; {_REMEDY}")
    return value.const_value


def array_of(value: ir.Value) -> np.ndarray:
    """The numbers of an initializer."""
    return tensor_of(value).numpy()


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    return tuple(tensor_of(value).shape.numpy())


def int_of(node: ir.Node, attribute: str) -> int:
    value = node.attributes.get_int(attribute)
    if value is None:
        raise GraphError(f"{describe(node)} has no attribute {attribute!r}, which its operator needs; {_REMEDY}")
    return value

"""The model-local functions of domain ai.reft: the edits in standard ONNX operators, for runtimes without the ops' kernels.

    LoReFT    y[t] = h[t] + U[s]^T act(A[s] h[t] + b[s])
    RED       y[t] = scale[s] * h[t] + bias[s]

s = slot[t]; a slot outside [0, N) passes h[t] through, bit for bit.

The row form gathers the edited rows only, so its cost follows the edited tokens, not S or N (D 2048, r 4, S 256, 8 rows edited: 0.10 ms
for N = 1, 0.12 ms for N = 1000, where a one-hot body takes 89 ms). Its row count depends on data, which TensorRT's parser refuses
(NonZero); the per-token form computes every row with its slot clipped and keeps the edited ones: 1.1 to 1.8 ms. All figures are LoReFT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from runtimes.edits.edit import ACTIVATED, ACTIVATIONS, Site
from runtimes.edits.op import DOMAIN, OP_TYPE, OPS, RED_TYPE, EditNode
from runtimes.errors import GraphError

MINIMUM_OPSET = 15
"""The first opset whose Shape takes a range and that has CastLike."""
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")
"""Every node carries them, behind its op's own. TensorRT takes its plugin only where both are set, and else the function."""

_Compute = Callable[["_Body", ir.Value, list[ir.Value]], ir.Value]
"""(float32 rows of h, the rows' banks in float32) -> float32 rows of y."""


def function_of(node: EditNode, *, opset: int, per_token: bool = False) -> ir.Function:
    """The function that serves ``node``: of its op, and its overload."""
    if node.op == RED_TYPE:
        return scale_bias_function(opset=opset, per_token=per_token)
    return edit_function(opset=opset, activation=node.activation, activated=node.activated, per_token=per_token)


def edit_function(*, opset: int, activation: str = "", activated: str = "all", per_token: bool = False) -> ir.Function:
    """LoReFT's function of one overload ("" for the identity, else for example gelu_first_half).

    h [.., D] T, slot [..] int32, U [N, r, D] T, A [N, r, D] T, b [N, r] T -> y [.., D] T, for h of rank 2 or 3, N >= 1, r >= 1 and T
    in {float32, float16, bfloat16}; sums are taken in float32 and rounded once. With "first_half" the activation acts on the first
    floor(r / 2) rows of z = A h + b.

    Raises GraphError for an opset below 15 or an activation the op does not know.
    """
    if activation not in ACTIVATIONS or activated not in ACTIVATED:
        raise GraphError(f"activation {activation!r} on {activated!r} rows is not one the op knows")
    overload = activation + ("_first_half" if activated == "first_half" else "")
    compute = partial(_low_rank_rows, activation=activation, activated=activated)
    return _function(OP_TYPE, compute, opset=opset, overload=overload, per_token=per_token)


def scale_bias_function(*, opset: int, per_token: bool = False) -> ir.Function:
    """RED's function: h [.., D] T, slot [..] int32, scale [N, D] T, bias [N, D] T -> y [.., D] T, in float32 and rounded once.

    For h of rank 2 or 3, N >= 1 and T in {float32, float16, bfloat16}. Raises GraphError for an opset below 15.
    """
    return _function(RED_TYPE, _scaled_rows, opset=opset, overload="", per_token=per_token)


def _low_rank_rows(body: _Body, h: ir.Value, banks: list[ir.Value], *, activation: str, activated: str) -> ir.Value:
    """z = A[s] h + b[s] as a batch of [r, D] x [D, 1], y = h + z U[s] as a batch of [1, r] x [r, D]."""
    U, A, b = banks
    z = body.add("MatMul", A, body.add("Unsqueeze", h, body.axes(-1)))
    z = body.add("Add", body.add("Squeeze", z, body.axes(-1)), b)
    z = _activated(body, z, activation, activated)
    change = body.add("MatMul", body.add("Unsqueeze", z, body.axes(-2)), U)
    return body.add("Add", h, body.add("Squeeze", change, body.axes(-2)))


def _scaled_rows(body: _Body, h: ir.Value, banks: list[ir.Value]) -> ir.Value:
    scale, bias = banks
    return body.add("Add", body.add("Mul", scale, h), bias)


def _function(op: str, compute: _Compute, *, opset: int, overload: str, per_token: bool) -> ir.Function:
    """The part that all ops share: which rows are edited, their banks by slot, and everything else passed through."""
    if opset < MINIMUM_OPSET:
        raise GraphError(
            f"the graph is of opset {opset}, the edit needs {MINIMUM_OPSET} or later; convert it (onnx.version_converter) or export it "
            "again with --opset 20"
        )
    body = _Body()
    h, slot, *banks = (ir.Value(name=name) for name in ("h", "slot", *(bank.name for bank in OPS[op].banks)))
    count = body.add("Cast", body.add("Shape", banks[0], start=0, end=1), to=int(ir.DataType.INT32))
    zero = body.constant(0, np.int32)
    in_bank = body.add("And", body.add("GreaterOrEqual", slot, zero), body.add("Less", slot, count))
    if per_token:
        # Every token has something to be computed from; the last step keeps the edited ones.
        h_rows, slot_rows = h, body.add("Where", in_bank, slot, zero)
    else:
        edited = body.add("Transpose", body.add("NonZero", in_bank), perm=[1, 0])
        h_rows, slot_rows = body.add("GatherND", h, edited), body.add("GatherND", slot, edited)

    # The leading dimensions are [K] edited rows or [..] tokens; ``compute`` spells out what is behind them. All in float32.
    bank_rows = [body.float32(body.add("Gather", bank, slot_rows, axis=0)) for bank in banks]
    y_rows = body.add("CastLike", compute(body, body.float32(h_rows), bank_rows), h)

    if per_token:
        y = body.add("Where", body.add("Unsqueeze", in_bank, body.axes(-1)), y_rows, h)
    else:
        y = body.add("ScatterND", h, edited, y_rows)
    y.name = "y"
    graph = ir.Graph([h, slot, *banks], [y], nodes=body.nodes, opset_imports={"": opset}, name=op)
    # Declared without defaults, so that checker and runtimes accept them on the nodes; the body itself does not read them.
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in (*OPS[op].attributes, *PLUGIN_ATTRIBUTES)]
    return ir.Function(DOMAIN, op, overload, graph=graph, attributes=attributes)


class _Body:
    """Nodes of a function under construction; every value gets the name of its operator and a number."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value | None, **attributes: int | list[int] | ir.TensorProtocol) -> ir.Value:
        node = ir.node(op, list(inputs), attributes)
        node.outputs[0].name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: float | list[int], dtype: type[np.generic]) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(value, dtype)))

    def axes(self, axis: int) -> ir.Value:
        return self.constant([axis], np.int64)

    def float32(self, value: ir.Value) -> ir.Value:
        return self.add("Cast", value, to=int(ir.DataType.FLOAT))


def _activated(body: _Body, z: ir.Value, activation: str, activated: str) -> ir.Value:
    """act(z) on all rows of z [.., r], or on its first floor(r / 2)."""
    if not activation:
        return z
    act = _ACTIVATION_BODIES[activation](body, z)
    if activated == "all":
        return act
    rank = body.add("Squeeze", body.add("Shape", z, start=-1), body.axes(0))
    rows = body.add("Range", body.constant(0, np.int64), rank, body.constant(1, np.int64))
    half = body.add("Div", rank, body.constant(2, np.int64))
    return body.add("Where", body.add("Less", rows, half), act, z)


def _gelu(body: _Body, z: ir.Value) -> ir.Value:
    """z Phi(z) = z / 2 (1 + erf(z / sqrt 2)); spelled out, as the Gelu operator exists from opset 20 only."""
    erf = body.add("Erf", body.add("Mul", z, body.constant(math.sqrt(0.5), np.float32)))
    return _half_of_one_plus(body, z, erf)


def _gelu_tanh(body: _Body, z: ir.Value) -> ir.Value:
    """z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))"""
    cube = body.add("Mul", body.add("Mul", z, z), z)
    inner = body.add("Add", z, body.add("Mul", cube, body.constant(0.044715, np.float32)))
    return _half_of_one_plus(body, z, body.add("Tanh", body.add("Mul", inner, body.constant(math.sqrt(2 / math.pi), np.float32))))


def _half_of_one_plus(body: _Body, z: ir.Value, x: ir.Value) -> ir.Value:
    half = body.add("Mul", z, body.constant(0.5, np.float32))
    return body.add("Mul", half, body.add("Add", x, body.constant(1.0, np.float32)))


_ACTIVATION_BODIES = {
    "relu": lambda body, z: body.add("Relu", z),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda body, z: body.add("Mul", z, body.add("Sigmoid", z)),
    "tanh": lambda body, z: body.add("Tanh", z),
    "sigmoid": lambda body, z: body.add("Sigmoid", z),
}


def use_bodies(model: ir.Model, *, per_token: bool) -> None:
    """Gives every ai.reft function of ``model`` the row form or the per-token form, in place."""
    for (domain, op, overload), function in list(model.functions.items()):
        if domain != DOMAIN or op not in OPS:
            continue
        activation, half, _ = overload.partition("_first_half")
        node = EditNode(site=Site(layer=0), op=op, activation=activation, activated="first_half" if half else "all")
        model.functions[domain, op, overload] = function_of(node, opset=function.opset_imports[""], per_token=per_token)

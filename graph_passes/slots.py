"""Which slot of its bank each token reads: computed in the graph from attention_mask, or handed in by the session.

With S = width of input_ids and mask = attention_mask [B, T], T >= S (growing with the cache, or as wide as a static cache):

    end = max(max(mask * (column + 1)), S);  start = end - S;  win = mask[:, start : end]
    p = sum(mask) - sum(win) + cumsum(win) - 1                        a token's rank among its row's real tokens
    L = reft.prompt_length where >= 0, else (sum(mask) if start == 0 else 0)
    f, l = reft.first, reft.last, each cut to L // 2 where reft.truncate
    slot = reft.suffix_slot if L - l <= p < L; else 0 if p < f or (reft.prompt and p < L) or reft.everywhere; else -1; -1 where win == 0

Without ``reft.prompt_length`` a prompt must come in one call: nothing in the shapes tells a chunk of a prompt from its completion.
The same arithmetic in numpy is ``runtimes.positions.slots``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.contract import read_contract
from runtimes.errors import GraphError
from runtimes.op import PROMPT_LENGTH, RULE_DEFAULTS, SLOT_INPUT

SLOT_VALUE = "reft.slot"
"""The int32 [B, S] value that every edit reads when the slots are computed in the graph."""
SLOT_MODES = ("graph", "input")


def add_slots(graph: ir.Graph, mode: str) -> ir.Value:
    """Adds the slots to the graph and returns them, int32 [B, S]: the rule ("graph"), or the graph input reft_slot ("input").

    Raises GraphError where the mode is unknown, or where the graph lacks the attention_mask [B, T] that the rule reads.
    """
    if mode == "graph":
        return _add_rule(graph)
    if mode == "input":
        return _add_input(graph)
    raise GraphError(f"slots {mode!r} is unknown; use one of: {', '.join(SLOT_MODES)}")


def _add_input(graph: ir.Graph) -> ir.Value:
    ids = read_contract(graph).input_ids
    slot = ir.Value(name=SLOT_INPUT, type=ir.TensorType(ir.DataType.INT32), shape=_batch_by_sequence(ids))
    graph.inputs.append(slot)
    return slot


def _batch_by_sequence(ids: ir.Value) -> ir.Shape:
    if ids.shape is not None and len(ids.shape) == 2:
        return ir.Shape(list(ids.shape))
    return ir.Shape(["batch", "sequence"])


def _add_rule(graph: ir.Graph) -> ir.Value:
    contract = read_contract(graph)
    ids, mask = contract.input_ids, contract.attention_mask
    if mask is None or (mask.shape is not None and len(mask.shape) != 2):
        got = "it has no such input" if mask is None else f"its attention_mask has rank {len(mask.shape)}"
        raise GraphError(
            f"slots can be computed in a graph from an attention_mask [batch, past + sequence] only; {got}; use --slots input"
        )
    rule = {name: _add_rule_value(graph, name, default) for name, default in RULE_DEFAULTS.items()}
    build = _Rule()
    mask = build.add("Cast", mask, to=int(ir.DataType.INT64))
    width = build.add("Shape", ids, start=1, end=2)
    columns = build.range(build.add("Shape", mask, start=1, end=2))

    # The last real column of any row ends this call, so that a mask as wide as a static cache works like a growing one.
    last = build.add("ReduceMax", build.add("Mul", mask, build.add("Add", columns, build.one)), keepdims=0)
    end = build.add("Max", build.add("Reshape", last, build.minus_one), width)
    start = build.add("Sub", end, width)
    window = build.add("Gather", mask, build.add("Add", build.range(width), start), axis=1)

    total = build.add("ReduceSum", mask, build.one, keepdims=1)
    before = build.add("Sub", total, build.add("ReduceSum", window, build.one, keepdims=1))
    rank = build.add("Sub", build.add("Add", before, build.add("CumSum", window, build.one_scalar)), build.one)

    derived = build.add("Where", build.add("Equal", start, build.zero), total, build.zero)
    given = build.add("Unsqueeze", rule[PROMPT_LENGTH], build.one)
    length = build.add("Where", build.add("GreaterOrEqual", given, build.zero), given, derived)

    half = build.add("Div", length, build.two)
    truncate = build.add("Greater", rule["reft.truncate"], build.zero)
    first, last = (
        build.add("Where", truncate, build.add("Min", rule[name], half), rule[name]) for name in ("reft.first", "reft.last")
    )
    in_prompt = build.add("Less", rank, length)
    in_suffix = build.add("And", build.add("GreaterOrEqual", rank, build.add("Sub", length, last)), in_prompt)
    whole_prompt = build.add("And", build.add("Greater", rule["reft.prompt"], build.zero), in_prompt)
    everywhere = build.add("Greater", rule["reft.everywhere"], build.zero)
    edited = build.add("Or", build.add("Or", build.add("Less", rank, first), whole_prompt), everywhere)

    slot = build.add("Where", edited, build.zero, build.minus_one)
    slot = build.add("Where", in_suffix, rule["reft.suffix_slot"], slot)
    slot = build.add("Where", build.add("Greater", window, build.zero), slot, build.minus_one)
    slot = build.add("Cast", slot, to=int(ir.DataType.INT32))
    slot.name = SLOT_VALUE
    slot.type = ir.TensorType(ir.DataType.INT32)
    slot.shape = _batch_by_sequence(ids)
    # The rule reads graph inputs only, so it can stand before everything that reads it.
    graph.insert_before(graph[0], build.nodes)
    return slot


def _add_rule_value(graph: ir.Graph, name: str, default: int) -> ir.Value:
    """An initializer that is a graph input too: runtimes may replace it per call. prompt_length is [1] or [B], the others [1]."""
    rows: int | str = f"{PROMPT_LENGTH}.rows" if name == PROMPT_LENGTH else 1
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([rows]),
        const_value=ir.tensor(np.array([default], np.int64), name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


class _Rule:
    """Nodes of the rule under construction; every value is named reft.rule.<operator>_<number>."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.zero, self.one, self.two, self.minus_one = (self.constant([value]) for value in (0, 1, 2, -1))
        self.zero_scalar, self.one_scalar = self.constant(0), self.constant(1)

    def add(self, op: str, *inputs: ir.Value, **attributes: int | ir.TensorProtocol) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"reft.rule.{op.lower()}_{len(self.nodes)}")
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | list[int]) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(value, np.int64)))

    def range(self, count: ir.Value) -> ir.Value:
        """[0, .., count - 1] of a count of shape [1]."""
        return self.add("Range", self.zero_scalar, self.add("Squeeze", count, self.zero), self.one_scalar)

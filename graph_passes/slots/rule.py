"""The half of the slot rule that every kind of graph shares: from a token's rank and its row's prompt length to its slot.

    f, l = reft.first, reft.last, each cut to L // 2 where reft.truncate
    slot = F + reft.suffix_slot if L - l <= p < L; else F if p < f or (reft.prompt and p < L) or reft.everywhere; else -1; -1 at pads
    F = reft.first_slot

Every number is [1], or [B] where each row has a rule of its own.

How p and L are known differs: from an attention mask (add.py), or from TensorRT-Edge-LLM's lengths (edge_llm.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from runtimes.edits.op import FIRST_SLOT, PROMPT_LENGTH

SLOT_VALUE = "reft.slot"
"""The int32 value that every edit reads when the slots are computed in the graph."""


class RuleNodes:
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

    def constant(self, value: int | list[int], dtype: type[np.integer] = np.int64) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(value, dtype)))

    def column(self, rows: ir.Value) -> ir.Value:
        """[B, 1] of rows [B], so that they broadcast over columns even where B = S."""
        return self.add("Unsqueeze", rows, self.one)

    def range(self, count: ir.Value) -> ir.Value:
        """[0, .., count - 1] of a count of shape [1]."""
        return self.add("Range", self.zero_scalar, self.add("Squeeze", count, self.zero), self.one_scalar)


def add_rule_values(graph: ir.Graph, defaults: Mapping[str, int]) -> dict[str, ir.Value]:
    """Initializers int64 [rows] that are graph inputs too: runtimes may replace them per call, by [1] or [B]."""
    # A name of its own for each: one rule may be [B] where another is [1].
    return {name: add_overridable(graph, name, [f"{name}.rows"], np.array([default], np.int64)) for name, default in defaults.items()}


def add_overridable(graph: ir.Graph, name: str, shape: Sequence[int | str], default: np.ndarray) -> ir.Value:
    """An initializer that is a graph input too, so that runtimes may replace it per call by a tensor of ``shape``."""
    tensor = ir.tensor(default, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def apply_rule(build: RuleNodes, *, rank: ir.Value, length: ir.Value, real: ir.Value, rule: Mapping[str, ir.Value]) -> ir.Value:
    """int32 slots of the tokens with ``rank`` p in a prompt of ``length`` L (int64, broadcast), -1 where not ``real`` (bool)."""
    number = {name: build.column(value) for name, value in rule.items() if name != PROMPT_LENGTH}
    half = build.add("Div", length, build.two)
    truncate = build.add("Greater", number["reft.truncate"], build.zero)
    first, last = (build.add("Where", truncate, build.add("Min", number[name], half), number[name]) for name in ("reft.first", "reft.last"))
    in_prompt = build.add("Less", rank, length)
    in_suffix = build.add("And", build.add("GreaterOrEqual", rank, build.add("Sub", length, last)), in_prompt)
    whole_prompt = build.add("And", build.add("Greater", number["reft.prompt"], build.zero), in_prompt)
    everywhere = build.add("Greater", number["reft.everywhere"], build.zero)
    edited = build.add("Or", build.add("Or", build.add("Less", rank, first), whole_prompt), everywhere)

    slot = build.add("Where", edited, number[FIRST_SLOT], build.minus_one)
    slot = build.add("Where", in_suffix, build.add("Add", number[FIRST_SLOT], number["reft.suffix_slot"]), slot)
    slot = build.add("Where", real, slot, build.minus_one)
    return build.add("Cast", slot, to=int(ir.DataType.INT32))

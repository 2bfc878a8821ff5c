"""The half of the slot rule that every kind of graph shares: from a token's rank and its row's prompt length to its slot.

    f, l = reft.first, reft.last, each cut to L // 2 where reft.truncate
    slot = reft.suffix_slot if L - l <= p < L; else 0 if p < f or (reft.prompt and p < L) or reft.everywhere; else -1; -1 at pads

How p and L are known differs: from an attention mask (add.py), or from TensorRT-Edge-LLM's lengths (edge_llm.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from runtimes.edits.op import PROMPT_LENGTH

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

    def constant(self, value: int | list[int]) -> ir.Value:
        return self.add("Constant", value=ir.tensor(np.array(value, np.int64)))

    def range(self, count: ir.Value) -> ir.Value:
        """[0, .., count - 1] of a count of shape [1]."""
        return self.add("Range", self.zero_scalar, self.add("Squeeze", count, self.zero), self.one_scalar)


def add_rule_values(graph: ir.Graph, defaults: Mapping[str, int]) -> dict[str, ir.Value]:
    """Initializers that are graph inputs too: runtimes may replace them per call. prompt_length is [1] or [B], the others [1]."""
    values = {}
    for name, default in defaults.items():
        rows: int | str = f"{PROMPT_LENGTH}.rows" if name == PROMPT_LENGTH else 1
        values[name] = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([rows]),
            const_value=ir.tensor(np.array([default], np.int64), name=name),
        )
        graph.inputs.append(values[name])
        graph.register_initializer(values[name])
    return values


def apply_rule(build: RuleNodes, *, rank: ir.Value, length: ir.Value, real: ir.Value, rule: Mapping[str, ir.Value]) -> ir.Value:
    """int32 slots of the tokens with ``rank`` p in a prompt of ``length`` L (int64, broadcast), -1 where not ``real`` (bool)."""
    half = build.add("Div", length, build.two)
    truncate = build.add("Greater", rule["reft.truncate"], build.zero)
    first, last = (build.add("Where", truncate, build.add("Min", rule[name], half), rule[name]) for name in ("reft.first", "reft.last"))
    in_prompt = build.add("Less", rank, length)
    in_suffix = build.add("And", build.add("GreaterOrEqual", rank, build.add("Sub", length, last)), in_prompt)
    whole_prompt = build.add("And", build.add("Greater", rule["reft.prompt"], build.zero), in_prompt)
    everywhere = build.add("Greater", rule["reft.everywhere"], build.zero)
    edited = build.add("Or", build.add("Or", build.add("Less", rank, first), whole_prompt), everywhere)

    slot = build.add("Where", edited, build.zero, build.minus_one)
    slot = build.add("Where", in_suffix, rule["reft.suffix_slot"], slot)
    slot = build.add("Where", real, slot, build.minus_one)
    return build.add("Cast", slot, to=int(ir.DataType.INT32))

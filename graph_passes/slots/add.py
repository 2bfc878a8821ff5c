"""Which slot of its bank each token reads: computed in the graph from attention_mask, or handed in where the graph has none.

With S = width of input_ids and mask = attention_mask [B, T], T >= S (growing with the cache, or as wide as a static cache):

    end = max(max(mask * (column + 1)), S);  start = end - S;  win = mask[:, start : end]
    p = sum(mask) - sum(win) + cumsum(win) - 1                        a token's rank among its row's real tokens
    L = reft.prompt_length where >= 0, else (sum(mask) if start == 0 else 0)
    f, l = reft.first, reft.last, each cut to L // 2 where reft.truncate
    F = reft.first_slot
    slot = F + reft.suffix_slot if L - l <= p < L; else F if p < f or (reft.prompt and p < L) or reft.everywhere; else -1; -1 where win == 0
    slot = reft.slots where reft.slots >= -1

Every number is [1] or [B], and reft.slots int32 is broadcast to [B, S]: adapters of different rows, their banks stacked, mix in one batch.
Without ``reft.prompt_length`` a prompt must come in one call: nothing in the shapes tells a chunk of a prompt from its completion.
The same arithmetic in numpy is ``runtimes.edits.positions.slots_of``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graph_passes.find.contract import read_contract
from graph_passes.find.edge_llm import is_edge_llm
from graph_passes.slots.edge_llm import add_edge_llm_rule
from graph_passes.slots.rule import SLOT_VALUE, RuleNodes, add_overridable, add_rule_values, apply_rule
from runtimes.edits.op import EXPLICIT_SLOTS, NOT_EXPLICIT, PROMPT_LENGTH, RULE_DEFAULTS, SLOT_INPUT


def add_slots(graph: ir.Graph) -> ir.Value:
    """Adds the slots to the graph and returns them, int32 [B, S]: the rule, or without an attention_mask [B, T] the input reft.slots.

    A TensorRT-Edge-LLM export has a rule of its own (graph_passes/slots/edge_llm.py), and no room for further inputs.
    """
    if is_edge_llm(graph):
        return add_edge_llm_rule(graph)
    contract = read_contract(graph)
    mask = contract.attention_mask
    # A mask of another shape, such as one that is spread over heads, does not say which columns of a row are real.
    if mask is None or (mask.shape is not None and len(mask.shape) != 2):
        slot = ir.Value(name=EXPLICIT_SLOTS, type=ir.TensorType(ir.DataType.INT32), shape=_batch_by_sequence(contract.input_ids))
        graph.inputs.append(slot)
        return slot
    return _add_rule(graph, contract.input_ids, mask)


def slot_mode(graph: ir.Graph) -> str:
    """Of a folded graph, what a manifest says: "graph" where it computes the slots, "input" where it takes them at every call."""
    taken = {value.name for value in graph.inputs if not value.is_initializer()}
    return "input" if taken & {EXPLICIT_SLOTS, SLOT_INPUT} else "graph"


def rule_names(graph: ir.Graph) -> frozenset[str]:
    """Of a folded graph, the rule's numbers that an adapter brings: none where slots are an input, fewer in a version 1 bundle."""
    return frozenset(RULE_DEFAULTS.keys() & {value.name for value in graph.inputs}) - {PROMPT_LENGTH}


def _batch_by_sequence(ids: ir.Value) -> ir.Shape:
    if ids.shape is not None and len(ids.shape) == 2:
        return ir.Shape(list(ids.shape))
    return ir.Shape(["batch", "sequence"])


def _add_rule(graph: ir.Graph, ids: ir.Value, mask: ir.Value) -> ir.Value:
    rule = add_rule_values(graph, RULE_DEFAULTS)
    explicit = add_overridable(
        graph, EXPLICIT_SLOTS, [f"{EXPLICIT_SLOTS}.rows", f"{EXPLICIT_SLOTS}.columns"], np.array([[NOT_EXPLICIT]], np.int32)
    )
    build = RuleNodes()
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
    given = build.column(rule[PROMPT_LENGTH])
    length = build.add("Where", build.add("GreaterOrEqual", given, build.zero), given, derived)

    slot = apply_rule(build, rank=rank, length=length, real=build.add("Greater", window, build.zero), rule=rule)
    ruled = build.add("Greater", build.constant(NOT_EXPLICIT + 1, np.int32), explicit)
    slot = build.add("Where", ruled, slot, explicit)
    slot.name = SLOT_VALUE
    slot.type = ir.TensorType(ir.DataType.INT32)
    slot.shape = _batch_by_sequence(ids)
    # The rule reads graph inputs only, so it can stand before everything that reads it.
    graph.insert_before(graph[0], build.nodes)
    return slot

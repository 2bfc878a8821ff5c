"""Which slot of its bank each token reads: computed in the graph from attention_mask, or handed in by the session.

With S = width of input_ids and mask = attention_mask [B, T], T >= S (growing with the cache, or as wide as a static cache):

    end = max(max(mask * (column + 1)), S);  start = end - S;  win = mask[:, start : end]
    p = sum(mask) - sum(win) + cumsum(win) - 1                        a token's rank among its row's real tokens
    L = reft.prompt_length where >= 0, else (sum(mask) if start == 0 else 0)
    f, l = reft.first, reft.last, each cut to L // 2 where reft.truncate
    slot = reft.suffix_slot if L - l <= p < L; else 0 if p < f or (reft.prompt and p < L) or reft.everywhere; else -1; -1 where win == 0

Without ``reft.prompt_length`` a prompt must come in one call: nothing in the shapes tells a chunk of a prompt from its completion.
The same arithmetic in numpy is ``runtimes.edits.positions.slots``.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.find.contract import read_contract
from graph_passes.find.edge_llm import is_edge_llm
from graph_passes.slots.edge_llm import add_edge_llm_rule
from graph_passes.slots.rule import SLOT_VALUE, RuleNodes, add_rule_values, apply_rule
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS, SLOT_INPUT
from runtimes.errors import GraphError

SLOT_MODES = ("graph", "input")


def add_slots(graph: ir.Graph, mode: str) -> ir.Value:
    """Adds the slots to the graph and returns them, int32 [B, S]: the rule ("graph"), or the graph input reft_slot ("input").

    A TensorRT-Edge-LLM export has a rule of its own (graph_passes/slots/edge_llm.py), and no room for further inputs.

    Raises GraphError where the mode is unknown, or where the graph lacks the attention_mask [B, T] that the rule reads.
    """
    if mode == "graph" and is_edge_llm(graph):
        return add_edge_llm_rule(graph)
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
    shape = None if mask is None else mask.shape
    if mask is None or (shape is not None and len(shape) != 2):
        got = "it has no such input" if shape is None else f"its attention_mask has rank {len(shape)}"
        raise GraphError(f"slots can be computed in a graph from an attention_mask [batch, past + sequence] only; {got}; use --slots input")
    rule = add_rule_values(graph, RULE_DEFAULTS)
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
    given = build.add("Unsqueeze", rule[PROMPT_LENGTH], build.one)
    length = build.add("Where", build.add("GreaterOrEqual", given, build.zero), given, derived)

    slot = apply_rule(build, rank=rank, length=length, real=build.add("Greater", window, build.zero), rule=rule)
    slot.name = SLOT_VALUE
    slot.type = ir.TensorType(ir.DataType.INT32)
    slot.shape = _batch_by_sequence(ids)
    # The rule reads graph inputs only, so it can stand before everything that reads it.
    graph.insert_before(graph[0], build.nodes)
    return slot

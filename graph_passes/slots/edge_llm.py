"""The slot rule of TensorRT-Edge-LLM's graphs, from the lengths that its runtime binds; it takes no inputs of ours.

Padded, with q = context_lengths [B], s = kvcache_start_index [B] (0 where it is empty), S columns:

    context = q <= S        a prefill's q counts the row's new tokens; a decode step's q counts all, s + 1
    p = s + column          a token's rank in its row
    L = s + q if context, else 0;   real = column < q

Tokens, with o = query_start_offsets [B + 1], q = query_lengths, s = past_lengths [B], C = length of context_sequence_count_carrier:

    row = #{b >= 1 : o[b] <= t};  p = s[row] + t - o[row]
    L = s[row] + q[row] if row < C, else 0;   real = t - o[row] < q[row]

From p and L on the rule is everybody's (rule.py). L = 0 in a decode step loses nothing: p >= L there, whatever L is. Where a cached
prefix is reused, L is still the whole prompt's length, so every position is found; but the cache was written by another prompt, whose
own last tokens had been edited where the rule names last tokens. A prompt fed in chunks cannot be told from one with a reused prefix.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.find.edge_llm import EdgeLLMContract, read_edge_llm_contract
from graph_passes.slots.rule import SLOT_VALUE, RuleNodes, add_rule_values, apply_rule
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS

EDGE_LLM_RULE = {name: default for name, default in RULE_DEFAULTS.items() if name != PROMPT_LENGTH}
"""The rule's numbers: the prompt's length is computed."""


def add_edge_llm_rule(graph: ir.Graph) -> ir.Value:
    """Adds the rule and returns the slots, int32: [B, S] for the padded layout, [T, 1] for the tokens one."""
    contract = read_edge_llm_contract(graph)
    rule = add_rule_values(graph, EDGE_LLM_RULE)
    build = RuleNodes()
    rank, length, real = _padded(build, contract) if contract.layout == "padded" else _tokens(build, contract)
    slot = apply_rule(build, rank=rank, length=length, real=real, rule=rule)
    slot.name = SLOT_VALUE
    slot.type = ir.TensorType(ir.DataType.INT32)
    dims = list(contract.stream.shape or ("batch", "sequence"))
    slot.shape = ir.Shape(dims[:2] if contract.layout == "padded" else [dims[0], 1])
    # The rule reads graph inputs only, so it can stand before everything that reads it.
    graph.insert_before(graph[0], build.nodes)
    return slot


def _padded(build: RuleNodes, contract: EdgeLLMContract) -> tuple[ir.Value, ir.Value, ir.Value]:
    """p [B, S], L [B, 1], real [B, S]"""
    counts, past = (build.add("Cast", value, to=int(ir.DataType.INT64)) for value in contract.lengths.values())
    batch = build.add("Shape", counts)
    # As many zeros as rows behind it: of an empty kvcache_start_index they are what is left.
    filled = build.add("Concat", past, build.add("Sub", counts, counts), axis=0)
    start = build.add("Unsqueeze", build.add("Slice", filled, build.zero, batch), build.one)
    counts = build.add("Unsqueeze", counts, build.one)
    width = build.add("Shape", contract.stream, start=1, end=2)
    column = build.range(width)
    context = build.add("LessOrEqual", counts, width)
    length = build.add("Where", context, build.add("Add", start, counts), build.zero)
    return build.add("Add", start, column), length, build.add("Less", column, counts)


def _tokens(build: RuleNodes, contract: EdgeLLMContract) -> tuple[ir.Value, ir.Value, ir.Value]:
    """p, L, real: [T, 1]"""
    offsets, counts, past, carrier = contract.lengths.values()
    offsets, counts, past = (build.add("Cast", value, to=int(ir.DataType.INT64)) for value in (offsets, counts, past))
    token = build.add("Unsqueeze", build.range(build.add("Shape", contract.stream, start=0, end=1)), build.one)
    rows = build.add("Shape", counts)
    ends = build.add("Slice", offsets, build.one, build.add("Add", rows, build.one))
    passed = build.add("Cast", build.add("GreaterOrEqual", token, ends), to=int(ir.DataType.INT64))
    # Tokens behind the last row, if any, count as its padding.
    row = build.add("Min", build.add("ReduceSum", passed, build.one, keepdims=1), build.add("Sub", rows, build.one))
    column = build.add("Sub", token, build.add("Gather", offsets, row))
    counts, past = build.add("Gather", counts, row), build.add("Gather", past, row)
    # Only the carrier's length means something; its values are not set.
    context = build.add("Less", row, build.add("Shape", carrier))
    length = build.add("Where", context, build.add("Add", past, counts), build.zero)
    return build.add("Add", past, column), length, build.add("Less", column, counts)

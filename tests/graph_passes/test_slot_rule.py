"""The in-graph slot rule against a brute-force oracle that knows every token's place, over random batches and call sequences."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.slots.add import add_slots
from runtimes.edits.op import RULE_DEFAULTS
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import GraphError

STATIC_WIDTH = 40


def _graph(opset: int = 20, *, mask: ir.DataType | None = ir.DataType.INT64, mask_rank: int = 2) -> ir.Model:
    """Nothing but the contract: the logits and keys are stand-ins, and no call feeds a past."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
    inputs = [ids]
    if mask is not None:
        shape = ir.Shape(["batch", 1, "total", "total"][-mask_rank:] if mask_rank > 2 else ["batch", "total"])
        inputs.append(ir.Value(name="attention_mask", type=ir.TensorType(mask), shape=shape))
    nothing = ir.tensor(np.zeros((0, 0), np.int64), name="past_key_values.0.key")
    past = ir.Value(name=nothing.name, type=ids.type, shape=ir.Shape([0, 0]), const_value=nothing)
    inputs.append(past)
    logits, key = ir.node("Identity", [ids]), ir.node("Identity", [ids])
    for node, name in ((logits, "logits"), (key, "present.0.key")):
        node.outputs[0].name = name
        node.outputs[0].type, node.outputs[0].shape = ids.type, ids.shape
    graph = ir.Graph(inputs, [logits.outputs[0], key.outputs[0]], nodes=[logits, key], opset_imports={"": opset}, name="slots")
    graph.register_initializer(past)
    return ir.Model(graph, ir_version=10)


@functools.cache
def _session(opset: int = 20, mask: ir.DataType = ir.DataType.INT64, fault: str = "") -> onnxruntime.InferenceSession:
    model = _graph(opset, mask=mask)
    slot = add_slots(model.graph, "graph")
    model.graph.outputs.append(slot)
    if fault:
        wrong = next(node for node in model.graph if node.op_type == "Less")
        wrong.op_type = fault
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, kw_only=True)
class Token:
    """A column of one row: its rank among the row's real tokens, or None for a pad."""

    rank: int | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rows of tokens, their true prompt lengths, and the column ranges of the calls that feed them."""

    rows: tuple[tuple[Token, ...], ...]
    prompt_lengths: tuple[int, ...]
    calls: tuple[tuple[int, int], ...]
    static: bool


@st.composite
def layouts(draw: st.DrawFn, *, chunks: bool) -> Layout:
    lengths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 3))
    sides = draw(st.lists(st.sampled_from(["left", "right"]), min_size=len(lengths), max_size=len(lengths)))
    steps = draw(st.lists(st.integers(1, 3), max_size=4))
    rows = []
    for length, side in zip(lengths, sides, strict=True):
        pads = [Token(rank=None)] * (width - length)
        prompt = [Token(rank=rank) for rank in range(length)]
        completion = [Token(rank=length + step) for step in range(sum(steps))]
        rows.append(tuple((pads + prompt if side == "left" else prompt + pads) + completion))
    cuts = draw(st.sets(st.integers(1, width))) if chunks else set()
    # A chunk that ends in pads of every row hides where it ends: documented as out of reach.
    cuts = {cut for cut in cuts if any(row[cut - 1].rank is not None for row in rows)}
    if all(row[width - 1].rank is None for row in rows):
        cuts = set()
    edges = sorted({0, *cuts, width}) + [width + sum(steps[: index + 1]) for index in range(len(steps))]
    calls = zip(edges, edges[1:], strict=False)
    return Layout(rows=tuple(rows), prompt_lengths=tuple(lengths), calls=tuple(calls), static=draw(st.booleans()))


RULES = st.fixed_dictionaries(
    {
        "first": st.integers(0, 6),
        "last": st.integers(0, 6),
        "prompt": st.booleans(),
        "everywhere": st.booleans(),
        "truncate": st.booleans(),
        "tied": st.booleans(),
    }
)


def expected_slot(token: Token, length: int, rule: dict[str, int | bool]) -> int:
    """One token by the rule in words; ``length`` is the prompt's length as the call can know it."""
    if token.rank is None:
        return -1
    first, last = rule["first"], rule["last"]
    if rule["truncate"]:
        first, last = min(first, length // 2), min(last, length // 2)
    is_prompt = token.rank < length
    if is_prompt and token.rank >= length - last:
        return 0 if rule["tied"] else 1
    if token.rank < first or rule["everywhere"] or (rule["prompt"] and is_prompt):
        return 0
    return -1


def _mask(layout: Layout, end: int) -> np.ndarray:
    mask = np.array([[token.rank is not None for token in row[:end]] for row in layout.rows], np.int64)
    return np.pad(mask, ((0, 0), (0, STATIC_WIDTH - end))) if layout.static else mask


def _rule_feeds(rule: dict[str, int | bool]) -> dict[str, np.ndarray]:
    values = {**rule, "suffix_slot": 0 if rule["tied"] else 1}
    return {name: np.array([int(values[name.removeprefix("reft.")])], np.int64) for name in RULE_DEFAULTS if name != "reft.prompt_length"}


def _wrong_calls(session: onnxruntime.InferenceSession, layout: Layout, rule: dict[str, int | bool], given_length: bool) -> list[str]:
    wrong = []
    for start, end in layout.calls:
        mask = _mask(layout, end)
        feeds = {"input_ids": np.zeros((len(layout.rows), end - start), np.int64), "attention_mask": mask, **_rule_feeds(rule)}
        if given_length:
            feeds["reft.prompt_length"] = np.array(layout.prompt_lengths, np.int64)
            lengths = layout.prompt_lengths
        else:
            lengths = layout.prompt_lengths if start == 0 else [0] * len(layout.rows)
        want = [[expected_slot(token, length, rule) for token in row[start:end]] for row, length in zip(layout.rows, lengths, strict=True)]
        got = session.run(["reft.slot"], feeds)[0]
        assert got.dtype == np.int32
        if not np.array_equal(got, want):
            wrong.append(f"columns {start}..{end}: got {got.tolist()}, expected {want}")
    return wrong


@settings(deadline=None, max_examples=400)
@given(layout=layouts(chunks=False), rule=RULES)
def test_prompt_length_derived_from_the_first_call(layout, rule):
    assert not _wrong_calls(_session(), layout, rule, given_length=False)


@settings(deadline=None, max_examples=400)
@given(layout=layouts(chunks=True), rule=RULES)
def test_prompt_length_given_with_chunked_prompts(layout, rule):
    assert not _wrong_calls(_session(), layout, rule, given_length=True)


@settings(deadline=None, max_examples=100)
@given(layout=layouts(chunks=True), rule=RULES, given_length=st.booleans())
def test_agrees_with_the_device_side_rule(layout, rule, given_length):
    numbers = {name: rule[name] for name in ("first", "last", "prompt", "everywhere", "truncate")}
    device_rule = object.__new__(PositionRule)  # the numpy rule takes any mix; the class allows one kind at a time
    for name, value in numbers.items():
        object.__setattr__(device_rule, name, value)
    lengths = np.array(layout.prompt_lengths, np.int64) if given_length else None
    for start, end in layout.calls:
        mask = _mask(layout, end)
        feeds = {"input_ids": np.zeros((len(layout.rows), end - start), np.int64), "attention_mask": mask, **_rule_feeds(rule)}
        if lengths is not None:
            feeds["reft.prompt_length"] = lengths
        want = slots(device_rule, mask, end - start, tied=rule["tied"], prompt_length=lengths)
        np.testing.assert_array_equal(_session().run(["reft.slot"], feeds)[0], want)


def test_defaults_edit_nothing():
    feeds = {"input_ids": np.zeros((2, 6), np.int64), "attention_mask": np.ones((2, 6), np.int64)}
    assert (_session().run(["reft.slot"], feeds)[0] == -1).all()


def test_f2_l1_by_hand():
    # Left padded: pads at 0 and 1, prompt of 5 tokens, then one decode call with a mask as wide as a static cache.
    rule = {"reft.first": np.array([2]), "reft.last": np.array([1]), "reft.suffix_slot": np.array([1])}
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]])
    prefill = {"input_ids": np.zeros((1, 7), np.int64), "attention_mask": mask, **rule}
    assert _session().run(["reft.slot"], prefill)[0].tolist() == [[-1, -1, 0, 0, -1, -1, 1]]
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]])
    decode = {"input_ids": np.zeros((1, 1), np.int64), "attention_mask": mask, **rule}
    assert _session().run(["reft.slot"], decode)[0].tolist() == [[-1]]


def test_one_prompt_length_serves_every_row():
    feeds = {
        "input_ids": np.zeros((2, 2), np.int64), "attention_mask": np.ones((2, 6), np.int64),
        "reft.last": np.array([1]), "reft.prompt_length": np.array([5]),
    }  # fmt: skip
    assert _session().run(["reft.slot"], feeds)[0].tolist() == [[0, -1]] * 2


@pytest.mark.parametrize("opset", [15, 18, 23])
@pytest.mark.parametrize("mask", [ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL], ids=["int64", "int32", "bool"])
def test_opsets_and_mask_types(opset, mask):
    feeds = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.array([[0, 1, 1, 1]]).astype(mask.numpy()),
             "reft.first": np.array([1])}  # fmt: skip
    assert _session(opset, mask).run(["reft.slot"], feeds)[0].tolist() == [[-1, 0, -1, -1]]


def test_a_planted_fault_is_seen():
    # Less -> LessOrEqual moves the first comparison by one token.
    layout = Layout(rows=(tuple(Token(rank=rank) for rank in range(7)),), prompt_lengths=(5,), calls=((0, 5), (5, 6), (6, 7)), static=False)
    rule = {"first": 2, "last": 1, "prompt": True, "everywhere": False, "truncate": True, "tied": True}
    assert not _wrong_calls(_session(), layout, rule, given_length=True)
    assert _wrong_calls(_session(fault="LessOrEqual"), layout, rule, given_length=True)


def test_the_slot_input_takes_the_shape_of_input_ids():
    graph = _graph().graph
    slot = add_slots(graph, "input")
    assert slot.name == "reft_slot" and slot.dtype == ir.DataType.INT32
    assert [str(dim) for dim in slot.shape] == ["batch", "sequence"]
    assert graph.inputs[-1] is slot and not any(name in graph.initializers for name in RULE_DEFAULTS)


@pytest.mark.parametrize(
    ("mask", "rank", "message"),
    [(None, 2, "no such input; use --slots input"), (ir.DataType.FLOAT, 4, "attention_mask has rank 4")],
)
def test_refused_masks(mask, rank, message):
    with pytest.raises(GraphError, match=message):
        add_slots(_graph(mask=mask, mask_rank=rank).graph, "graph")


def test_unknown_mode():
    with pytest.raises(GraphError, match="slots 'mask' is unknown"):
        add_slots(_graph().graph, "mask")

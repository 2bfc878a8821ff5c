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
from runtimes.edits.positions import PositionRule, slots, slots_of

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
    slot = add_slots(model.graph)
    model.graph.outputs.append(slot)
    if fault == "columns":
        first_axis = next(
            node for node in model.graph if node.op_type == "Constant" and node.attributes["value"].value.numpy().tolist() == [0]
        )
        for node in model.graph:
            if node.op_type == "Unsqueeze" and node.inputs[0].name in RULE_DEFAULTS:
                node.replace_input_with(1, first_axis.outputs[0])
    elif fault:
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


Rule = dict[str, int]

RULES = st.fixed_dictionaries(
    {
        "first": st.integers(0, 6),
        "last": st.integers(0, 6),
        "prompt": st.integers(0, 1),
        "everywhere": st.integers(0, 1),
        "truncate": st.integers(0, 1),
        "suffix_slot": st.integers(0, 1),
        "first_slot": st.integers(0, 5),
    }
)


@st.composite
def mixed(draw: st.DrawFn, *, chunks: bool) -> tuple[Layout, list[Rule]]:
    """A layout, and one rule for all of its rows or one for each."""
    layout = draw(layouts(chunks=chunks))
    rows = len(layout.rows) if draw(st.booleans()) else 1
    return layout, draw(st.lists(RULES, min_size=rows, max_size=rows))


def expected_slot(token: Token, length: int, rule: Rule) -> int:
    """One token by the rule in words; ``length`` is the prompt's length as the call can know it."""
    if token.rank is None:
        return -1
    first, last = rule["first"], rule["last"]
    if rule["truncate"]:
        first, last = min(first, length // 2), min(last, length // 2)
    is_prompt = token.rank < length
    if is_prompt and token.rank >= length - last:
        return rule["first_slot"] + rule["suffix_slot"]
    if token.rank < first or rule["everywhere"] or (rule["prompt"] and is_prompt):
        return rule["first_slot"]
    return -1


def _mask(layout: Layout, end: int) -> np.ndarray:
    mask = np.array([[token.rank is not None for token in row[:end]] for row in layout.rows], np.int64)
    return np.pad(mask, ((0, 0), (0, STATIC_WIDTH - end))) if layout.static else mask


def _rule_feeds(rules: list[Rule]) -> dict[str, np.ndarray]:
    return {f"reft.{name}": np.array([rule[name] for rule in rules], np.int64) for name in rules[0]}


def _wrong_calls(session: onnxruntime.InferenceSession, layout: Layout, rules: list[Rule], *, given_length: bool) -> list[str]:
    """Calls in which the graph, or the rule in numpy, selects another slot than the rule in words."""
    wrong = []
    for start, end in layout.calls:
        width = end - start
        feeds = {"input_ids": np.zeros((len(layout.rows), width), np.int64), "attention_mask": _mask(layout, end), **_rule_feeds(rules)}
        if given_length:
            feeds["reft.prompt_length"] = np.array(layout.prompt_lengths, np.int64)
            lengths = layout.prompt_lengths
        else:
            lengths = layout.prompt_lengths if start == 0 else [0] * len(layout.rows)
        each = rules * (len(layout.rows) // len(rules))
        want = [
            [expected_slot(token, length, rule) for token in row[start:end]]
            for row, length, rule in zip(layout.rows, lengths, each, strict=True)
        ]
        got = session.run(["reft.slot"], feeds)[0]
        in_numpy = slots_of({name: feeds[name] for name in feeds.keys() & RULE_DEFAULTS}, feeds["attention_mask"], width)
        assert got.dtype == in_numpy.dtype == np.int32
        for who, found in (("graph", got), ("numpy", in_numpy)):
            if not np.array_equal(found, want):
                wrong.append(f"{who}, columns {start}..{end}: got {found.tolist()}, expected {want}")
    return wrong


@settings(deadline=None, max_examples=400)
@given(drawn=mixed(chunks=False))
def test_prompt_length_derived_from_the_first_call(drawn):
    assert not _wrong_calls(_session(), *drawn, given_length=False)


@settings(deadline=None, max_examples=400)
@given(drawn=mixed(chunks=True))
def test_prompt_length_given_with_chunked_prompts(drawn):
    assert not _wrong_calls(_session(), *drawn, given_length=True)


@settings(deadline=None, max_examples=100)
@given(drawn=mixed(chunks=True), data=st.data())
def test_explicit_slots_win_where_they_say_something(drawn, data):
    """Of one token, one row, one column or of all; what is below -1 leaves the token to the rule."""
    layout, rules = drawn
    for start, end in layout.calls:
        shape = [data.draw(st.sampled_from([1, size])) for size in (len(layout.rows), end - start)]
        count = shape[0] * shape[1]
        explicit = np.array(data.draw(st.lists(st.integers(-3, 4), min_size=count, max_size=count))).reshape(shape)
        feeds = {"input_ids": np.zeros((len(layout.rows), end - start), np.int64), "attention_mask": _mask(layout, end)}
        feeds |= _rule_feeds(rules)
        ruled = _session().run(["reft.slot"], feeds)[0]
        want = np.where(explicit >= -1, explicit, ruled)
        got = _session().run(["reft.slot"], {**feeds, "reft.slots": explicit.astype(np.int32)})[0]
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(slots_of(_rule_feeds(rules), feeds["attention_mask"], end - start, explicit=explicit), want)


def _alike(count: int, length: int) -> Layout:
    """``count`` rows of as many tokens, all of them prompt, in one call."""
    row = tuple(Token(rank=rank) for rank in range(length))
    return Layout(rows=(row,) * count, prompt_lengths=(length,) * count, calls=((0, length),), static=False)


OFF = {"first": 0, "last": 0, "prompt": 0, "everywhere": 0, "truncate": 0, "suffix_slot": 0, "first_slot": 0}


@pytest.mark.parametrize("number", ["first", "last", "prompt", "everywhere", "truncate", "suffix_slot", "first_slot"])
def test_as_many_rows_as_columns(number):
    """B = S: a rule [B] that is not turned into [B, 1] would be read as one number a column, and nothing would say so."""
    edits = {**OFF, "first": 2, "last": 1} if number in ("truncate", "suffix_slot", "first_slot") else OFF
    rules = [{**edits, number: row % 2} for row in range(4)]
    layout = _alike(4, 4) if number != "truncate" else _alike(3, 3)
    assert not _wrong_calls(_session(), layout, rules[: len(layout.rows)], given_length=True)
    # The fault that this is about: columns in place of rows.
    assert _wrong_calls(_session(fault="columns"), layout, rules[: len(layout.rows)], given_length=True)


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
    rules = [{**OFF, "first": 2, "last": 1, "prompt": 1, "truncate": 1}]
    assert not _wrong_calls(_session(), layout, rules, given_length=True)
    assert _wrong_calls(_session(fault="LessOrEqual"), layout, rules, given_length=True)


def test_a_rule_of_one_adapter_says_what_its_class_says():
    """``PositionRule.tensors`` of several rows, concatenated, are the rules of a batch."""
    rules = [("f2+l1", False, 3), ("prompt", True, 0), ("all", True, 7), ("l2", True, 2)]
    tensors = [PositionRule.parse(positions).tensors(tied=tied, first_slot=at) for positions, tied, at in rules]
    batch = {name: np.concatenate([each[name] for each in tensors]) for name in tensors[0]}
    mask = np.array([[0, 1, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    want = [[-1, 3, 3, -1, -1, 4], [0] * 6, [7, 7, 7, -1, -1, -1], [-1, -1, -1, -1, 2, 2]]
    assert slots_of(batch, mask, 6).tolist() == want
    for row, (positions, tied, at) in enumerate(rules):
        alone = slots(PositionRule.parse(positions), mask[row : row + 1], 6, tied=tied)
        assert np.where(alone < 0, alone, alone + at).tolist() == [want[row]]


@pytest.mark.parametrize(("mask", "rank"), [(None, 2), (ir.DataType.FLOAT, 4)])
def test_without_a_mask_of_rows_and_columns_the_slots_are_an_input(mask, rank):
    graph = _graph(mask=mask, mask_rank=rank).graph
    slot = add_slots(graph)
    assert slot.name == "reft.slots" and slot.dtype == ir.DataType.INT32
    assert [str(dim) for dim in slot.shape] == ["batch", "sequence"]
    assert graph.inputs[-1] is slot and not any(name in graph.initializers for name in RULE_DEFAULTS)

"""The slot rule of TensorRT-Edge-LLM's graphs, run in onnxruntime on the lengths that its runtime binds, against the device-side rule."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from edge_decoders import Row, edge_decoder, edge_feeds, lengths_of, session
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.slots.add import add_slots
from graph_passes.slots.edge_llm import EDGE_LLM_RULE, add_edge_llm_rule
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import GraphError

RULES = st.one_of(
    st.builds(
        lambda first, last, truncate: PositionRule(first=first, last=last or int(not first), truncate=truncate),
        st.integers(0, 6), st.integers(0, 6), st.booleans(),
    ),
    st.sampled_from([PositionRule(prompt=True), PositionRule(everywhere=True)]),
)  # fmt: skip


@functools.cache
def _session(layout: str, fault: tuple[str, str] = ("", "")) -> onnxruntime.InferenceSession:
    """The rule alone; ``fault`` changes the first of one kind of operator into another."""
    model = edge_decoder(layout)
    slot = add_slots(model.graph)
    wrong, right = fault[1], fault[0]
    if right:
        next(node for node in model.graph if node.op_type == right and node.name.startswith("reft.rule")).op_type = wrong
    model.graph.outputs.append(slot)
    return session(model)


def _got(layout: str, rule: PositionRule, tied: bool, rows: list[Row], *, decode: bool, fault: tuple[str, str] = ("", "")) -> np.ndarray:
    feeds = edge_feeds(edge_decoder(layout), layout, rows, decode=decode) | rule.tensors(tied=tied)
    found = _session(layout, fault).run(["reft.slot"], feeds)[0]
    assert found.dtype == np.int32
    return found.reshape(len(rows), -1)


def _expected(rule: PositionRule, tied: bool, rows: list[Row], prompts: list[int]) -> np.ndarray:
    """Row by row, by the device-side rule that is told every prompt's length; -1 where a row is padded."""
    width = max(row.new for row in rows)
    expected = np.full((len(rows), width), -1, np.int32)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        mask = np.ones((1, row.past + row.new), np.int64)
        expected[index, : row.new] = slots(rule, mask, row.new, tied=tied, prompt_length=np.array([prompt]))
    return expected


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Prompt lengths, how much of each lies in the cache already, and a number of decode steps."""
    prompts = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    reused = [draw(st.integers(0, prompt - 1)) if draw(st.booleans()) else 0 for prompt in prompts]
    return prompts, reused, draw(st.integers(0, 3))


@pytest.mark.parametrize("layout", ["padded", "tokens"])
@settings(deadline=None, max_examples=300)
@given(batch=batches(), rule=RULES, tied=st.booleans())
def test_every_call_agrees_with_the_rule_that_is_told_the_prompt_length(layout, batch, rule, tied):
    prompts, reused, steps = batch
    rows = [Row(past=past, new=prompt - past) for prompt, past in zip(prompts, reused, strict=True)]
    np.testing.assert_array_equal(_got(layout, rule, tied, rows, decode=False), _expected(rule, tied, rows, prompts))
    for step in range(steps):
        rows = [Row(past=prompt + step, new=1) for prompt in prompts]
        np.testing.assert_array_equal(_got(layout, rule, tied, rows, decode=True), _expected(rule, tied, rows, prompts))


@pytest.mark.parametrize("layout", ["padded", "tokens"])
@settings(deadline=None, max_examples=100)
@given(prompts=st.lists(st.integers(1, 14), min_size=1, max_size=4), rule=RULES, tied=st.booleans())
def test_a_first_call_agrees_with_a_right_padded_mask(layout, prompts, rule, tied):
    mask = (np.arange(max(prompts)) < np.array(prompts)[:, None]).astype(np.int64)
    rows = [Row(past=0, new=prompt) for prompt in prompts]
    np.testing.assert_array_equal(_got(layout, rule, tied, rows, decode=False), slots(rule, mask, max(prompts), tied=tied))


@settings(deadline=None, max_examples=100)
@given(prompts=st.lists(st.integers(1, 9), min_size=1, max_size=5), rule=RULES)
def test_rows_packed_without_padding(prompts, rule):
    """The layout allows rows of any start; the runtime pads them to one width as yet."""
    counts = np.array(prompts, np.int32)
    feeds = edge_feeds(edge_decoder("tokens"), "tokens", [Row(past=0, new=n) for n in prompts]) | rule.tensors(tied=True)
    feeds |= {"query_start_offsets": np.concatenate([[0], counts.cumsum()]).astype(np.int32)}
    feeds["inputs_embeds"], feeds["positions"] = feeds["inputs_embeds"][: counts.sum()], feeds["positions"][: counts.sum()]
    feeds["logits_indices"] = counts.cumsum() - 1
    found = _session("tokens").run(["reft.slot"], feeds)[0][:, 0]
    whole = [slots(rule, np.ones((1, n), np.int64), n)[0] for n in prompts]
    np.testing.assert_array_equal(found, np.concatenate(whole))


def test_tokens_behind_the_last_row():
    feeds = edge_feeds(edge_decoder("tokens"), "tokens", [Row(past=0, new=3)]) | PositionRule(everywhere=True).tensors(tied=True)
    feeds["inputs_embeds"] = np.pad(feeds["inputs_embeds"], ((0, 2), (0, 0)))
    assert _session("tokens").run(["reft.slot"], feeds)[0][:, 0].tolist() == [0, 0, 0, -1, -1]


def test_by_hand():
    # Two prompts of 5 and 3 tokens, f2+l1 untied; then one decode step.
    rows, rule = [Row(past=0, new=5), Row(past=0, new=3)], PositionRule(first=2, last=1)
    for layout in ("padded", "tokens"):
        assert _got(layout, rule, False, rows, decode=False).tolist() == [[0, 0, -1, -1, 1], [0, -1, 1, -1, -1]]
        assert _got(layout, rule, False, [Row(past=5, new=1), Row(past=3, new=1)], decode=True).tolist() == [[-1], [-1]]


def _wrong_calls(layout: str, fault: tuple[str, str]) -> int:
    prefill, step = [Row(past=0, new=5), Row(past=0, new=3)], [Row(past=5, new=1), Row(past=3, new=1)]
    wrong = 0
    for rule in map(PositionRule.parse, ("f1+l2", "prompt", "all")):
        for rows, decode in ((prefill, False), (step, True)):
            found = _got(layout, rule, True, rows, decode=decode, fault=fault)
            wrong += not np.array_equal(found, _expected(rule, True, rows, [5, 3]))
    return wrong


@pytest.mark.parametrize(
    ("layout", "right", "wrong"),
    [
        ("padded", "LessOrEqual", "Less"), ("padded", "LessOrEqual", "GreaterOrEqual"), ("padded", "Less", "LessOrEqual"),
        ("tokens", "GreaterOrEqual", "Greater"), ("tokens", "Less", "LessOrEqual"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(layout, right, wrong):
    assert not _wrong_calls(layout, ("", ""))
    assert _wrong_calls(layout, (right, wrong))


def test_no_input_but_the_numbers_of_the_rule():
    model = edge_decoder()
    before = [value.name for value in model.graph.inputs]
    add_edge_llm_rule(model.graph)
    assert [value.name for value in model.graph.inputs] == [*before, *EDGE_LLM_RULE]


@pytest.mark.parametrize("name", ["context_lengths", "kvcache_start_index"])
def test_missing_lengths(name):
    model = edge_decoder()
    model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == name))
    with pytest.raises(GraphError, match=f"input '{name}' missing"):
        add_slots(model.graph)


def test_lengths_are_those_of_the_layout():
    assert lengths_of("padded", [Row(past=3, new=1)], decode=True)["context_lengths"].tolist() == [4]
    assert lengths_of("padded", [Row(past=0, new=4)], decode=False)["kvcache_start_index"].shape == (0,)
    assert ir.DataType.from_numpy(lengths_of("tokens", [Row(past=0, new=2)], decode=False)["positions"].dtype) == ir.DataType.INT32

"""RED in a graph: its function body against float64, nodes in series with LoReFT's, and TensorRT's form of both."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import rounding
from decoders import session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from small_decoders import ROUNDING, WIDTH, random_banks, small_decoder, small_feeds

from graph_passes.edge_llm.lora import use_lora_inputs
from graph_passes.fold import fold_graph
from graph_passes.function_body import scale_bias_function, use_bodies
from graph_passes.insert import insert_edits, is_edit
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from graph_passes.unfold import unfold_graph
from runtimes.edits.edit import Edit, ScaleBiasEdit, Site
from runtimes.edits.op import DOMAIN, PROMPT_LENGTH, RED_TYPE, RULE_DEFAULTS, EditNode, edits_of, no_edit_bank
from runtimes.edits.positions import PositionRule
from runtimes.errors import GraphError
from runtimes.native_library import find_op_library

SITE = Site(layer=1)
LOREFT, GELU, RED = EditNode(site=SITE), EditNode(site=SITE, activation="gelu"), EditNode(site=SITE, op=RED_TYPE)
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Relative to the largest entry of y: two float32 roundings, and that of the result to its type."""


def _model(dtype: ir.DataType, rank: int, per_token: bool, opset: int = 20) -> onnx.ModelProto:
    leading = ("batch", "sequence") if rank == 3 else ("tokens",)
    shapes = {"h": (*leading, WIDTH), "slot": leading, "scale": ("N", WIDTH), "bias": ("N", WIDTH)}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT32 if name == "slot" else dtype), shape=ir.Shape(shape))
        for name, shape in shapes.items()
    ]
    node = ir.node(RED_TYPE, inputs, {"plugin_namespace": "ai.reft", "plugin_version": "1"}, domain=DOMAIN, name="edit")
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", inputs[0].type, inputs[0].shape
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="edit")
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[scale_bias_function(opset=opset, per_token=per_token)]))


@functools.cache
def _session(dtype: str, rank: int, per_token: bool, opset: int = 20, library: bool = False) -> onnxruntime.InferenceSession:
    model = _model(ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())], rank, per_token, opset)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(find_op_library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _feeds(seed: int, leading: tuple[int, ...], dtype: str, slots: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    draw = lambda *shape: random.standard_normal(shape).astype(kind)  # noqa: E731
    slot = random.integers(-2, slots + 2, leading).astype(np.int32)
    return {"h": draw(*leading, WIDTH), "slot": slot, "scale": draw(slots, WIDTH), "bias": draw(slots, WIDTH)}


def _check(y: np.ndarray, feeds: dict[str, np.ndarray], dtype: str) -> None:
    h, slot = feeds["h"], feeds["slot"]
    outside = (slot < 0) | (slot >= len(feeds["scale"]))
    assert y.dtype == h.dtype and y[outside].tobytes() == h[outside].tobytes()
    want = h.astype(np.float64)
    for number, edit in enumerate(edits_of(RED, (feeds["scale"], feeds["bias"]))):
        want[slot == number] = edit.apply(h[slot == number])
    if y.size:
        assert np.abs(y.astype(np.float64) - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    leading=st.sampled_from([(0, 5), (2, 0), (1, 1), (3, 4), (14,), (0,), (1,)]),
    slots=st.integers(1, 5),
)
def test_against_float64(dtype, per_token, seed, leading, slots):
    feeds = _feeds(seed, leading, dtype, slots)
    _check(_session(dtype, len(leading) + 1, per_token).run(None, feeds)[0], feeds, dtype)


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
def test_passing_tokens_keep_every_bit(per_token):
    feeds = _feeds(0, (1, 5), "float16")
    feeds["slot"][:] = [[-1, 2, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 0]]
    feeds["h"][0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    feeds["h"][0, 1] = 60000.0
    feeds["scale"][:] = 100.0
    y = _session("float16", 3, per_token).run(None, feeds)[0]
    assert y[0, :4].tobytes() == feeds["h"][0, :4].tobytes()
    assert y[0, 4].tobytes() != feeds["h"][0, 4].tobytes()


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_no_edit_bank_is_the_identity_to_the_bit(dtype, per_token):
    """As another adapter's slots meet it in a bundle of both: every token in slot 0, infinities, the smallest numbers, both zeros."""
    feeds = _feeds(3, (2, 7), dtype) | {"slot": np.zeros((2, 7), np.int32)}
    feeds["h"][0, 0, :5] = [np.inf, 0.0, -np.inf, 6e-8, -0.0]
    feeds |= dict(zip(("scale", "bias"), no_edit_bank(WIDTH, feeds["h"].dtype, RED_TYPE), strict=True))
    y = _session(dtype, 3, per_token).run(None, feeds)[0]
    if per_token:
        assert y[0, 0, 4] == 0
        y[0, 0, 4] = -0.0  # onnxruntime's Where gives 0.0 for it; TensorRT is who runs this form
    assert y.tobytes() == feeds["h"].tobytes()


def test_half_precision_is_rounded_once():
    # 2048 + 1 is not a float16: rounding the product before the sum would lose the one.
    feeds = _feeds(0, (4,), "float16", slots=1) | {"slot": np.zeros(4, np.int32)}
    feeds["h"][:], feeds["scale"][:], feeds["bias"][:] = 45.28, 45.28, -2048
    exact = np.float64(feeds["h"][0, 0]) ** 2 - 2048
    assert np.float16(np.float16(exact + 2048) - 2048) != np.float16(exact)
    np.testing.assert_array_equal(_session("float16", 2, False).run(None, feeds)[0], np.float16(exact))


def test_bfloat16_on_the_reference():
    """onnxruntime's CPU provider lacks bfloat16's operators; onnx's own evaluator has them."""
    feeds = _feeds(5, (6,), "bfloat16")
    y = ReferenceEvaluator(_model(ir.DataType.BFLOAT16, 2, False)).run(None, feeds)[0]
    _check(np.asarray(y).view(ml_dtypes.bfloat16) if y.dtype != ml_dtypes.bfloat16 else y, feeds, "bfloat16")


@pytest.mark.parametrize("opset", [15, 18, 23])
@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
def test_opsets(opset, per_token):
    feeds = _feeds(1, (2, 3), "float32")
    _check(_session("float32", 3, per_token, opset).run(None, feeds)[0], feeds, "float32")


def test_opset_14_is_refused():
    with pytest.raises(GraphError, match="opset 14, the edit needs 15 or later"):
        scale_bias_function(opset=14)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_with_the_op_library(dtype):
    """A library that has no RED of its own leaves the function at work; one that has, computes the same."""
    if find_op_library() is None:
        pytest.skip("no op library is installed")
    for rank, leading in ((2, (9,)), (3, (2, 7))):
        feeds = _feeds(2, leading, dtype)
        _check(_session(dtype, rank, False, library=True).run(None, feeds)[0], feeds, dtype)


def test_a_planted_error_is_seen():
    feeds = _feeds(0, (2, 7), "float32")
    y = _session("float32", 3, False).run(None, {**feeds, "bias": feeds["bias"] * np.float32(1.001)})[0]
    with pytest.raises(AssertionError):
        _check(y, feeds, "float32")


def test_bodies_are_exchanged_in_place():
    model = ir.from_proto(_model(ir.DataType.FLOAT, 3, per_token=False))
    use_bodies(model, per_token=True)
    assert ir.to_proto(model) == _model(ir.DataType.FLOAT, 3, per_token=True)


# --- in a decoder ---------------------------------------------------------------------------------


def _folded(nodes: tuple[EditNode, ...] = (LOREFT, GELU, RED), **decoder: object) -> ir.Model:
    model = small_decoder(opset=20, **decoder)
    fold_graph(model, nodes)
    return model


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _run(model: ir.Model, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> list[np.ndarray]:
    return session(model).run(outputs, dict(feeds))


def test_exact_wiring():
    model = _folded()
    nodes = {node.name: node for node in model.graph if is_edit(node)}
    series = [nodes[node.name] for node in (LOREFT, GELU, RED)]
    assert [node.op_type for node in series] == ["LoReFT", "LoReFT", "RED"]
    assert series[2].inputs[0] is series[1].outputs[0] and series[1].inputs[0] is series[0].outputs[0]
    assert [value.name for value in series[2].inputs[1:]] == [
        "reft.slot", "reft.1.block_output.red.scale", "reft.1.block_output.red.bias",
    ]  # fmt: skip
    assert {name: a.value for name, a in series[2].attributes.items()} == {"plugin_namespace": "ai.reft", "plugin_version": "1"}
    scale, bias = series[2].inputs[2:]
    assert [str(dim) for dim in scale.shape] == ["reft.1.block_output.red.N", str(WIDTH)] and scale.shape == bias.shape
    assert set(model.functions) == {(DOMAIN, "LoReFT", ""), (DOMAIN, "LoReFT", "gelu"), (DOMAIN, "RED", "")}


def test_series_at_one_site_is_one_edit_after_the_other():
    """The stream behind the series, cut out of the graph, against the edits applied in numpy."""
    model = _folded()
    where = next(node for node in model.graph if node.name == LOREFT.name).inputs[0]
    model.graph.outputs.extend([where, next(node for node in model.graph if node.name == RED.name).outputs[0]])
    slot = np.array([[0, 1, -1, 7, 1], [1, -1, 0, 0, -1]], np.int32)
    banks = random_banks(model, slots=2)
    before, after = _run(model, small_feeds(model) | banks | {"reft.slots": slot}, [where.name, RED.name])
    want = before.astype(np.float64)
    for node in (LOREFT, GELU, RED):
        edits: tuple[Edit, ...] = edits_of(node, [banks[name] for name in node.bank_names])
        for number, edit in enumerate(edits):
            want[slot == number] = edit.apply(want[slot == number])
    rounding.check(after, want, rounding.edit(WIDTH, 4, in_sequence=3))
    outside = (slot < 0) | (slot > 1)
    assert after[outside].tobytes() == before[outside].tobytes() and not np.allclose(after, before)


@pytest.mark.parametrize("slots", ["graph", "input"])
@pytest.mark.parametrize("block", ["pre_norm", "pre_norm_fused", "parallel"])
def test_as_folded_nothing_is_edited(block, slots):
    base, model = small_decoder(opset=20, block=block), _folded(block=block, mask=slots == "graph")
    for a, b in zip(_run(model, small_feeds(model)), _run(base, small_feeds(base)), strict=True):
        rounding.check(a, b, ROUNDING)


def test_unfold_leaves_the_decoder():
    base, model = small_decoder(opset=20), _folded()
    assert unfold_graph(model) == 3
    assert not model.functions and not [v.name for v in model.graph.inputs if v.name.startswith("reft.")]
    for a, b in zip(_run(model, small_feeds(model)), _run(base, small_feeds(base)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("positions", ["f2+l1", "prompt", "all"])
@pytest.mark.parametrize("freeze", [False, True])
def test_tensorrts_graph_says_the_same(positions, freeze):
    """Banks as plain inputs, or constants; slots in the graph; the per-token body."""
    model = _folded()
    rule = PositionRule.parse(positions).tensors(tied=positions != "f2+l1")
    adapter = random_banks(model, slots=2) | rule
    derived = derive_tensorrt_graph(_copy(model), plugin=False, freeze=adapter if freeze else None)
    shapes = {t.name: t.shape for t in derived.inputs}
    assert (RED.bank_names[0] in shapes) != freeze
    assert freeze or shapes[RED.bank_names[0]] == ("reft.1.block_output.red.N", WIDTH)
    assert derived.edit_nodes == 3
    assert not {n.op_type for f in derived.model.functions.values() for n in f} & {"NonZero", "GatherND", "ScatterND"}
    feeds = small_feeds(model) | {PROMPT_LENGTH: np.array([5, 3])}
    want = _run(model, feeds | adapter)
    assert not np.allclose(want[0], _run(model, feeds)[0]), "the adapter steers"
    for a, b in zip(_run(derived.model, feeds if freeze else feeds | adapter), want, strict=True):
        rounding.check(a, b, ROUNDING)


def test_no_edit_banks_and_rules_off_are_the_base():
    """What a TensorRT session binds where no adapter is active: RED's scale is one, not zero."""
    model = _folded()
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    off = {name: np.array([value]) for name, value in RULE_DEFAULTS.items()}
    for node in (LOREFT, GELU, RED):
        off |= dict(zip(node.bank_names, no_edit_bank(WIDTH, np.dtype(np.float32), node.op), strict=True))
    for a, b in zip(_run(derived.model, small_feeds(model) | off), _run(model, small_feeds(model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_with_the_plugin_no_function_is_left():
    derived = derive_tensorrt_graph(_folded(), plugin=True)
    assert not derived.model.functions and derived.edit_nodes == 3


def test_lora_inputs_are_refused():
    model = _folded(dtype=ir.DataType.FLOAT16)
    with pytest.raises(GraphError, match=r"block_output.red is a scale and bias \(RED\), which no LoRA weight can hold"):
        use_lora_inputs(model.graph, slots=1)


def test_float16_streams_take_float16_banks():
    model = small_decoder(opset=20, dtype=ir.DataType.FLOAT16)
    insert_edits(model, [RED])
    banks = {v.name: v for v in model.graph.inputs if v.name in RED.bank_names}
    assert {v.dtype for v in banks.values()} == {ir.DataType.FLOAT16}
    assert (banks[RED.bank_names[0]].const_value.numpy() == 1).all() and not banks[RED.bank_names[1]].const_value.numpy().any()


def test_oracle_is_the_edit():
    edit = ScaleBiasEdit(scale=np.array([2.0, -1.0]), bias=np.array([0.5, 0.0]))
    np.testing.assert_array_equal(edit.apply(np.array([[1.0, 3.0]])), [[2.5, -3.0]])

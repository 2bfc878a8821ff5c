"""The ONNX function body against float64, at every edge, and bit-identity outside the bank."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from graph_passes.function_body import edit_function, use_bodies
from runtimes.edits.edit import ACTIVATIONS, Site, activate
from runtimes.edits.op import DOMAIN, OP_TYPE, EditNode
from runtimes.errors import GraphError

WIDTH = 16
NODES = [EditNode(site=Site(layer=0))] + [
    EditNode(site=Site(layer=0), activation=activation, activated=activated)
    for activation in ACTIVATIONS[1:]
    for activated in ("all", "first_half")
]
# Relative to the largest entry of y: rounding of the result to its type, plus float32 sums.
TOLERANCE = {ir.DataType.FLOAT: 2e-6, ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}


def _model(edit: EditNode, dtype: ir.DataType, rank: int, per_token: bool, opset: int = 20) -> onnx.ModelProto:
    leading = ("batch", "sequence")[: rank - 1] if rank == 3 else ("tokens",)
    shapes = {"h": (*leading, WIDTH), "slot": leading, "U": ("N", "r", WIDTH), "A": ("N", "r", WIDTH), "b": ("N", "r")}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT32 if name == "slot" else dtype), shape=ir.Shape(shape))
        for name, shape in shapes.items()
    ]
    attributes = {"activation": edit.activation, "activated": edit.activated, "plugin_namespace": "ai.reft", "plugin_version": "1"}
    node = ir.node(OP_TYPE, inputs, attributes, domain=DOMAIN, overload=edit.overload, name="edit")
    output = node.outputs[0]
    output.name, output.type, output.shape = "y", inputs[0].type, inputs[0].shape
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="edit")
    function = edit_function(opset=opset, activation=edit.activation, activated=edit.activated, per_token=per_token)
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))


@functools.cache
def _session(edit: EditNode, dtype: ir.DataType, rank: int, per_token: bool, opset: int = 20) -> onnxruntime.InferenceSession:
    model = _model(edit, dtype, rank, per_token, opset)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _oracle(feeds: dict[str, np.ndarray], edit: EditNode) -> np.ndarray:
    """Every row by itself, in float64."""
    U, A, b = (feeds[name].astype(np.float64) for name in ("U", "A", "b"))
    y = feeds["h"].astype(np.float64)
    for index in np.ndindex(feeds["slot"].shape):
        slot = feeds["slot"][index]
        if 0 <= slot < len(U):
            z = A[slot] @ y[index] + b[slot]
            active = len(z) if edit.activated == "all" else len(z) // 2
            z[:active] = activate(z[:active], edit.activation)
            y[index] += U[slot].T @ z
    return y


def _feeds(seed: int, leading: tuple[int, ...], dtype: ir.DataType, slots: int = 2, rank: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    numpy_type = dtype.numpy()
    draw = lambda *shape, scale=1.0: (random.standard_normal(shape) * scale).astype(numpy_type)  # noqa: E731
    return {
        "h": draw(*leading, WIDTH),
        "slot": random.integers(-2, slots + 2, leading).astype(np.int32),
        "U": draw(slots, rank, WIDTH, scale=0.5),
        "A": draw(slots, rank, WIDTH, scale=0.5),
        "b": draw(slots, rank),
    }


def _check(y: np.ndarray, feeds: dict[str, np.ndarray], edit: EditNode, dtype: ir.DataType) -> None:
    outside = (feeds["slot"] < 0) | (feeds["slot"] >= len(feeds["U"]))
    assert y[outside].tobytes() == feeds["h"][outside].tobytes()
    expected = _oracle(feeds, edit)
    if y.size:
        error = np.abs(y.astype(np.float64) - expected).max()
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16], ids=["float32", "float16"])
@pytest.mark.parametrize("edit", NODES, ids=[node.overload or "identity" for node in NODES])
def test_against_float64(edit, dtype, rank, per_token):
    session = _session(edit, dtype, rank, per_token)
    leading = (2, 7) if rank == 3 else (14,)
    for seed in range(3):
        feeds = _feeds(seed, leading, dtype)
        _check(session.run(None, feeds)[0], feeds, edit, dtype)


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    leading=st.sampled_from([(0, 5), (2, 0), (1, 1), (3, 4)]),
    slots=st.integers(1, 5),
    rank=st.integers(1, 20),
    edit=st.sampled_from([NODES[0], NODES[3], NODES[4]]),
)
def test_any_bank_and_any_batch(per_token, seed, leading, slots, rank, edit):
    feeds = _feeds(seed, leading, ir.DataType.FLOAT, slots, rank)
    _check(_session(edit, ir.DataType.FLOAT, 3, per_token).run(None, feeds)[0], feeds, edit, ir.DataType.FLOAT)


@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
def test_passing_tokens_keep_every_bit(per_token):
    feeds = _feeds(0, (1, 5), ir.DataType.FLOAT16)
    feeds["slot"][:] = [[-1, 2, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 0]]
    feeds["h"][0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    feeds["h"][0, 1] = 60000.0
    feeds["U"][:], feeds["A"][:] = 100.0, 100.0
    y = _session(NODES[0], ir.DataType.FLOAT16, 3, per_token).run(None, feeds)[0]
    assert y[0, :4].tobytes() == feeds["h"][0, :4].tobytes()
    assert y[0, 4].tobytes() != feeds["h"][0, 4].tobytes()


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=["float16", "bfloat16"])
def test_half_precision_sums_in_float32(dtype):
    # 2048 + 1 is not a float16 and 256 + 1 not a bfloat16: sums in those types would lose every one of these ones.
    feeds = _feeds(0, (4,), dtype, slots=1, rank=1)
    feeds["slot"][:] = 0
    feeds["h"][:] = 1
    feeds["A"][:] = 1
    feeds["A"][0, 0, 0] = 2048
    feeds["b"][:] = -2048
    feeds["U"][:] = 1
    model = _model(NODES[0], dtype, 2, False)
    if dtype == ir.DataType.FLOAT16:
        y = _session(NODES[0], dtype, 2, False).run(None, feeds)[0]
    else:
        # Checked on onnx's reference evaluator: no bfloat16 Gather or MatMul is promised on onnxruntime's CPU provider.
        y = ReferenceEvaluator(model).run(None, feeds)[0]
    np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0 + (WIDTH - 1))


@pytest.mark.parametrize("opset", [15, 17, 18, 21, 23])
@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "per_token"])
def test_every_opset_from_15_on(opset, per_token):
    edit = EditNode(site=Site(layer=0), activation="gelu", activated="first_half")
    feeds = _feeds(1, (2, 3), ir.DataType.FLOAT)
    _check(_session(edit, ir.DataType.FLOAT, 3, per_token, opset).run(None, feeds)[0], feeds, edit, ir.DataType.FLOAT)


def test_a_planted_error_of_one_percent_is_seen():
    feeds = _feeds(0, (2, 7), ir.DataType.FLOAT)
    y = _session(NODES[0], ir.DataType.FLOAT, 3, False).run(None, {**feeds, "U": feeds["U"] * np.float32(1.01)})[0]
    with pytest.raises(AssertionError):
        _check(y, feeds, NODES[0], ir.DataType.FLOAT)


def test_rows_form_gathers_and_per_token_form_does_not():
    rows = [node.op_type for node in edit_function(opset=20)]
    assert {"NonZero", "GatherND", "ScatterND"} <= set(rows)
    tokens = {node.op_type for node in edit_function(opset=20, per_token=True)}
    assert "Where" in tokens and not tokens & {"NonZero", "GatherND", "ScatterND"}
    # The identity computes no activation at all.
    assert not set(rows) & {"Erf", "Tanh", "Sigmoid", "Relu", "Range"}


def test_refused_opset_and_activation():
    with pytest.raises(GraphError, match="opset 14, the edit needs 15 or later"):
        edit_function(opset=14)
    with pytest.raises(GraphError, match="'softmax'"):
        edit_function(opset=20, activation="softmax")


def test_bodies_are_exchanged_in_place():
    edit = EditNode(site=Site(layer=0), activation="gelu_tanh", activated="first_half")
    model = ir.from_proto(_model(edit, ir.DataType.FLOAT, 3, per_token=False))
    use_bodies(model, per_token=True)
    assert ir.to_proto(model) == _model(edit, ir.DataType.FLOAT, 3, per_token=True)

"""RED in onnxruntime: against float64, in place, on threads, beside LoReFT, and what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_op import DTYPES, UNNAMED, as_model, installed_library, op_node, run, session, statistics
from native_op import bank_inputs as lo_reft_inputs
from native_op import oracle as lo_reft_oracle
from native_red import PLUGIN, bank_inputs, check, draw, oracle, red_model, red_node
from onnx import TensorProto, helper


@functools.cache
def op_session(dtype: str, rank: int, threads: int = 1):
    return session(red_model(dtype, rank, **PLUGIN), installed_library(), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(11,), (2, 7), (0, 5), (3, 0), (0,), (1, 1)])
def test_against_float64(dtype, leading) -> None:
    for seed, (width, slots) in enumerate([(64, 2), (33, 1), (7, 5)]):
        feeds = draw(seed, leading, width, slots, dtype)
        y = run(op_session(dtype, len(leading) + 1), feeds)
        assert y.shape == feeds["h"].shape
        check(y, feeds, dtype)


def test_attributes_may_be_absent() -> None:
    feeds = draw(3, (2, 9), 32, 2, "float32")
    check(run(session(red_model(), installed_library()), feeds), feeds, "float32")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.integers(0, 4), st.integers(0, 90))),
    width=st.integers(1, 300),
    slots=st.integers(1, 8),
    threads=st.sampled_from([1, 2]),
)
def test_any_shape(seed, dtype, leading, width, slots, threads) -> None:
    feeds = draw(seed, leading, width, slots, dtype)
    check(run(op_session(dtype, len(leading) + 1, threads), feeds), feeds, dtype)


@pytest.mark.parametrize("edited", ["all", "none", "few", "clustered"])
def test_threads_and_one_thread_agree_to_the_bit(edited) -> None:
    feeds = draw(0, (4, 200), 512, 2, "float32")
    slot = feeds["slot"]
    slot[...] = 0 if edited == "all" else -1
    if edited == "few":
        slot[:, ::50] = 1
    elif edited == "clustered":
        slot[1] = 1
    statistics(installed_library())
    alone = run(op_session("float32", 3), feeds)
    shared = run(op_session("float32", 3, threads=2), feeds)
    counts = statistics(installed_library())
    assert alone.tobytes() == shared.tobytes()
    assert counts["edited_rows"] == 2 * int(((slot >= 0) & (slot < 2)).sum())
    # Without an edited token there is still a copy to make, since a graph input is never overwritten.
    assert counts["threaded"] == 2
    check(shared, feeds, "float32")


def test_a_small_job_stays_on_its_thread() -> None:
    feeds = draw(0, (1, 4), 512, 2, "float32")
    statistics(installed_library())
    run(op_session("float32", 3, threads=2), feeds)
    assert statistics(installed_library())["threaded"] == 0


def residual_chain(layers: int, *, keep: bool = False) -> onnx.ModelProto:
    """h = h + sublayer; h = RED(LoReFT(h)), whose result has two readers: both ops of the domain in one graph."""
    nodes, h = [], "x"
    for i in range(layers):
        nodes += [
            helper.make_node("Mul", [h, "weight"], [f"sub{i}"]),
            helper.make_node("Add", [h, f"sub{i}"], [f"res{i}"]),
            op_node([f"res{i}", "slot", "U", "A", "b"], f"low{i}", **PLUGIN),
            red_node(f"low{i}", f"edited{i}", **PLUGIN),
            helper.make_node("Tanh", [f"edited{i}"], [f"norm{i}"]),
            helper.make_node("Add", [f"edited{i}", f"norm{i}"], [f"h{i}"]),
        ]
        h = f"h{i}"
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["B", "S", 32]), info("weight", TensorProto.FLOAT, [32])]
    inputs += [info("slot", TensorProto.INT32, ["B", "S"]), *lo_reft_inputs(TensorProto.FLOAT), *bank_inputs(TensorProto.FLOAT)]
    outputs = [info(h, TensorProto.FLOAT, ["B", "S", 32])]
    if keep:  # what RED reads is read by somebody else, too
        outputs += [info(f"low{i}", TensorProto.FLOAT, ["B", "S", 32]) for i in range(layers)]
    return as_model(nodes, inputs, outputs)


@pytest.mark.parametrize("keep", [False, True], ids=["in_place", "stream_kept"])
def test_in_place_in_every_layer_and_only_where_allowed(keep) -> None:
    from native_op import draw as draw_lo_reft

    layers = 6
    low, red = draw_lo_reft(1, (2, 5), 32, 4, 2, "float32"), draw(1, (2, 5), 32, 2, "float32")
    red["scale"] *= 0.3
    weight = np.linspace(0.1, 0.4, 32, dtype=np.float32)
    feeds = {"x": low["h"], "weight": weight, **{n: low[n] for n in ("slot", "U", "A", "b")}, "scale": red["scale"], "bias": red["bias"]}
    before = feeds["x"].copy()
    chain = session(residual_chain(layers, keep=keep), installed_library())
    statistics(installed_library())
    y = chain.run(None, feeds)[0]
    counts = statistics(installed_library())
    assert counts["calls"] == 2 * layers
    # A stream that is kept is a graph output with a buffer of its own: LoReFT writes into it, and RED must not write over it.
    assert counts["in_place"] == (0 if keep else 2 * layers)
    assert np.array_equal(feeds["x"], before)
    h = feeds["x"].astype(np.float64)
    for _ in range(layers):
        h = oracle({**feeds, "h": lo_reft_oracle({**feeds, "h": h + h * weight})})
        h = h + np.tanh(h)
    assert np.abs(y - h).max() <= 2e-5 * np.abs(h).max()


@pytest.mark.parametrize("shape", UNNAMED.values(), ids=UNNAMED)
def test_unnamed_dimensions_do_not_reach_later_nodes_as_numbers(shape) -> None:
    """As LoReFT's test says: onnxruntime would abort in the inference of a later Slice."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Identity", ["x"], ["h"]),
        red_node("h", "edited"),
        helper.make_node("Slice", ["edited", "minus_one", "end", "axis"], ["last"]),
        helper.make_node("Add", ["last", "edited"], ["y"]),
    ]
    inputs = [info("x", TensorProto.FLOAT, shape), info("slot", TensorProto.INT32, None), *bank_inputs(TensorProto.FLOAT)]
    model = as_model(nodes, inputs, [info("y", TensorProto.FLOAT, None)])
    for name, value in (("minus_one", -1), ("end", 2**62), ("axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    feeds = draw(0, (2, 5), 16, 1, "float32")
    y = session(model, installed_library()).run(None, {"x": feeds["h"], **{n: v for n, v in feeds.items() if n != "h"}})[0]
    edited = run(op_session("float32", 3), feeds)
    assert np.array_equal(y, edited[:, -1:] + edited)


def test_a_graph_input_is_never_overwritten() -> None:
    feeds = draw(0, (2, 5), 32, 1, "float32")
    before = feeds["h"].copy()
    statistics(installed_library())
    run(op_session("float32", 3), feeds)
    assert statistics(installed_library())["in_place"] == 0
    assert np.array_equal(feeds["h"], before)


def bad_inputs() -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    values = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    fits = {"h": values(2, 5, 8), "slot": np.zeros((2, 5), np.int32), "scale": values(3, 8), "bias": values(3, 8)}
    return {
        "slot has shape [2, 4], expected [2, 5], one slot per token of h [2, 5, 8]": {**fits, "slot": np.zeros((2, 4), np.int32)},
        "slot has shape [5, 2], expected [2, 5]": {**fits, "slot": np.zeros((5, 2), np.int32)},
        "scale has shape [3, 9], expected [N, 8] with N >= 1, D being that of h [2, 5, 8]": {**fits, "scale": values(3, 9)},
        "scale has shape [3, 1], expected [N, 8]": {**fits, "scale": values(3, 1)},
        "scale has shape [0, 8], expected [N, 8] with N >= 1": {**fits, "scale": values(0, 8), "bias": values(0, 8)},
        "bias has shape [2, 8], expected [3, 8], the shape of scale": {**fits, "bias": values(2, 8)},
        "bias has shape [3, 7], expected [3, 8], the shape of scale": {**fits, "bias": values(3, 7)},
    }


@pytest.mark.parametrize("message", bad_inputs())
def test_shapes_that_do_not_fit(message) -> None:
    with pytest.raises(Exception, match="RED") as caught:
        run(op_session("float32", 3), bad_inputs()[message])
    assert "RED: " + message in str(caught.value)


@pytest.mark.parametrize("rank", [1, 4])
def test_ranks_that_do_not_fit(rank) -> None:
    leading = (2, 3, 4)[: rank - 1]
    feeds = {**draw(0, (2, 5), 8, 1, "float32"), "slot": np.zeros(leading, np.int32), "h": np.zeros((*leading, 8), np.float32)}
    with pytest.raises(Exception, match="RED: h has shape .*, expected \\[tokens, D\\] or \\[batch, sequence, D\\]"):
        run(op_session("float32", rank), feeds)


def test_banks_of_another_rank_do_not_fit() -> None:
    model = red_model()
    for value in model.graph.input:
        if value.name == "scale":
            value.type.tensor_type.shape.dim.add().dim_param = "scale_2"
    feeds = draw(0, (2, 5), 8, 1, "float32")
    feeds["scale"] = feeds["scale"][:, None]
    with pytest.raises(Exception, match="RED: scale has shape \\[1, 1, 8\\], expected \\[N, 8\\]"):
        run(session(model, installed_library()), feeds)


@pytest.mark.parametrize(
    ("name", "element", "array_type", "message"),
    [
        ("slot", TensorProto.INT64, np.int64, "RED: slot is int64, expected int32"),
        ("scale", TensorProto.FLOAT16, np.float16, "RED: h, scale and bias are float32, float16 and float32, expected float32"),
        ("bias", TensorProto.DOUBLE, np.float64, "RED: h, scale and bias are float32, float32 and float64, expected float32"),
        ("h", TensorProto.DOUBLE, np.float64, "Type 'tensor(double)' of input parameter (h) of operator (RED)"),
    ],
)
def test_types_that_do_not_fit(name, element, array_type, message) -> None:
    model = red_model()
    for value in (*model.graph.input, *(model.graph.output if name == "h" else ())):
        if value.name in (name, "y"):
            value.type.tensor_type.elem_type = element
    feeds = draw(0, (2, 5), 8, 1, "float32")
    feeds[name] = feeds[name].astype(array_type)
    with pytest.raises(Exception, match="RED") as caught:
        session(model, installed_library()).run(None, feeds)
    assert message in str(caught.value)

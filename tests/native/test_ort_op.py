"""The op in onnxruntime: against float64, in place, on threads, and what it refuses."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_op import DTYPES, UNNAMED, as_model, bank_inputs, check, draw, installed_library, op_model, op_node, run, session, statistics
from onnx import TensorProto, helper

from runtimes.edits.edit import ACTIVATED, ACTIVATIONS

PLUGIN = {"plugin_namespace": "ai.reft", "plugin_version": "1"}


@functools.cache
def op_session(dtype: str, rank: int, activation: str = "", activated: str = "all", threads: int = 1):
    model = op_model(dtype, rank, activation=activation, activated=activated, **PLUGIN)
    return session(model, installed_library(), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(11,), (2, 7), (0, 5), (3, 0), (0,), (1, 1)])
def test_against_float64(dtype, leading) -> None:
    for seed, (width, rank, slots) in enumerate([(64, 4, 2), (33, 1, 1), (7, 12, 5)]):
        feeds = draw(seed, leading, width, rank, slots, dtype)
        y = run(op_session(dtype, len(leading) + 1), feeds)
        assert y.shape == feeds["h"].shape
        check(y, feeds, dtype)


@pytest.mark.parametrize("activated", ACTIVATED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_attributes(activation, activated) -> None:
    feeds = draw(3, (2, 9), 32, 6, 2, "float32")
    check(run(op_session("float32", 3, activation, activated), feeds), feeds, "float32", activation, activated)


def test_attributes_may_be_absent() -> None:
    feeds = draw(3, (2, 9), 32, 6, 2, "float32")
    check(run(session(op_model(), installed_library()), feeds), feeds, "float32")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.integers(0, 4), st.integers(0, 90))),
    width=st.integers(1, 300),
    rank=st.integers(1, 40),
    slots=st.integers(1, 8),
    threads=st.sampled_from([1, 2]),
)
def test_any_shape(seed, dtype, leading, width, rank, slots, threads) -> None:
    feeds = draw(seed, leading, width, rank, slots, dtype)
    check(run(op_session(dtype, len(leading) + 1, threads=threads), feeds), feeds, dtype)


@pytest.mark.parametrize("edited", ["all", "none", "few", "clustered"])
def test_threads_and_one_thread_agree_to_the_bit(edited) -> None:
    feeds = draw(0, (4, 200), 512, 4, 2, "float32")
    slot = feeds["slot"]
    slot[...] = {"all": 0, "none": -1, "few": -1, "clustered": -1}[edited]
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
    feeds = draw(0, (1, 4), 512, 4, 2, "float32")
    statistics(installed_library())
    run(op_session("float32", 3, threads=2), feeds)
    assert statistics(installed_library())["threaded"] == 0


def residual_chain(layers: int, *, keep: bool = False):
    """h = h + sublayer; h = edit(h); the edited h has two readers, a norm and the next Add, as in every pre-norm decoder."""
    nodes, h = [], "x"
    for i in range(layers):
        nodes += [
            helper.make_node("Mul", [h, "scale"], [f"sub{i}"]),
            helper.make_node("Add", [h, f"sub{i}"], [f"res{i}"]),
            op_node([f"res{i}", "slot", "U", "A", "b"], f"edited{i}", activation="", activated="all", **PLUGIN),
            helper.make_node("LayerNormalization", [f"edited{i}", "scale"], [f"norm{i}"], axis=-1),
            helper.make_node("Add", [f"edited{i}", f"norm{i}"], [f"h{i}"]),
        ]
        h = f"h{i}"
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", 32]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, [32]),
        helper.make_tensor_value_info("slot", TensorProto.INT32, ["B", "S"]),
        *bank_inputs(TensorProto.FLOAT),
    ]
    outputs = [helper.make_tensor_value_info(h, TensorProto.FLOAT, ["B", "S", 32])]
    if keep:  # the unedited stream is read by somebody else, too
        outputs += [helper.make_tensor_value_info(f"res{i}", TensorProto.FLOAT, ["B", "S", 32]) for i in range(layers)]
    return as_model(nodes, inputs, outputs)


def chain_oracle(feeds: dict[str, np.ndarray], layers: int) -> np.ndarray:
    from native_op import oracle

    h = feeds["x"].astype(np.float64)
    for _ in range(layers):
        h = h + h * feeds["scale"]
        h = oracle({**feeds, "h": h})
        centred = h - h.mean(-1, keepdims=True)
        h = h + feeds["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return h


@pytest.mark.parametrize("keep", [False, True], ids=["in_place", "stream_kept"])
def test_in_place_in_every_layer_and_only_where_allowed(keep) -> None:
    layers = 6
    feeds = draw(1, (2, 5), 32, 4, 2, "float32")
    feeds["x"] = feeds.pop("h")
    feeds["scale"] = np.linspace(0.1, 0.4, 32, dtype=np.float32)
    chain = session(residual_chain(layers, keep=keep), installed_library())
    before = feeds["x"].copy()
    statistics(installed_library())
    outputs = chain.run(None, feeds)
    counts = statistics(installed_library())
    assert counts["calls"] == layers
    assert counts["in_place"] == (0 if keep else layers)
    assert np.array_equal(feeds["x"], before)
    expected = chain_oracle(feeds, layers)
    assert np.abs(outputs[0] - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", UNNAMED.values(), ids=UNNAMED)
def test_unnamed_dimensions_do_not_reach_later_nodes_as_numbers(shape) -> None:
    """onnxruntime stores an unnamed unknown dimension that a custom op infers as -1, and aborts in the inference of a later Slice."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Identity", ["x"], ["h"]),
        op_node(["h", "slot", "U", "A", "b"], "edited"),
        helper.make_node("Slice", ["edited", "minus_one", "end", "axis"], ["last"]),
        helper.make_node("Add", ["last", "edited"], ["y"]),
    ]
    inputs = [info("x", TensorProto.FLOAT, shape), info("slot", TensorProto.INT32, None), *bank_inputs(TensorProto.FLOAT)]
    model = as_model(nodes, inputs, [info("y", TensorProto.FLOAT, None)])
    for name, value in (("minus_one", -1), ("end", 2**62), ("axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    feeds = draw(0, (2, 5), 16, 4, 1, "float32")
    y = session(model, installed_library()).run(None, {"x": feeds["h"], **{n: v for n, v in feeds.items() if n != "h"}})[0]
    edited = run(op_session("float32", 3), feeds)
    assert np.array_equal(y, edited[:, -1:] + edited)


def test_a_graph_input_is_never_overwritten() -> None:
    feeds = draw(0, (2, 5), 32, 4, 1, "float32")
    before = feeds["h"].copy()
    statistics(installed_library())
    run(op_session("float32", 3), feeds)
    assert statistics(installed_library())["in_place"] == 0
    assert np.array_equal(feeds["h"], before)


BAD_ATTRIBUTES = {
    "activation is 'softmax', expected one of \"\", relu": {"activation": "softmax"},
    "activation is the integer 3, expected a string": {"activation": 3},
    "activation is the number 0.5, expected a string": {"activation": 0.5},
    "activation is a list, a tensor or a graph, expected a string": {"activation": [1, 2]},
    "activation has 500 characters": {"activation": "x" * 500},
    "activated is 'second_half', expected all or first_half": {"activated": "second_half"},
    "activated is '', expected all or first_half": {"activated": ""},
}


@pytest.mark.parametrize("message", BAD_ATTRIBUTES)
def test_attributes_that_do_not_fit(message) -> None:
    with pytest.raises(Exception, match="LoReFT: attribute") as caught:
        session(op_model(**BAD_ATTRIBUTES[message]), installed_library())
    assert message in str(caught.value)


def bad_inputs():
    random = np.random.default_rng(0)
    values = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    fits = {"h": values(2, 5, 8), "slot": np.zeros((2, 5), np.int32), "U": values(3, 2, 8), "A": values(3, 2, 8), "b": values(3, 2)}
    empty = {"U": values(0, 2, 8), "A": values(0, 2, 8), "b": values(0, 2)}
    return {
        "slot has shape [2, 4], expected [2, 5], one slot per token of h [2, 5, 8]": {**fits, "slot": np.zeros((2, 4), np.int32)},
        "slot has shape [5, 2], expected [2, 5]": {**fits, "slot": np.zeros((5, 2), np.int32)},
        "U has shape [3, 2, 9], expected [N, r, 8]": {**fits, "U": values(3, 2, 9)},
        "U has shape [3, 0, 8], expected [N, r, 8]": {**fits, "U": values(3, 0, 8), "A": values(3, 0, 8), "b": values(3, 0)},
        "U has shape [0, 2, 8], expected [N, r, 8] with N >= 1": {**fits, **empty},
        "U has shape [3, 2000, 8]": {**fits, "U": values(3, 2000, 8), "A": values(3, 2000, 8), "b": values(3, 2000)},
        "A has shape [3, 4, 8], expected [3, 2, 8], the shape of U": {**fits, "A": values(3, 4, 8)},
        "A has shape [2, 2, 8], expected [3, 2, 8], the shape of U": {**fits, "A": values(2, 2, 8)},
        "b has shape [3, 1], expected [3, 2], [N, r] of U [3, 2, 8]": {**fits, "b": values(3, 1)},
    }


@pytest.mark.parametrize("message", bad_inputs())
def test_shapes_that_do_not_fit(message) -> None:
    with pytest.raises(Exception, match="LoReFT") as caught:
        run(op_session("float32", 3), bad_inputs()[message])
    assert "LoReFT: " + message in str(caught.value)


@pytest.mark.parametrize("rank", [1, 4])
def test_ranks_that_do_not_fit(rank) -> None:
    leading = (2, 3, 4)[: rank - 1]
    feeds = {**bad_inputs()["A has shape [3, 4, 8], expected [3, 2, 8], the shape of U"], "slot": np.zeros(leading, np.int32)}
    feeds["h"] = np.zeros((*leading, 8), np.float32)
    with pytest.raises(Exception, match="LoReFT: h has shape .*, expected \\[tokens, D\\] or \\[batch, sequence, D\\]"):
        run(op_session("float32", rank), feeds)


@pytest.mark.parametrize(
    ("name", "element", "array_type", "message"),
    [
        ("slot", TensorProto.INT64, np.int64, "LoReFT: slot is int64, expected int32"),
        ("U", TensorProto.FLOAT16, np.float16, "LoReFT: h, U, A and b are float32, float16, float32 and float32, expected float32"),
        ("b", TensorProto.DOUBLE, np.float64, "LoReFT: h, U, A and b are float32, float32, float32 and float64, expected float32"),
        ("h", TensorProto.DOUBLE, np.float64, "Type 'tensor(double)' of input parameter (h) of operator (LoReFT)"),
    ],
)
def test_types_that_do_not_fit(name, element, array_type, message) -> None:
    model = op_model()
    for value in (*model.graph.input, *(model.graph.output if name == "h" else ())):
        if value.name in (name, "y"):
            value.type.tensor_type.elem_type = element
    feeds = draw(0, (2, 5), 8, 2, 1, "float32")
    feeds[name] = feeds[name].astype(array_type)
    with pytest.raises(Exception, match="LoReFT") as caught:
        session(model, installed_library()).run(None, feeds)
    assert message in str(caught.value)


def test_one_registration_per_options_object_and_many_objects() -> None:
    feeds = draw(0, (2, 5), 8, 2, 1, "float32")
    for _ in range(3):  # every session of a process borrows the same domain
        check(run(session(op_model(), installed_library()), feeds), feeds, "float32")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="Domain already set"):  # noqa: PT012 - which of them says so depends on the release
        options.register_custom_ops_library(str(installed_library()))
        options.register_custom_ops_library(str(installed_library()))
        onnxruntime.InferenceSession(op_model().SerializeToString(), options, providers=["CPUExecutionProvider"])

"""Logits of the last columns only: the same numbers as without the cut, and graphs whose head is not found are left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rounding
from decoders import session
from small_decoders import EVERY_TOKEN, ROUNDING, VOCABULARY, WIDTH, random_banks, small_decoder, small_feeds

from graph_passes.first_logit import add_first_logit
from graph_passes.fold import fold_graph
from graph_passes.unfold import unfold_graph
from runtimes.edits.edit import Site
from runtimes.edits.op import FIRST_LOGIT, EditNode

Tail = Callable[[ir.Model, ir.Value], ir.Value]
"""From a head's output to the logits."""
NODES = [EditNode(site=Site(layer=2))]


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType(ir.tensor(array).dtype)))
    value.shape = ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _add(model: ir.Model, op: str, *inputs: ir.Value, domain: str = "", **attributes: object) -> ir.Value:
    node = ir.node(op, list(inputs), attributes, domain=domain, name=f"tail.{len(model.graph)}")
    node.outputs[0].name = node.name
    model.graph.append(node)
    return node.outputs[0]


def _soft_cap(model: ir.Model, value: ir.Value) -> ir.Value:
    cap = _constant(model, "cap", np.array(3.0, np.float32))
    return _add(model, "Mul", cap, _add(model, "Tanh", _add(model, "Div", value, cap)))


def _bias(model: ir.Model, value: ir.Value) -> ir.Value:
    return _add(model, "Add", _constant(model, "bias", np.arange(VOCABULARY, dtype=np.float32)), value)


def _scale_and_cast(model: ir.Model, value: ir.Value) -> ir.Value:
    scaled = _add(model, "Mul", value, _constant(model, "scale", np.array([[[2.0]]], np.float32)))
    return _add(model, "Cast", _add(model, "Cast", scaled, to=int(ir.DataType.DOUBLE)), to=int(ir.DataType.FLOAT))


def _reshape(model: ir.Model, value: ir.Value) -> ir.Value:
    return _add(model, "Reshape", value, _constant(model, "same", np.array([0, -1, VOCABULARY])))


def _by_token(model: ir.Model, value: ir.Value) -> ir.Value:
    """A scale of every token's own."""
    ids = _add(model, "Cast", model.graph.inputs[0], to=int(ir.DataType.FLOAT))
    return _add(model, "Mul", value, _add(model, "Unsqueeze", ids, _constant(model, "last_axis", np.array([2]))))


def _by_column(model: ir.Model, value: ir.Value) -> ir.Value:
    """A constant for each of five columns."""
    return _add(model, "Add", value, _constant(model, "columns", np.arange(5, dtype=np.float32)[:, None]))


def _maximum(model: ir.Model, value: ir.Value) -> ir.Value:
    """Over the columns: one token's logits follow from another's."""
    return _add(model, "CumSum", value, _constant(model, "axis", np.array(1)))


def _with_tail(tail: Tail, **decoder: object) -> ir.Model:
    model = small_decoder(opset=20, **decoder)
    head = next(node for node in model.graph if node.name == "logits")
    before = head.outputs[0]
    before.name = "head"
    after = tail(model, before)
    model.graph.outputs[0] = after
    after.name, after.type, after.shape = "logits", before.type, ir.Shape(["batch", "sequence", VOCABULARY])
    return model


def _same(model: ir.Model, value: ir.Value) -> ir.Value:
    return _add(model, "Identity", value)


def _transposed_weight(model: ir.Model, value: ir.Value) -> ir.Value:
    """As exporters write a head that is tied to the embedding."""
    head = value.producer()
    weight = model.graph.initializers["head.weight"]
    table = _constant(model, "head.table", weight.const_value.numpy().T.copy())
    node = ir.node("Transpose", [table], {"perm": [1, 0]}, name="head.transposed")
    node.outputs[0].name = node.name
    model.graph.insert_before(head, node)
    head.replace_input_with(1, node.outputs[0])
    return _same(model, value)


def _dequantized_weight(model: ir.Model, value: ir.Value) -> ir.Value:
    head = value.producer()
    weight = _constant(model, "head.int8", np.arange(WIDTH * VOCABULARY, dtype=np.int8).reshape(WIDTH, VOCABULARY))
    node = ir.node("DequantizeLinear", [weight, _constant(model, "head.scale", np.array(0.01, np.float32))], name="head.dequantized")
    node.outputs[0].name = node.name
    model.graph.insert_before(head, node)
    head.replace_input_with(1, node.outputs[0])
    return _same(model, value)


def _packed_weight(model: ir.Model, value: ir.Value) -> ir.Value:
    head = value.producer()
    random = np.random.default_rng(0)
    packed = _constant(model, "head.packed", random.integers(0, 255, (VOCABULARY, 1, 8), np.uint8))
    scales = _constant(model, "head.scales", random.random((VOCABULARY, 1), np.float32))
    attributes = {"K": WIDTH, "N": VOCABULARY, "bits": 4, "block_size": 16}
    node = ir.node("MatMulNBits", [head.inputs[0], packed, scales], attributes, domain="com.microsoft", name="head.packed_product")
    node.outputs[0].name = node.name
    model.graph.insert_after(head, node)
    return _same(model, node.outputs[0])


@pytest.mark.parametrize(
    "tail", [_same, _soft_cap, _bias, _scale_and_cast, _transposed_weight, _dequantized_weight, _packed_weight], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("typed", [True, False])
def test_the_last_columns_are_the_same_numbers(tail: Tail, typed: bool) -> None:
    model = _with_tail(tail, typed=typed)
    before = session(model).run(None, small_feeds(model))
    fold_graph(model, NODES)
    steered = random_banks(model) | EVERY_TOKEN
    for adapter in ({}, steered):
        every = session(model).run(None, small_feeds(model) | adapter)
        for first in (0, 1, 4, 5, 9):
            got = session(model).run(None, {**small_feeds(model), **adapter, FIRST_LOGIT: np.array([first])})
            assert got[0].shape == (2, max(5 - first, 0), VOCABULARY)
            if got[0].size:
                rounding.check(got[0], every[0][:, first:], ROUNDING)
            for present, whole in zip(got[1:], every[1:], strict=True):
                np.testing.assert_array_equal(present, whole)
        if not adapter:
            rounding.check(every[0], before[0], ROUNDING)
    assert str(next(v for v in model.graph.outputs if v.name == "logits").shape[1]) == "logits_columns"


@pytest.mark.parametrize("tail", [_reshape, _by_token, _by_column, _maximum], ids=lambda t: t.__name__)
def test_a_head_that_is_not_found_is_left_alone(tail: Tail) -> None:
    model = _with_tail(tail)
    before = ir.to_proto(model)
    assert not add_first_logit(model.graph) and ir.to_proto(model) == before


def test_graphs_of_the_last_logits_are_left_alone() -> None:
    """By what they declare, or by the Slice in front of the head."""
    declared = small_decoder()
    declared.graph.outputs[0].shape = ir.Shape(["batch", 1, VOCABULARY])
    sliced = small_decoder()
    head = next(node for node in sliced.graph if node.name == "logits")
    ends = [_constant(sliced, f"{name}", np.array([number])) for name, number in (("from", -1), ("to", 2**62), ("axes", 1))]
    node = ir.node("Slice", [head.inputs[0], *ends], name="last")
    node.outputs[0].name = "last"
    sliced.graph.insert_before(head, node)
    head.replace_input_with(0, node.outputs[0])
    labels = small_decoder()
    labels.graph.outputs[0].shape = ir.Shape(["batch", VOCABULARY])
    for model in (declared, sliced, labels):
        assert not add_first_logit(model.graph)


def test_whoever_else_reads_the_hidden_states_reads_all_of_them() -> None:
    model = small_decoder()
    model.graph.outputs.append(next(node for node in model.graph if node.name == "norm").outputs[0])
    assert add_first_logit(model.graph)
    got = session(model).run(None, small_feeds(model) | {FIRST_LOGIT: np.array([3])})
    assert got[0].shape == (2, 2, VOCABULARY) and got[-1].shape == (2, 5, WIDTH)


def test_unfold_takes_it_out() -> None:
    model = small_decoder()
    fold_graph(model, NODES)
    assert FIRST_LOGIT in model.graph.initializers
    unfold_graph(model)
    assert not [value.name for value in model.graph.inputs if value.name.startswith("reft.")]
    assert "Slice" not in {node.op_type for node in model.graph}
    base = small_decoder()
    np.testing.assert_array_equal(session(model).run(None, small_feeds(model))[0], session(base).run(None, small_feeds(base))[0])


def test_onnx_checker_accepts_the_cut() -> None:
    model = small_decoder(opset=23)
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
    assert add_first_logit(model.graph)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)

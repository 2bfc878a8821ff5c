"""A cache that goes in or comes out by half: every way that was thought of is refused, in one line, before anything is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from decoders import session
from small_decoders import WIDTH, small_decoder, small_feeds

from graph_passes.find.contract import check_history, name_cache, read_contract
from graph_passes.fold import fold_graph
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.errors import GraphError

EDIT = [EditNode(site=Site(layer=1))]


def with_values() -> ir.Model:
    """small_decoder with a cache of values beside that of keys, which is what attention sums."""
    model = small_decoder()
    graph = model.graph
    for layer in range(3):
        key = _node(graph, f"present.{layer}.key")
        past = ir.Value(name=f"past_key_values.{layer}.value", type=key.inputs[0].type, shape=key.inputs[0].shape)
        graph.inputs.append(past)
        concat = ir.node("Concat", [past, key.inputs[1]], {"axis": 2}, name=f"present.{layer}.value")
        value = concat.outputs[0]
        value.name, value.type, value.shape = concat.name, key.outputs[0].type, key.outputs[0].shape
        graph.insert_after(key, concat)
        _node(graph, f"layers.{layer}.attention.context4").replace_input_with(1, value)
        graph.outputs.append(value)
    return model


def _node(graph: ir.Graph, name: str) -> ir.Node:
    return next(node for node in graph if node.name == name)


def _drop_input(graph: ir.Graph, name: str) -> None:
    """The cache does not come in: the step's own keys are all there is."""
    value = next(v for v in graph.inputs if v.name == name)
    for use in value.uses():
        use.node.replace_input_with(0, use.node.inputs[1])
        use.node.resize_inputs(1)
    graph.inputs.remove(value)


def _drop_output(graph: ir.Graph, name: str) -> None:
    graph.outputs.remove(next(v for v in graph.outputs if v.name == name))


def _no_past_at_all(graph: ir.Graph) -> None:
    """What optimum's decoder_model.onnx is."""
    for name in [v.name for v in graph.inputs if v.name.startswith("past")]:
        _drop_input(graph, name)


def _retyped(graph: ir.Graph, dtype: ir.DataType) -> None:
    next(v for v in graph.inputs if v.name == "past_key_values.1.value").type = ir.TensorType(dtype)


def _reshaped(graph: ir.Graph, *shape: int | str) -> None:
    next(v for v in graph.inputs if v.name == "past_key_values.1.value").shape = ir.Shape(shape)


def _twice(graph: ir.Graph) -> None:
    same = ir.node("Identity", [_node(graph, "present.1.key").outputs[0]])
    same.outputs[0].name = "present_1_key"
    graph.append(same)
    graph.outputs.append(same.outputs[0])


def _another_state_by_half(graph: ir.Graph) -> None:
    state = ir.node("Identity", [_node(graph, "layers.1.output").outputs[0]])
    state.outputs[0].name, state.outputs[0].type = "present_conv.1", ir.TensorType(ir.DataType.FLOAT)
    graph.append(state)
    graph.outputs.append(state.outputs[0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_no_past_at_all, r"inputs 'past_key_values.<layer>.key\|value' missing.*export .*text-generation-with-past"),
        (lambda g: [_drop_input(g, f"past_key_values.1.{p}") for p in ("key", "value")],
         r"cache: input 'past_key_values.1.key', input 'past_key_values.1.value' missing"),
        (lambda g: _drop_input(g, "past_key_values.2.key"), "cache: input 'past_key_values.2.key' missing"),
        (lambda g: _drop_input(g, "past_key_values.0.value"), "cache: input 'past_key_values.0.value' missing"),
        (lambda g: _drop_output(g, "present.0.value"), "cache: output 'present.0.value' missing"),
        (lambda g: [_drop_input(g, "past_key_values.1.value"), _drop_output(g, "present.1.value")],
         "cache: output 'present.1.value', input 'past_key_values.1.value' missing"),
        (lambda g: [_drop_input(g, f"past_key_values.1.{p}") or _drop_output(g, f"present.1.{p}") for p in ("key", "value")],
         "output 'present.1.key', output 'present.1.value', input 'past_key_values.1.key', input 'past_key_values.1.value' missing"),
        (_another_state_by_half, "cache: input 'past_conv.1' missing"),
        (_twice, "present.1.key and present_1_key are both the key of layer 1"),
        (lambda g: _retyped(g, ir.DataType.FLOAT16), r"past_key_values.1.value is float16 .*present.1.value, .* float \[batch"),
        (lambda g: _reshaped(g, "batch", 2, "past", WIDTH), r"\[batch, 2, past, 8\], and present.1.value"),
        (lambda g: _reshaped(g, "batch", 1, "past", 2 * WIDTH), r"\[batch, 1, past, 16\], and present.1.value"),
        (lambda g: _reshaped(g, "batch", "past", WIDTH), r"\[batch, past, 8\], and present.1.value"),
    ],
    ids=["no past", "a layer", "a key", "a value", "a value out", "no value", "a gap", "another state", "twice", "type", "heads", "width",
         "rank"],
)  # fmt: skip
def test_half_a_cache_by_its_names(change: Callable[[ir.Graph], object], match: str) -> None:
    model = with_values()
    fold_graph(with_values(), EDIT)
    change(model.graph)
    with pytest.raises(GraphError, match=match) as caught:
        read_contract(model.graph)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.exit_code == 2


def _own_keys_only(graph: ir.Graph) -> None:
    """The cache is kept, and attention looks at the step's own keys alone."""
    own = _node(graph, "present.1.key").inputs[1]
    _node(graph, "layers.1.attention.kt").replace_input_with(0, own)


def _not_kept(graph: ir.Graph) -> None:
    """What comes out is the step's own keys, though attention read the cache."""
    own = ir.node("Identity", [_node(graph, "present.1.key").inputs[1]])
    _swap_output(graph, "present.1.key", own)


def _never_grows(graph: ir.Graph) -> None:
    _swap_output(graph, "present.1.value", ir.node("Identity", [_node(graph, "present.1.value").inputs[0]]))


def _swap_output(graph: ir.Graph, name: str, node: ir.Node) -> None:
    old = _node(graph, name).outputs[0]
    node.outputs[0].type, node.outputs[0].shape, node.outputs[0].name = old.type, old.shape, name
    old.name = f"{name}.inner"
    graph.append(node)
    graph.outputs[graph.outputs.index(old)] = node.outputs[0]


def _length_only(graph: ir.Graph) -> None:
    """The cache is read for its shape, as positions need it: zeros of that many tokens stand for it."""
    concat = _node(graph, "present.1.value")
    shape = ir.node("Shape", [concat.inputs[0]])
    zeros = ir.node("ConstantOfShape", [shape.outputs[0]])
    shape.outputs[0].name, zeros.outputs[0].name = "shape", "zeros"
    graph.insert_before(concat, [shape, zeros])
    concat.replace_input_with(0, zeros.outputs[0])


def _layers_swapped(graph: ir.Graph) -> None:
    first, second = (_node(graph, f"present.{layer}.key") for layer in (0, 1))
    a, b = first.inputs[0], second.inputs[0]
    first.replace_input_with(0, b)
    second.replace_input_with(0, a)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_own_keys_only, "logits do not depend on past_key_values.1.key, so that a decode step would not know its history"),
        (_not_kept, "present.1.key does not hold what came in as past_key_values.1.key"),
        (_never_grows, "present.1.value does not depend on the tokens"),
        (_length_only, "present.1.value does not hold what came in as past_key_values.1.value"),
        (_layers_swapped, "present.0.key does not hold what came in as past_key_values.0.key"),
    ],
)
def test_half_a_cache_by_what_is_computed(change: Callable[[ir.Graph], object], match: str) -> None:
    """Names and shapes are right: only the graph's wires tell."""
    model = with_values()
    change(model.graph)
    read_contract(model.graph)
    before = len(list(model.graph))
    with pytest.raises(GraphError, match=match) as caught:
        fold_graph(model, EDIT)
    assert len(str(caught.value).splitlines()) == 1 and len(list(model.graph)) == before
    check_history(with_values().graph)


SPELLINGS = [
    ("past_key_values.{}.{}", "present_key_values.{}.{}"),
    ("past_key_values.{}.decoder.{}", "present.{}.decoder.{}"),
    ("past_{1}_{0}", "present_{1}_{0}"),
    ("past_{}_{}", "present_{}_{}"),
    ("past.{}.{}s", "present.{}.{}s"),
]


@pytest.mark.parametrize(("given", "returned"), SPELLINGS)
def test_every_spelling_has_its_other_half(given: str, returned: str) -> None:
    model = with_values()
    feeds = small_feeds(model)
    wanted = session(model).run(["logits", "present.2.value"], feeds)
    for value in (*model.graph.inputs, *model.graph.outputs):
        prefix, *slot = value.name.split(".")
        if slot:
            value.name = (given if prefix == "past_key_values" else returned).format(*slot)
    assert [key.name for key in read_contract(model.graph).keys] == [returned.format(layer, "key") for layer in range(3)]
    half = given.format(1, "value")
    found = next(v for v in model.graph.inputs if v.name == half)
    found.name = "elsewhere"
    with pytest.raises(GraphError, match=f"cache: input '{half}' missing"):
        read_contract(model.graph)
    found.name = half
    lost = next(v for v in model.graph.outputs if v.name == returned.format(1, "value"))
    lost.name = "elsewhere"
    with pytest.raises(GraphError, match="cache: output 'present[._].*' missing"):
        read_contract(model.graph)
    lost.name = returned.format(1, "value")
    assert name_cache(model.graph) and not name_cache(model.graph)
    got = session(model).run(["logits", "present.2.value"], feeds)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, got, strict=True))

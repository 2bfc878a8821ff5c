"""Random graphs, random readers of the stream: no reader is left behind and no operand changes its place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from decoders import session
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import random_banks, small_decoder, small_feeds

from graph_passes.insert import insert_edits
from graph_passes.sites import find_sites
from runtimes.edit import STREAMS, Site
from runtimes.op import EditNode

BLOCKS = ["pre_norm", "pre_norm_fused", "post_norm", "parallel", "parallel_late", "after_norm"]
EDITS = st.lists(
    st.builds(
        EditNode,
        site=st.builds(Site, layer=st.integers(0, 2), stream=st.sampled_from(STREAMS)),
        activation=st.sampled_from(["", "relu", "tanh"]),
    )
    | st.builds(EditNode, site=st.builds(Site, layer=st.integers(0, 2), stream=st.sampled_from(STREAMS)), op=st.just("RED")),
    min_size=1,
    max_size=6,
    unique=True,
)


@st.composite
def decoders_with_readers(draw: st.DrawFn) -> ir.Model:
    """A decoder whose streams are also read by nodes outside any block, at either operand of operators that do not commute."""
    model = small_decoder(block=draw(st.sampled_from(BLOCKS)))
    streams = [location.value for location in find_sites(model).values()]
    readers = st.tuples(st.sampled_from(streams), st.sampled_from(streams), st.sampled_from(["Sub", "Div", "Pow"]), st.booleans())
    for number, (left, right, op, is_output) in enumerate(draw(st.lists(readers, max_size=4))):
        node = ir.node(op, [left, right], name=f"reader.{number}")
        node.outputs[0].name = f"reader.{number}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 8])
        model.graph.append(node)
        if is_output:
            model.graph.outputs.append(node.outputs[0])
    for stream in draw(st.lists(st.sampled_from(streams), max_size=2, unique_by=id)):
        if not stream.is_graph_output() and stream.type is not None:
            model.graph.outputs.append(stream)
    return model


def _origin(value: ir.Value | None, edits: set[str], renamed: dict[str, str]) -> str | None:
    """The name under which the value was known before the edits: series of edits are walked back to the stream."""
    while value is not None and value.producer() is not None and value.producer().name in edits:
        value = value.producer().inputs[0]
    if value is None or not value.name:
        return None
    return renamed.get(value.name, value.name)


@settings(deadline=None, max_examples=150)
@given(model=decoders_with_readers(), nodes=EDITS)
def test_readers_keep_their_operands(model, nodes):
    before = {node.name: [value.name if value is not None and value.name else None for value in node.inputs] for node in model.graph}
    outputs = [value.name for value in model.graph.outputs]
    located = find_sites(model)
    streams = {
        (location.node.name, location.output_index): location for site, location in located.items() if site in {n.site for n in nodes}
    }
    named = {key: location.value.name for key, location in streams.items()}
    insert_edits(model, nodes, slots="input")

    edits = {node.name for node in nodes}
    split = {name for name, _ in streams if name not in {node.name for node in model.graph}}
    renamed = {f"{name}.base": name for name in named.values()}
    for node in model.graph:
        if node.name in before:
            assert [_origin(value, edits, renamed) for value in node.inputs] == before[node.name]
    assert [value.name for value in model.graph.outputs] == outputs
    # Nothing but the next edit reads a stream, so every reader is behind the whole series.
    for node in model.graph:
        if node.name in edits:
            assert {use.node.name for use in node.inputs[0].uses()} == {node.name} and not node.inputs[0].is_graph_output()
    assert {name for name in before if name not in {node.name for node in model.graph}} == split


@settings(deadline=None, max_examples=25)
@given(block=st.sampled_from(BLOCKS), nodes=EDITS, seed=st.integers(0, 1000))
def test_the_order_of_sites_does_not_matter(block, nodes, seed):
    results = []
    # Nodes of one site are in series in the order given, so only the order of sites may change.
    for ordered in (nodes, sorted(nodes, key=lambda node: node.site), sorted(nodes, key=lambda node: node.site, reverse=True)):
        model = small_decoder(block=block)
        insert_edits(model, ordered, slots="input")
        results.append(session(model).run(None, {**small_feeds(model), **random_banks(model, seed=seed)})[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-5, atol=1e-5)

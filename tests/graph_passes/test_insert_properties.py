"""Random graphs, random readers of the stream: no reader is left behind and no operand changes its place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import rounding
from decoders import session
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import EVERY_TOKEN, ROUNDING, random_banks, small_decoder, small_feeds

from graph_passes.find.sites import find_sites
from graph_passes.insert import insert_edits
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.op import EditNode

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


OPERATORS = {"Sub": np.subtract, "Div": np.divide, "Pow": np.power, "MatMul": lambda a, b: a @ b}
"""What readers compute; nothing here commutes."""
PLACES = ("graph", "If", "If in If", "Loop")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One node outside any block that reads streams ``left`` and ``right``, which may be one, in the graph or in a body of it."""

    left: int
    right: int
    op: str
    place: str
    is_output: bool


READERS = st.lists(
    st.builds(
        Reader, left=st.integers(0, 11), right=st.integers(0, 11), op=st.sampled_from(list(OPERATORS)), place=st.sampled_from(PLACES),
        is_output=st.booleans(),
    ),
    max_size=4,
)  # fmt: skip


def _float(value: ir.Value, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", "columns"])
    return value


def _compute(name: str, op: str, left: ir.Value, right: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """left op right, [B, S, ..]; MatMul takes the second operand transposed."""
    nodes = []
    if op == "MatMul":
        nodes.append(ir.node("Transpose", [right], {"perm": [0, 2, 1]}, name=f"{name}.transposed"))
        right = _float(nodes[0].outputs[0], f"{name}.transposed")
    nodes.append(ir.node(op, [left, right], name=name))
    return nodes, _float(nodes[-1].outputs[0], name)


def _inside_if(name: str, nodes: list[ir.Node], result: ir.Value, other: ir.Value) -> list[ir.Node]:
    """If(true) with ``nodes`` in its then branch, the stream ``other`` in its else branch."""
    always = ir.node("Constant", [], {"value": ir.tensor(np.array(True))}, name=f"{name}.always")
    always.outputs[0].name = always.name
    same = ir.node("Identity", [other], name=f"{name}.else")
    _float(same.outputs[0], same.name)
    bodies = {
        "then_branch": ir.Graph([], [result], nodes=nodes, name=f"{name}.then_graph"),
        "else_branch": ir.Graph([], [same.outputs[0]], nodes=[same], name=f"{name}.else_graph"),
    }
    node = ir.node("If", [always.outputs[0]], {k: ir.AttrGraph(k, g) for k, g in bodies.items()}, name=f"{name}.if")
    _float(node.outputs[0], f"{name}.chosen")
    return [always, node]


def _inside_loop(name: str, nodes: list[ir.Node], result: ir.Value, start: ir.Value) -> list[ir.Node]:
    """Loop over ``nodes``, twice; what the first turn computes is thrown away, and it starts from the stream ``start``."""
    constants = [
        ir.node("Constant", [], {"value": ir.tensor(np.array(value))}, name=f"{name}.{kind}")
        for kind, value in (("twice", 2), ("always", True))
    ]
    for node in constants:
        node.outputs[0].name = node.name
    turn, again, carried = (
        ir.Value(name=f"{name}.{kind}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        for kind, dtype, shape in (
            ("turn", ir.DataType.INT64, []),
            ("again", ir.DataType.BOOL, []),
            ("carried", ir.DataType.FLOAT, ["batch", "sequence", "columns"]),
        )
    )
    go = ir.node("Identity", [again], name=f"{name}.go")
    go.outputs[0].name, go.outputs[0].type, go.outputs[0].shape = go.name, ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    body = ir.Graph([turn, again, carried], [go.outputs[0], result], nodes=[go, *nodes], name=f"{name}.body")
    loop = ir.node("Loop", [*(c.outputs[0] for c in constants), start], {"body": ir.AttrGraph("body", body)}, name=f"{name}.loop")
    _float(loop.outputs[0], f"{name}.last")
    return [*constants, loop]


def add_reader(model: ir.Model, name: str, reader: Reader, left: ir.Value, right: ir.Value) -> ir.Value:
    """The value that the reader computes, at the top level."""
    nodes, result = _compute(name, reader.op, left, right)
    if reader.place.startswith("If"):
        nodes = _inside_if(name, nodes, result, right)
        if reader.place == "If in If":
            nodes = _inside_if(f"{name}.outer", nodes, nodes[-1].outputs[0], left)
    elif reader.place == "Loop":
        nodes = _inside_loop(name, nodes, result, left)
    model.graph.extend(nodes)
    if reader.is_output:
        model.graph.outputs.append(nodes[-1].outputs[0])
    return nodes[-1].outputs[0]


@st.composite
def decoders_with_readers(draw: st.DrawFn) -> ir.Model:
    """A decoder whose streams are read by nodes outside any block, in bodies too, at both operands of operators that do not commute."""
    model = small_decoder(block=draw(st.sampled_from(BLOCKS)))
    streams = [location.value for location in find_sites(model).values()]
    for number, reader in enumerate(draw(READERS)):
        add_reader(model, f"reader.{number}", reader, streams[reader.left % len(streams)], streams[reader.right % len(streams)])
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


@settings(deadline=None, max_examples=100)
@given(model=decoders_with_readers(), nodes=EDITS)
def test_readers_keep_their_operands(model, nodes):
    nodes_before = list(model.graph.all_nodes())
    before = {node.name: [value.name if value is not None and value.name else None for value in node.inputs] for node in nodes_before}
    outputs = [value.name for value in model.graph.outputs]
    located = find_sites(model)
    streams = {
        (location.node.name, location.output_index): location for site, location in located.items() if site in {n.site for n in nodes}
    }
    named = {key: location.value.name for key, location in streams.items()}
    insert_edits(model, nodes)

    edits = {node.name for node in nodes}
    kept = {node.name for node in model.graph.all_nodes()}
    split = {name for name, _ in streams if name not in kept}
    renamed = {f"{name}.base": name for name in named.values()}
    for node in model.graph.all_nodes():
        if node.name in before:
            assert [_origin(value, edits, renamed) for value in node.inputs] == before[node.name]
    assert [value.name for value in model.graph.outputs] == outputs
    # Nothing but the next edit reads a stream, so every reader is behind the whole series.
    for node in model.graph:
        if node.name in edits:
            assert {use.node.name for use in node.inputs[0].uses()} == {node.name} and not node.inputs[0].is_graph_output()
    assert {name for name in before if name not in kept} == split


@settings(deadline=None, max_examples=30)
@given(block=st.sampled_from(BLOCKS), nodes=EDITS, readers=READERS.filter(len), seed=st.integers(0, 1000))
def test_readers_compute_with_the_edited_streams(block, nodes, readers, seed):
    """In onnxruntime, banks filled: every reader, wherever it stands, sees what the last edit of each of its streams wrote."""
    model = small_decoder(block=block)
    located = find_sites(model)
    sites = sorted(located)
    streams = [located[site].value for site in sites]
    chosen = [(streams[r.left % len(streams)], streams[r.right % len(streams)]) for r in readers]
    # A name for what each stream is in the end: a reader of its own, whose result is the stream itself.
    finals = {}
    for stream in {id(value): value for pair in chosen for value in pair}.values():
        node = ir.node("Identity", [stream], name=f"final.{len(finals)}")
        finals[id(stream)] = _float(node.outputs[0], node.name)
        model.graph.append(node)
    model.graph.outputs.extend(finals.values())
    results = [add_reader(model, f"r.{i}", replace(r, is_output=True), *chosen[i]) for i, r in enumerate(readers)]
    insert_edits(model, nodes)
    run = session(model)
    names = [value.name for value in run.get_outputs()]
    with np.errstate(all="ignore"):
        got = dict(zip(names, run.run(None, {**small_feeds(model), **random_banks(model, seed=seed), **EVERY_TOKEN}), strict=True))
        for reader, result, (left, right) in zip(readers, results, chosen, strict=True):
            a, b = (got[finals[id(value)].name] for value in (left, right))
            expected = OPERATORS[reader.op](a, b.swapaxes(1, 2) if reader.op == "MatMul" else b)
            if reader.op == "MatMul":  # element by element, a sum that cancels is all rounding
                rounding.check(got[result.name], expected, ROUNDING)
            else:
                np.testing.assert_allclose(got[result.name], expected, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(block=st.sampled_from(BLOCKS), nodes=EDITS, seed=st.integers(0, 1000))
def test_the_order_of_sites_does_not_matter(block, nodes, seed):
    results = []
    # Nodes of one site are in series in the order given, so only the order of sites may change.
    for ordered in (nodes, sorted(nodes, key=lambda node: node.site), sorted(nodes, key=lambda node: node.site, reverse=True)):
        model = small_decoder(block=block)
        insert_edits(model, ordered)
        results.append(session(model).run(None, {**small_feeds(model), **random_banks(model, seed=seed), **EVERY_TOKEN})[0])
    for other in results[1:]:
        rounding.check(other, results[0], ROUNDING)

"""Inserts the ops of domain ai.reft behind the streams of a decoder graph, together with its banks, slots and function bodies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import describe, input_of, producer_of
from graph_passes.find.dominators import Dominators
from graph_passes.find.sites import SiteLocation, locate_sites
from graph_passes.find.skip_norms import refuse_training_norm, split_skip_norm
from graph_passes.find.streams import StreamType, stream_types
from graph_passes.function_body import function_of
from graph_passes.slots.add import add_slots
from graph_passes.slots.rule import SLOT_VALUE
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.op import (
    DOMAIN,
    OP_VERSION,
    OPS,
    OVERRIDABLE_NUMBERS,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    EditNode,
    no_edit_bank,
)
from runtimes.errors import GraphError

FUNCTION_IR_VERSION = 8
"""The first IR version with model-local functions; overloads of them came with 10."""
OVERLOAD_IR_VERSION = 10


def insert_edits(model: ir.Model, nodes: Sequence[EditNode], *, per_token: bool = False) -> None:
    """Inserts one LoReFT or RED node per entry of ``nodes``, in place.

        stream -> consumers    becomes    stream -> LoReFT [-> LoReFT .. -> RED] -> the same consumers, at the same input index

    Nodes of one site stand in series in the order given; where an edit of block i's output and one of block i+1's input share a
    value, the output's comes first. Banks hold no edit (``runtimes.edits.op.no_edit_bank``), and a runtime may override them with any N
    and r; slots come from the graph's attention_mask, or without one from the input reft.slots. As inserted, nothing is
    edited. Where a stream is hidden inside a fused skip norm, that node is split.

    Raises SiteNotFound or SiteAmbiguous for a site the graph does not show, GraphError for a graph that carries edits already, that
    uses the names reft.* itself, whose opset is below 15 or whose stream is not float32, float16 or bfloat16.
    """
    try:
        InsertEdits(nodes, per_token=per_token)(model)
    except ir.passes.InvariantError as error:
        if isinstance(error.__cause__, GraphError):
            raise error.__cause__ from None
        raise


class InsertEdits(ir.passes.InPlacePass):
    """``insert_edits`` as an onnx-ir pass."""

    def __init__(self, nodes: Sequence[EditNode], *, per_token: bool = False) -> None:
        self.nodes = tuple(nodes)
        self.per_token = per_token

    def requires(self, model: ir.Model) -> None:
        if not self.nodes:
            raise GraphError("no edit to insert; name at least one site")
        if len(set(self.nodes)) != len(self.nodes):
            twice = next(node.name for node in self.nodes if self.nodes.count(node) > 1)
            raise GraphError(f"{twice} is asked for twice; one node per site, op and activation serves every adapter")
        refuse_folded(model)
        _refuse_taken_names(model, self.nodes)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        located = locate_sites(model, [node.site for node in self.nodes])
        # All checks come before the first change, so that a refused graph is left as it was.
        types = stream_types(located)
        functions = {
            (node.op, node.overload): function_of(node, opset=model.opset_imports.get("", 0), per_token=self.per_token)
            for node in self.nodes
        }
        for location in located.values():
            if location.is_skip_norm:
                refuse_training_norm(location.node)
        groups = _by_value(self.nodes, located)
        slot_by_rank = {3: add_slots(graph)}
        if any(types[node.site].rank == 2 for node in self.nodes):
            slot_by_rank[2] = _flattened(graph, slot_by_rank[3])

        for location, group in groups:
            kind = types[group[0].site]
            value = split_skip_norm(location.node) if location.is_skip_norm else location.value
            _insert_behind(graph, value, group, kind, slot_by_rank[kind.rank])

        model.opset_imports[DOMAIN] = OP_VERSION
        for function in functions.values():
            model.functions[function.identifier()] = function
        needed = OVERLOAD_IR_VERSION if any(overload for _, overload in functions) else FUNCTION_IR_VERSION
        model.ir_version = max(model.ir_version, needed)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        inserted = {node.name: node for node in model.graph if is_edit(node)}
        missing = [node.name for node in self.nodes if node.name not in inserted]
        if missing or len(inserted) != len(self.nodes):
            raise GraphError(f"the graph carries {len(inserted)} of {len(self.nodes)} edits; missing: {', '.join(missing) or 'none'}")
        for node in inserted.values():
            stream = input_of(node, 0)
            left = [describe(use.node) for use in stream.uses() if use.node is not node]
            if left or stream.is_graph_output():
                raise GraphError(f"{', '.join(left) or 'a graph output'} still reads {stream.name!r} before {node.name}")
            if None in node.inputs or not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
                raise GraphError(f"{node.name} is not wired: inputs {[str(v and v.name) for v in node.inputs]}")
            if node.op_identifier() not in model.functions:
                raise GraphError(f"{node.name} has no function body for {node.op_type}, overload {node.overload!r}")
        # Building the dominator tree refuses a graph that is not sorted.
        Dominators(model.graph, model.graph.inputs[0])


def is_edit(node: ir.Node) -> bool:
    """Whether ``node`` is an edit: LoReFT or RED of domain ai.reft."""
    return node.domain == DOMAIN and node.op_type in OPS


def banks_of(edit: ir.Node) -> list[ir.Value]:
    """What an edit reads behind its stream and its slots."""
    return [value for value in edit.inputs[2:] if value is not None]


def refuse_folded(model: ir.Model) -> None:
    """Raises GraphError where the model carries edits already."""
    present = [node.name for node in model.graph.all_nodes() if node.domain == DOMAIN]
    if present or any(domain == DOMAIN for domain, _, _ in model.functions):
        raise GraphError(
            f"the graph carries edits already ({len(present)} {DOMAIN} nodes{': ' + str(present[0]) + ', ..' if present else ''}); fold "
            "into the graph as it was exported, or add the new sites to the list it was folded with"
        )


def _refuse_taken_names(model: ir.Model, nodes: Sequence[EditNode]) -> None:
    graph = model.graph
    used = {value.name for node in graph for value in node.outputs} | set(graph.initializers) | {v.name for v in graph.inputs}
    wanted = {name for node in nodes for name in (*node.bank_names, node.name)} | OVERRIDABLE_NUMBERS | {SLOT_VALUE}
    if taken := sorted(wanted & used):
        raise GraphError(f"the graph uses the name {taken[0]!r} itself, which an edit needs; rename that value")


def _by_value(nodes: Sequence[EditNode], located: dict[Site, SiteLocation]) -> list[tuple[SiteLocation, list[EditNode]]]:
    """Edits that share a value, in the order in which the decoder would apply them: the output of a block before the next's input."""
    groups: dict[tuple[ir.Node, int], list[EditNode]] = {}
    places: dict[tuple[ir.Node, int], SiteLocation] = {}
    for node in nodes:
        location = located[node.site]
        place = (location.node, location.output_index)
        places[place] = location
        groups.setdefault(place, []).append(node)
    return [
        (places[place], sorted(group, key=lambda node: (node.site.layer, STREAMS.index(node.site.stream))))
        for place, group in groups.items()
    ]


def _insert_behind(graph: ir.Graph, value: ir.Value, group: Sequence[EditNode], kind: StreamType, slot: ir.Value) -> None:
    # Snapshot: the edit itself becomes a consumer of the value and must not be rewired onto its own output.
    consumers = value.uses()
    output_positions = [index for index, output in enumerate(graph.outputs) if output is value]
    edited = value
    inserted = []
    for edit in group:
        node = ir.node(
            edit.op,
            [edited, slot, *_add_banks(graph, edit, kind)],
            {**edit.attributes, "plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION},
            domain=DOMAIN,
            overload=edit.overload,
            name=edit.name,
        )
        edited = node.outputs[0]
        edited.name = edit.name
        edited.type = ir.TensorType(kind.dtype)
        edited.shape = value.shape
        inserted.append(node)
    graph.insert_after(producer_of(value), inserted)
    for consumer, index in consumers:
        consumer.replace_input_with(index, edited)
    if output_positions:
        # Who reads the graph's output by name gets the edited stream, as a hook on the eager model would give.
        name = value.name
        for position in output_positions:
            graph.outputs[position] = edited
        value.name = f"{name}.base"
        edited.name = name


def _add_banks(graph: ir.Graph, edit: EditNode, kind: StreamType) -> list[ir.Value]:
    """The op's banks: initializers of N = r = 1 that hold no edit and are graph inputs too, so that runtimes may swap them."""
    sizes = {"r": f"{edit.name}.r", "D": kind.width}
    values = []
    for name, bank, array in zip(edit.bank_names, edit.spec.banks, no_edit_bank(kind.width, kind.dtype.numpy(), edit.op), strict=True):
        value = ir.Value(
            name=name,
            type=ir.TensorType(kind.dtype),
            shape=ir.Shape([f"{edit.name}.N", *(sizes[axis] for axis in bank.axes)]),
            const_value=ir.tensor(array, dtype=kind.dtype, name=name),
        )
        graph.inputs.append(value)
        graph.register_initializer(value)
        values.append(value)
    return values


def _flattened(graph: ir.Graph, slot: ir.Value) -> ir.Value:
    """[B * S]: slots for streams that the graph has flattened to [B * S, D] (OPT's MLP)."""
    every = ir.node("Constant", [], {"value": ir.tensor(np.array([-1], np.int64))}, name=f"{SLOT_VALUE}.every")
    flat = ir.node("Reshape", [slot, every.outputs[0]], name=f"{SLOT_VALUE}.flat")
    for node in (every, flat):
        node.outputs[0].name = node.name
    flat.outputs[0].type = slot.type
    producer = slot.producer()
    if producer is None:
        graph.insert_before(graph[0], [every, flat])
    else:
        graph.insert_after(producer, [every, flat])
    return flat.outputs[0]

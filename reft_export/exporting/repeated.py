"""A deep model's graph from that of a shallow one: blocks of one kind are traced three times, and repeated under the other layers' weights.

Nothing is assumed of a block but what the shallow graph shows: its second and third occurrence must be the same nodes, reading the same
values, but for the stream, the cache and the weights of their layer. Where they are not, the whole model is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript.optimizer import fold_constants
from transformers import PreTrainedModel

from graph_passes.accessors import array_of, name_of
from graph_passes.find.sites import find_sites
from reft_export.exporting.alike import Shallow, shallow_copy
from reft_export.exporting.exported_graph import ExportedGraph
from runtimes.artifacts.manifest import WeightSource
from runtimes.edits.edit import Site
from runtimes.errors import ExportError, GraphError

Export = Callable[[PreTrainedModel, Collection[str]], ExportedGraph]
"""(a model, names of parameters that may not be folded into constants nor joined where they are equal) to its graph."""

PAST, PRESENT = "past_key_values", "present"


class NotAlikeError(GraphError):
    """Blocks of one kind are not the same nodes."""


def export_repeated(model: PreTrainedModel, export: Export) -> ExportedGraph:
    """The graph of ``model``, of which ``export`` need trace few blocks where most are alike; it may rearrange the model in place.

    Raises what ``export`` raises for the whole model.
    """
    shallow = shallow_copy(model)
    if shallow is not None:
        own = [name for name, _ in shallow.model.named_parameters(remove_duplicate=False) if name.startswith(f"{shallow.blocks}.")]
        try:
            repeated = repeat_blocks(export(shallow.model, own), shallow, model)
            fold_weights(repeated.model)
            return repeated
        except (ExportError, GraphError):  # NotAlikeError among them; what is wrong with the model itself the whole of it says below
            pass
    return export(model, ())


def repeat_blocks(exported: ExportedGraph, shallow: Shallow, model: PreTrainedModel) -> ExportedGraph:
    """``exported``, of ``shallow``, becomes the graph of ``model``, in place. Weights stay views of the model's.

    Raises NotAlikeError, before anything is changed, where blocks of one kind differ; GraphError where blocks cannot be told apart.
    """
    blocks = _blocks(exported.model, len(shallow.traced))
    numbers: dict[int, list[int]] = {}
    for number, layer in enumerate(shallow.traced):
        numbers.setdefault(shallow.kinds[layer], []).append(number)
    for kind, occurrences in numbers.items():
        if shallow.kinds.count(kind) > len(occurrences):
            _Comparison(exported, shallow.blocks, blocks[occurrences[-2]], blocks[occurrences[-1]]).check()
    last = blocks[-1]
    behind = [use for use in last.output.uses() if use.node not in last.nodes]
    builder = _Builder(exported, shallow, model)
    builder.rename_kept()
    kept = {layer: blocks[number] for number, layer in enumerate(shallow.traced)}
    stream = blocks[0].stream
    for layer, kind in enumerate(shallow.kinds):
        if layer in kept:
            kept[layer].read(stream)
            stream = kept[layer].output
        else:
            stream = builder.repeat(blocks[numbers[kind][-1]], shallow.traced[numbers[kind][-1]], layer, stream)
    for use in behind:
        use.node.replace_input_with(use.idx, stream)
    builder.order_cache()
    exported.model.graph.sort()
    return replace(exported, weights=builder.weights)


def fold_weights(graph: ir.Model) -> None:
    """What is computed of weights alone becomes an initializer, as where nothing was held back from the optimizer: Gemma's 1 + w."""
    if not any(node.inputs and all(value is not None and value.is_initializer() for value in node.inputs) for node in graph.graph):
        return
    fold_constants(graph, onnx_shape_inference=False)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    RemoveUnusedNodesPass()(graph)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    number: int
    nodes: dict[ir.Node, None]
    """In the graph's order."""
    stream: ir.Value
    """What it reads; of block 0 what it writes, as nothing is read in its place."""
    output: ir.Value
    presents: tuple[ir.Value, ...]

    def read(self, stream: ir.Value) -> None:
        if stream is self.stream:
            return
        for use in tuple(self.stream.uses()):
            if use.node in self.nodes:
                use.node.replace_input_with(use.idx, stream)


def _blocks(graph: ir.Model, depth: int) -> list[_Block]:
    """What each block adds to the values upstream of it: block 0 also holds what stands before it, and what all of them share."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for node in graph.graph for a in node.attributes.values()):
        raise NotAlikeError("a node holds a graph of its own, whose values may be any block's")
    found = find_sites(graph)
    blocks: list[_Block] = []
    seen: set[ir.Node] = set()
    for number in range(depth):
        inner = Site(layer=number + 1, stream="block_input")
        site = inner if number + 1 < depth else Site(layer=number, stream="block_output")
        if site not in found:
            raise NotAlikeError(f"the graph does not show {site}")
        output = found[site].value
        presents = tuple(value for value in graph.graph.outputs if name_of(value).startswith(f"{PRESENT}.{number}."))
        upstream = _upstream((output, *presents), seen)
        seen |= upstream
        nodes = {node: None for node in graph.graph if node in upstream}
        blocks.append(_Block(number=number, nodes=nodes, stream=blocks[-1].output if blocks else output, output=output, presents=presents))
    return blocks


def _upstream(values: Collection[ir.Value], known: Collection[ir.Node]) -> set[ir.Node]:
    """The nodes that ``values`` depend on, without ``known`` ones."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found and node not in known:
            found.add(node)
            waiting.extend(value for value in node.inputs if value is not None)
    return found


class _Comparison:
    """Two blocks of one kind, from their outputs upwards."""

    def __init__(self, exported: ExportedGraph, blocks: str, one: _Block, other: _Block) -> None:
        self._weights, self._blocks = exported.weights, blocks
        self._one, self._other = one, other
        self._pairs: dict[ir.Node, ir.Node] = {}

    def check(self) -> None:
        """Raises NotAlikeError unless both are the same nodes over the same values."""
        one, other = self._one, self._other
        if len(one.presents) != len(other.presents) or len(one.nodes) != len(other.nodes):
            raise self._differ(one.output, other.output)
        waiting: list[tuple[ir.Value | None, ir.Value | None]] = [
            *zip((one.output, *one.presents), (other.output, *other.presents), strict=True)
        ]
        while waiting:
            ours, theirs = waiting.pop()
            if ours is None or theirs is None:
                if ours is not theirs:
                    raise self._differ(ours, theirs)
                continue
            waiting.extend(self._inputs(ours, theirs))
        if len(self._pairs) != len(other.nodes):
            raise NotAlikeError(f"block {one.number} has nodes that block {other.number} does not have")

    def _inputs(self, ours: ir.Value, theirs: ir.Value) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
        """What the two values' nodes read, where these are nodes of the blocks."""
        node, twin = ours.producer(), theirs.producer()
        inside = node in self._one.nodes
        if inside != (twin in self._other.nodes):
            raise self._differ(ours, theirs)
        if not inside:
            if not self._same_outside(ours, theirs):
                raise self._differ(ours, theirs)
            return
        assert node is not None and twin is not None
        known = self._pairs.setdefault(node, twin)
        if known is not twin or ours.index() != theirs.index() or _operator(node) != _operator(twin):
            raise self._differ(ours, theirs)
        yield from zip(node.inputs, twin.inputs, strict=True)

    def _same_outside(self, ours: ir.Value, theirs: ir.Value) -> bool:
        """Whether two values from outside the blocks are each block's own stream, cache or weight, or one and the same."""
        one, other = self._one, self._other
        if ours is one.stream or theirs is other.stream:
            return ours is one.stream and theirs is other.stream
        if ours is theirs:  # shared by all layers, unless it is one layer's own
            return not self._is_own(ours)
        if ours.is_graph_input() and theirs.is_graph_input():
            return _renumbered(name_of(ours), PAST, one.number, other.number) == name_of(theirs)
        if not (ours.is_initializer() and theirs.is_initializer()):
            return False
        source, twin = self._weights.get(name_of(ours)), self._weights.get(name_of(theirs))
        if source is None or twin is None:
            return source is twin and _equal(ours, theirs)
        own = replace(source, parameter=_renumbered(source.parameter, self._blocks, one.number, other.number))
        return own == twin and own != source and ours.shape == theirs.shape and ours.dtype == theirs.dtype

    def _is_own(self, value: ir.Value) -> bool:
        source = self._weights.get(name_of(value))
        return (source is not None and source.parameter.startswith(f"{self._blocks}.")) or name_of(value).startswith(f"{PAST}.")

    def _differ(self, ours: ir.Value | None, theirs: ir.Value | None) -> NotAlikeError:
        names = " and ".join("nothing" if value is None else repr(value.name) for value in (ours, theirs))
        return NotAlikeError(f"blocks {self._one.number} and {self._other.number} differ: {names}")


def _operator(node: ir.Node) -> tuple[object, ...]:
    attributes = tuple(sorted((name, a.type.name, _attribute(a)) for name, a in node.attributes.items()))
    return node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs), attributes


def _attribute(attribute: ir.Attr) -> object:
    if attribute.is_ref():
        return attribute.ref_attr_name
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.value.tobytes()
    return tuple(attribute.value) if isinstance(attribute.value, list | tuple) else attribute.value


def _equal(one: ir.Value, other: ir.Value) -> bool:
    return one.dtype == other.dtype and np.array_equal(array_of(one), array_of(other))


def _renumbered(name: str, prefix: str, old: int, new: int) -> str:
    """``<prefix>.<old>.rest`` with the new number; any other name stays."""
    start = f"{prefix}.{old}."
    return f"{prefix}.{new}.{name.removeprefix(start)}" if name.startswith(start) else name


class _Builder:
    """Puts the blocks of further layers into a shallow graph."""

    def __init__(self, exported: ExportedGraph, shallow: Shallow, model: PreTrainedModel) -> None:
        self._graph, self._shallow, self._model = exported.model.graph, shallow, model
        self.weights: dict[str, WeightSource] = dict(exported.weights)

    def rename_kept(self) -> None:
        """Weights and caches of the traced blocks get the numbers of their layers; the last one first, as a number only ever grows."""
        for number, layer in reversed(list(enumerate(self._shallow.traced))):
            if number == layer:
                continue
            for name, source in list(self.weights.items()):
                renamed = self._renamed(name, source, number, layer)
                if renamed is None:
                    continue
                self._graph.initializers[name].name = renamed[0]
                del self.weights[name]
                self.weights[renamed[0]] = renamed[1]
            for values, prefix in ((self._graph.inputs, PAST), (self._graph.outputs, PRESENT)):
                for value in values:
                    value.name = _renumbered(name_of(value), prefix, number, layer)

    def _renamed(self, name: str, source: WeightSource, old: int, new: int) -> tuple[str, WeightSource] | None:
        """Name and source of the same weight in another layer; None of a weight that is no block's own."""
        parameter = _renumbered(source.parameter, self._shallow.blocks, old, new)
        if parameter == source.parameter:
            return None
        return _renumbered(name, self._shallow.blocks, old, new), replace(source, parameter=parameter)

    def repeat(self, block: _Block, of: int, layer: int, stream: ir.Value) -> ir.Value:
        """Adds ``block``, that of layer ``of``, as that of another ``layer``, reading ``stream``; returns what it writes."""
        values: dict[ir.Value, ir.Value] = {block.stream: stream}
        for node in block.nodes:
            inputs = [None if value is None else self._counterpart(value, values, of, layer) for value in node.inputs]
            outputs = [self._value_like(value, _output_name(value, of, layer)) for value in node.outputs]
            values.update(zip(node.outputs, outputs, strict=True))
            name = None if node.name is None else f"{node.name}.{layer}"
            self._graph.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    list(node.attributes.values()),
                    overload=node.overload,
                    outputs=outputs,
                    version=node.version,
                    name=name,
                )
            )
        self._graph.outputs.extend(values[value] for value in block.presents)
        return values[block.output]

    def _counterpart(self, value: ir.Value, values: dict[ir.Value, ir.Value], of: int, layer: int) -> ir.Value:
        """What the block of ``layer`` reads where that of layer ``of`` reads ``value``."""
        if value in values:
            return values[value]
        name = name_of(value)
        if value.is_graph_input() and (renamed := _renumbered(name, PAST, of, layer)) != name:
            made = self._value_like(value, renamed)
            self._graph.inputs.append(made)
        elif name in self.weights and (own := self._renamed(name, self.weights[name], of, layer)) is not None:
            made = self._weight(value, *own)
        else:
            return value
        values[value] = made
        return made

    def _weight(self, like: ir.Value, name: str, source: WeightSource) -> ir.Value:
        """The initializer of a parameter of the model, as a view of it."""
        parameter = self._model.get_parameter(source.parameter).detach()
        made = self._value_like(like, name)
        made.const_value = TorchTensor(parameter.t() if source.transpose else parameter, name=name)
        if made.const_value.shape != like.shape or made.const_value.dtype != like.dtype:
            raise NotAlikeError(f"{source.parameter} is {made.const_value.shape}, and {like.name} {like.shape}")
        self._graph.register_initializer(made)
        self.weights[name] = source
        return made

    @staticmethod
    def _value_like(value: ir.Value, name: str) -> ir.Value:
        return ir.Value(name=name, type=value.type, shape=None if value.shape is None else value.shape.copy())

    def order_cache(self) -> None:
        """Inputs and outputs of the cache by their layers."""
        for values, prefix in ((self._graph.inputs, PAST), (self._graph.outputs, PRESENT)):
            ordered = sorted(values, key=lambda value: _layer(name_of(value), prefix))
            values.clear()
            values.extend(ordered)


def _output_name(value: ir.Value, of: int, layer: int) -> str:
    renamed = _renumbered(name_of(value), PRESENT, of, layer)
    return renamed if value.is_graph_output() else f"{value.name}.{layer}"


def _layer(name: str, prefix: str) -> tuple[int, str]:
    """By layer, key before value; what is no layer's cache stays in front, in its order, as sorting does not change that of equals."""
    if not name.startswith(f"{prefix}."):
        return -1, ""
    _, layer, part = name.split(".")
    return int(layer), part

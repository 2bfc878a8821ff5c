"""Immediate dominators of the nodes that depend on one graph input: which values does everything downstream pass through?"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from graph_passes.accessors import describe
from runtimes.errors import GraphError

SHAPE_READERS = frozenset({"Shape", "Size"})
"""Ops whose output depends on a tensor's shape alone: batch and sequence sizes would otherwise tie every layer to the input."""

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})


class Dominators:
    """The dominator tree of ``graph``, rooted at the value ``root``; edges into Shape and Size are cut.

    A node a dominates a node b when every path from the root to b passes a. Nodes that do not depend on the root (weights,
    rotary tables, the attention mask) are not part of the tree.

    Source: Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm" (2001); one sweep is enough on an acyclic graph.

    Raises GraphError when a node stands before the producer of one of its inputs.
    """

    def __init__(self, graph: ir.Graph, root: ir.Value) -> None:
        self._dominator: dict[ir.Node, ir.Node | None] = {}
        self._depth: dict[ir.Node, int] = {}
        self._root = root
        seen: set[ir.Node] = set()
        for node in graph:
            self._check_order(node, graph, seen)
            seen.add(node)
            if node.op_type in SHAPE_READERS:
                continue
            sources = [value.producer() for value in read_values(node) if value is root or value.producer() in self._depth]
            if not sources:
                continue
            dominator = sources[0]
            for source in sources[1:]:
                dominator = self._common(dominator, source)
            self._dominator[node] = dominator
            self._depth[node] = self._depth_of(dominator) + 1

    def __contains__(self, node: ir.Node | None) -> bool:
        """Whether ``node`` depends on the root."""
        return node in self._depth

    def depends(self, value: ir.Value | None) -> bool:
        """Whether ``value`` depends on the root."""
        return value is not None and (value is self._root or value.producer() in self._depth)

    def adds_branches(self, node: ir.Node) -> bool:
        """Whether ``node`` is an Add of two values that both depend on the root: a residual Add, not a bias."""
        return node.op_type == "Add" and all(map(self.depends, node.inputs))

    def shifts_or_scales(self, node: ir.Node) -> bool:
        """Whether ``node`` adds or multiplies elementwise what depends on the root with what does not: a bias, a factor."""
        return node.op_type in _ELEMENTWISE and sum(map(self.depends, node.inputs)) == 1

    def climb(self, node: ir.Node | None) -> Iterator[ir.Node]:
        """``node``, its immediate dominator, that one's, and so on up to the root; nothing where ``node`` does not depend on the root."""
        step = node if node in self else None
        while step is not None:
            yield step
            step = self._dominator[step]

    def _depth_of(self, node: ir.Node | None) -> int:
        return 0 if node is None else self._depth[node]

    def _common(self, a: ir.Node | None, b: ir.Node | None) -> ir.Node | None:
        # None is the root value itself; the deeper of the two climbs until they meet.
        while a is not b:
            if a is not None and self._depth[a] >= self._depth_of(b):
                a = self._dominator[a]
            elif b is not None:
                b = self._dominator[b]
        return a

    @staticmethod
    def _check_order(node: ir.Node, graph: ir.Graph, seen: set[ir.Node]) -> None:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if value is not None and producer is not None and producer.graph is graph and producer not in seen:
                raise GraphError(
                    f"node {describe(node)} stands before {describe(producer)}, which computes its input {value.name!r}; "
                    "ONNX wants nodes in topological order: write the graph again with a tool that sorts it"
                )


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Every value ``node`` reads, those of its subgraphs (If, Loop, Scan) included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = list(attribute.as_graphs())
        else:
            continue
        for body in bodies:
            for inner in body.all_nodes():
                yield from (value for value in inner.inputs if value is not None)
            # A subgraph may hand an outer value straight through.
            yield from body.outputs

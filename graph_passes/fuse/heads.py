"""Rotary embeddings, and what else moves numbers between a projection and attention, as one operator or none.

    x [B, S, H D] -> Reshape, Transpose -> x cos + rotate(x) sin -> Transpose, Reshape -> GroupQueryAttention
    becomes    x -> RotaryEmbedding -> GroupQueryAttention

with y_i = x_i cos_i - x_j sin_i,  y_j = x_j cos_i + x_i sin_i for the pairs (i, j) of the first r of a head's D columns: (i, i + r/2), or
(2i, 2i + 1) where interleaved. Families write it in a dozen ways. None is looked for: what stands between is a handful of operators that
move, add and multiply, so it is run on random numbers, where two such formulas agree only if they are one, and what is not the operator's
formula stays as it is.

The operator looks angles up in tables by position. Here the tables are the step's own angles, one row a token, as the graph computes them
from position_ids, and a token's position is its number: right for any scaling of the angles and any length of context, and no bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.accessors import input_of, int_of, name_of
from graph_passes.cache_shapes import ATTENTION
from graph_passes.find.axes import constant_tensor
from graph_passes.find.dominators import SHAPE_READERS
from graph_passes.fuse.evaluate import evaluate
from graph_passes.fuse.norms import NORM

ROTARY = "RotaryEmbedding"
_CONTRIB = "com.microsoft"
_MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Concat", "Expand", "Identity"})
_MIXES = frozenset({"Mul", "Add", "Sub", "Neg"})
_PARTS = frozenset({"Slice", "Split"})
_BATCH, _STEP, _PAST = 2, 3, 5
"""Sizes that parts are run with; no two are equal, so that an axis is told by its size."""
TOLERANCE = {ir.DataType.FLOAT: 2e-6, ir.DataType.FLOAT16: 2e-2}
"""Largest difference of two ways to round one formula, relative to its largest value."""
_ALL = np.iinfo(np.int64).max


class FuseHeads(ir.passes.InPlacePass):
    """See the module. Graphs without GroupQueryAttention stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        attentions = [node for node in graph if node.op_type == ATTENTION and node.domain == _CONTRIB]
        if not attentions:
            return ir.passes.PassResult(model, modified=False)
        _norms_before_transposes(graph)
        fusion = _Fusion(graph)
        for attention in attentions:
            heads = int_of(attention, "num_heads"), int_of(attention, "kv_num_heads")
            for index, count in ((0, heads[0]), (1, heads[1]), (2, heads[1])):
                value = attention.inputs[index]
                if value is not None and (found := fusion.shorter(value, count)) is not None:
                    attention.replace_input_with(index, found)
            for value in _moved(attention.outputs[0]):
                if (found := fusion.shorter(value, heads[0])) is not None:
                    value.replace_all_uses_with(found)
        RemoveUnusedNodesPass()(model)
        graph.sort()
        return ir.passes.PassResult(model, modified=fusion.found > 0)


def _norms_before_transposes(graph: ir.Graph) -> None:
    """norm(transpose(x)) is transpose(norm(x)) where the last axis stays: the norm of a head's columns can stand before its heads move."""
    for norm in list(graph):
        moved = norm.inputs[0].producer() if norm.op_type == NORM and norm.inputs[0] is not None else None
        if moved is None or moved.op_type != "Transpose" or len(list(moved.outputs[0].uses())) > 1:
            continue
        order = list(moved.attributes.get_ints("perm", ()))
        before, after = input_of(moved, 0), norm.outputs[0]
        if not order or order[-1] != len(order) - 1:
            continue
        earlier = ir.node(NORM, [before, norm.inputs[1]], dict(norm.attributes), name=f"{norm.name}.heads")
        earlier.outputs[0].type, earlier.outputs[0].shape = after.type, before.shape
        later = ir.node("Transpose", [earlier.outputs[0]], {"perm": order})
        later.outputs[0].type, later.outputs[0].shape = after.type, after.shape
        graph.insert_before(norm, [earlier, later])
        after.replace_all_uses_with(later.outputs[0])
        graph.remove(norm, safe=True)


def _moved(value: ir.Value) -> Iterator[ir.Value]:
    """What attention's output becomes by moves alone, the last first."""
    found = []
    while len(uses := list(value.uses())) == 1 and uses[0].node.op_type in _MOVES and uses[0].idx == 0:
        value = uses[0].node.outputs[0]
        found.append(value)
    yield from reversed(found)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What stands between ``source`` and a value: nothing but moves and mixes with ``angles``."""

    source: ir.Value
    angles: tuple[ir.Value, ...]


@dataclass(frozen=True, kw_only=True)
class _Angles:
    """cos or sin as a part reads them, [.., B, .., S, .., width], and which of their columns are those of the pairs."""

    value: ir.Value
    shape: tuple[int, ...]
    start: int = 0
    stop: int = _ALL
    step: int = 1

    @property
    def pairs(self) -> int:
        return len(range(*slice(self.start, self.stop, self.step).indices(self.shape[-1])))

    def spread(self, pairs: np.ndarray) -> np.ndarray:
        """pairs [B, S, r/2] as the part reads them."""
        if self.step == 2:
            pairs = np.repeat(pairs, 2, -1)
        elif self.shape[-1] != pairs.shape[-1]:
            pairs = np.concatenate([pairs, pairs], -1)
        return pairs.reshape(self.shape)


class _Fusion:
    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._inputs = {name_of(value): value for value in graph.inputs}
        self._tokens, self._positions = _dependents(graph)
        self._tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        self._numbers: ir.Value | None = None
        self.found = 0

    def shorter(self, end: ir.Value, heads: int) -> ir.Value | None:
        """``end`` [B, S, heads D] computed by less; None where it is not known how."""
        columns = _columns(end)
        part = None if columns is None or columns % heads else self._part(end, columns)
        if part is None or columns is None or end.dtype not in TOLERANCE:
            return None
        layout = _layout(part.source, heads, columns)
        if layout is None:
            return None
        angles = [self._angles(value) for value in part.angles]
        made = None
        if not angles and self._is(end, part, layout, heads, [], interleaved=False):
            made = self._flat(part.source, layout, columns)
        elif len(angles) == 2 and angles[0] is not None and angles[1] is not None:
            made = self._rotated(end, part, layout, heads, (angles[0], angles[1]))
        self.found += made is not None
        return made

    def _part(self, end: ir.Value, columns: int) -> _Part | None:
        sources: dict[ir.Value, None] = {}
        angles: dict[ir.Value, None] = {}
        seen: set[ir.Value] = set()
        waiting = [end]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value not in self._tokens:
                if value in self._positions and value.dtype is not None and value.dtype.is_floating_point():
                    angles[value] = None
                continue  # a constant, or a shape
            node = value.producer()
            if node is None or self._is_source(value, node, columns, end):
                sources[value] = None
            else:
                waiting += [read for read in node.inputs if read is not None]
        if len(sources) != 1 or end in sources:
            return None
        return _Part(source=next(iter(sources)), angles=tuple(angles))

    def _is_source(self, value: ir.Value, node: ir.Node, columns: int, end: ir.Value) -> bool:
        if node.domain != "" or node.op_type not in _MOVES | _MIXES:
            return True
        whole = _columns(value) == columns
        if whole and value is not end and value.shape is not None and len(value.shape) == 3:
            return True
        if whole and node.op_type in _PARTS and (_columns(input_of(node, 0)) or 0) > columns:
            return True
        # A bias, a norm's weight.
        return node.op_type in _MIXES and any(v is not None and v not in self._tokens and not self._is_harmless(v) for v in node.inputs)

    def _is_harmless(self, value: ir.Value) -> bool:
        tensor = constant_tensor(value)
        return value in self._positions if tensor is None else tensor.size == 1

    def _angles(self, value: ir.Value) -> _Angles | None:
        """How the angles of a few positions lie in ``value``."""
        numbers = np.random.default_rng(0).integers(1, 60, (_BATCH, _STEP))
        positions = self._inputs.get("position_ids")
        found = None if positions is None else evaluate(self._graph, [value], {**self._shapes(), positions: numbers})
        if found is None:
            return None
        (array,) = found
        width = array.shape[-1]
        if array.size != _BATCH * _STEP * width or [size for size in array.shape[:-1] if size != 1] != [_BATCH, _STEP]:
            return None
        half, even = width // 2, array[..., ::2]
        if width % 2 == 0 and np.array_equal(array[..., :half], array[..., half:]):
            return _Angles(value=value, shape=array.shape, stop=half)
        if width % 2 == 0 and np.array_equal(even, array[..., 1::2]):
            return _Angles(value=value, shape=array.shape, step=2)
        return _Angles(value=value, shape=array.shape)

    def _shapes(self) -> dict[ir.Value, np.ndarray]:
        """Inputs that parts read shapes of."""
        given = {"input_ids": np.zeros((_BATCH, _STEP), np.int64), "attention_mask": np.ones((_BATCH, _PAST + _STEP), np.int64)}
        given["position_ids"] = np.zeros((_BATCH, _STEP), np.int64)
        return {self._inputs[name]: array for name, array in given.items() if name in self._inputs}

    def _is(self, end: ir.Value, part: _Part, layout: str, heads: int, angles: Sequence[_Angles], *, interleaved: bool) -> bool:
        """Whether ``end`` is what the operator with these angles makes of the source; without angles, the source itself."""
        random = np.random.default_rng(0)
        columns = _columns(end)
        assert columns is not None and end.dtype is not None
        kind = end.dtype.numpy()
        x = random.standard_normal((_BATCH, _STEP, heads, columns // heads)).astype(kind)
        laid = {"BSHD": x, "BHSD": x.swapaxes(1, 2), "BSW": x.reshape(_BATCH, _STEP, columns)}[layout]
        given = {**self._shapes(), part.source: np.ascontiguousarray(laid)}
        expected = x
        if angles:
            cos, sin = (random.standard_normal((_BATCH, _STEP, angles[0].pairs)).astype(kind) for _ in range(2))
            given |= {each.value: each.spread(pairs) for each, pairs in zip(angles, (cos, sin), strict=True)}
            expected = rotary(x, cos, sin, interleaved=interleaved)
        found = evaluate(self._graph, [end], given)
        if found is None or found[0].shape != (_BATCH, _STEP, columns):
            return False
        error = np.abs(found[0].astype(np.float64) - expected.reshape(_BATCH, _STEP, columns)).max()
        return bool(error <= TOLERANCE[end.dtype] * np.abs(expected).max())

    def _rotated(self, end: ir.Value, part: _Part, layout: str, heads: int, angles: tuple[_Angles, _Angles]) -> ir.Value | None:
        columns = _columns(end)
        assert columns is not None
        width = columns // heads
        if angles[0].pairs != angles[1].pairs or 2 * angles[0].pairs > width:
            return None
        orders = (angles, angles[::-1])
        ways = ((cos, sin, interleaved) for cos, sin in orders for interleaved in (False, True))
        way = next((way for way in ways if self._is(end, part, layout, heads, way[:2], interleaved=way[2])), None)
        if way is None:
            return None
        cos, sin, interleaved = way
        options = {"num_heads": heads, "interleaved": int(interleaved)}
        if 2 * cos.pairs < width:
            options["rotary_embedding_dim"] = 2 * cos.pairs
        inputs = [self._flat(part.source, layout, columns), self._token_numbers(), *self._rows(cos, sin)]
        return self._add(ROTARY, inputs, end, options, domain=_CONTRIB, name=f"{end.name}.rotary")

    def _flat(self, source: ir.Value, layout: str, columns: int) -> ir.Value:
        """The source as [B, S, H D]."""
        if layout == "BSW":
            return source
        if layout == "BHSD":
            assert source.shape is not None
            dims = [source.shape[i] for i in (0, 2, 1, 3)]
            source = self._add("Transpose", [source], source, {"perm": [0, 2, 1, 3]}, shape=dims)
        assert source.shape is not None
        shape = self._constant("reft_fused.columns", [0, 0, columns])
        return self._add("Reshape", [source, shape], source, shape=[source.shape[0], source.shape[1], columns])

    def _rows(self, cos: _Angles, sin: _Angles) -> tuple[ir.Value, ir.Value]:
        """Both as tables [B S, r/2], one row a token."""
        key = cos.value, sin.value
        if key not in self._tables:
            self._tables[key] = self._table(cos), self._table(sin)
        return self._tables[key]

    def _table(self, angles: _Angles) -> ir.Value:
        value = angles.value
        if angles.pairs != angles.shape[-1]:
            ends = (("starts", angles.start), ("ends", angles.stop), ("axes", -1), ("steps", angles.step))
            slices = [self._constant(f"reft_fused.{name}", [number]) for name, number in ends]
            value = self._add("Slice", [value, *slices], value, shape=[*(value.shape or ())[:-1], angles.pairs])
        shape = self._constant("reft_fused.table", [-1, angles.pairs])
        return self._add("Reshape", [value, shape], value, shape=[None, angles.pairs])

    def _token_numbers(self) -> ir.Value:
        """[B, S]: 0, 1, .. row by row."""
        if self._numbers is None:
            ids = self._inputs["position_ids"]
            size = self._add("Size", [ids], ids, shape=[])
            zero, one = (self._constant(f"reft_fused.{number}", number) for number in (0, 1))
            counted = self._add("Range", [zero, size, one], ids, shape=[None])
            shape = self._add("Shape", [ids], ids, shape=[2])
            self._numbers = self._add("Reshape", [counted, shape], ids, shape=list(ids.shape or ()))
        return self._numbers

    def _add(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        attributes: Mapping[str, int | list[int]] | None = None,
        *,
        shape: Sequence[int | str | ir.SymbolicDim | None] | None = None,
        domain: str = "",
        name: str | None = None,
    ) -> ir.Value:
        """A node's output, of the type of ``like`` and of its shape where none is given; the graph is sorted at last."""
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, name=name)
        node.outputs[0].type = like.type
        node.outputs[0].shape = like.shape if shape is None else ir.Shape(shape)
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, numbers: int | list[int]) -> ir.Value:
        array = np.asarray(numbers, np.int64)
        name = ".".join([name, *(str(number) for number in array.reshape(-1))])
        if name not in self._graph.initializers:
            self._graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self._graph.initializers[name]


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> np.ndarray:
    """y_i = x_i cos_i - x_j sin_i, y_j = x_j cos_i + x_i sin_i. x [B, S, H, D], cos and sin [B, S, r/2]; columns behind r stay."""
    pairs = cos.shape[-1]
    one, other = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    cos, sin = cos[:, :, None], sin[:, :, None]
    y = x.copy()
    y[..., one] = x[..., one] * cos - x[..., other] * sin
    y[..., other] = x[..., other] * cos + x[..., one] * sin
    return y


def _dependents(graph: ir.Graph) -> tuple[set[ir.Value], set[ir.Value]]:
    """Values that depend on what the tokens are, and values that depend on where they stand; on their number alone: neither."""
    tokens = {value for value in graph.inputs if name_of(value) not in ("attention_mask", "position_ids")}
    positions = {value for value in graph.inputs if name_of(value) in ("attention_mask", "position_ids")}
    for node in graph:
        if node.op_type in SHAPE_READERS:
            continue
        for found in (tokens, positions):
            if any(value in found for value in node.inputs):
                found.update(node.outputs)
    return tokens, positions


def _columns(value: ir.Value) -> int | None:
    """The product of a shape's numbers: of a token's in [B, S, H D] and [B, H, S, D]."""
    if value.shape is None:
        return None
    return int(np.prod([size for size in value.shape if isinstance(size, int)]))


def _layout(source: ir.Value, heads: int, columns: int) -> str | None:
    sizes = [size if isinstance(size, int) else None for size in source.shape or ()]
    layouts = {"BSW": [None, None, columns], "BSHD": [None, None, heads, columns // heads], "BHSD": [None, heads, None, columns // heads]}
    return next((name for name, wanted in layouts.items() if sizes == wanted), None)

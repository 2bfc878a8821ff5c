"""Which axes a value has, followed from input_ids [batch, sequence] on, as optimized graphs declare no shapes of inner values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest

import onnx_ir as ir

from graph_passes.accessors import optional_input
from graph_passes.find.domains import KNOWN
from graph_passes.find.skip_norms import SKIP_NORMS
from runtimes.edits.op import DOMAIN

BATCH, SEQUENCE = "batch", "sequence"
TOKENS, TOKENS_SEQUENCE_FIRST = "batch * sequence", "sequence * batch"
OTHER = ""
"""Any other axis, and one that is not followed."""
_APART = {TOKENS: (BATCH, SEQUENCE), TOKENS_SEQUENCE_FIRST: (SEQUENCE, BATCH)}
Axes = tuple[str, ...]
"""One label per axis, so that its length is the rank."""

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Where"})
_LIKE_FIRST = frozenset(
    {"Cast", "Identity", "Dropout", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Reciprocal", "Neg", "Exp", "Clip", "Softmax", "Elu",
     "LeakyRelu", "Softplus", "HardSigmoid", "HardSwish", "Silu", "Swish", "FastGelu", "BiasGelu", "QuickGelu", "Slice", "Pad", "Concat",
     "QuantizeLinear", "DequantizeLinear", "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "RotaryEmbedding",
     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Split", "ScatterND", "ScatterElements", "MoE", "QMoE",
     "Attention", "LoReFT", "RED"}
)  # fmt: skip
"""Operators whose first output has the axes of their first input."""
_PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
)
_LOOKUPS = {"Gather": 1, "GatherBlockQuantized": 1, "EmbedLayerNormalization": 0}
"""Index of the input that holds token ids where the table is a weight."""
_REDUCTIONS = frozenset({"ReduceSum", "ReduceMean", "ReduceMax"})
_FUSED_ATTENTION = frozenset({"GroupQueryAttention", "MultiHeadAttention", "DecoderMaskedMultiHeadAttention"})
"""Operators of onnxruntime that give [batch, sequence, width] whatever the rank of their query is."""
_INNER_SIZES = frozenset({"Mul", "Div", "Add", "Sub", "Max", "Min", "Where"})
_LONGEST_SHAPE = 16
_DOMAINS = KNOWN | {DOMAIN}
"""Operators of others may share these names and mean something else."""


class TracedAxes:
    """The axes of every value of ``graph`` that can be followed, by one pass over its nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._axes: dict[ir.Value, Axes] = {}
        self._sizes: dict[ir.Value, Axes] = {}
        """Of shape tensors, element by element: the axis whose size it is, a number, or OTHER."""
        ids = next((value for value in graph.inputs if value.name == "input_ids"), None)
        declared = list(ids.shape) if ids is not None and ids.shape is not None else []
        symbols = [size.value for size in declared if isinstance(size, ir.SymbolicDim) and size.value is not None]
        self._names = dict(zip(symbols, (BATCH, SEQUENCE), strict=True)) if len(set(symbols)) == len(declared) == 2 else {}
        if ids is not None and len(declared) in (0, 2):
            self._axes[ids] = (BATCH, SEQUENCE)
        for node in graph:
            self._follow(node)

    def of(self, value: ir.Value | None) -> Axes | None:
        """The axes of ``value``; None where not even its rank can be told."""
        if value is None:
            return None
        traced = self._axes.get(value)
        shape = value.shape
        if shape is None and traced is None and (tensor := constant_tensor(value)) is not None:
            shape = tensor.shape
        if shape is None:
            return traced
        declared = tuple(OTHER if isinstance(size, int) or size.value is None else self._names.get(size.value, OTHER) for size in shape)
        if traced is None or len(traced) != len(declared):
            return declared
        return tuple(a or b for a, b in zip(traced, declared, strict=True))

    def rank(self, value: ir.Value) -> int | None:
        """The rank of ``value``, by what computes it or by what reads it."""
        pending, seen = [value], {value}
        while pending:
            value = pending.pop()
            if (axes := self.of(value)) is not None:
                return len(axes)
            for node, index in value.uses():
                keeps = node.op_type in _BROADCASTING or (index == 0 and node.op_type in _LIKE_FIRST | _PRODUCTS)
                if keeps and node.outputs[0] not in seen:
                    seen.add(node.outputs[0])
                    pending.append(node.outputs[0])
        return None

    def _follow(self, node: ir.Node) -> None:
        if node.domain not in _DOMAINS or not node.outputs:
            return
        try:
            sizes, axes = self._sizes_by(node), self._axes_by(node)
        except TypeError:  # an attribute of another type than the operator's
            return
        if sizes is not None and len(sizes) <= _LONGEST_SHAPE:
            self._sizes[node.outputs[0]] = sizes
        if axes is not None:
            every = node.outputs if node.op_type == "Split" else (node.outputs[0], *node.outputs[3:4]) if node.op_type in SKIP_NORMS else ()
            self._axes |= dict.fromkeys((node.outputs[0], *every), axes)

    def _axes_by(self, node: ir.Node) -> Axes | None:
        rule = _RULES.get(node.op_type)
        return None if rule is None else rule(self, node)

    def _like_first(self, node: ir.Node) -> Axes | None:
        return self.of(optional_input(node, 0))

    def _product(self, node: ir.Node) -> Axes | None:
        first, second = self.of(optional_input(node, 0)), self.of(optional_input(node, 1))
        if first is None:
            return None
        if second is not None and len(second) > len(first):
            return (OTHER,) * len(second)
        return (*first[:-1], OTHER)

    def _gemm(self, node: ir.Node) -> Axes:
        first = self.of(optional_input(node, 0))
        return (first[0] if first and not node.attributes.get_int("transA", 0) else OTHER, OTHER)

    def _attention(self, node: ir.Node) -> Axes:
        query = self.of(optional_input(node, 0))
        return (*query[:2], OTHER) if query is not None and len(query) == 3 else (OTHER,) * 3

    def _lookup(self, node: ir.Node) -> Axes | None:
        indices = self.of(optional_input(node, _LOOKUPS[node.op_type]))
        table = (OTHER, OTHER) if node.op_type != "Gather" else self.of(optional_input(node, 0))
        if indices is None or not table:
            return None
        axis = node.attributes.get_int("axis", node.attributes.get_int("gather_axis", 0)) % len(table)
        return (*table[:axis], *indices, *table[axis + 1 :])

    def _transposed(self, node: ir.Node) -> Axes | None:
        source = self.of(optional_input(node, 0))
        if source is None:
            return None
        every = list(range(len(source)))
        order = node.attributes.get_ints("perm", every[::-1])
        return tuple(source[axis] for axis in order) if sorted(order) == every else None

    def _expanded(self, node: ir.Node) -> Axes | None:
        source, sizes = self.of(optional_input(node, 0)), self._sizes_of(optional_input(node, 1))
        return None if sizes is None else (OTHER,) * max(len(sizes), len(source or ()))

    def _filled(self, node: ir.Node) -> Axes | None:
        sizes = self._sizes_of(optional_input(node, 0))
        return None if sizes is None else (OTHER,) * len(sizes)

    def _with_axes_changed(self, node: ir.Node) -> Axes | None:
        source = self.of(optional_input(node, 0))
        return None if source is None else _with_axes_changed(node, source)

    def _broadcast(self, node: ir.Node) -> Axes | None:
        every = [self.of(value) for value in node.inputs]
        known = [axes for axes in every if axes is not None]
        longest = max(known, key=len, default=())
        # Beside an operand that is not followed, only what is surely the stream tells the rank: a table of positions is [S, D].
        if None in every and len(longest) < 3 and not any(label in longest for label in (BATCH, TOKENS, TOKENS_SEQUENCE_FIRST)):
            return None
        labels = (next(filter(None, column), OTHER) for column in zip_longest(*(axes[::-1] for axes in known), fillvalue=OTHER))
        return tuple(labels)[::-1]

    def _reshaped(self, node: ir.Node) -> Axes | None:
        source, target = self.of(optional_input(node, 0)) or (), optional_input(node, 1)
        sizes = self._sizes_of(target)
        if sizes is None:
            shape = None if target is None else target.shape
            length = shape[0] if shape is not None and len(shape) == 1 else None
            return (OTHER,) * length if isinstance(length, int) and length <= _LONGEST_SHAPE else None
        if not node.attributes.get_int("allowzero", 0):
            sizes = tuple(source[i] if size == "0" and i < len(source) else size for i, size in enumerate(sizes))
        axes = [size if size in (BATCH, SEQUENCE, *source) else OTHER for size in sizes]
        if source and len(axes) == 2 and not axes[0]:
            together = next((tokens for tokens, apart in _APART.items() if apart == source[:2]), OTHER)
            axes[0] = together or (source[0] if source[0] in _APART else OTHER)
        if source and len(axes) > 2 and source[0] in _APART:
            apart = _APART[source[0]]
            if all(size in (label, OTHER) for size, label in zip(axes, apart, strict=False)):
                axes[:2] = apart
        return tuple(axes)

    def _sizes_of(self, value: ir.Value | None) -> Axes | None:
        if value is None or value in self._sizes:
            return None if value is None else self._sizes[value]
        numbers = _integers(value)
        return None if numbers is None else tuple(map(str, numbers))

    def _sizes_by(self, node: ir.Node) -> Axes | None:
        op, inputs = node.op_type, list(node.inputs)
        if not inputs:
            return None
        if op == "Shape":
            axes = self.of(inputs[0])
            return None if axes is None else axes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(axes))]
        if op in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"):
            return self._sizes_of(inputs[0])
        parts = [part for part in map(self._sizes_of, inputs) if part is not None]
        if len(parts) != len(inputs):
            return None
        if op == "Concat":
            return tuple(size for part in parts for size in part)
        if op in _INNER_SIZES:
            return (OTHER,) * max(map(len, parts))
        if op == "Gather" and len(parts) == 2:
            inside = all(_is_number(i) and -len(parts[0]) <= int(i) < len(parts[0]) for i in parts[1])
            return tuple(parts[0][int(i)] for i in parts[1]) if inside else None
        one_each = all(len(part) == 1 and _is_number(part[0]) for part in parts[1:])
        if op == "Slice" and len(parts) > 2 and one_each and parts[4:] in ([], [("1",)]):
            return parts[0][int(parts[1][0]) : int(parts[2][0])]
        return None


_RULES: Mapping[str, Callable[[TracedAxes, ir.Node], Axes | None]] = {
    **dict.fromkeys(_LIKE_FIRST, TracedAxes._like_first),
    **dict.fromkeys(_BROADCASTING, TracedAxes._broadcast),
    **dict.fromkeys(_PRODUCTS, TracedAxes._product),
    **dict.fromkeys(_FUSED_ATTENTION, TracedAxes._attention),
    **dict.fromkeys(_LOOKUPS, TracedAxes._lookup),
    **dict.fromkeys(("Unsqueeze", "Squeeze", *_REDUCTIONS), TracedAxes._with_axes_changed),
    "Gemm": TracedAxes._gemm,
    "Transpose": TracedAxes._transposed,
    "Reshape": TracedAxes._reshaped,
    "Expand": TracedAxes._expanded,
    "ConstantOfShape": TracedAxes._filled,
}
"""What an operator makes of its inputs' axes; of any other operator nothing is known."""


def _is_number(size: str) -> bool:
    return size.lstrip("-").isdigit()


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; None of any other value, and of a Constant that is not whole."""
    try:
        return ir.convenience.get_const_tensor(value)
    except ValueError:
        return None


def _integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a short constant, as shapes and lists of axes are."""
    tensor = None if value is None else constant_tensor(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > _LONGEST_SHAPE:
        return None
    numbers = tensor.numpy().reshape(-1).tolist()
    if isinstance(tensor, ir.ExternalTensor):
        # Reading it has mapped the whole file, weights and all, into memory.
        tensor.release()
    return numbers


def _with_axes_changed(node: ir.Node, source: Axes) -> Axes | None:
    """What Unsqueeze, Squeeze or a reduction makes of ``source``; their axes are an attribute in older opsets, and an input since."""
    given = node.attributes.get_ints("axes", None)
    if given is None and len(node.inputs) > 1:
        given = _integers(node.inputs[1])
    if node.op_type in _REDUCTIONS and node.attributes.get_int("keepdims", 1):
        return source
    if given is None or not source and node.op_type != "Unsqueeze":
        return None
    rank = len(source) + (len(given) if node.op_type == "Unsqueeze" else 0)
    at = {axis % rank for axis in given}
    if node.op_type != "Unsqueeze":
        return tuple(label for axis, label in enumerate(source) if axis not in at)
    left = iter(source)
    return tuple(OTHER if axis in at else next(left) for axis in range(rank))

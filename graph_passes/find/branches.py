"""What the attention and MLP modules of one block return, read off the residual Adds of that block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import onnx_ir as ir

from graph_passes.accessors import describe, producer_of
from graph_passes.find.axes import constant_tensor
from graph_passes.find.dominators import Dominators
from graph_passes.find.encoder import ATTENTIONS
from graph_passes.find.skip_norms import SKIP_NORM_BIAS

_PROJECTIONS = frozenset({"MatMul", "Gemm", "MatMulNBits", "FusedMatMul"})
_PASS_THROUGH = frozenset({"Reshape", "Identity", "Dropout"})
_STREAM_ALIASES = frozenset({"Cast", "Identity", "Reshape"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_SHAPE_KEEPERS = frozenset({"Cast", "DequantizeLinear", "Identity"})
_VARIANCE = frozenset({"ReduceMean", "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
_NORM_PARTS = _VARIANCE | {"Add", "Cast", "Div", "Mul", "Pow", "Reciprocal", "Reshape", "Rsqrt", "Sqrt", "Sub", "Identity"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """The value a module returns."""

    node: ir.Node
    output_index: int
    how: str


def module_outputs(
    dominators: Dominators, block: Sequence[ir.Node] | None, key: ir.Value, chain: frozenset[ir.Node]
) -> dict[str, Branch | str]:
    """attention_output and mlp_output of one block: the branch, or the reason (a clause) why the graph does not show it.

    ``block`` holds the nodes of ``chain`` behind the block's input, its output included; None where the output is not known.
    The attention branch is the one that reads ``key`` (present.<layer>.key), or else what ``key`` is a side copy of.
    """
    streams = ("attention_output", "mlp_output")
    if block is None:
        return dict.fromkeys(streams, "the end of its block is not known")
    operands = [operand for node in block for operand in _operands(dominators, node, chain)]
    if not operands:
        return dict.fromkeys(streams, "its block has no residual Add")
    upstream = [_upstream(dominators, value, chain) for value, _ in operands]
    keys = {key.producer()}
    if not any(keys & nodes for nodes in upstream):
        # A second choice only: the projection of the keys may be joined with that of the MLP.
        keys = _key_path(dominators, key, chain)
    branches: dict[str, list[tuple[ir.Value, ir.Node]]] = {stream: [] for stream in streams}
    for operand, nodes in zip(operands, upstream, strict=True):
        branches["attention_output" if keys & nodes else "mlp_output"].append(operand)
    return {stream: _module_output(dominators, found, chain) for stream, found in branches.items()}


def _key_path(dominators: Dominators, key: ir.Value, chain: frozenset[ir.Node]) -> set[ir.Node]:
    """The nodes that all of ``key`` passes from its projection on; empty where no projection is told."""
    path: set[ir.Node] = set()
    for node in dominators.climb(key.producer()):
        if node in chain:
            break
        path.add(node)
        if _is_projection(dominators, node):
            return path
    return set()


def adds_other_than_attention(dominators: Dominators, merge: ir.Node, key: ir.Value, chain: frozenset[ir.Node]) -> bool:
    """Whether the residual Add ``merge`` adds a branch without attention: an MLP, or what a head computes."""
    for value, _ in _operands(dominators, merge, chain):
        nodes = _upstream(dominators, value, chain)
        if all(node.op_type in _STREAM_ALIASES or dominators.shifts_or_scales(node) for node in nodes):
            continue  # the stream itself, times a factor (Doge)
        if key.producer() not in nodes and not any(node.op_type in ATTENTIONS for node in nodes):
            return True
    return False


def _operands(
    dominators: Dominators, node: ir.Node, chain: frozenset[ir.Node], seen: set[ir.Node] | None = None
) -> Iterator[tuple[ir.Value, ir.Node]]:
    """The values that ``node`` adds to the stream: its operands, Adds of Adds taken apart, the stream itself left out.

    ``seen``: the Adds that were taken apart already, each of which is once.
    """
    seen = {node} if seen is None else seen
    if node.op_type not in SKIP_NORM_BIAS and not dominators.adds_branches(node):
        return
    for value in node.inputs[:2]:
        if value is None or not dominators.depends(value):
            continue
        producer = value.producer()
        while producer is not None and producer.op_type in _STREAM_ALIASES and producer not in chain:
            source = producer.inputs[0]
            producer = None if source is None else source.producer()
        if producer is None or producer in chain:
            continue
        direct = value.producer()
        if direct is not None and dominators.adds_branches(direct):
            # Parallel blocks: x + attention + mlp is an Add of Adds in either order.
            if direct not in seen:
                seen.add(direct)
                yield from _operands(dominators, direct, chain, seen)
        else:
            yield value, node


def _upstream(dominators: Dominators, value: ir.Value, stop: frozenset[ir.Node]) -> set[ir.Node]:
    """The nodes that ``value`` is computed from, as far up as ``stop``."""
    seen: set[ir.Node] = set()
    pending = [value]
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer in seen or producer in stop or producer not in dominators:
            continue
        seen.add(producer)
        pending += [source for source in producer.inputs if source is not None]
    return seen


def _module_output(dominators: Dominators, found: Sequence[tuple[ir.Value, ir.Node]], chain: frozenset[ir.Node]) -> Branch | str:
    if _is_mixture(dominators, found, chain):
        merge = found[0][1]
        return Branch(node=merge, output_index=0, how=f"{describe(merge)} adds up the two branches of a mixture of experts")
    if len(found) != 1:
        names = ", ".join(repr(value.name) for value, _ in found) or "none"
        return f"{len(found)} branches of its block could be it ({names})"
    value, merge = found[0]
    # The last projection's bias may have been fused into the skip norm.
    bias = SKIP_NORM_BIAS.get(merge.op_type)
    if bias is not None and len(merge.inputs) > bias and merge.inputs[bias] is not None:
        return f"{describe(merge)} adds a bias that may belong to it; use a graph without fused skip norms"
    projection = _last_projection(dominators, value, chain)
    if projection is None and (total := _sum_of_experts(dominators, value, chain)) is not None:
        return _branch(value, f"{describe(total)} sums over the experts and feeds the residual Add")
    if projection is None:
        return f"the branch {value.name!r} does not end in one linear projection"
    return _projected(dominators, value, projection)


def _last_projection(dominators: Dominators, value: ir.Value, chain: frozenset[ir.Node]) -> ir.Node | None:
    """The nearest projection that all of ``value`` passes, behind ``chain``."""
    behind = takewhile(lambda node: node not in chain, dominators.climb(value.producer()))
    return next((node for node in behind if _is_projection(dominators, node)), None)


def _projected(dominators: Dominators, value: ir.Value, projection: ir.Node) -> Branch | str:
    """What ``projection`` gives, its bias included, where nothing else of the module may stand between it and the residual Add."""
    if projection.attributes.get_float("alpha", 1.0) != 1.0:
        # onnxruntime fuses a multiplier behind the projection (Granite) into FusedMatMul.
        return f"the last projection of its branch ({describe(projection)}) has a multiplier fused in; use a graph without fusions"
    between = _upstream(dominators, value, frozenset({projection}))
    output, behind = _with_bias(dominators, projection, between)
    left = {node for node in between - _upstream(dominators, output, frozenset({projection})) if not _is_float_cast(node)}
    unclear = ", ".join(sorted({node.op_type for node in left}))
    if all(node.op_type in _NORM_PARTS for node in left) and any(node.op_type in _VARIANCE for node in left):
        # No norm begins by adding or multiplying a constant; a bias that is not known for one, or a factor, stands before it.
        unclear = behind.op_type if behind is not None and dominators.shifts_or_scales(behind) else ""
    if unclear:
        return (
            f"between the last projection of its branch ({describe(projection)}) and the residual Add stand {unclear}, and whether "
            "they belong to the module cannot be told"
        )
    end = "the residual Add" if not left else "the norm before the residual Add"
    return _branch(output, f"output of the projection {describe(projection)} that feeds {end}")


def _branch(value: ir.Value, how: str) -> Branch:
    node = producer_of(value)
    return Branch(node=node, output_index=node.outputs.index(value), how=how)


def _sum_of_experts(dominators: Dominators, value: ir.Value, chain: frozenset[ir.Node]) -> ir.Node | None:
    """The node by which ``value``, reshaped at most, is the sum over the experts, or that sum with a shared expert beside it.

    None where a norm or a factor stands behind the sum: whether that is the module's own cannot be told.
    """
    node = value.producer()
    while node is not None and (node.op_type in _PASS_THROUGH or node.op_type == "Cast") and node not in chain:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node in chain:
        return None
    if dominators.adds_branches(node):
        parts = {part for part in node.inputs if part is not None}
        return node if any(_sum_of_experts(dominators, part, chain) is not None for part in parts) else None
    return node if node.op_type == "ReduceSum" else None


def _is_mixture(dominators: Dominators, found: Sequence[tuple[ir.Value, ir.Node]], chain: frozenset[ir.Node]) -> bool:
    """Whether ``found`` are routed and shared experts: two branches that an Add of their own brings together, one a sum over experts."""
    merges = {merge for _, merge in found}
    if len(found) != 2 or len(merges) != 1 or merges & chain:
        return False
    return any(_sum_of_experts(dominators, value, chain) is not None for value, _ in found)


def _is_projection(dominators: Dominators, node: ir.Node) -> bool:
    # One operand depends on the tokens, the other is a weight: this is what tells a projection from Q K^T.
    return node.op_type in _PROJECTIONS and sum(map(dominators.depends, node.inputs)) == 1


def _with_bias(dominators: Dominators, projection: ir.Node, between: set[ir.Node]) -> tuple[ir.Value, ir.Node | None]:
    """The projection's output after its bias and after the reshape that Gemm needs, where those follow at once; and what follows then.

    None follows where the value has several readers, or only the residual Add. A Cast carries the same tensor, so that the output is
    before it, but a bias may stand behind it.
    """
    output = value = projection.outputs[0]
    biased = False
    while len(consumers := [node for node in value.consumers() if node in between]) == 1:
        node = consumers[0]
        if node.op_type == "Add" and not biased and _is_vector_bias(dominators, node):
            biased = True
        elif node.op_type not in _PASS_THROUGH and not _is_float_cast(node):
            return output, node
        value = node.outputs[0]
        if not _is_float_cast(node):
            output = value
    return output, None


def _is_float_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes.get_int("to") in _FLOATS


def _is_vector_bias(dominators: Dominators, node: ir.Node) -> bool:
    others = [value for value in node.inputs if value is not None and not dominators.depends(value)]
    if len(others) != 1:
        return False
    declared = others[0].shape
    shape = tuple(declared) if declared is not None and len(declared) == 1 else _constant_shape(others[0])
    return shape is not None and len(shape) > 0 and shape[-1] != 1 and all(dim == 1 for dim in shape[:-1])


def _constant_shape(value: ir.Value) -> Sequence[object] | None:
    """The shape of a weight or a constant, also behind operators that keep it; None of anything else."""
    while (node := value.producer()) is not None and node.op_type in _SHAPE_KEEPERS:
        if node.inputs[0] is None:
            return None
        value = node.inputs[0]
    tensor = constant_tensor(value)
    return None if tensor is None else tuple(tensor.shape)

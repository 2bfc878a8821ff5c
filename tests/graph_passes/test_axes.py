"""Rank and order of axes where a graph declares no inner shape: what is followed, and what is left open."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graph_passes.find.axes import BATCH, OTHER, SEQUENCE, TOKENS, TOKENS_SEQUENCE_FIRST, TracedAxes

HEADER = """<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1, "own": 1]>
decoder (int64[batch, sequence] input_ids, float[batch, 1, past, 8] past) => (float[batch, sequence, 8] logits)
<float[11, 8] table, float[8, 8] w, float[8] bias, int64[2] flat = {-1, 8}, int64[1] one = {1}, int64[1] minus_one = {-1},
 int64[1] axis0 = {0}, int64[1] eight = {8}, int64[4] heads = {0, 0, 2, 4}, int64 last = {-1}, int64 zero = {0}, int64[2] split = {4, 4}>
{ x = Gather(table, input_ids) """
SIZES = "sizes = Shape(input_ids) bsd = Concat<axis = 0>(sizes, eight) "
SEPARATE = """shape = Shape(x) b0 = Gather(shape, zero) b = Unsqueeze(b0, axis0) s = Shape<start = 1, end = 2>(x)
bsd = Concat<axis = 0>(b, s, minus_one) """
PLAIN, FLAT, TURNED = (BATCH, SEQUENCE, OTHER), (TOKENS, OTHER), (SEQUENCE, BATCH, OTHER)


def _traced(body: str) -> tuple[TracedAxes, ir.Value]:
    model = ir.from_onnx_text(HEADER + body + " logits = Identity(y) }")
    model.graph.outputs[0].shape = None
    return TracedAxes(model.graph), next(value for node in model.graph for value in node.outputs if value.name == "y")


@pytest.mark.parametrize(
    ("body", "axes"),
    [
        ("y = Add(x, bias)", PLAIN),
        ("a = MatMul(x, w) b = Relu(a) y = Add(b, x)", PLAIN),
        ("f = Reshape(x, flat) a = MatMul(f, w) y = Add(f, a)", FLAT),
        ("f = Reshape(x, flat) y = Gemm<transB = 1>(f, w, bias)", FLAT),
        (SIZES + "f = Reshape(x, flat) y = Reshape(f, bsd)", PLAIN),
        (SEPARATE + "f = Reshape(x, flat) y = Reshape(f, bsd)", PLAIN),
        ("h = Reshape(x, heads) t = Transpose<perm = [0, 2, 1, 3]>(h) u = Transpose<perm = [0, 2, 1, 3]>(t) y = ReduceSum(u, axis0)",
         (BATCH, SEQUENCE, OTHER, OTHER)),
        ("t = Transpose<perm = [1, 0, 2]>(x) y = LayerNormalization(t, bias)", TURNED),
        ("t = Transpose<perm = [1, 0, 2]>(x) y = Reshape(t, flat)", (TOKENS_SEQUENCE_FIRST, OTHER)),
        ("t = Transpose<perm = [1, 0, 2]>(x) u = Transpose<perm = [1, 0, 2]>(t) y = Add(u, x)", PLAIN),
        ("y = Gather<axis = 1>(x, last)", (BATCH, OTHER)),
        ("y = Gather<axis = 1>(x, axis0)", (BATCH, OTHER, OTHER)),
        ("u = Unsqueeze(x, one) y = Squeeze(u, one)", PLAIN),
        ("a, y = Split<axis = -1>(x, split)", PLAIN),
        ("q = MatMul(x, w) y, k = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1>(q, q, q, past)", PLAIN),
        # One operand is not followed: only beside the stream is that no matter.
        ("a = own.Unknown(x) y = Add(a, x)", PLAIN),
        ("a = own.Unknown(x) y = Add(a, table)", None),
        ("a = own.Unknown(x) y = Add(a, bias)", None),
        # Names of other domains may mean something else.
        ("y = own.Transpose(x)", None),
    ],
)  # fmt: skip
def test_axes_of_a_value(body: str, axes: tuple[str, ...] | None) -> None:
    traced, value = _traced(body)
    assert traced.of(value) == axes


@pytest.mark.parametrize(
    ("body", "rank"),
    [
        ("y = own.Unknown(x) a = MatMul(y, w) b = Add(x, a)", 3),
        ("f = Reshape(x, flat) y = own.Unknown(x) a = Softmax(y) b = Mul(a, f)", 2),
        # What a Reshape or another unknown operator makes of it tells nothing.
        ("y = own.Unknown(x) a = Reshape(y, flat)", None),
        ("y = own.Unknown(x) a = own.Unknown(y) b = Add(a, x)", None),
    ],
)
def test_readers_tell_the_rank_of_what_is_not_followed(body: str, rank: int | None) -> None:
    traced, value = _traced(body)
    assert traced.of(value) is None and traced.rank(value) == rank


def test_declared_names_tell_the_order() -> None:
    traced, value = _traced("y = own.Unknown(x)")
    for shape, axes in ((["sequence", "batch", 8], TURNED), (["batch", "sequence", 8], PLAIN), (["s", None, 8], (OTHER,) * 3)):
        value.shape = ir.Shape(shape)
        assert traced.of(value) == axes


@pytest.mark.parametrize(
    "body",
    [
        "y = Reshape(x)", "y = Gather(x)", "y = Transpose<perm = [0, 7, 1]>(x)", "y = Constant()", "y = Expand(x)",
        "s = Squeeze(last, one) y = Squeeze(s, one)", "s = Shape(x) y = Gather(s)", "s = Shape(x) y = Slice(s, one)", "y = Concat()",
        "k = Constant() y = Reshape(x, k)", "y = Squeeze(zero, one)", "y = ConstantOfShape()", "y = Shape()",
    ],
)  # fmt: skip
def test_malformed_nodes_are_not_followed(body: str) -> None:
    """What is wrong with them is for a checker to say."""
    traced, value = _traced(body)
    assert traced.of(value) is None


@pytest.mark.parametrize(
    "node",
    [
        ("Gather", {"axis": 0.5}), ("Transpose", {"perm": "10"}), ("Squeeze", {"axes": 1.5}), ("ReduceMean", {"keepdims": "no"}),
        ("Shape", {"start": "a"}), ("Gemm", {"transA": [1]}),
    ],
)  # fmt: skip
def test_attributes_of_another_type_are_not_followed(node: tuple[str, dict[str, object]]) -> None:
    op, attributes = node
    ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    broken = ir.node(op, [ids, ids], attributes)
    assert TracedAxes(ir.Graph([ids], [], nodes=[broken], opset_imports={"": 20})).of(broken.outputs[0]) is None


def test_a_node_without_outputs_is_not_followed() -> None:
    ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    graph = ir.Graph([ids], [], nodes=[ir.Node("", "Identity", [ids], num_outputs=0)], opset_imports={"": 20})
    assert TracedAxes(graph).of(ids) == (BATCH, SEQUENCE)

"""The KV cache's heads and width as integers, read off GroupQueryAttention."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graph_passes.cache_shapes import fix_cache_shapes, writes_in_place
from graph_passes.find.domains import check_domains
from runtimes.errors import GraphError

HEADS, CACHE_HEADS, HEAD_WIDTH = 4, 2, 16


def _decoder(*, packed: bool, columns: int, declared: bool = True, domain: str = "com.microsoft") -> ir.Model:
    """One attention whose q, k and v come from MatMuls of ``columns`` columns; ``declared`` shapes or what the weights tell."""

    def value(name: str, shape: list[int | str | None]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))

    x = value("x", ["batch", "sequence", 8])
    past = [value(f"past_key_values.0.{part}", ["batch", CACHE_HEADS, "past", "kv_cache_dim"]) for part in ("key", "value")]
    weights = [value(f"w{i}", [8, columns]) for i in range(1 if packed else 3)]
    products = [ir.node("MatMul", [x, w]) for w in weights]
    for product in products:
        product.outputs[0].type = x.type
        if declared:
            product.outputs[0].shape = ir.Shape(["batch", "sequence", columns])
    qkv = [p.outputs[0] for p in products] + [None] * (3 - len(products))
    attention = ir.node(
        "GroupQueryAttention", [*qkv, *past], {"num_heads": HEADS, "kv_num_heads": CACHE_HEADS}, domain=domain, num_outputs=3
    )
    for output, name in zip(attention.outputs, ("y", "present.0.key", "present.0.value"), strict=True):
        output.name = name
    graph = ir.Graph(
        [x, *weights, *past], list(attention.outputs), nodes=[*products, attention], opset_imports={"": 20, domain: 1}, name="g"
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("packed", "columns"), [(True, (HEADS + 2 * CACHE_HEADS) * HEAD_WIDTH), (False, CACHE_HEADS * HEAD_WIDTH)])
def test_width_follows_from_the_columns_of_the_attention(packed, columns, declared) -> None:
    model = _decoder(packed=packed, columns=columns, declared=declared)
    fix_cache_shapes(model)
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name.partition(".")[0] in ("past_key_values", "present")]
    assert [(v.shape[1], v.shape[3]) for v in caches] == [(CACHE_HEADS, HEAD_WIDTH)] * 4
    assert {str(v.shape[2]) for v in caches} == {"past", "total_sequence_length"}


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(GraphError, match="33 columns for 2 heads"):
        fix_cache_shapes(_decoder(packed=False, columns=33))


def test_unknown_operator_domain_is_refused() -> None:
    check_domains(_decoder(packed=True, columns=128))
    with pytest.raises(GraphError, match=r"GroupQueryAttention\('y'\) is an operator of 'my.ops'"):
        check_domains(_decoder(packed=True, columns=128, domain="my.ops"))


def test_a_cache_that_one_buffer_can_hold() -> None:
    assert writes_in_place(_decoder(packed=True, columns=128).graph)


def _read_again(graph: ir.Graph) -> None:
    node = ir.node("Neg", [next(v for v in graph.inputs if v.name == "past_key_values.0.value")])
    graph.append(node)


def _not_returned(graph: ir.Graph) -> None:
    graph.outputs.pop()


def _keys_for_values(graph: ir.Graph) -> None:
    graph.outputs[1].name, graph.outputs[2].name = graph.outputs[2].name, graph.outputs[1].name


def _another_attention(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "GroupQueryAttention").op_type = "MultiHeadAttention"


@pytest.mark.parametrize("change", [_read_again, _not_returned, _keys_for_values, _another_attention])
def test_a_cache_that_has_to_be_copied(change) -> None:
    model = _decoder(packed=True, columns=128)
    change(model.graph)
    assert not writes_in_place(model.graph)
    assert not writes_in_place(ir.Graph([], [], nodes=[], name="without"))

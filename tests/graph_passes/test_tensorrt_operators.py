"""TensorRT's graphs hold what the parsers of its releases list, and no input whose numbers it would want on the host."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import build_decoder, export_decoder, session
from onnx import TensorProto, helper
from small_decoders import small_decoder
from tensorrt_operators import JETPACK_6, RELEASES, lacking
from test_tensorrt_graph import NODES

from calibration.collect import product_inputs
from calibration.quantize import quantize_graph
from calibration.settings import settings_for
from graph_passes.cumulative_sum import replace_cumulative_sums
from graph_passes.fold import fold_graph
from graph_passes.shape_inputs import shape_inputs
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from runtimes.edits.edit import Site
from runtimes.edits.op import RED_TYPE, EditNode
from runtimes.errors import EngineError

EVERY_EDIT = (*NODES[:3], EditNode(site=Site(layer=0, stream="mlp_output"), op=RED_TYPE))
STAND_IN = "SimplifiedLayerNormalization"
"""The norm of small_decoder's graphs is onnxruntime's; exporters write it out."""


def _lacking(model: ir.Model, release: str) -> list[str]:
    return list(lacking(ir.to_proto(model), RELEASES[release]))


def _derived(model: ir.Model, *, plugin: bool = False, nodes: tuple[EditNode, ...] = EVERY_EDIT) -> ir.Model:
    fold_graph(model, nodes)
    return derive_tensorrt_graph(model, plugin=plugin).model


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
@pytest.mark.parametrize("plugin", [False, True])
def test_the_edit_and_the_rule_need_nothing_that_a_release_lacks(release, dtype, plugin) -> None:
    derived = _derived(small_decoder(opset=20, dtype=ir.DataType[dtype]), plugin=plugin)
    assert "CumSum" not in {node.op_type for node in derived.graph}
    assert [node for node in _lacking(derived, release) if not node.startswith(STAND_IN)] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "phi3", "falcon"])
def test_exported_families_need_nothing_that_a_release_lacks(family) -> None:
    """Others: test_tensorrt_graph.py."""
    derived = _derived(export_decoder(build_decoder(family, layers=2)))
    for release in RELEASES:
        assert _lacking(derived, release) == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "options"), [("qdq-int8", {"lm_head": True}), ("qdq-int4", {}), ("fp8", {})])
def test_quantized_graphs_need_nothing_that_a_release_lacks(scheme, options) -> None:
    model = export_decoder(build_decoder("llama", layers=2), opset=21 if scheme == "qdq-int4" else 20)
    fold_graph(model, EVERY_EDIT)
    quantize_graph(model, settings_for(scheme, **options), dict.fromkeys(product_inputs(model), (-4.0, 4.0)))
    derived = derive_tensorrt_graph(model, plugin=False).model
    for release in RELEASES:
        assert _lacking(derived, release) == []


def test_the_table_sees_what_is_missing() -> None:
    def model(op: str, *types: int, **attributes: object) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(f"x{i}", t, [2, 3]) for i, t in enumerate(types)]
        node = helper.make_node(op, [i.name for i in inputs], ["y"], name="node", **attributes)
        graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", types[0], None)])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])

    assert list(lacking(model("CumSum", TensorProto.INT64, TensorProto.INT64), JETPACK_6)) == ["CumSum of INT64 (node)"]
    assert list(lacking(model("Equal", TensorProto.BOOL, TensorProto.BOOL), JETPACK_6)) == ["Equal of BOOL (node)"]
    assert list(lacking(model("NonZero", TensorProto.INT64), JETPACK_6)) == ["NonZero (node)"]


def _cumulative(axis: int, shape: list[int | str], dtype: int = TensorProto.INT64, **attributes: int) -> ir.Model:
    nodes = [helper.make_node("Constant", [], ["axis"], value_int=axis), helper.make_node("CumSum", ["x", "axis"], ["y"], **attributes)]
    value = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    return ir.from_proto(model)


@pytest.mark.parametrize("dtype", ["INT64", "INT32"])
def test_a_cumulative_sum_as_a_product(dtype) -> None:
    for shape in ((1, 1), (2, 7), (3, 0), (2, 900)):
        model = _cumulative(1, ["B", "S"], TensorProto.DataType.Value(dtype))
        replace_cumulative_sums(model.graph)
        assert {node.op_type for node in model.graph} & {"CumSum", "MatMul"} == {"MatMul"}
        x = np.random.default_rng(0).integers(0, 3, shape).astype(dtype.lower())
        (y,) = session(model).run(None, {"x": x})
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, np.cumsum(x, 1))


@pytest.mark.parametrize(("axis", "attributes"), [(0, {}), (1, {"exclusive": 1}), (1, {"reverse": 1})])
def test_other_cumulative_sums_stay(axis, attributes) -> None:
    model = _cumulative(axis, ["B", "S"], **attributes)
    replace_cumulative_sums(model.graph)
    assert "CumSum" in {node.op_type for node in model.graph}


def _with_shape_input(*, through: str | None = None) -> ir.Model:
    """A decoder whose logits are cut to as many columns as an input says; ``through``: an operator between."""
    model = small_decoder(opset=20)
    count = ir.Value(name="columns", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    model.graph.inputs.append(count)
    read = count
    if through is not None:
        between = ir.node(through, [count], name="between")
        model.graph.append(between)
        read = between.outputs[0]
    node = ir.node("Slice", [model.graph.outputs[0], read, read], name="cut")
    node.outputs[0].name = "cut"
    model.graph.append(node)
    return model


def test_an_input_that_decides_a_shape_is_refused() -> None:
    assert shape_inputs(small_decoder(opset=20).graph) == []
    for through in (None, "Neg"):
        model = _with_shape_input(through=through)
        assert [each.name for each in shape_inputs(model.graph)] == ["columns"]
    assert shape_inputs(_with_shape_input(through="Shape").graph) == [], "its shape is known before a step"
    fold_graph(model, NODES[:1])
    with pytest.raises(EngineError, match=r"the numbers of columns decide shapes in the graph \(Slice\('cut'\)\)") as caught:
        derive_tensorrt_graph(model, plugin=True)
    assert caught.value.exit_code == 4

"""A head that is tied to the embedding is stored once, in float and quantized, and what a graph computes stays what it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from calibration.products import activation_quantization, dequantized_weights
from calibration.quantize import quantize_graph
from calibration.settings import BlockFormat, settings_for
from calibration.weight_only import dequantize, quantize_blocks
from graph_passes.external import load_graph, write_graph
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from graph_passes.tied_head import tie_head, tied_head, untie_head
from runtimes.errors import CalibrationError

VOCABULARY = 50
IDS = np.array([[3, 49, 0], [7, 7, 12]])
LEVELS = tuple(ort.GraphOptimizationLevel.__members__.values())


def decoder(width: int = 64, *, tied: bool = True, dtype: type = np.float32) -> ir.Model:
    """logits = (T[ids] + (T[ids] M)) H: a table, one product and a head, whose weight is T^T or its own."""
    generator = np.random.default_rng(0)
    table = generator.standard_normal((VOCABULARY, width)).astype(dtype)
    arrays = {
        "model.embed_tokens.weight": table,
        "model.layers.0.mlp.up_proj.weight": (generator.standard_normal((width, width)) / width**0.5).astype(dtype),
        "lm_head.weight": table.T if tied else generator.standard_normal((width, VOCABULARY)).astype(dtype),
    }
    values = {}
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        values[name] = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    embedding, inner, head = values.values()
    gather = ir.node("Gather", [embedding, ids], name="lookup")
    product = ir.node("MatMul", [gather.outputs[0], inner], name="inner")
    total = ir.node("Add", [gather.outputs[0], product.outputs[0]], name="total")
    logits = ir.node("MatMul", [total.outputs[0], head], name="head")
    for node, name in ((gather, "embedded"), (product, "multiplied"), (total, "hidden"), (logits, "logits")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(embedding.const_value.dtype)
        node.outputs[0].shape = ir.Shape(["batch", "sequence", VOCABULARY if name == "logits" else width])
    nodes = [gather, product, total, logits]
    graph = ir.Graph([ids], [logits.outputs[0]], nodes=nodes, initializers=list(values.values()), opset_imports={"": 20}, name="decoder")
    return ir.Model(graph, ir_version=10)


def run(path: Path, level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"]).run(None, {"input_ids": IDS})[0]


def expected(weights: Mapping[str, np.ndarray]) -> np.ndarray:
    embedded = weights["model.embed_tokens.weight"][IDS]
    return (embedded + embedded @ weights["model.layers.0.mlp.up_proj.weight"]) @ weights["lm_head.weight"]


def arrays_of(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_a_float_head_reads_the_table(fused, tmp_path) -> None:
    model = decoder()
    before = expected(arrays_of(model))
    assert tie_head(model, fused=fused) == "lm_head.weight"
    assert set(model.graph.initializers) == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"}
    write_graph(model, tmp_path / "tied")
    assert (tmp_path / "tied" / "model.onnx.data").stat().st_size == 4 * (VOCABULARY * 64 + 64 * 64)
    for level in LEVELS:
        np.testing.assert_allclose(run(tmp_path / "tied", level), before, rtol=1e-5, atol=1e-5)
    stored = load_graph(tmp_path / "tied" / "model.onnx")
    head = tied_head(stored.graph)
    assert head is not None and head.name == "lm_head.weight" and head.node.op_type == ("FusedMatMul" if fused else "MatMul")
    # Untied it is the graph that it was, and can be written so.
    assert untie_head(stored.graph) == "lm_head.weight" and tied_head(stored.graph) is None
    assert [node.op_type for node in stored.graph] == ["Gather", "MatMul", "Add", "MatMul"]
    write_graph(stored, tmp_path / "apart")
    np.testing.assert_allclose(run(tmp_path / "apart"), before, rtol=1e-5, atol=1e-5)


def test_other_heads_stay_as_they_are() -> None:
    own, moved = decoder(tied=False), decoder()
    head = moved.graph.initializers["lm_head.weight"]
    array = head.const_value.numpy().copy()
    array[5, 49] += 1e-3
    head.const_value = ir.tensor(array, name=head.name)
    for model in (own, moved):
        assert tie_head(model, fused=True) is None and untie_head(model.graph) is None
        assert "lm_head.weight" in model.graph.initializers


def test_tensorrt_reads_a_fused_head_written_out() -> None:
    model = decoder()
    tie_head(model, fused=True)
    derive_tensorrt_graph(model, plugin=False)
    assert [node.op_type for node in model.graph if not node.domain] == ["Gather", "MatMul", "Add", "Transpose", "MatMul"]
    assert tied_head(model.graph) is not None


JOBS = {
    "int4": {"bits": 4},
    "int4 asymmetric": {"bits": 4, "symmetric": False, "embeddings": 4},
    "int4 throughout": {"bits": 4, "embeddings": 4},
    "k_quant": {"bits": 4, "embeddings": 4, "method": "k_quant"},
    "hqq": {"bits": 4, "embeddings": 4, "method": "hqq", "accuracy_level": 1},
    "int8": {"bits": 8},
    "int8 asymmetric": {"bits": 8, "symmetric": False, "block_size": 16},
}


@pytest.mark.parametrize("job", JOBS)
def test_a_quantized_table_is_one_range_of_bytes(job, tmp_path) -> None:
    """Lookup and head mean the same numbers, and onnxruntime computes with them at every level of its optimizer."""
    model = decoder()
    tie_head(model, fused=True)
    done = quantize_graph(model, settings_for("weight-only", **{"accuracy_level": 1, **JOBS[job]}))
    assert done.tied and done.embeddings == JOBS[job].get("embeddings", 8) and not done.note
    assert [error.name for error in done.errors] == ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    weights = dict(dequantized_weights(model))
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"].T, weights["lm_head.weight"])
    write_graph(model, tmp_path / "q")
    stored = load_graph(tmp_path / "q" / "model.onnx")
    lookup = next(node for node in stored.graph if node.op_type == "GatherBlockQuantized")
    head = next(node for node in stored.graph if node.op_type == "MatMulNBits" and node.attributes.get_int("N") == VOCABULARY)
    assert lookup.inputs[2:] == head.inputs[2:] and lookup.inputs[0] is not head.inputs[1]
    rows, columns = lookup.inputs[0].const_value, head.inputs[1].const_value
    assert (rows.offset, rows.length) == (columns.offset, columns.length)
    names = stored.graph.initializers
    size = sum(value.const_value.nbytes for name, value in names.items() if isinstance(value.const_value, ir.ExternalTensor))
    assert (tmp_path / "q" / "model.onnx.data").stat().st_size == size - columns.nbytes
    wanted = expected(weights)
    for level in LEVELS:
        np.testing.assert_allclose(run(tmp_path / "q", level), wanted, rtol=1e-4, atol=1e-4)
    # Written again from the file, the range stays one.
    write_graph(stored, tmp_path / "again")
    data = [(tmp_path / name / "model.onnx.data").read_bytes() for name in ("q", "again")]
    assert data[0] == data[1]
    np.testing.assert_array_equal(
        dict(dequantized_weights(load_graph(tmp_path / "again" / "model.onnx")))["lm_head.weight"], weights["lm_head.weight"]
    )


def test_schemes_that_quantize_activations_share_the_table_too() -> None:
    for scheme in ("dynamic", "static"):
        model = decoder()
        done = quantize_graph(model, settings_for(scheme), {"embedded": (-3.0, 3.0)})
        assert done.tied and done.embeddings == 8 and not done.float_weights
        assert activation_quantization(model)["lm_head.weight"].kind == "block"


def test_what_is_asked_for_is_stored_apart() -> None:
    def quantized(scheme: str = "weight-only", *, tied: bool = True, **options) -> tuple[ir.Model, object]:
        model = decoder(tied=tied)
        ranges = {"embedded": (-3.0, 3.0), "hidden": (-3.0, 3.0)}
        return model, quantize_graph(model, settings_for(scheme, **options), ranges)

    for options in ({"embeddings": 0}, {"embeddings": 8, "lm_head": False}, {"embeddings": 8, "keep_high": ("lm_head",)}):
        _, done = quantized(**options)
        assert not done.tied and "stored apart" in done.note and done.embeddings == options["embeddings"]
    # A float head keeps the embedding float with it, unless that is asked for.
    for options in ({"lm_head": False}, {"keep_high": ("lm_head",)}):
        model, done = quantized(**options)
        assert done.tied and done.embeddings == 0 and "stays float with the head" in done.note
        assert tied_head(model.graph) is not None
    for scheme, tied in (("qdq-int4", False), ("qdq-int8", True), ("fp8", True)):
        model, done = quantized(scheme)
        assert done.tied == tied and done.embeddings == 0 and bool(done.note) != tied
        assert not tied or "Transpose" in {node.op_type for node in model.graph}
    model, done = quantized(tied=False)
    assert not done.tied and done.embeddings == 8 and not done.note
    assert {error.name for error in done.errors} == {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"}


def test_rows_that_no_block_divides() -> None:
    done = quantize_graph(model := decoder(48), settings_for("weight-only"))
    assert done.embeddings == 8 and "blocks of 16" in done.note
    assert next(n for n in model.graph if n.op_type == "GatherBlockQuantized").attributes.get_int("block_size") == 16
    done = quantize_graph(decoder(40), settings_for("weight-only"))
    assert done.embeddings == 0 and "rows of 40" in done.note
    with pytest.raises(CalibrationError, match=r"rows of 40.*--embeddings float"):
        quantize_graph(decoder(40), settings_for("weight-only", embeddings=8))


def test_an_embedding_that_the_exporter_changed_stays_float() -> None:
    known = {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}
    done = quantize_graph(decoder(tied=False), settings_for("weight-only"), parameters=known)
    assert done.embeddings == 0 and "the exporter changed its values" in done.note


def test_shared_bytes_are_written_once_and_equal_ones_are_not(tmp_path) -> None:
    model = decoder()
    shared = np.arange(400, dtype=np.float32)
    arrays = {"one": shared, "two": shared.reshape(4, 100), "equal": shared.copy()}
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
    write_graph(model, tmp_path / "m")
    stored = load_graph(tmp_path / "m" / "model.onnx").graph.initializers
    offsets = {name: stored[name].const_value.offset for name in arrays}
    assert offsets["one"] == offsets["two"] != offsets["equal"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name].const_value.numpy(), array)
        assert model.graph.initializers[name].const_value.numpy() is not None  # the model in memory is as it was
        assert not isinstance(model.graph.initializers[name].const_value, ir.ExternalTensor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("offset", [0.0, 0.1, -0.1])
def test_k_quant_is_nowhere_farther_than_rtn(bits, block_size, offset) -> None:
    """By the error that it searches by, block by block; weights of one sign, whose zero point lies outside the grid, among them."""
    weight = np.random.default_rng(1).standard_t(6, (200, 24)).astype(np.float32) * np.float32(0.03) + np.float32(offset)
    blocks = -(-200 // block_size)
    padded = np.zeros((24, blocks * block_size), np.float32)
    padded[:, :200] = weight.T
    padded = padded.reshape(24, blocks, block_size)
    importance = np.sqrt(np.mean(padded**2, axis=2, keepdims=True)) + np.abs(padded)
    errors = {}
    for method in ("rtn", "k_quant"):
        found = quantize_blocks(weight, BlockFormat(bits=bits, block_size=block_size, symmetric=False, method=method))
        restored = np.zeros((24, blocks * block_size), np.float32)
        restored[:, :200] = dequantize(found.packed, found.scales, found.zero_points, bits, block_size, 200, 24).T
        errors[method] = (importance * (restored.reshape(padded.shape) - padded) ** 2)[:, : 200 // block_size].sum(axis=2)
    assert (errors["k_quant"] <= errors["rtn"] * (1 + 1e-5)).all()
    assert errors["k_quant"].sum() < 0.999 * errors["rtn"].sum()

"""Weight-only quantization: exact against the same dequantized weights, the edit left alone, the source bundle too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.activations import ActivationQuantization
from calibration.products import dequantized_weights
from calibration.quantize import quantize_graph
from calibration.settings import QuantizationSettings, settings_for
from calibration.weight_only import dequantize
from graph_passes.external import load_graph
from reft_export.base.dequantized import fake_quantize
from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.gate import lost_adapters
from reft_export.parity.quality import QualityGate
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.errors import AdapterError, CalibrationError, ParityError
from runtimes.parity.figures import BUDGETS, Delta, Figures, ParityReport, judge

QUIET = {"report": lambda _: None}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bundle(bits, bundle_folder, base_folder, tmp_path) -> None:
    source = bundle_folder("llama")
    before = {p.name: p.stat().st_mtime_ns for p in source.rglob("*")}
    result = quantize_bundle(source, str(base_folder("llama")), tmp_path / "q", QuantizationSettings(bits=bits), **QUIET)
    assert {p.name: p.stat().st_mtime_ns for p in source.rglob("*")} == before
    exact = [r for r in result.parity.rungs if "level 1" in r.name]
    shipped = [r for r in result.parity.rungs if "level 4" in r.name]
    assert {r.budget.name for r in exact} == {f"weight-only int{bits}"}
    assert {r.budget.name for r in shipped} == {"accuracy level 4"}
    assert all(r.figures.greedy_equal is not False for r in exact)
    _check_delta_reference(tmp_path / "q", result.parity, bits)
    graph = load_graph(tmp_path / "q" / "model.onnx")
    operators = {n.op_type for n in graph.graph if n.domain == "com.microsoft"}
    assert operators == {"GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "RotaryEmbedding"}
    assert not [n for n in graph.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]
    banks = [v for v in graph.graph.inputs if v.name.startswith("reft.") and v.name[-2:] in (".U", ".A", ".b")]
    assert banks and {v.dtype for v in banks} == {ir.DataType.FLOAT}
    assert sum(w.bytes_after for w in result.weight_errors) < (0.2 if bits == 4 else 0.35) * sum(
        w.bytes_before for w in result.weight_errors
    )


def _check_delta_reference(folder, report, bits: int) -> None:
    """Steering is compared with the float32 model's, not with the quantized model's own: that would always be preserved."""
    bundle = open_bundle(folder)
    for name in bundle.adapter_names:
        golden = bundle.golden(name)
        assert np.abs(golden["fp32_logits"] - golden["logits"]).max() > 1e-3
    cosines = [r.delta.cosine for r in report.rungs if r.delta is not None]
    assert len(cosines) == 2 * len(bundle.adapter_names)
    assert all(0.9 < c < (0.9999 if bits == 4 else 0.999999) for c in cosines), cosines


def test_planted_fault_in_a_quantized_weight(bundle_folder, base_folder, tmp_path, monkeypatch) -> None:
    """A scale that is off by 1 % after the eager reference was dequantized: the gate at level 1 sees it, whatever loss is accepted."""
    from reft_export.quantizing import assemble as module

    right = module.write_graph

    def wrong(graph, folder) -> None:
        scales = graph.graph.initializers["model.layers.1.mlp.up_proj.weight_scales"]
        kept = scales.const_value
        scales.const_value = ir.tensor(kept.numpy() * np.float32(1.01), name=scales.name)
        right(graph, folder)
        scales.const_value = kept

    monkeypatch.setattr(module, "write_graph", wrong)
    source, taken = bundle_folder("llama"), QualityGate(accept_loss=True)
    with pytest.raises(ParityError, match="int4 level 1"):
        quantize_bundle(source, str(base_folder("llama")), tmp_path / "q", QuantizationSettings(), quality=taken, **QUIET)
    assert not (tmp_path / "q").exists()


def test_only_who_loses_nothing_but_the_delta_is_named() -> None:
    budget = BUDGETS["fp16"]
    right, wrong = (Figures(compared=1, max_abs=e, max_relative=e, kl=0.0, top1=1.0, greedy_equal=True) for e in (0.0, 1.0))
    kept, lost = Delta(cosine=0.9995, norm_ratio=1.0), Delta(cosine=0.5, norm_ratio=1.0)
    found = {"kept": (right, kept), "weak": (right, lost), "wrong": (wrong, lost), "both.1": (right, lost)}
    rungs = [judge(f"int4 level 4, {name}: full forward", "eager", f, budget, delta=d) for name, (f, d) in found.items()]
    rungs.append(judge("int4 level 4, both.1: greedy", "eager", wrong, budget))
    assert [rung.lost_steering for rung in rungs] == [False, True, False, True, False]
    assert "by weak, as" in lost_adapters(ParityReport(rungs=tuple(rungs)), tuple(found))
    assert lost_adapters(ParityReport(rungs=tuple(rungs[:1] + rungs[2:])), tuple(found)) == ""


@pytest.mark.slow
def test_a_barely_trained_adapter_is_named(base_folder, adapter_folders, tmp_path) -> None:
    """Its edit is smaller than the rounding of the weights: the other adapter's bundle is possible without it."""
    base, (strong, folder) = str(base_folder("llama")), adapter_folders("llama", ("tied", "all-direft"))
    adapter = load_adapter(folder)
    weak = {name: value * np.float32(1e-3) for name, value in adapter.tensors.items()}
    save_adapter(replace(adapter, tensors=weak), tmp_path / "barely")
    said = "too little of the steering: barely: delta cosine .*expected 0.9 .without probes.*; train it further, or leave it out"
    with pytest.raises(ParityError, match=said) as caught:
        export_bundle(base, [strong, tmp_path / "barely"], tmp_path / "b", ExportSettings(precision="int4"), **QUIET)
    assert not (tmp_path / "b").exists()
    assert caught.value.report.passed  # the bundle is the model that it claims to be


@pytest.mark.parametrize("embeddings", [pytest.param(None, marks=pytest.mark.slow), 0])
def test_a_tied_base_is_stored_once(embeddings, tmp_path) -> None:
    """Float, and quantized unless the embedding is asked for in float; each is held against eager PyTorch."""
    from reft_export.exporting.export import ExportSettings, export_bundle

    base = tiny.save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    result = export_bundle(str(base), [], tmp_path / "b", ExportSettings(precision="int4", embeddings=embeddings), **QUIET)
    assert result.parity.passed
    manifest = open_bundle(tmp_path / "b").manifest
    names = {w.name for w in result.weight_errors} & {"lm_head.weight", "model.embed_tokens.weight"}
    if embeddings == 0:
        assert names == {"lm_head.weight"} and "stored apart" in result.note
        assert (manifest.embeddings, manifest.quantization.embeddings) == ("separate", 0)
        return
    assert names == {"model.embed_tokens.weight"} and not result.note
    assert (manifest.embeddings, manifest.quantization.embeddings) == ("shared", 8)
    export_bundle(str(base), [], tmp_path / "float", ExportSettings(), **QUIET)
    assert open_bundle(tmp_path / "float").manifest.embeddings == "shared"
    stored = {v.const_value.shape.numpy() for v in load_graph(tmp_path / "float" / "model.onnx").graph.initializers.values()}
    config = load_base(base).model.config
    assert (config.vocab_size, config.hidden_size) in stored and (config.hidden_size, config.vocab_size) not in stored
    # The float bundle's head is the same one when it is quantized afterwards, calibrated or not.
    for scheme in ("weight-only", "dynamic"):
        again = quantize_bundle(tmp_path / "float", str(base), tmp_path / scheme, settings_for(scheme), **QUIET)
        assert again.parity.passed and again.manifest.embeddings == "shared"
    weights = [dict(dequantized_weights(load_graph(tmp_path / name / "model.onnx"))) for name in ("b", "weight-only")]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])


def test_refusals(bundle_folder, base_folder, tmp_path) -> None:
    quantized = bundle_folder("llama", "int4")
    with pytest.raises(CalibrationError, match="quantized already"):
        quantize_bundle(quantized, str(base_folder("llama")), tmp_path / "q", QuantizationSettings(), **QUIET)
    with pytest.raises(AdapterError, match="pass the base it was made from"):
        quantize_bundle(bundle_folder("llama"), str(base_folder("qwen2")), tmp_path / "q", QuantizationSettings(), **QUIET)
    with pytest.raises(CalibrationError, match="power of two"):
        QuantizationSettings(block_size=48)
    with pytest.raises(CalibrationError, match="starts from the fp32 one"):
        quantize_bundle(bundle_folder("llama", "fp16"), str(base_folder("llama")), tmp_path / "q", QuantizationSettings(), **QUIET)
    assert not (tmp_path / "q").exists()


def test_weights_that_are_not_finite_are_refused(bundle_folder) -> None:
    graph = load_graph(bundle_folder("llama") / "model.onnx")
    value = graph.graph.initializers["model.layers.0.mlp.up_proj.weight"]
    array = value.const_value.numpy().copy()
    array[3, 5] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(CalibrationError, match=r"up_proj\.weight holds values that are not finite"):
        quantize_graph(graph, QuantizationSettings())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (50, 7), (33, 1)])
def test_dequantize_is_what_onnxruntime_multiplies_by(bits, symmetric, rows, columns) -> None:
    """The identity matrix through MatMulNBits at level 1 gives the dequantized weight itself, padded last blocks included."""
    import onnxruntime as ort

    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape(["n", rows]), type=ir.TensorType(ir.DataType.FLOAT))
    tensor = ir.tensor(weight, name="w")
    w = ir.Value(name="w", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    node = ir.node("MatMul", [x, w], name="product")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["n", columns]), ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 20}, name="g"), ir_version=10)
    quantize_graph(model, settings_for("weight-only", bits, symmetric=symmetric, accuracy_level=1))
    ((name, restored),) = dequantized_weights(model)
    assert name == "w" and restored.shape == weight.shape
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": np.eye(rows, dtype=np.float32)})[0], restored, atol=1e-6)
    assert np.abs(restored - weight).max() < (0.35 if bits == 4 else 0.03)


@given(st.integers(1, 5), st.integers(1, 80), st.sampled_from([4, 8]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_dequantize_layout(columns, rows, bits, seed) -> None:
    """Against a loop over single values: low nibble first, one scale and zero point per block of 16 rows."""
    generator = np.random.default_rng(seed)
    blocks = -(-rows // 16)
    packed = generator.integers(0, 256, (columns, blocks, 16 * bits // 8), dtype=np.uint8)
    scales = generator.standard_normal((columns, blocks)).astype(np.float32)
    points = generator.integers(0, 256, (columns, blocks if bits == 8 else -(-blocks // 2)), dtype=np.uint8)
    w = dequantize(packed, scales, points, bits, 16, rows, columns)
    k, n = int(generator.integers(rows)), int(generator.integers(columns))
    block, inside = divmod(k, 16)
    if bits == 8:
        q, z = int(packed[n, block, inside]), int(points[n, block])
    else:
        q = int(packed[n, block, inside // 2]) >> (4 * (inside % 2)) & 15
        z = int(points[n, block // 2]) >> (4 * (block % 2)) & 15
    assert w[k, n] == np.float32(q - z) * scales[n, block]


def test_fake_quantization_of_activations() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, 127.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    y = fake_quantize(x, ActivationQuantization(kind="block", block_size=4))
    assert y.tolist() == [[1.0, -2.0, 0.0, 127.0, 0.0, 0.0, 0.0, 0.0, 3.0]]

"""Every scheme on random families: the weights are exact, the activations what eager fake quantization says, the edit stays float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from tiers import slow_and_long

from calibration.activations import STORED
from calibration.products import activation_quantization, dequantized_weights
from calibration.quantize import quantize_graph
from calibration.settings import settings_for
from graph_passes.external import load_graph
from graph_passes.find.weights import weight_products
from graph_passes.insert import is_edit
from reft_export.base.dequantized import copy_experts, load_dequantized
from reft_export.base.load import load_base
from reft_export.base.memory import share_weights
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import CalibrationRequest
from reft_export.quantizing.weights import EagerModel
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import CalibrationError, ParityError
from runtimes.ort.session import OrtSession

QUIET = {"report": lambda _: None}
ACTIVATIONS = {"weight-only": "block", "dynamic": "token", "static": "uint8", "qdq-int8": "int8", "fp8": "fp8"}
JOBS = {
    "int4": ("weight-only", {}),
    "hqq": ("weight-only", {"method": "hqq"}),
    "k_quant": ("weight-only", {"method": "k_quant", "embeddings": 4, "block_size": 16}),
    "asymmetric": ("weight-only", {"symmetric": False, "embeddings": 4}),
    "int8 asymmetric": ("weight-only", {"bits": 8, "symmetric": False, "embeddings": 4}),
    "dynamic": ("dynamic", {}),
    "static": ("static", {}),
    "qdq-int4": ("qdq-int4", {}),
    "qdq-int8": ("qdq-int8", {}),
    "fp8": ("fp8", {}),
}
FAST = ("int4", "dynamic", "static", "qdq-int4")
"""One of each kind; `make test-slow` runs the others."""
WITH_GPT2 = ("hqq", "asymmetric", "dynamic", "static", "fp8")
"""Schemes that a second family is quantized by; the others are tried on qwen2."""


def request_for(scheme: str, prompts: Path) -> CalibrationRequest | None:
    return CalibrationRequest(data=prompts, decode_tokens=6) if settings_for(scheme).kind.activations == "static" else None


CASES = [pytest.param("llama", job, marks=() if job in FAST else pytest.mark.slow) for job in JOBS]
CASES += [
    pytest.param("gpt2" if job in WITH_GPT2 else "qwen2", job, marks=pytest.mark.slow if job in FAST else pytest.mark.long) for job in JOBS
]


@pytest.mark.parametrize(("family", "job"), CASES)
def test_scheme(family, job, float_bundle, prompts_file, tmp_path) -> None:
    scheme, options = JOBS[job]
    source, base = float_bundle(family)
    result = quantize_bundle(
        source, base, tmp_path / "q", settings_for(scheme, **options), calibration=request_for(scheme, prompts_file), **QUIET
    )
    assert result.parity.passed
    bundle = open_bundle(tmp_path / "q")
    assert bundle.manifest.quantization.scheme == scheme
    exact = [r for r in result.parity.rungs if r.budget.name.startswith("weight-only")]
    shipped = [r for r in result.parity.rungs if r.budget.name in ("activation-quantized", "accuracy level 4")]
    layouts = {r.name.rpartition(": ")[2] for r in exact}
    assert {"full forward", "prefill and decode", "chunked prefill", "single rows"} <= layouts
    assert all(r.figures.greedy_equal is not False for r in exact)
    graph = load_graph(bundle.graph_path)
    activations = activation_quantization(graph)
    kind = None if job == "hqq" else ACTIVATIONS.get(scheme)
    # A head that is tied to the embedding is its int8 table, and so a MatMulNBits.
    tied = {"block"} if family == "gpt2" and scheme in ("dynamic", "static") else set()
    assert {how.kind for how in activations.values()} == ({kind} if kind else set()) | tied
    assert bool(shipped) == bool(activations)
    stepped = [r for r in result.parity.rungs if r.name.endswith("step by step")]
    assert len(stepped) == (3 if kind in ("token", "uint8", "int8", "fp8") else 0)
    assert all(r.budget.name == "weight-only int8" for r in stepped)
    assert any(r.delta is not None and 0.9 <= r.delta.cosine < 1 for r in result.parity.rungs)
    check_edit_is_float(graph, load_graph(source / "model.onnx"))


def check_edit_is_float(graph: ir.Model, before: ir.Model) -> None:
    """Same nodes, float banks, and functions whose nodes are the float bundle's, one by one."""
    edits = {n.name: n for n in graph.graph if is_edit(n)}
    assert edits.keys() == {n.name for n in before.graph if is_edit(n)} != set()
    for node in edits.values():
        assert all(value.is_graph_input() for value in node.inputs[2:])
        assert {value.dtype for value in node.inputs[2:]} == {ir.DataType.FLOAT}
        producer = node.inputs[0].producer()
        assert producer.op_type not in ("DequantizeLinear", "QuantizeLinear")
    for key, function in before.functions.items():
        assert [n.op_type for n in graph.functions[key]] == [n.op_type for n in function]
    names = {v.name: v.const_value.numpy() for v in before.graph.inputs if v.is_initializer()}
    for name, array in names.items():
        np.testing.assert_array_equal(graph.graph.initializers[name].const_value.numpy(), array)


@pytest.mark.parametrize("job", slow_and_long(["dynamic", "static", "qdq-int4"], "static"))
def test_parity_runs_eager_again(job, float_bundle, prompts_file, tmp_path) -> None:
    scheme, options = JOBS[job]
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for(scheme, **options), calibration=request_for(scheme, prompts_file), **QUIET)
    ladder = host_ladder(open_bundle(tmp_path / "q"), base, **QUIET)
    assert ladder.passed
    wanted = {"qdq-int4, float activations"} if job == "qdq-int4" else {f"{scheme}, float activations", scheme}
    assert wanted <= {r.name.rpartition(", ")[0] for r in ladder.rungs}


def test_a_token_is_answered_alike_in_any_company(float_bundle, tmp_path) -> None:
    """Dynamic int8 with one scale a call would answer a prompt by what shares the batch with it."""
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for("dynamic"), **QUIET)
    session = OrtSession(open_bundle(tmp_path / "q"))
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 250, (3, 9))
    alone = session.step(ids[:1], np.ones((1, 9), np.int64)).logits[0]
    together = session.step(ids, np.ones((3, 9), np.int64)).logits[0]
    padded = session.step(np.pad(ids, ((0, 0), (4, 0))), np.pad(np.ones((3, 9), np.int64), ((0, 0), (4, 0)))).logits[0, 4:]
    scale = np.abs(alone).max()
    assert np.abs(together - alone).max() < 1e-5 * scale and np.abs(padded - alone).max() < 1e-5 * scale


@pytest.mark.parametrize("scheme", ["dynamic", "qdq-int4", "qdq-int8", "fp8", "static"])
def test_dequantized_weights_go_into_eager(scheme, float_bundle) -> None:
    """What a refit trains on: every linear weight but the kept ones, each within half a step of the float one."""
    source, base = float_bundle()
    graph = load_graph(source / "model.onnx")
    sources = open_bundle(source).manifest.weights
    originals = {name: value.const_value.numpy() for name, value in graph.graph.initializers.items() if name in sources}
    ranges = {node.inputs[0].name: (-3.0, 5.0) for node in weight_products(graph.graph)}
    quantize_graph(graph, settings_for(scheme, lm_head=True), ranges)
    restored = dict(dequantized_weights(graph))
    count = 22 + (settings_for(scheme).embedding_bits > 0)
    assert len(restored) == count
    for name, value in restored.items():
        largest = np.abs(originals[name]).max()
        # int4 has no +8: what is nearest to it is a whole step off. E4M3 has steps of 1/16 of the value.
        # Blocks of int8 have no +128.
        bound = largest * {"qdq-int4": 1 / 8, "fp8": 1 / 28}.get(scheme, 1 / 128 if "embed" in name else 0.5 / 127)
        assert np.abs(value - originals[name]).max() <= 1.02 * bound
    loaded = load_base(base).model
    assert len(load_dequantized(loaded, graph, sources)) == count
    up = loaded.get_submodule("model.layers.1.mlp.up_proj").weight.numpy()
    np.testing.assert_allclose(up.T, restored["model.layers.1.mlp.up_proj.weight"], rtol=1e-6)


def test_the_float_model_stays_beside_the_one_that_carries_a_graphs_weights(float_bundle) -> None:
    source, base = float_bundle()
    graph, sources = load_graph(source / "model.onnx"), open_bundle(source).manifest.weights
    quantize_graph(graph, settings_for("weight-only", 4))
    floats = load_base(base).model
    before = {name: (parameter, parameter.clone()) for name, parameter in floats.named_parameters()}
    eager = EagerModel(floats)
    carrying = eager.carrying(graph, sources)
    eager.put_away()  # frees nothing of what cannot be loaded again
    assert eager.floats() is floats
    assert all(parameter is before[name][0] and parameter.equal(before[name][1]) for name, parameter in floats.named_parameters())
    quantized = set(dict(dequantized_weights(graph)))
    changed = {name for name, parameter in carrying.named_parameters() if not parameter.equal(before[name][1])}
    assert len(changed) == len(quantized) > 0
    kept = [name for name, parameter in carrying.named_parameters() if parameter is before[name][0]]
    assert kept and len(kept) + len(changed) == len(before)  # norms are no copies


@pytest.mark.parametrize("attribute", ["up", "weight"])
def test_experts_that_are_written_in_place_are_copied_first(attribute) -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.register_parameter(attribute, torch.nn.Parameter(torch.ones(2, 3, 4)))
    model.experts.bias = torch.nn.Parameter(torch.ones(3))
    copied = share_weights(model)  # pyright: ignore[reportArgumentType]
    name = f"experts.{attribute}"
    sources = {f"up.{e}": WeightSource(parameter=name, transpose=False, axis=0, start=e, stop=e + 1) for e in (0, 1)}
    copy_experts(copied, sources | {"bias": WeightSource(parameter="experts.bias", transpose=False)})  # pyright: ignore[reportArgumentType]
    copied.get_parameter(name).detach()[0].zero_()
    assert bool(model.get_parameter(name).all()) and copied.experts.bias is model.experts.bias


@pytest.mark.parametrize("scheme", ["static", pytest.param("dynamic", marks=pytest.mark.long), "fp8"])
def test_planted_fault_in_a_weight(scheme, float_bundle, prompts_file, tmp_path, monkeypatch) -> None:
    """A scale that is off by a tenth after eager was dequantized: the rung with float activations sees it."""
    from reft_export.quantizing import assemble as module

    right = module.write_graph

    def wrong(graph, folder) -> None:
        scales = graph.graph.initializers["model.layers.1.mlp.up_proj.weight_scales"]
        kept = scales.const_value
        scales.const_value = ir.tensor(kept.numpy() * np.float32(1.1), name=scales.name)
        right(graph, folder)
        scales.const_value = kept

    monkeypatch.setattr(module, "write_graph", wrong)
    source, base = float_bundle()
    with pytest.raises(ParityError, match=f"{scheme}, float activations"):
        quantize_bundle(source, base, tmp_path / "q", settings_for(scheme), calibration=request_for(scheme, prompts_file), **QUIET)
    assert not (tmp_path / "q").exists()


def test_planted_fault_in_an_activation(float_bundle, prompts_file, tmp_path, monkeypatch) -> None:
    """The scale of one activation is off by a tenth while the graph runs: the weights are right, the roundings are not the formula's."""
    from reft_export.parity import activation_ladder as module

    right = module.expose_quantized_inputs

    def wrong(graph) -> None:
        right(graph)
        down = next(n for n in graph.graph if n.op_type == "QuantizeLinear")
        down.inputs[1].const_value = ir.tensor(np.array(down.inputs[1].const_value.numpy() * np.float32(1.1)), name="off")

    monkeypatch.setattr(module, "expose_quantized_inputs", wrong)
    source, base = float_bundle()
    request = CalibrationRequest(data=prompts_file, decode_tokens=6)
    with pytest.raises(ParityError, match=r"static, base: step by step against eager, same roundings"):
        quantize_bundle(source, base, tmp_path / "q", settings_for("static"), calibration=request, **QUIET)


def test_kept_layers_head_and_embeddings(float_bundle) -> None:
    source, _ = float_bundle()

    def quantized(scheme: str = "weight-only", **options) -> tuple[set[str], tuple[str, ...]]:
        graph = load_graph(source / "model.onnx")
        kept = quantize_graph(graph, settings_for(scheme, **options)).float_weights
        return {name for name, _ in dequantized_weights(graph)}, kept

    everything, kept = quantized()
    assert len(everything) == 23 and "model.embed_tokens.weight" in everything and not kept
    names, kept = quantized(keep_high=("0", "*.mlp.down_proj"), lm_head=False)
    assert set(kept) == everything - names and len(kept) == 7 + 2 + 1
    assert "lm_head.weight" in kept and "model.layers.2.mlp.down_proj.weight" in kept
    assert quantized(keep_high=("1-2", "lm_head"), embeddings=0)[0] == {n for n in everything if ".layers.0." in n}
    assert quantized("dynamic", embeddings=4)[0] == everything == quantized("dynamic", embeddings=0)[0] | {"model.embed_tokens.weight"}
    for patterns, message in ((("7",), "'7' fits none of the 22 weights"), (("*",), "nothing is left"), (("mlp",), "fits none")):
        with pytest.raises(CalibrationError, match=message):
            quantized(keep_high=patterns)


def test_missing_ranges_change_nothing(float_bundle) -> None:
    source, _ = float_bundle()
    graph = load_graph(source / "model.onnx")
    before = [n.op_type for n in graph.graph]
    with pytest.raises(CalibrationError, match="there is no range for"):
        quantize_graph(graph, settings_for("static"), {"mul_108": (0.0, 1.0)})
    assert [n.op_type for n in graph.graph] == before


def test_weights_are_stored_as_the_runtimes_read_them(float_bundle) -> None:
    """uint8 around 128 for onnxruntime, int8 without zero points for TensorRT, E4M3, int4 in blocks along K."""
    source, _ = float_bundle()
    types = {"static": ("uint8", 128), "qdq-int8": ("int8", 0), "fp8": ("fp8", 0)}
    for scheme, (kind, zero) in types.items():
        graph = load_graph(source / "model.onnx")
        quantize_graph(graph, settings_for(scheme), {n.inputs[0].name: (-1.0, 2.0) for n in weight_products(graph.graph)})
        restored = [n for n in graph.graph if n.op_type == "DequantizeLinear" and n.inputs[0].is_initializer()]
        assert len(restored) == 21
        for node in restored:
            q, scales, points = (v.const_value.numpy() for v in node.inputs)
            assert q.dtype == points.dtype == STORED[kind] and (points.astype(np.float32) == zero).all()
            assert scales.shape == points.shape == (q.shape[1],) and node.attributes.get_int("axis") == 1
        point = next(n for n in graph.graph if n.op_type == "QuantizeLinear").inputs[2].const_value.numpy()
        assert point.dtype == STORED[kind] and (float(point) == 0 or scheme == "static")
    graph = load_graph(source / "model.onnx")
    quantize_graph(graph, settings_for("qdq-int4", block_size=16))
    assert graph.opset_imports[""] == 21 and {f.opset_imports[""] for f in graph.functions.values()} == {21}
    node = next(n for n in graph.graph if n.op_type == "DequantizeLinear")
    assert node.inputs[0].dtype == ir.DataType.INT4 and len(node.inputs) == 2
    assert list(node.inputs[1].shape) == [node.inputs[0].shape[0] // 16, node.inputs[0].shape[1]]


@pytest.mark.long
def test_builtin_base(adapter_folders, prompts_file, tmp_path) -> None:
    """The trained base of the quickstart, with a random edit: every kind of scheme says what eager says. An edit without probes that
    means nothing to a trained model is held to its delta alone: rounded activations, and 4-bit embeddings under int8, may miss that gate,
    and nothing else."""
    from reft_export.quickstart import base_path
    from runtimes.edits.adapter import save_adapter

    base = str(base_path())
    info = load_base(base).info
    adapter = tiny.random_adapter(info, positions="f1+l1", layers=(1, 3))
    save_adapter(adapter, tmp_path / "small")
    export_bundle(base, [tmp_path / "small"], tmp_path / "fp32", ExportSettings(), **QUIET)
    for job in ("int4", "int8 asymmetric", "dynamic", "static", "qdq-int8", "fp8"):
        scheme, options = JOBS[job]
        request = request_for(scheme, prompts_file)
        settings = settings_for(scheme, **options)
        try:
            report = quantize_bundle(tmp_path / "fp32", base, tmp_path / job, settings, calibration=request, **QUIET).parity
        except ParityError as error:
            report = error.report
            assert job in ("int8 asymmetric", "static", "qdq-int8")
        missed = [r for r in report.rungs if not r.passed]
        assert all(r.figures.max_relative <= r.budget.logits and r.figures.top1 >= r.budget.top1 for r in missed), job
        assert any(r.name.endswith("step by step") for r in report.rungs) == (scheme in ("dynamic", "static", "qdq-int8", "fp8"))


@pytest.mark.slow
def test_half_precision_source_for_tensorrt(float_bundle, tmp_path) -> None:
    source, base = float_bundle("llama", "fp16")
    result = quantize_bundle(source, base, tmp_path / "q", settings_for("qdq-int4"), **QUIET)
    assert result.parity.passed and {r.budget.name for r in result.parity.rungs} == {"weight-only int4, fp16"}
    graph = load_graph(tmp_path / "q" / "model.onnx")
    scales = [n.inputs[1].dtype for n in graph.graph if n.op_type == "DequantizeLinear"]
    assert set(scales) == {ir.DataType.FLOAT16}

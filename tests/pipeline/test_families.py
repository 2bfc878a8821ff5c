"""Families beyond those that every route is tested with: through dynamo, and mixtures of experts through transformers' own exporter."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from models import bases
from models.adapters import random_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from calibration.settings import settings_for
from reft_export.base.load import load_base
from reft_export.eager.steering import site_module
from reft_export.exporting import transformers as route
from reft_export.exporting.bfloat16 import ARITHMETIC, widen_bfloat16
from reft_export.exporting.dynamo import export_dynamo
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import BackendUnavailable, BundleError, ExportError, InputError, ParityError, SiteNotFound

QUIET = {"report": lambda _: None}
ALL = ("block_output", "attention_output", "mlp_output")
NEW = ("phi", "olmo2", "cohere", "starcoder2", "stablelm", "smollm3", "falcon", "glm4", "bloom", "gpt_neo", "helium")
needs_exporters = pytest.mark.skipif(
    importlib.util.find_spec("transformers.exporters") is None, reason="this transformers has no transformers.exporters"
)


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """(folder, adapter) by family: two layers, one adapter at every stream."""

    def make(family: str, streams: tuple[str, ...] = ALL):
        root = tmp_path_factory.mktemp("families")
        folder = bases.save_base(root / family, family)
        sites = [Site(layer=layer, stream=stream) for stream in streams for layer in (0, 1)]
        save_adapter(random_adapter(load_base(folder).info, sites), root / "style")
        return str(folder), root / "style"

    return make


def _worst(result) -> float:
    return max(rung.figures.max_relative for rung in result.parity.rungs)


@pytest.mark.slow
@pytest.mark.parametrize("family", NEW)
def test_edits_at_every_stream(family, small_base, tmp_path) -> None:
    model, adapter = small_base(family)
    assert _worst(export_bundle(model, [adapter], tmp_path / "b", ExportSettings(), **QUIET)) < 2e-5


def test_an_epsilon_that_passes_for_zero_stays_in_the_graph() -> None:
    """Helium: 1e-8, and the embedding of its pad token is zeros."""
    model = bases.build_base("helium", layers=1)
    assert not model.get_input_embeddings().weight[bases.PAD].any()
    session = ort.InferenceSession(ir.to_proto(export_dynamo(model).model).SerializeToString(), providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    ids = {"input_ids": [[7, bases.PAD, 9]], "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]]}
    feeds = {name: np.array(value, np.int64) for name, value in ids.items()} | past
    assert np.isfinite(session.run(["logits"], feeds)[0]).all()


def test_a_multimodal_bases_text_model_is_exported() -> None:
    """Gemma 3 from 4b on: the decoder's sizes stand in text_config."""
    text = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)).eval()
    assert "logits" in [value.name for value in export_dynamo(model).model.graph.outputs]


def test_bfloat16_arithmetic_runs_and_is_the_same_to_the_bit() -> None:
    """Falcon's ALiBi, a product of bfloat16 values in a graph of any type."""
    x, y = (ir.val(name, ir.DataType.FLOAT, ["N"]) for name in "xy")
    low = [ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16}) for value in (x, y)]
    nodes = [*low]
    for op in ARITHMETIC:
        nodes.append(ir.node(op, [cast.outputs[0] for cast in low]))
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.FLOAT}, name=op))
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.BFLOAT16 if node.op_type in ARITHMETIC or node in low else ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes if node.name in ARITHMETIC]
    graph = ir.Model(ir.Graph([x, y], outputs, nodes=nodes, opset_imports={"": 20}), ir_version=10)
    widen_bfloat16(graph)
    feeds = {name: np.random.default_rng(i).standard_normal(10000, np.float32) for i, name in enumerate("xy")}
    a, b = (torch.from_numpy(array).bfloat16() for array in feeds.values())
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for got, wanted in zip(session.run(None, feeds), (a + b, a - b, a * b, a / b), strict=True):
        assert np.array_equal(got, wanted.float().numpy())


def test_an_operator_that_takes_no_bfloat16_is_named(small_base, tmp_path) -> None:
    """Doge's Softplus: ONNX has it for bfloat16 from opset 22 on."""
    model, adapter = small_base("doge", ("block_output",))
    with pytest.raises(ExportError, match="checker refuses the bfloat16 graph: .*Softplus.*; use another --precision"):
        export_bundle(model, [adapter], tmp_path / "b", ExportSettings(precision="bf16"), **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_falcon_with_alibi(tmp_path) -> None:
    layout = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "new_decoder_architecture": False}
    folder = bases.save_base(tmp_path / "falcon", "falcon", overrides=layout)
    save_adapter(random_adapter(load_base(folder).info, [Site(layer=1)]), tmp_path / "style")
    assert _worst(export_bundle(str(folder), [tmp_path / "style"], tmp_path / "b", ExportSettings(), **QUIET)) < 2e-5


def test_frequencies_that_follow_the_length_are_refused_by_name() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = bases.build_base("llama", layers=1, overrides={"rope_parameters": rope})
    with pytest.raises(InputError, match="llama changes its rotary frequencies .* \\(rope_type dynamic\\)"):
        export_dynamo(model)


@pytest.mark.slow
def test_granite_is_edited_at_its_blocks_and_not_inside(small_base, tmp_path) -> None:
    model, adapter = small_base("granite", ("block_output",))
    assert _worst(export_bundle(model, [adapter], tmp_path / "b", ExportSettings(), **QUIET)) < 2e-5
    model, adapter = small_base("granite")
    with pytest.raises(SiteNotFound, match="whether they belong to the module cannot be told"):
        export_bundle(model, [adapter], tmp_path / "c", ExportSettings(), **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize(("family", "attention", "mlp"), [
    ("bloom", "dense", "dense_4h_to_h"),
    ("mpt", None, "down_proj"),
    ("opt", None, None),
])  # fmt: skip
def test_modules_that_add_the_residual_themselves_are_edited_before_it(family, attention, mlp) -> None:
    """What Bloom's attention returns is the residual stream already: an edit of its output would be one of the stream."""
    model = bases.build_base(family)
    layer = next(module for name, module in model.named_modules() if name.endswith((".h.0", ".blocks.0", ".layers.0")))
    for stream, inner in (("attention_output", attention), ("mlp_output", mlp)):
        found = site_module(model, Site(layer=0, stream=stream))
        path = next(name for name, module in layer.named_modules() if module is found)
        assert path.rpartition(".")[2] == (inner or path)


# --- mixtures of experts ----------------------------------------------------------------------------------------------------


@needs_exporters
@pytest.mark.slow
def test_a_mixture_of_experts(small_base, tmp_path) -> None:
    """fp32 at parity with edits at every stream; int4 with its experts quantized, exact against eager with the same weights."""
    model, adapter = small_base("qwen3_moe")
    result = export_bundle(model, [adapter], tmp_path / "b", ExportSettings(exporter="transformers"), **QUIET)
    assert _worst(result) < 2e-5 and result.manifest.exporter == "transformers"
    experts = {n: s for n, s in result.manifest.weights.items() if ".experts." in n}
    assert len(experts) == 2 * 2 * 4
    assert experts["model.layers.1.mlp.experts.down_proj.3"].start == 3
    small = quantize_bundle(tmp_path / "b", model, tmp_path / "int4", settings_for("weight-only", 4), **QUIET)
    assert set(experts) <= {error.name for error in small.weight_errors}
    exact = [rung.figures.max_relative for rung in small.parity.rungs if "level 1" in rung.name]
    assert exact and max(exact) < 1e-4
    # Which rows an expert reads is known to the graph alone: those products take their inputs in float.
    nodes = [node for node in ir.load(tmp_path / "int4" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    levels = {node.attributes.get_int("accuracy_level") for node in nodes if ".experts." in node.inputs[1].name}
    assert levels == {1} and 4 in {node.attributes.get_int("accuracy_level") for node in nodes}
    # Schemes that quantize activations leave the experts in float, and say so.
    dynamic = quantize_bundle(tmp_path / "b", model, tmp_path / "dynamic", settings_for("dynamic"), **QUIET)
    assert dynamic.parity.passed and set(experts) <= set(open_bundle(tmp_path / "dynamic").manifest.quantization.kept)


@needs_exporters
@pytest.mark.slow
def test_experts_in_the_wrong_order_are_caught(small_base, tmp_path, monkeypatch) -> None:
    right = route._split_experts

    def wrong(graph, experts):
        sources = right(graph, experts)
        values = graph.graph.initializers
        first, second = (values[f"model.layers.0.mlp.experts.down_proj.{e}"] for e in (0, 1))
        first.const_value, second.const_value = second.const_value, first.const_value
        return sources

    monkeypatch.setattr(route, "_split_experts", wrong)
    model, adapter = small_base("qwen3_moe", ("block_output",))
    with pytest.raises(ParityError, match="relative logit error"):
        export_bundle(model, [adapter], tmp_path / "b", ExportSettings(exporter="transformers"), **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["b.parity.json"]


def test_dynamo_names_the_exporter_that_takes_experts(small_base, tmp_path) -> None:
    model, adapter = small_base("mixtral", ("block_output",))
    with pytest.raises(ExportError, match=r"mixtral is a mixture of experts, .*; use --exporter transformers") as caught:
        export_bundle(model, [adapter], tmp_path / "b", ExportSettings(), **QUIET)
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_transformers_without_exporters(small_base, tmp_path, monkeypatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.6" if name == "transformers" else real(name))
    with pytest.raises(BackendUnavailable, match=r"needs transformers 5.23, here is 4.57.6; pip install") as caught:
        export_bundle(small_base("llama")[0], [], tmp_path / "b", ExportSettings(exporter="transformers"), **QUIET)
    assert caught.value.exit_code == 4 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["mamba2", "lfm2"])
def test_decoders_with_another_state_than_keys_and_values(family, small_base, tmp_path) -> None:
    model, adapter = small_base(family, ("block_output",))
    with pytest.raises((InputError, ExportError)) as caught:
        export_bundle(model, [adapter], tmp_path / "b", ExportSettings(), **QUIET)
    assert family in str(caught.value) and len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_experts_matrix_of_another_base(tmp_path) -> None:
    import torch

    from reft_export.base.dequantized import _expert
    from runtimes.artifacts.manifest import WeightSource

    stacked, source = torch.zeros(4, 6, 8), WeightSource(parameter="mlp.experts.down_proj", axis=0, start=2, stop=3)
    _expert(stacked, source, torch.Size((6, 8))).fill_(1)
    assert stacked.sum((1, 2)).tolist() == [0, 0, 48, 0]
    with pytest.raises(BundleError, match=r"holds matrices of \[6, 8\] in the base and \[8, 6\] in the bundle"):
        _expert(stacked, source, torch.Size((8, 6)))

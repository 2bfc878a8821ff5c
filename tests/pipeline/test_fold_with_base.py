"""A graph of another tool and the base it came from: weights are matched by value, and the bundle is quantized as one of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from foreign_graphs import join_products, save_foreign
from test_fold_genai import stock as stock
from test_genai import check_stock_genai
from test_genai import python as python
from tiers import slow_and_long

from calibration.settings import settings_for
from calibration.weights import constant
from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.folding.fold import fold_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.refit import load_on_bundle
from reft_export.quantizing.settings import CalibrationRequest
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError, CalibrationError, GraphError, InputError, ParityError
from runtimes.text.tokenizer import Tokenizer

QUIET = {"sites": (), "force": False, "report": lambda _: None}
SILENT = {"report": lambda _: None}
INT4 = settings_for("weight-only", bits=4, block_size=16)


@pytest.fixture
def joined(bundle_folder, tmp_path) -> Path:
    """A llama whose q, k, v and whose gate, up are one product each, its weights named by number."""
    return save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", join=True)


def test_folded_with_its_base_and_quantized(joined, base_folder, adapter_folders, tmp_path) -> None:
    folders, base = adapter_folders("llama", ("untied",)), str(base_folder("llama"))
    result = fold_bundle(joined, folders, tmp_path / "b", model=base, **QUIET)
    assert result.parity.passed and [r.name for r in result.parity.rungs][:1] == ["base: full forward"]
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.model == open_own_record(base, bundle)
    assert bundle.golden_names == ("base", "untied") and (bundle.folder / "tokenizer.json").is_file()
    weights = bundle.manifest.weights
    joins = sorted(tuple(p.parameter.rsplit(".", 2)[1] for p in (s, *s.joined)) for s in weights.values() if s.joined)
    assert joins == [("gate_proj", "up_proj")] * 3 + [("q_proj", "k_proj", "v_proj")] * 3
    assert all(name.startswith("onnx::MatMul_") for name in weights)
    done = quantize_bundle(tmp_path / "b", base, tmp_path / "q", INT4, **SILENT)
    assert done.parity.passed and done.manifest.weights == weights
    assert sum(node.op_type == "MatMulNBits" for node in load_graph(tmp_path / "q" / "model.onnx").graph) == 13  # 4 a layer, and the head


def _without_past(model: ir.Model, *layers: int, declared: bool) -> None:
    """The cache of these layers comes out and does not go in: what optimum's decoder_model.onnx is in all of them.

    ``declared``: its inputs are there, and are asked for their length alone.
    """
    for value in [v for v in model.graph.inputs if v.name.startswith("past") and int(v.name.split(".")[1]) in layers]:
        own = next(use.node.inputs[1] for use in value.uses() if use.node.op_type == "Concat")
        for use in value.uses():
            if use.node.op_type == "Concat":
                use.node.resize_inputs(1)
            if use.node.op_type == "Concat" or not declared:
                use.node.replace_input_with(0, own)
        if not declared:
            model.graph.inputs.remove(value)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(
    ("layers", "declared", "match"),
    [
        ((0, 1, 2), False, r"cache: inputs 'past_key_values.<layer>.key\|value' missing"),
        ((1,), False, "cache: input 'past_key_values.1.key', input 'past_key_values.1.value' missing"),
        ((1,), True, "present.1.key does not hold what came in as past_key_values.1.key"),
    ],
    ids=["all", "a layer", "its length"],
)
def test_a_cache_that_only_comes_out_is_refused(
    layers, declared, match, with_base, bundle_folder, base_folder, adapter_folders, tmp_path
) -> None:
    def change(model: ir.Model) -> None:
        _without_past(model, *layers, declared=declared)

    source = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=change)
    base = str(base_folder("llama")) if with_base else None
    with pytest.raises(GraphError, match=match) as caught:
        fold_bundle(source, adapter_folders("llama", ("untied",)), tmp_path / "b", model=base, **QUIET)
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "b").exists()


def _renamed_cache(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name.startswith(("past", "present")):
            way, layer, part = value.name.split(".")
            value.name = f"{way.split('_')[0]}_{part}_{layer}"


def test_a_cache_of_other_names_answers_as_eager_does(bundle_folder, base_folder, adapter_folders, tmp_path) -> None:
    """And says of which family it is: with the config.json of its base beside it the fold goes through, with another's not."""
    source = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=_renamed_cache)
    assert "past_key_0" in {value.name for value in load_graph(source).graph.inputs}
    folders, config = adapter_folders("llama", ("untied",)), source.parent / "config.json"
    config.write_text('{"model_type": "mistral"}')
    with pytest.raises(AdapterError, match=r"trained on llama, a llama; .*config.json says that the graph is a mistral"):
        fold_bundle(source, folders, tmp_path / "b", **QUIET)
    config.write_text((base_folder("llama") / "config.json").read_text())
    assert fold_bundle(source, folders, tmp_path / "b", **QUIET).not_run == ""
    assert host_ladder(open_bundle(tmp_path / "b"), str(base_folder("llama")), **SILENT).passed


def open_own_record(base: str, bundle) -> object:
    """The base's own record, but for the context, which a graph without a config does not state."""
    from reft_export.base.model_record import model_record

    return replace(model_record(load_base(base)), context_length=bundle.manifest.model.context_length)


def test_the_base_brings_its_tokenizer(joined, base_folder, adapter_folders, tmp_path) -> None:
    base = base_folder("llama")
    fold_bundle(joined, adapter_folders("llama", ("untied",)), tmp_path / "b", **QUIET)
    assert not (tmp_path / "b" / "tokenizer.json").exists()
    quantize_bundle(tmp_path / "b", str(base), tmp_path / "q", INT4, **SILENT)
    assert json.loads((tmp_path / "q" / "tokenizer.json").read_bytes()) == json.loads((base / "tokenizer.json").read_bytes())
    bundle = open_bundle(tmp_path / "q")
    assert Tokenizer.load(bundle.folder, bundle.manifest.model).encode("hello")


def test_the_weights_tell_the_width(bundle_folder, base_folder, tmp_path) -> None:
    """Of a graph that declares no inner shape, folded without adapters and without config.json beside it."""

    def undeclare(model: ir.Model) -> None:
        for value in (v for node in model.graph for v in node.outputs if not v.is_graph_output()):
            value.shape = None

    graph = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=undeclare)
    options = {**QUIET, "sites": (Site(layer=1),)}
    fold_bundle(graph, [], tmp_path / "alone", **options)
    assert open_bundle(tmp_path / "alone").manifest.model.hidden_size == load_base(str(base_folder("llama"))).info.hidden_size
    assert fold_bundle(graph, [], tmp_path / "b", model=str(base_folder("llama")), **options).parity.passed


@pytest.mark.parametrize("scheme", slow_and_long(["weight-only", "static"], "static"))
def test_folded_without_its_base(scheme, joined, base_folder, adapter_folders, prompts_file, tmp_path) -> None:
    """Quantize finds the weights itself, and nothing is written to the bundle that it reads."""
    base = str(base_folder("llama"))
    fold_bundle(joined, adapter_folders("llama", ("untied", "prompt-relu")), tmp_path / "b", **QUIET)
    before = {p: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    request = CalibrationRequest(data=prompts_file, decode_tokens=4) if scheme == "static" else None
    done = quantize_bundle(tmp_path / "b", base, tmp_path / "q", settings_for(scheme), calibration=request, **SILENT)
    assert done.parity.passed
    assert {p: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()} == before
    assert done.manifest.model.fingerprint == load_base(base).info.fingerprint
    assert open_bundle(tmp_path / "q").golden_names == ("base", "untied", "prompt-relu")


@pytest.mark.parametrize("family", slow_and_long(["llama", "phi3"], "phi3"))
def test_a_genai_folder(family, stock, base_folder, adapter_folders, python, tmp_path) -> None:
    """The builder as its users call it joins q, k, v; the quantized folder is one that onnxruntime-genai opens, settings and all."""
    base = str(base_folder(family))
    fold_bundle(stock(family, "fp32"), adapter_folders(family, ("untied",)), tmp_path / "b", model=base, **QUIET)
    done = quantize_bundle(tmp_path / "b", base, tmp_path / "q", INT4, **SILENT)
    assert done.parity.passed
    linear = {s.parameter for source in done.manifest.weights.values() for s in (source, *source.joined)}
    assert {f"{name}.weight" for name, m in load_base(base).model.named_modules() if hasattr(m, "in_features")} <= linear
    assert json.loads((tmp_path / "q" / "genai_config.json").read_text())["search"]["top_k"] == 7
    check_stock_genai(open_bundle(tmp_path / "q"), python)


@pytest.mark.slow
def test_weights_that_the_builder_quantized(stock, base_folder, adapter_folders, tmp_path) -> None:
    """What another tool rounded has no equal in the checkpoint: one line, from whichever verb."""
    source, base = stock("llama", "int4"), str(base_folder("llama"))
    with pytest.raises(GraphError, match="were quantized by the tool that made the graph .*MatMulNBits.*leave --model out") as caught:
        fold_bundle(source, [], tmp_path / "b", model=base, **QUIET)
    assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()
    result = fold_bundle(source, adapter_folders("llama", ("untied",)), tmp_path / "b", **QUIET)
    assert result.quantized > 10
    with pytest.raises(GraphError, match="nothing is left that could be quantized against the base; fold its float graph"):
        quantize_bundle(tmp_path / "b", base, tmp_path / "q", INT4, **SILENT)
    with pytest.raises(GraphError, match="cannot be told from the checkpoint's"):
        load_on_bundle(open_bundle(tmp_path / "b"), base)
    assert not (tmp_path / "q").exists()


def test_weights_in_a_few_bits(bundle_folder, base_folder, tmp_path) -> None:
    """DequantizeLinear in the graph, as other quantizers leave it."""

    def quantize_one(model: ir.Model) -> None:
        node = next(n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].const_value is not None)
        old = node.inputs[1]
        array = old.const_value.numpy()
        values = [
            constant(f"{old.name}.{n}", a)
            for n, a in (("q", np.round(array * 99).clip(-127, 127).astype(np.int8)), ("scale", np.float32(1 / 99)))
        ]
        for value in values:
            model.graph.register_initializer(value)
        restore = ir.node("DequantizeLinear", values, name="restore")
        restore.outputs[0].name = "restored"
        model.graph.insert_before(node, restore)
        node.replace_input_with(1, restore.outputs[0])

    graph = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=quantize_one)
    with pytest.raises(GraphError, match=r"1 weights were quantized .*\.q, INT8, of DequantizeLinear"):
        fold_bundle(graph, [], tmp_path / "b", model=str(base_folder("llama")), **QUIET)


def test_other_bases(joined, base_folder, adapter_folders, tmp_path) -> None:
    """Another depth or vocabulary, the same sizes with other weights, one weight changed: each is refused, and nothing is written."""
    other = tiny.save_base(tmp_path / "other", "llama", num_hidden_layers=2)
    with pytest.raises(AdapterError, match=r"has 3 layers, other \(fingerprint \w{12}\) 2; pass the base"):
        fold_bundle(joined, [], tmp_path / "b", model=str(other), **QUIET)
    same_size = tiny.save_base(tmp_path / "random", "llama", initializer_range=0.03)
    with pytest.raises(AdapterError, match=r"no weight of .* is a parameter of random \(fingerprint \w{12}\)"):
        fold_bundle(joined, [], tmp_path / "b", model=str(same_size), **QUIET)
    with pytest.raises(AdapterError, match=r"was trained on llama \(fingerprint \w{12}\), this base is random \(\w{12}\)"):
        fold_bundle(joined, adapter_folders("llama", ("untied",)), tmp_path / "b", model=str(same_size), **QUIET)
    with pytest.raises(InputError, match="holds the input"):
        fold_bundle(joined, [], tmp_path / "other", model=str(other), **{**QUIET, "force": True})
    assert not (tmp_path / "b").exists()


def _scale(model: ir.Model) -> None:
    """Half of one weight and a Mul by two: the same answers, by a matrix that no parameter holds."""
    node = next(n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].const_value is not None)
    weight = node.inputs[1]
    weight.const_value = ir.tensor(weight.const_value.numpy() / 2, name=weight.name)
    two = constant("two", np.float32(2))
    model.graph.register_initializer(two)
    double = ir.node("Mul", [node.outputs[0], two], name="double")
    double.outputs[0].name = "doubled"
    model.graph.insert_after(node, double)
    for use in [use for use in node.outputs[0].uses() if use.node is not double]:
        use.node.replace_input_with(use.idx, double.outputs[0])


@pytest.mark.slow
def test_a_weight_that_the_exporter_scaled(bundle_folder, base_folder, adapter_folders, tmp_path) -> None:
    base = str(base_folder("llama"))
    graph = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=_scale)
    assert fold_bundle(graph, adapter_folders("llama", ("untied",)), tmp_path / "b", model=base, **QUIET).parity.passed
    with pytest.raises(CalibrationError, match=r"1 weights to quantize are no parameters .*--keep-high: onnx::MatMul_\d+$") as caught:
        quantize_bundle(tmp_path / "b", base, tmp_path / "q", INT4, **SILENT)
    kept = replace(INT4, keep_high=(str(caught.value).rsplit(" ", 1)[1],))
    assert quantize_bundle(tmp_path / "b", base, tmp_path / "q", kept, **SILENT).parity.passed


@pytest.mark.slow
def test_a_graph_that_computes_something_else(bundle_folder, base_folder, adapter_folders, tmp_path) -> None:
    """The right weights in the wrong places: values match, answers do not, and neither verb leaves anything."""

    def swap(model: ir.Model) -> None:
        nodes = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].const_value is not None]
        first, second = [n for n in nodes if n.inputs[1].const_value.shape == nodes[0].inputs[1].const_value.shape][:2]
        one, other = first.inputs[1], second.inputs[1]
        first.replace_input_with(1, other)
        second.replace_input_with(1, one)

    base, adapters = str(base_folder("llama")), adapter_folders("llama", ("untied",))
    graph = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "foreign", change=swap)
    with pytest.raises(ParityError, match="was it exported from another checkpoint"):
        fold_bundle(graph, adapters, tmp_path / "b", model=base, **QUIET)
    assert not (tmp_path / "b").exists()
    fold_bundle(graph, adapters, tmp_path / "b", **QUIET)
    with pytest.raises(ParityError):
        quantize_bundle(tmp_path / "b", base, tmp_path / "q", INT4, **SILENT)
    assert not (tmp_path / "q").exists()


def test_join_is_what_it_says(bundle_folder) -> None:
    model = load_graph(bundle_folder("llama") / "model.onnx")
    assert join_products(model.graph) == 2 * tiny.LAYERS


def test_fold_needs_no_torch_without_a_base(joined, adapter_folders, tmp_path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom reft_export.folding.fold import fold_bundle\n"
        "fold_bundle(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), sites=(), force=False, report=print)\n"
        "bad = {'torch', 'transformers', 'onnxruntime.quantization'} & set(sys.modules)\nassert not bad, bad"
    )
    adapter = adapter_folders("llama", ("untied",))[0]
    done = subprocess.run([sys.executable, "-c", code, joined, adapter, tmp_path / "b"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]

"""Export, fold and gate, end to end: what comes out says what eager PyTorch says, or nothing comes out."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from reseal import reseal

from graph_passes.external import load_graph
from reft_export.base.load import base_from_memory, load_base
from reft_export.exporting import dynamo
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.ladder import host_ladder
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.op import FIRST_LOGIT
from runtimes.errors import AdapterError, InputError, ParityError
from runtimes.generation import greedy_tokens
from runtimes.golden import check_golden
from runtimes.native_library import find_op_library
from runtimes.ort.session import OrtSession

QUIET = {"report": lambda _: None}


def _check_export(family, base_folder, adapter_folders, output, **settings):
    result = export_bundle(str(base_folder(family)), adapter_folders(family), output, ExportSettings(**settings), **QUIET)
    assert result.parity.passed
    return result


def _check_rows_alone(folder) -> None:
    """Batch 1: every golden prompt alone gets the 64 greedy tokens that eager gave it in a padded batch."""
    bundle = open_bundle(folder)
    session = OrtSession(bundle, threads=1)
    for name in bundle.golden_names:
        session.set_adapter(None if name == "base" else name)
        golden = bundle.golden(name)
        for ids, length, tokens in zip(golden["input_ids"], golden["prompt_length"], golden["greedy_tokens"], strict=True):
            assert greedy_tokens(session, [ids[:length].tolist()], 64)[0].tolist() == tokens.tolist(), name


@pytest.mark.parametrize(("family", "target"), [("llama", "onnxruntime"), ("gpt2", "tensorrt")])
def test_fp32_bundle_is_what_eager_says(family, target, bundle_folder) -> None:
    """Every adapter and the base: logits within 2e-5, 64 greedy tokens equal, cache continuity in every layout."""
    bundle = open_bundle(bundle_folder(family, target=target))
    session = OrtSession(bundle, threads=1)

    report = check_golden(bundle, session)
    assert report.passed
    assert {r.budget.logits for r in report.rungs} == {2e-5}
    greedy = [r.figures.greedy_equal for r in report.rungs if r.figures.greedy_equal is not None]
    assert greedy == [True] * 7
    assert all(bundle.golden(name)["greedy_tokens"].shape[1] == 64 for name in bundle.golden_names)
    ways = {r.name.partition(": ")[2] for r in report.rungs}
    assert ways >= {"full forward", "prefill and decode", "chunked prefill", "single rows"}
    assert ("left padding" in ways) == (target == "tensorrt")
    _check_rows_alone(bundle.folder)
    # The adapters change the answer: an edit that did nothing would pass everything above.
    base = bundle.golden("base")["logits"]
    assert all(np.abs(bundle.golden(n)["logits"] - base).max() > 0.1 for n in bundle.adapter_names)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in ("llama", "gpt2")])
def test_every_family(family, base_folder, adapter_folders, tmp_path) -> None:
    result = _check_export(family, base_folder, adapter_folders, tmp_path / "b")
    greedy = [r.figures.greedy_equal for r in result.parity.rungs if r.figures.greedy_equal is not None]
    assert greedy == [True] * 7
    _check_rows_alone(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_quantized_families(family, base_folder, adapter_folders, tmp_path) -> None:
    result = _check_export(family, base_folder, adapter_folders, tmp_path / "b", precision="int4")
    exact = [r for r in result.parity.rungs if "level 1" in r.name]
    assert exact and max(r.figures.max_relative for r in exact) < 1e-4


def test_logits_last(base_folder, adapter_folders, tmp_path) -> None:
    folders = adapter_folders("llama", ("untied",))
    result = export_bundle(str(base_folder("llama")), folders, tmp_path / "b", ExportSettings(logits="last"), **QUIET)
    assert result.parity.passed
    logits = next(o for o in result.manifest.outputs if o.name == "logits")
    assert logits.shape[1] == 1 and FIRST_LOGIT not in load_graph(tmp_path / "b" / "model.onnx").graph.initializers


@pytest.mark.slow
def test_half_precision(base_folder, adapter_folders, tmp_path) -> None:
    """float16 runs here and is held to its budget; bfloat16 is checked structurally, and says so."""
    folders = adapter_folders("llama", ("untied", "prompt-relu"))
    half = export_bundle(str(base_folder("llama")), folders, tmp_path / "fp16", ExportSettings(precision="fp16"), **QUIET)
    assert half.parity.passed and half.parity.rungs[0].budget.name == "fp16"
    brain = export_bundle(str(base_folder("llama")), folders, tmp_path / "bf16", ExportSettings(precision="bf16"), **QUIET)
    assert brain.parity is None and "structurally" in brain.note
    assert {r.dtype for r in brain.manifest.outputs} == {"bfloat16"}
    open_bundle(tmp_path / "bf16")


def test_no_adapter_puts_nodes_at_every_block_output(base_folder, tmp_path) -> None:
    """An adapter trained later swaps into a bundle that was exported without one."""
    result = export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(), **QUIET)
    assert [(n.layer, n.stream) for n in result.manifest.nodes] == [(i, "block_output") for i in range(tiny.LAYERS)]


def test_two_streams_and_extra_sites(base_folder, tmp_path) -> None:
    info = load_base(base_folder("llama")).info
    for stream in ("attention_output", "mlp_output", "block_input"):
        save_adapter(tiny.random_adapter(info, stream=stream), tmp_path / "a" / stream)
    folders = sorted((tmp_path / "a").iterdir())
    result = export_bundle(str(base_folder("llama")), folders, tmp_path / "b", ExportSettings(sites=(Site(layer=1),)), **QUIET)
    assert result.parity.passed
    assert len(result.manifest.nodes) == 7


def test_weights_map_names_every_matrix(bundle_folder, base_folder) -> None:
    manifest = open_bundle(bundle_folder("llama")).manifest
    model = load_base(base_folder("llama")).model
    matrices = {n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim == 2}
    assert matrices <= {source.parameter for source in manifest.weights.values()}


# --- refusals: one clear line, nothing written, nothing lost ----------------------------------------------------------------


def test_wrong_base_names_both(base_folder, adapter_folders, tmp_path) -> None:
    other = tiny.save_base(tmp_path / "other", "llama", rms_norm_eps=1e-4)
    with pytest.raises(AdapterError, match=r"adapter tied was trained on llama \(fingerprint .*other"):
        export_bundle(str(other), adapter_folders("llama", ("tied",)), tmp_path / "b", ExportSettings(), **QUIET)
    assert not (tmp_path / "b").exists()


def test_unknown_layer(base_folder, tmp_path) -> None:
    with pytest.raises(InputError, match=r"layer 31 does not exist in llama \(3 layers, 0 to 2\)"):
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(sites=(Site(layer=31),)), **QUIET)


def test_existing_output_is_kept(base_folder, tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(), **QUIET)
    assert (tmp_path / "b" / "precious").read_text() == "mine"


@pytest.mark.slow
def test_a_bundle_of_a_model_in_memory_is_that_of_its_folder(bundle_folder, base_folder, adapter_folders, tmp_path) -> None:
    """Graph, adapters, golden arrays and manifest, but for the base's name and the hashes of what holds it; the model stays as it was."""
    base = load_base(base_folder("llama"))
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    arguments = [adapter_folders("llama"), tmp_path / "b", ExportSettings()]
    result = export_bundle(base_from_memory(base.model, base.tokenizer, name="notebook"), *arguments, **QUIET)
    assert result.parity.passed and [path.name for path in tmp_path.iterdir()] == ["b"]

    ours, theirs = (open_bundle(folder) for folder in (tmp_path / "b", bundle_folder("llama")))
    renamed = replace(ours.manifest.model, name=theirs.manifest.model.name)
    own = {"files": {}, "digest": ""}
    assert replace(ours.manifest, model=renamed, **own) == replace(theirs.manifest, **own)
    for path in ("model.onnx", "model.onnx.data", *(f"adapters/{name}.onnx_adapter" for name in ours.adapter_names)):
        assert (ours.folder / path).read_bytes() == (theirs.folder / path).read_bytes(), path
    for name in ours.golden_names:
        for array, value in theirs.golden(name).items():
            assert np.array_equal(ours.golden(name)[array], value), (name, array)
    assert dict.fromkeys(before, True) == {name: torch.equal(p, before[name]) for name, p in base.model.named_parameters()}


def test_what_no_model_in_memory_can_be_exported_as(base_folder, adapter_folders, tmp_path) -> None:
    def refused(match: str, model: Any, kind: type[Exception] = InputError, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            export_bundle(model, more.pop("adapters", []), tmp_path / "b", ExportSettings(**more.pop("settings", {})), **more, **QUIET)
        assert not list(tmp_path.iterdir())

    model = tiny.build("llama")
    refused("a tokenizer goes with a model in memory", base_folder("llama"), tokenizer=tiny.tokenizer())
    refused("this is a Linear; load it with from_pretrained", torch.nn.Linear(2, 2))
    refused("layer 9 does not exist in llama", model, settings={"sites": (Site(layer=9),)})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.neg_()
    adapters = adapter_folders("llama", ("untied",))
    refused("this base is llama: it has other values in layers.1.mlp.up_proj.weight", model, AdapterError, adapters=adapters)
    if importlib.util.find_spec("onnxruntime_genai") is not None:
        refused("has no tokenizer, which the builder reads", model, settings={"exporter": "builder"})


def test_interrupt_leaves_nothing_and_loses_nothing(base_folder, tmp_path, monkeypatch) -> None:
    """Ctrl-C in mid-export with --force over an existing bundle: the old one stays, no partial folder remains."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{}")
    (tmp_path / "b" / "precious").write_text("mine")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dynamo, "make_row_major", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(), force=True, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "precious").read_text() == "mine"


def test_force_replaces_nothing_but_our_own(base_folder, adapter_folders, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(InputError, match="holds other files than ours"):
        export_bundle(str(base_folder("llama")), [], tmp_path / "thesis", ExportSettings(), force=True, **QUIET)
    (adapter,) = adapter_folders("llama", ("tied",))
    for output in (adapter, adapter.parent, base_folder("llama")):
        with pytest.raises(InputError, match="holds the input"):
            export_bundle(str(base_folder("llama")), [adapter], output, ExportSettings(), force=True, **QUIET)
    assert (adapter / "adapter.json").is_file() and (base_folder("llama") / "config.json").is_file()


def test_planted_fault_is_caught_by_the_gate(base_folder, adapter_folders, tmp_path, monkeypatch) -> None:
    """An export that is silently wrong leaves no bundle, and a report of what was measured."""
    right = dynamo.make_row_major

    def wrong(model):
        sources = right(model)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = weight.data * 1.01
        return sources

    monkeypatch.setattr(dynamo, "make_row_major", wrong)
    with pytest.raises(ParityError, match="relative logit error") as caught:
        export_bundle(str(base_folder("llama")), adapter_folders("llama", ("tied",)), tmp_path / "b", ExportSettings(), **QUIET)
    assert caught.value.exit_code == 3
    assert [p.name for p in tmp_path.iterdir()] == ["b.parity.json"]


def test_damaged_adapter_is_refused(adapter_folders, tmp_path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(adapter_folders("llama", ("tied",))[0], folder)
    tensors = folder / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(folder)
    reseal(folder, mystery=1)
    with pytest.raises(AdapterError, match="unknown keys"):
        load_adapter(folder)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_host_ladder(precision, base_folder, bundle_folder, tmp_path) -> None:
    # Its own: beside the shared one, other workers make theirs meanwhile.
    folder = shutil.copytree(bundle_folder("llama", precision), tmp_path / "bundle")
    siblings = set(folder.parent.iterdir())
    report = host_ladder(open_bundle(folder), str(base_folder("llama")), **QUIET)
    assert report.passed
    assert set(folder.parent.iterdir()) == siblings, "temporary variants are gone"
    kinds = {r.name.partition(",")[0] for r in report.rungs}
    expected = {"exported", "folded"} if precision == "fp32" else {"int4 level 1", "int4 level 4"}
    fused = {"fused"} if find_op_library() else set()
    assert kinds == {"numpy", "function"} | fused | expected

"""``--exporter builder``: onnxruntime-genai's fused graphs become bundles that say what eager PyTorch says, or none at all."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from test_genai import check_stock_genai
from test_genai import python as python
from tiers import slow_and_long

from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.exporting import builder, installed
from reft_export.exporting.export import ExportSettings, export_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.op import FIRST_LOGIT
from runtimes.errors import BackendUnavailable, ExportError, InputError, ParityError
from runtimes.generation import GenerationSettings, generate, greedy_tokens, padding_of
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "granite", "smollm3")
QUIET = {"report": lambda _: None}
NAMES = ("untied", "prompt-relu")


def _parameters(folder) -> set[str]:
    model = load_base(folder).model
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}


@pytest.mark.usefixtures("genai_installed")
@pytest.mark.parametrize("family", slow_and_long(FAMILIES, "llama", "qwen3", "gemma2", "phi3"))
def test_every_family_that_the_builder_gets_right(family, base_folder, adapter_folders, python, tmp_path) -> None:
    settings = ExportSettings(exporter="builder")
    result = export_bundle(str(base_folder(family)), adapter_folders(family, NAMES), tmp_path / "b", settings, **QUIET)
    manifest = result.manifest
    assert max(r.figures.max_relative for r in result.parity.rungs) < 2e-5
    assert [r.figures.greedy_equal for r in result.parity.rungs if r.figures.greedy_equal is not None] == [True] * 3
    assert (manifest.exporter, manifest.padding, manifest.genai) == ("builder", "none", "supported")
    assert manifest.kv_cache == "in-place"
    assert {source.parameter for source in manifest.weights.values()} == _parameters(base_folder(family))
    operators = [node.op_type for node in ir.load(tmp_path / "b" / "model.onnx").graph]
    assert operators.count("GroupQueryAttention") == tiny.LAYERS
    caches = [t.shape for t in manifest.inputs if t.name.startswith("past_key_values")]
    assert all(isinstance(shape[1], int) and isinstance(shape[3], int) for shape in caches)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"] and not (tmp_path / "b" / ".exporter").exists()
    check_stock_genai(open_bundle(tmp_path / "b"), python)


@pytest.mark.slow
@pytest.mark.usefixtures("genai_installed")
@pytest.mark.parametrize(("family", "precision"), [("llama", "int4"), ("phi3", "int4"), ("qwen2", "int8"), ("llama", "fp16")])
def test_precisions(family, precision, base_folder, adapter_folders, tmp_path) -> None:
    """Quantized by the project's own quantizer; phi3's checkpoint holds q, k, v in one parameter that the builder splits."""
    settings = ExportSettings(exporter="builder", precision=precision)
    result = export_bundle(str(base_folder(family)), adapter_folders(family, NAMES), tmp_path / "b", settings, **QUIET)
    assert result.parity.passed
    exact = [r.figures.max_relative for r in result.parity.rungs if "level 1" in r.name]
    assert bool(exact) == precision.startswith("int") and max(exact, default=0) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("genai_installed")
@pytest.mark.parametrize("settings", [{"logits": "last"}, {}], ids=str)
@pytest.mark.parametrize(("cache", "padding"), [("in-place", "right"), ("appended", "none")])
def test_batches_and_chunks(settings, cache, padding, base_folder, adapter_folders, tmp_path) -> None:
    """GroupQueryAttention takes a chunk for one row only, and where its cache is copied no rows of unequal length: answers must not show
    it."""
    folders = adapter_folders("llama", ("untied",))
    export_bundle(str(base_folder("llama")), folders, tmp_path / "b", ExportSettings(exporter="builder", **settings), **QUIET)
    bundle = open_bundle(tmp_path / "b")
    bundle = replace(bundle, manifest=replace(bundle.manifest, kv_cache=cache))
    session = OrtSession(bundle, threads=1, adapter="untied")
    assert padding_of(session) == padding
    assert (FIRST_LOGIT in load_graph(bundle.graph_path).graph.initializers) == ("logits" not in settings)
    golden = bundle.golden("untied")
    prompts = [row[:n].tolist() for row, n in zip(golden["input_ids"], golden["prompt_length"], strict=True)]
    prompts += [prompts[0][::-1], prompts[1]]
    together = greedy_tokens(session, prompts, 64)
    assert np.array_equal(together[:4], golden["greedy_tokens"])
    options = GenerationSettings(max_new_tokens=8)
    tokenizer = Tokenizer.load(bundle.folder)
    whole, chunked = (generate(session, tokenizer, prompts, options, prefill_chunk=c) for c in (0, 3))
    assert [g.tokens for g in whole] == [g.tokens for g in chunked]


@pytest.mark.slow
@pytest.mark.usefixtures("genai_installed")
def test_a_family_that_the_builder_exports_wrongly(tmp_path) -> None:
    """onnxruntime-genai 0.18 takes OLMo's norms to have another epsilon. It says nothing; the gate does."""
    base = tiny.save_base(tmp_path / "olmo", "olmo")
    (tmp_path / "out").mkdir()
    with pytest.raises(ParityError, match="no bundle was written") as caught:
        export_bundle(str(base), [], tmp_path / "out" / "b", ExportSettings(exporter="builder"), **QUIET)
    assert caught.value.exit_code == 3
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.parity.json"]


@pytest.mark.slow
@pytest.mark.usefixtures("genai_installed")
def test_without_its_window_mistral_is_caught(base_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(builder, "_write_windows", lambda *_: None)
    with pytest.raises(ParityError, match="relative logit error"):
        export_bundle(str(base_folder("mistral")), [], tmp_path / "b", ExportSettings(exporter="builder"), **QUIET)


@pytest.mark.slow
@pytest.mark.usefixtures("genai_installed")
def test_families_that_the_builder_does_not_know(base_folder, tmp_path) -> None:
    with pytest.raises(ExportError, match="could not export opt: .*not currently supported.*; use --exporter dynamo") as caught:
        export_bundle(str(base_folder("opt")), [], tmp_path / "b", ExportSettings(exporter="builder"), **QUIET)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_package(base_folder, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime_genai" else find(name, *rest))
    with pytest.raises(BackendUnavailable, match=r"pip install 'reft-export\[genai\]'") as caught:
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(exporter="builder"), **QUIET)
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_base_without_tokenizer(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(installed.CHECKS, "builder", lambda: None)
    tiny.build("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="has no tokenizer, which the builder reads"):
        export_bundle(tmp_path / "llama", [], tmp_path / "bundle", ExportSettings(exporter="builder"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("settings", "match"), [({"opset": 23}, "chooses the opset itself"), ({"precision": "bf16"}, "dynamo only")])
def test_settings_that_the_builder_does_not_take(settings, match) -> None:
    with pytest.raises(InputError, match=match):
        ExportSettings(exporter="builder", **settings)

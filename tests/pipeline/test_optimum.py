"""optimum-onnx's graphs: ``--exporter optimum``, and ``fold`` on the folder that optimum-cli writes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch
import transformers

from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.folding.fold import fold_bundle
from reft_export.parity.ladder import host_ladder
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import BackendUnavailable, InputError

QUIET = {"report": lambda _: None}
NEW = not transformers.__version__.startswith("4.57.")
needs_optimum = pytest.mark.skipif(
    NEW, reason=f"optimum-onnx refuses transformers {transformers.__version__}; make test-transformers-4 runs it"
)


@needs_optimum
@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("gpt2", "fp32"), ("llama", "int4")])
def test_export(family, precision, base_folder, adapter_folders, tmp_path) -> None:
    """Linear weights are called onnx::MatMul_<n> there: the manifest's map is found by value, and parity of int4 stands on it."""
    folders = adapter_folders(family, ("untied", "prompt-relu"))
    settings = ExportSettings(exporter="optimum", precision=precision)
    result = export_bundle(str(base_folder(family)), folders, tmp_path / "b", settings, **QUIET)
    assert result.parity.passed
    assert (result.manifest.exporter, result.manifest.padding, result.manifest.opset) == ("optimum", "left", 20)
    model = load_base(base_folder(family)).model
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert linear <= {source.parameter for source in result.manifest.weights.values()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


@needs_optimum
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fold(family, base_folder, adapter_folders, tmp_path) -> None:
    command = [sys.executable, "-m", "optimum.exporters.onnx", "--model", base_folder(family), "--task", "text-generation-with-past"]
    done = subprocess.run([str(part) for part in [*command, tmp_path / "onnx"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = adapter_folders(family, ("untied", "prompt-relu"))
    fold_bundle(tmp_path / "onnx", folders, tmp_path / "b", sites=(), force=False, **QUIET)
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.model.context_length == 512
    assert host_ladder(bundle, str(base_folder(family)), **QUIET).passed


@pytest.mark.skipif(not NEW, reason="this transformers is the one that optimum-onnx takes")
def test_refused_with_another_transformers(base_folder, tmp_path) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"needs transformers 4.57, here is .*pip install 'reft-export\[cpu,host,optimum\]'"
    ) as caught:
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(exporter="optimum"), **QUIET)
    assert caught.value.exit_code == 4 and not list(tmp_path.iterdir())


def test_missing_package(base_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.6")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "optimum" else find(name, *rest))
    with pytest.raises(BackendUnavailable, match="needs optimum-onnx, which is not installed"):
        export_bundle(str(base_folder("llama")), [], tmp_path / "b", ExportSettings(exporter="optimum"), **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"logits": "last"}], ids=str)
def test_settings_that_it_does_not_take(settings) -> None:
    with pytest.raises(InputError, match="float32 graphs with all logits"):
        ExportSettings(exporter="optimum", **settings)

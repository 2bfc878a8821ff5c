"""``fold`` on a folder that onnxruntime-genai's own builder made: it stays such a folder, and stock onnxruntime-genai steers with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from test_genai import check_stock_genai
from test_genai import python as python

from graph_passes.external import load_graph
from graph_passes.unfold import unfold_graph
from reft_export.folding.fold import fold_bundle
from reft_export.parity.ladder import host_ladder
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import GraphError, InputError
from runtimes.ort.session import OrtSession

QUIET = {"sites": (), "force": False, "report": lambda _: None}


@pytest.fixture
def stock(genai_installed, base_folder, tmp_path):
    """A folder made by the builder as its users call it: fused q, k, v and its own int4."""

    def make(family: str, precision: str) -> Path:
        folder = tmp_path / f"{family}-{precision}"
        arguments = ["-m", base_folder(family), "-o", folder, "-p", precision, "-e", "cpu", "-c", tmp_path / "cache"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments, "--extra_options", "hf_token=false"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        config = json.loads((folder / "genai_config.json").read_text())
        config["search"]["top_k"] = 7  # as a user would
        (folder / "genai_config.json").write_text(json.dumps(config))
        (folder / "merges.txt").write_text("h e")
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("llama", "int4"), ("qwen3", "int4")])
def test_stays_a_genai_folder(family, precision, stock, base_folder, adapter_folders, python, tmp_path) -> None:
    source, output = stock(family, precision), tmp_path / "folded"
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    result = fold_bundle(source, adapter_folders(family, ("untied", "prompt-relu", "all-direft")), output, **QUIET)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before, "the source was written to"
    assert set(before) <= {p.name for p in output.iterdir()}
    assert json.loads((output / "genai_config.json").read_text()) == json.loads(before["genai_config.json"])
    assert "SkipSimplifiedLayerNormalization" in result.found["0.block_output"]
    bundle = open_bundle(output)
    assert (bundle.manifest.genai, bundle.manifest.padding, bundle.manifest.model.hidden_size) == ("supported", "none", 64)
    answers = check_stock_genai(bundle, python)
    assert len({tuple(a) for a in answers.values()}) > 1
    # The builder's int4 rounds activations too (accuracy level 4): a norm split in two flips single roundings.
    _check_base_is_unchanged(source / "model.onnx", bundle, budget=2e-5 if precision == "fp32" else 2e-2)
    if precision == "fp32":
        assert host_ladder(bundle, str(base_folder(family)), report=lambda _: None).passed


def _check_base_is_unchanged(source: Path, bundle, *, budget: float) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(source), options)
    ids = np.random.default_rng(2).integers(0, 250, (2, 9))
    empty = {i.name: np.zeros((2, i.shape[1], 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})
    folded = OrtSession(bundle).step(ids, np.ones_like(ids)).logits
    assert np.abs(folded - logits).max() <= budget * np.abs(logits).max()


def _folder(tmp_path: Path, bundle_folder, config: object) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes((bundle_folder("llama") / name).read_bytes())
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "decoder",
    [{"pipeline": [{}], "filename": "model.onnx"}, {}, {"filename": "../model.onnx"}],
    ids=["pipeline", "no file", "outside"],
)
def test_configs_of_anything_but_one_graph_are_refused(decoder, bundle_folder, tmp_path) -> None:
    folder = _folder(tmp_path, bundle_folder, {"model": {"decoder": decoder}})
    with pytest.raises(InputError, match="names no single decoder graph"):
        fold_bundle(folder, [], tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_the_op_library_that_the_config_names_comes_along(bundle_folder, tmp_path) -> None:
    def config(library: str) -> dict:
        return {"model": {"decoder": {"filename": "model.onnx", "session_options": {"custom_ops_library": library}}}}

    folder = _folder(tmp_path, bundle_folder, config("lib/ops.so"))
    _unfold(folder)
    with pytest.raises(InputError, match="names the op library lib/ops.so, which is not a file"):
        fold_bundle(folder, [], tmp_path / "out", **QUIET)
    (folder / "lib").mkdir()
    (folder / "lib" / "ops.so").write_text("a library")
    fold_bundle(folder, [], tmp_path / "out", **QUIET)
    assert (tmp_path / "out" / "lib" / "ops.so").read_text() == "a library"
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text()) == config("lib/ops.so")
    (tmp_path / "ops.so").write_text("not inside")
    (folder / "genai_config.json").write_text(json.dumps(config("../ops.so")))
    with pytest.raises(InputError, match="not a file of"):
        fold_bundle(folder, [], tmp_path / "out2", **QUIET)
    assert not (tmp_path / "out2").exists()


def _unfold(folder: Path) -> None:
    model = load_graph(folder / "model.onnx")
    unfold_graph(model)
    ir.save(model, folder / "model.onnx")


def test_unknown_operators_are_refused(bundle_folder, tmp_path) -> None:
    folder = _folder(tmp_path, bundle_folder, {"model": {"decoder": {"filename": "model.onnx"}}})
    model = load_graph(folder / "model.onnx")
    next(n for n in model.graph if n.op_type == "Sigmoid").domain = "my.ops"
    model.opset_imports["my.ops"] = 1
    ir.save(model, folder / "model.onnx")
    with pytest.raises(GraphError, match="is an operator of 'my.ops'"):
        fold_bundle(folder, [], tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_every_stop_token_of_the_owner_is_kept(tmp_path) -> None:
    """Also one that the generation config lacks and no tokenizer marks as special."""
    from reft_export.folding.graph_record import stated_config as _config
    from reft_export.folding.graph_record import stated_stop_tokens

    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": [5, 9]}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert stated_stop_tokens(tmp_path, _config(tmp_path), 320) == (5, 9)

"""RED end to end: bundles of RED and LoReFT adapters on the families, every place where an adapter goes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
import rounding
import tiny
import torch
from shared_folders import shared_folder
from test_genai import check_stock_genai
from test_genai import python as python
from test_schemes import request_for
from tiers import slow_and_long
from typer.testing import CliRunner

from calibration.settings import settings_for
from graph_passes.external import load_graph
from graph_passes.insert import is_edit
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from graph_passes.unfold import unfold_graph
from reft_export.adding.add import add_adapter
from reft_export.base.load import load_base
from reft_export.building import plan as plan_module
from reft_export.building import plugin as plugin_module
from reft_export.building.engine_profiles import engine_profiles
from reft_export.building.settings import BuildSettings
from reft_export.bundling import files as bundling
from reft_export.cli.inspect import inspect_adapter, inspect_bundle
from reft_export.cli.main import app
from reft_export.eager.banks import bank_edits
from reft_export.eager.steering import site_module, steered
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.folding.fold import fold_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import RefitSettings
from reft_export.quantizing.swap import swap_bundle
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.engine import open_engine
from runtimes.artifacts.engine_adapter import read_engine_adapter
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import ScaleBiasEdit
from runtimes.edits.op import RED_TYPE
from runtimes.errors import EngineError, ParityError
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession

sys.path.insert(0, str(Path(__file__).parent.parent / "graph_passes"))

from edge_decoders import WIDTH as EDGE_WIDTH  # noqa: E402
from edge_decoders import edge_decoder  # noqa: E402

QUIET = {"report": lambda _: None}
ADAPTERS = {
    "red-all": {"method": "red", "positions": "all", "stream": "mlp_output"},
    "red-untied": {"method": "red", "positions": "f1+l3", "tied": False, "seed": 1},
    "loreft": {"positions": "f2+l2", "seed": 2},
}
"""As its authors place it; untied and in series with LoReFT at one site; LoReFT."""
MORE = {
    "red-attention": {"method": "red", "positions": "prompt", "stream": "attention_output", "seed": 3},
    "red-input": {"method": "red", "positions": "l1", "stream": "block_input", "seed": 4},
    "gelu": {"positions": "f3", "activation": "gelu", "seed": 5},
}


@pytest.fixture(scope="module")
def red_folders(base_folder, tmp_path_factory):
    def folders(family: str = "llama", names: tuple[str, ...] = tuple(ADAPTERS)) -> list[Path]:
        root, info = tmp_path_factory.mktemp("red"), load_base(base_folder(family)).info
        for name in names:
            save_adapter(tiny.random_adapter(info, **(ADAPTERS | MORE)[name]), root / name)
        return [root / name for name in names]

    return folders


@pytest.fixture(scope="module")
def red_bundle(base_folder, red_folders):
    def folder(family: str = "llama", precision: str = "fp32", *, target: Literal["onnxruntime", "tensorrt"] = "onnxruntime") -> Path:
        def make(output: Path) -> None:
            settings = ExportSettings(precision=precision, target=target)
            export_bundle(str(base_folder(family)), red_folders(family), output, settings, **QUIET)

        return shared_folder(f"red-bundles/{target}/{family}-{precision}", make)

    return folder


def _check(folder: Path, adapters: int) -> None:
    bundle = open_bundle(folder)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert report.passed and {r.budget.logits for r in report.rungs} == {2e-5}
    assert [r.figures.greedy_equal for r in report.rungs if r.figures.greedy_equal is not None] == [True] * (1 + adapters)
    base = bundle.golden("base")["logits"]
    assert all(np.abs(bundle.golden(n)["logits"] - base).max() > 0.1 for n in bundle.adapter_names)


def test_one_bundle_of_red_and_loreft(red_bundle) -> None:
    """Prefill and decode, chunks, padding on both sides, greedy tokens."""
    _check(red_bundle(), 3)
    bundle = open_bundle(red_bundle())
    ops = [(n.op, n.layer, n.stream) for n in bundle.manifest.nodes]
    last = tiny.LAYERS - 1
    sites = [(layer, stream) for layer in (0, last) for stream in ("block_output", "mlp_output")]
    assert ops == [op for s in sites for op in ((("LoReFT", *s), ("RED", *s)) if s[1] == "block_output" else (("RED", *s),))]
    assert bundle.manifest.genai == "supported"
    banks = read_onnx_adapter(bundle.adapter("loreft").file)
    assert (banks["reft.0.block_output.red.scale"] == 1).all() and not banks["reft.0.block_output.red.bias"].any()
    found = bank_edits(bundle, "red-untied")
    assert {n.op for n in found} == {RED_TYPE} and all(isinstance(e, ScaleBiasEdit) for es in found.values() for e in es)
    assert [len(edits) for edits in found.values()] == [2, 2]
    shown = inspect_bundle(red_bundle())
    assert "reft.0.block_output.red" in shown["edit nodes"]
    assert {row["name"]: row["rank"] for row in shown["adapters"]} == {"red-untied": None, "red-all": None, "loreft": 4}
    code, output = _cli("inspect", red_bundle())
    assert code == 0 and not re.search(r"red\s+│\s+(0|None)", output) and re.search(r"red\s+│\s+│", output)


@pytest.mark.slow
def test_the_ladder(red_bundle, base_folder) -> None:
    """Edit by edit, then against eager PyTorch again."""
    ladder = host_ladder(open_bundle(red_bundle()), str(base_folder()), **QUIET)
    assert ladder.passed and {"numpy, red-all", "function, red-untied"} <= {rung.name for rung in ladder.rungs}


def test_eager_is_a_hook_by_hand(base_folder, red_folders) -> None:
    """prompt * scale + bias in plain PyTorch, prefix and suffix by index."""
    base = load_base(base_folder())
    adapter = load_adapter(red_folders("llama", ("red-untied",))[0])
    ids, handles = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(0)), []
    for site in adapter.sites:

        def hook(module, args, output, site=site):  # noqa: ANN001
            h = (output[0] if isinstance(output, tuple) else output).clone()
            for group, at in (("prefix", slice(0, 1)), ("suffix", slice(-3, None))):
                scale, bias = (torch.from_numpy(adapter.tensors[f"{site}.{group}.{name}"]) for name in ("scale", "bias"))
                h[:, at] = h[:, at] * scale + bias
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(site_module(base.model, site).register_forward_hook(hook))
    with torch.no_grad():
        want = base.model(ids).logits
        for handle in handles:
            handle.remove()
        plain = base.model(ids).logits
        with steered(base.model, adapter):
            found = base.model(ids).logits
    rounding.check(found, want, 2 * rounding.logits_of(base.model))
    assert (plain - want).abs().max() > 0.1


def test_red_is_added_where_its_nodes_are(red_bundle, base_folder, tmp_path) -> None:
    info = load_base(base_folder()).info
    save_adapter(tiny.random_adapter(info, **ADAPTERS["red-untied"] | {"seed": 7}), tmp_path / "late")
    assert add_adapter(red_bundle(), [tmp_path / "late"], model=str(base_folder()), output=tmp_path / "b", **QUIET).parity.passed
    _check(tmp_path / "b", 4)


def test_adapters_swap_and_the_base_comes_back(red_bundle) -> None:
    bundle = open_bundle(red_bundle())
    session, ids = OrtSession(bundle, threads=1), np.arange(8)[None] + 40
    unfolded = load_graph(bundle.graph_path)
    assert unfold_graph(unfolded) == len(bundle.nodes) and not any(map(is_edit, unfolded.graph))
    logits = {}
    for name in (None, *bundle.adapter_names, None):
        session.set_adapter(name)
        found = session.step(ids, np.ones_like(ids)).logits
        assert name not in logits or np.array_equal(found, logits[name])
        assert all(not np.allclose(found, other) for key, other in logits.items() if key != name)
        logits[name] = found


@pytest.mark.slow
def test_the_gate_sees_a_wrong_edit(base_folder, red_folders, tmp_path, monkeypatch) -> None:
    """Planted: a bias one percent off in the file that ships."""
    right = bundling.write_onnx_adapter

    def wrong(path: Path, tensors: dict[str, np.ndarray]) -> None:
        right(path, {name: x * np.float32(1.01) if name.endswith(".red.bias") else x for name, x in tensors.items()})

    monkeypatch.setattr(bundling, "write_onnx_adapter", wrong)
    with pytest.raises(ParityError, match="relative logit error"):
        export_bundle(str(base_folder()), red_folders("llama", ("red-all",)), tmp_path / "b", ExportSettings(), **QUIET)
    assert not (tmp_path / "b").exists()


# --- training and the command line ----------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"what is {'very ' * (i % 3)}{i}?", "completion": " ok" * (1 + i % 4)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _cli(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output


def test_train(base_folder, data, tmp_path) -> None:
    """From the identity to a smaller loss; then on from there, and --rank is refused."""
    common = ("train", "-m", base_folder(), "-d", data, "--max-steps", 8, "--samples", 0, "--lr", "1e-2", "--positions", "all")
    code, output = _cli(*common, "--method", "red", "--stream", "mlp_output", "-o", tmp_path / "red", "--json")
    assert code == 0, output
    history = json.loads(output[output.index("{") :])["history"]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    adapter = load_adapter(tmp_path / "red")
    assert (adapter.method, adapter.rank, str(adapter.positions)) == ("red", 0, "all")
    assert {site.stream for site in adapter.sites} == {"mlp_output"} and len(adapter.sites) == tiny.LAYERS
    shown = inspect_adapter(tmp_path / "red")
    assert shown["rank"] is None and shown["parameters"] == 2 * tiny.LAYERS * tiny.WIDTH
    code, output = _cli(*common[:5], "--start", tmp_path / "red", "--max-steps", 2, "--samples", 0, "-o", tmp_path / "on")
    assert code == 0 and "red, 3 sites, 384 parameters" in output, output
    assert load_adapter(tmp_path / "on").digest != adapter.digest
    for options in (("--method", "red"), ("--start", tmp_path / "red")):
        code, output = _cli(*common[:5], *options, "--rank", 4, "-o", tmp_path / "x")
        assert code == 2 and "--rank 4 does not apply to red" in output and not (tmp_path / "x").exists()
    code, output = _cli(*common[:5], "--method", "red", "--activation", "gelu", "-o", tmp_path / "x")
    assert code == 2 and "red has no place for an activation" in output


def test_settings_say_no_rank(base_folder, red_folders) -> None:
    assert TrainSettings(method="red").rank == 0 and TrainSettings(method="red", rank=9, dropout=0.1).rank == 0
    assert settings_like(load_adapter(red_folders("llama", ("red-all",))[0])).rank == 0


@pytest.mark.slow
def test_op_bench_names_the_op_that_it_measures(base_folder, red_folders, tmp_path) -> None:
    export_bundle(str(base_folder()), red_folders("llama", ("red-all",)), tmp_path / "b", ExportSettings(), **QUIET)
    code, output = _cli("bench", tmp_path / "b", "--op")
    assert code == 2 and "measures the low-rank op (LoReFT)" in output


# --- everywhere else an adapter goes ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_families(family, red_bundle) -> None:
    _check(red_bundle(family), 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_stream(family, base_folder, red_folders, tmp_path) -> None:
    folders = red_folders(family, (*ADAPTERS, *MORE))
    export_bundle(str(base_folder(family)), folders, tmp_path / "b", ExportSettings(), **QUIET)
    _check(tmp_path / "b", 6)


@pytest.mark.slow
def test_half_precision(base_folder, red_folders, tmp_path) -> None:
    half = export_bundle(str(base_folder()), red_folders(), tmp_path / "fp16", ExportSettings(precision="fp16"), **QUIET)
    assert half.parity.passed and half.parity.rungs[0].budget.name == "fp16"
    brain = export_bundle(str(base_folder()), red_folders(), tmp_path / "bf16", ExportSettings(precision="bf16"), **QUIET)
    assert "structurally" in brain.note
    banks = read_onnx_adapter(open_bundle(tmp_path / "bf16").adapter("red-all").file)
    assert banks["reft.0.mlp_output.red.scale"].dtype.name == "bfloat16"


@pytest.mark.parametrize(
    "scheme", slow_and_long(["weight-only", "dynamic", "static", "qdq-int4", "qdq-int8", "fp8"], "weight-only", "static", "qdq-int4")
)
def test_schemes(scheme, red_bundle, base_folder, prompts_file, tmp_path) -> None:
    """The edit stays in float, beside quantized products; adapters keep their bytes."""
    source = red_bundle()
    done = quantize_bundle(
        source, str(base_folder()), tmp_path / "q", settings_for(scheme), calibration=request_for(scheme, prompts_file), **QUIET
    )
    assert done.parity.passed
    old, new = open_bundle(source), open_bundle(tmp_path / "q")
    assert new.nodes == old.nodes
    for name in old.adapter_names:
        before, after = (read_onnx_adapter(b.adapter(name).file) for b in (old, new))
        assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_refit(base_folder, red_folders, data, tmp_path) -> None:
    sources = red_folders("llama", ("red-all", "red-untied"))
    export_bundle(str(base_folder()), sources, tmp_path / "int4", ExportSettings(precision="int4"), **QUIET)
    settings = RefitSettings(data=data, sources=tuple(sources), steps=20)
    result = swap_bundle(tmp_path / "int4", str(base_folder()), tmp_path / "again", refit=settings, **QUIET)
    assert {f.adapter: f.kept for f in result.report.refits} == {"red-all": False, "red-untied": False}
    assert all(f.after < f.before for f in result.report.refits)
    assert open_bundle(tmp_path / "again").digest == open_bundle(tmp_path / "int4").digest


@pytest.mark.slow
def test_trained_with_dropout_at_two_streams(base_folder, red_folders, data, tmp_path) -> None:
    base = load_base(base_folder())
    settings = TrainSettings(method="red", positions="all", max_steps=4, samples=0, dropout=0.2, streams="block_output;mlp_output")
    trained = train(base, data, settings, tmp_path / "red")
    assert len(trained.adapter.sites) == 2 * tiny.LAYERS
    result = export_bundle(str(base_folder()), [tmp_path / "red"], tmp_path / "b", ExportSettings(), **QUIET)
    assert result.parity.passed


@pytest.mark.slow
def test_fold_of_a_plain_graph_and_genai(red_bundle, base_folder, red_folders, genai_installed, python, tmp_path) -> None:
    """A graph that carries no edits; what comes out is steered by stock onnxruntime-genai too."""
    answers = check_stock_genai(open_bundle(red_bundle()), python)
    assert len({tuple(a) for a in answers.values()}) > 1
    plain = tmp_path / "plain"
    shutil.copytree(red_bundle(), plain)
    graph = load_graph(plain / "model.onnx")
    unfold_graph(graph)
    ir.save(graph, plain / "unfolded.onnx")
    folder = tmp_path / "graph"
    folder.mkdir()
    shutil.copyfile(plain / "unfolded.onnx", folder / "model.onnx")
    for name in ("model.onnx.data", "tokenizer.json", "tokenizer_config.json", "genai_config.json"):
        shutil.copyfile(plain / name, folder / name)
    shutil.copyfile(base_folder() / "config.json", folder / "config.json")
    fold_bundle(folder, red_folders(), tmp_path / "out", sites=(), force=False, **QUIET)
    bundle = open_bundle(tmp_path / "out")
    assert bundle.nodes == open_bundle(red_bundle()).nodes
    assert host_ladder(bundle, str(base_folder()), **QUIET).passed


# --- TensorRT ---------------------------------------------------------------------------------------


def test_plan_of_an_engine(red_bundle) -> None:
    """Widths are no ranks: limits and profiles come from the low-rank banks and the slots alone."""
    opened = open_bundle(red_bundle(target="tensorrt"))
    tensors = {name: read_onnx_adapter(opened.adapter(name).file) for name in opened.adapter_names}
    graph = derive_tensorrt_graph(load_graph(opened.graph_path), plugin=False)
    limits = plan_module._limits(opened, BuildSettings(target="tensorrt-rtx", use_plugin=False), tensors, plugin=False)
    assert (limits.tuned_rank, limits.tuned_slots) == (4, 2) and limits.max_rank < tiny.WIDTH
    banks = {name for node in opened.nodes for name in node.bank_names}
    for profile in engine_profiles(graph.inputs, banks, limits):
        shape = profile.shapes["reft.0.block_output.red.scale"]
        assert (shape.min, shape.opt, shape.max) == ((1, tiny.WIDTH), (2, tiny.WIDTH), (limits.max_slots, tiny.WIDTH))


def test_a_plugin_from_before_is_refused(red_bundle, tmp_path, monkeypatch) -> None:
    graph = derive_tensorrt_graph(load_graph(open_bundle(red_bundle(target="tensorrt")).graph_path), plugin=True)
    monkeypatch.setattr(plugin_module, "plugin_details", lambda library: ("LoReFT 1, RED 1, TensorRT 10.3.0", ("86",)))
    plugin_module.check_ops(tmp_path / "libreft_trt.so", graph)
    monkeypatch.setattr(plugin_module, "plugin_details", lambda library: ("LoReFT 1, TensorRT 10.3.0", ("86",)))
    with pytest.raises(EngineError, match="has LoReFT 1, TensorRT 10.3.0, and no RED, which the graph needs; compile it again"):
        plugin_module.check_ops(tmp_path / "libreft_trt.so", graph)


@pytest.mark.slow
@pytest.mark.parametrize(("freeze", "plugin"), [(None, False), ("red-untied", False), (None, True)])
def test_tensorrt_engines(freeze, plugin, red_bundle, tensorrt_rtx, request, tmp_path) -> None:
    """The real TensorRT-RTX builds both bodies, and both plugins; adapters stay inputs, or one is part of the engine."""
    how = ["--plugin", request.getfixturevalue("tensorrt_plugin")] if plugin else ["--no-plugin"]
    command = [
        sys.executable,
        "-m",
        "reft_export.cli.main",
        "build",
        red_bundle("llama", "fp16", target="tensorrt"),
        "--target",
        "tensorrt-rtx",
    ]
    command += ["--sm", "86", *how, "-o", tmp_path / "engine", *(["--freeze", freeze] if freeze else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": tensorrt_rtx["PYTHONPATH"]}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    engine = open_engine(tmp_path / "engine", verify=True)
    assert (engine.engine.plugin is not None) == plugin
    names = {record.name for record in engine.engine.inputs if ".red." in record.name}
    assert names == (set() if freeze else {name for node in engine.nodes if node.op == RED_TYPE for name in node.bank_names})
    assert set(engine.adapter_names) == ({freeze} if freeze else set(ADAPTERS))
    source = open_bundle(red_bundle("llama", "fp16", target="tensorrt"))
    for name in () if freeze else engine.adapter_names:
        bound, stored = read_engine_adapter(engine.adapter_file(name)), read_onnx_adapter(source.adapter(name).file)
        assert all(np.array_equal(bound[key], stored[key]) for key in stored)


@pytest.mark.slow
def test_edge_llm(tmp_path) -> None:
    """As constants; as LoRA weights never, in one line and with nothing written."""
    from runtimes.edits.adapter import BaseModel

    info = BaseModel(name="tiny", fingerprint="0" * 64, num_hidden_layers=3, hidden_size=EDGE_WIDTH)
    save_adapter(tiny.random_adapter(info, method="red", positions="f2+l1", tied=False), tmp_path / "red")
    folder = tmp_path / "llm"
    folder.mkdir()
    ir.save(edge_decoder("padded", dtype=ir.DataType.FLOAT16), folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({"engine_role": "llm", "hidden_size": EDGE_WIDTH, "num_hidden_layers": 3}))
    code, output = _cli("fold", folder, "-a", tmp_path / "red", "-o", tmp_path / "out")
    assert code == 0, output
    graph = load_graph(tmp_path / "out" / "model.onnx").graph
    assert [node.op_type for node in graph if is_edit(node)] == ["RED", "RED"]
    code, output = _cli("fold", folder, "-a", tmp_path / "red", "-o", tmp_path / "lora", "--as-lora")
    assert code == 2 and "has a scale and bias (RED), which LoRA weights cannot hold" in " ".join(output.split())
    assert not (tmp_path / "lora").exists()

"""`build` as a user meets it, with the real TensorRT-RTX, whose builder needs no GPU; each engine is built in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mock_trtexec
import numpy as np
import onnx_ir as ir
import pytest
from tiers import slow_and_long

from graph_passes.external import load_graph
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from reft_export.building import plan as plan_module
from reft_export.building import plugin as plugin_module
from reft_export.building.build import build_engine
from reft_export.building.engine_profiles import EngineLimits, engine_profiles
from reft_export.building.plan import plan_build
from reft_export.building.settings import BuildSettings
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.quickstart import base_path
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.engine import open_engine
from runtimes.artifacts.engine_adapter import read_engine_adapter
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS
from runtimes.errors import BuildError, BundleError, EngineError, InputError
from runtimes.files.hashes import sha256_of
from runtimes.tensorrt.builder import BuildSpec
from runtimes.tensorrt.builder_process import run_builder

Cli = Callable[..., subprocess.CompletedProcess[str]]


def _environment(tensorrt: dict[str, str] | None = None) -> dict[str, str]:
    """As a user's shell: the fixture's own link for the parser is left out, `build` makes the one that it needs."""
    rtx = {} if tensorrt is None else {"PYTHONPATH": tensorrt["PYTHONPATH"]}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **rtx}


def _run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reft_export.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture(scope="session")
def bundle_folder(bundle_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Bundles that TensorRT can be built from."""
    return partial(bundle_folder, target="tensorrt")


@pytest.fixture
def cli(tensorrt_rtx: dict[str, str]) -> Cli:
    return lambda *arguments: _run(_environment(tensorrt_rtx), *arguments)


def _refused(done: subprocess.CompletedProcess[str], *, code: int, match: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and match in lines[0], done.stderr


def _build(cli: Cli, bundle: Path, output: Path, *options: object) -> dict[str, object]:
    done = cli("build", bundle, "--target", "tensorrt-rtx", "-o", output, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def quickstart_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's own base in fp16, an edit node behind every block."""
    output = tmp_path_factory.mktemp("quickstart") / "bundle"
    export_bundle(str(base_path()), [], output, ExportSettings(precision="fp16", target="tensorrt"), report=lambda _: None)
    return output


@pytest.mark.slow
def test_engine_without_plugin(cli, bundle_folder, tmp_path) -> None:
    """Six adapters of every kind in one engine for three GPUs: its folder, its manifest, `inspect`, and the rebuild command."""
    bundle = open_bundle(bundle_folder("llama", "fp16"))
    output = tmp_path / "engine"
    sms = [word for sm in ("86", "8.9", "sm_120") for word in ("--sm", sm)]
    said = _build(cli, bundle.folder, output, "--no-plugin", *sms)
    assert said["compute_capabilities"] == ["8.6", "8.9", "12.0"] and said["peak_memory"] > 1e8
    engine = open_engine(output, verify=True)
    assert (engine.digest, engine.adapter_names, engine.golden_names) == (bundle.digest, bundle.adapter_names, bundle.golden_names)
    e = engine.engine
    assert (e.plugin, e.frozen, e.target, e.tensorrt_version) == (None, None, "tensorrt-rtx", "1.7.1.116")
    assert [p.name for p in e.profiles] == ["prefill", "decode"]
    names = {t.name for t in e.inputs}
    banks = {name for node in bundle.nodes for name in node.bank_names}
    assert {name for name in names if name.startswith("reft.")} == banks | set(RULE_DEFAULTS)
    for name in bundle.adapter_names:
        stored, bound = read_onnx_adapter(bundle.adapter(name).file), read_engine_adapter(engine.adapter_file(name))
        assert bound.keys() == stored.keys() <= names
        assert all(np.array_equal(bound[k], v) and bound[k].dtype == v.dtype for k, v in stored.items())
        for profile in e.profiles:
            for bank in banks:
                shape = profile.shapes[bank]
                assert all(a <= b <= c for a, b, c in zip(shape.min, bound[bank].shape, shape.max, strict=True))

    shown = cli("inspect", output)
    assert shown.returncode == 0
    for text in ("tensorrt-rtx 1.7.1.116", "8.6, 8.9, 12.0", "expanded", "nothing: adapters swap", "past_key_values.*.key (3)"):
        assert text in shown.stdout, text
    assert json.loads(cli("inspect", output, "--json").stdout)["rebuild"] == e.rebuild

    before = sha256_of(output / "engine.json")
    _refused(cli("build", bundle.folder, "--target", "tensorrt-rtx", "-o", output), code=2, match="pass --force")
    assert sha256_of(output / "engine.json") == before
    again = cli(*shlex.split(e.rebuild)[1:])
    assert again.returncode == 0, again.stderr
    assert open_engine(output).engine.graph_digest == e.graph_digest
    _refused(cli("build", output, "--target", "tensorrt-rtx", "-o", tmp_path / "x"), code=2, match="is an engine already")

    for name in ("engine.plan", "adapters/tied.safetensors", "adapters/tied.json", "manifest.json", "golden/base.npz"):
        damaged = Path(shutil.copytree(output, tmp_path / "damaged", dirs_exist_ok=True))
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(BundleError):
            open_engine(damaged)
        done = cli("inspect", damaged)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and str(damaged) in done.stderr


@pytest.mark.slow
def test_engine_with_the_plugin(cli, bundle_folder, tensorrt_plugin, tmp_path) -> None:
    """Every activation becomes a plugin layer; the library travels with the engine."""
    bundle = bundle_folder("llama", "fp16")
    said = _build(cli, bundle, tmp_path / "engine", "--plugin", tensorrt_plugin, "--sm", 86)
    engine = open_engine(tmp_path / "engine")
    assert said["plugin"] == engine.engine.plugin.file == tensorrt_plugin.name
    assert engine.plugin_path.read_bytes() == tensorrt_plugin.read_bytes()
    assert engine.engine.profiles[0].shapes[engine.nodes[0].bank_names[0]].max == (64, 64, 64)


@pytest.mark.parametrize("precision", slow_and_long(["fp16", "bf16", "fp32"], "bf16"))
def test_precisions(cli, bundle_folder, tensorrt_plugin, precision, tmp_path) -> None:
    """What no CPU runs can still be built: bfloat16, with the plugin and expanded."""
    for options in (("--plugin", tensorrt_plugin), ("--no-plugin",)):
        _build(cli, bundle_folder("llama", precision), tmp_path / "engine", *options, "--sm", 89, "--force")
        engine = open_engine(tmp_path / "engine")
        dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
        banks = [t for name, t in read_engine_adapter(engine.adapter_file("untied")).items() if name not in RULE_DEFAULTS]
        assert banks and {t.dtype.name for t in banks} == {dtype}


@pytest.mark.parametrize("family", slow_and_long(["gpt2", "gemma3_text"], "gemma3_text"))
def test_other_families(cli, bundle_folder, family, tmp_path) -> None:
    _build(cli, bundle_folder(family, "fp16"), tmp_path / "engine", "--no-plugin", "--sm", 89)
    engine = open_engine(tmp_path / "engine").engine
    assert engine.outputs[0].name == "logits"
    assert engine.cache == {"gpt2": "columns", "gemma3_text": "whole"}[family], "a window counts columns"


@pytest.mark.slow
def test_quickstart_engines(cli, quickstart_bundle, tensorrt_plugin, tmp_path) -> None:
    """One GPU each, with the plugin or without."""
    for sm, capability, options in (("86", "8.6", ("--plugin", tensorrt_plugin)), ("120", "12.0", ("--no-plugin",))):
        said = _build(cli, quickstart_bundle, tmp_path / "engine", "--sm", sm, *options, "--force")
        assert said["compute_capabilities"] == [capability] and said["bytes"] > 1e6


@pytest.mark.parametrize(
    ("scheme", "precision"),
    [pytest.param("qdq-int4", "fp16", marks=pytest.mark.long), pytest.param("qdq-int8", "fp32", marks=pytest.mark.slow)],
)
def test_quantized_quickstart_engines(cli, tensorrt_plugin, prompts_file, scheme, precision, tmp_path) -> None:
    """int4 block DequantizeLinear and int8 Q/DQ, from the verbs that a user calls."""
    calibrate = ["--calibrate", prompts_file] if scheme == "qdq-int8" else []
    for arguments in (
        ("export", "-m", base_path(), "-p", precision, "--target", "tensorrt", "-o", tmp_path / "float"),
        ("quantize", tmp_path / "float", "-m", base_path(), "--scheme", scheme, *calibrate, "-o", tmp_path / "quantized"),
    ):
        done = cli(*arguments)
        assert done.returncode == 0, done.stderr
    for options in (("--plugin", tensorrt_plugin), ("--no-plugin",)):
        sms = ("--sm", 86, "--sm", 89, "--sm", 120)
        said = _build(cli, tmp_path / "quantized", tmp_path / "engine", *sms, *options, "--force")
        assert said["compute_capabilities"] == ["8.6", "8.9", "12.0"]
        assert open_engine(tmp_path / "engine").manifest.quantization.scheme == scheme


@pytest.mark.slow
def test_frozen_engines(cli, bundle_folder, tmp_path) -> None:
    """A frozen engine answers for what is frozen into it and for nothing else."""
    bundle = bundle_folder("llama", "fp16")
    _build(cli, bundle, tmp_path / "tied", "--no-plugin", "--sm", 86, "--freeze", "tied")
    engine = open_engine(tmp_path / "tied")
    assert (engine.engine.frozen, engine.adapter_names, engine.golden_names) == ("tied", ("tied",), ("tied",))
    assert {t.name for t in engine.engine.inputs if t.name.startswith("reft")} == {PROMPT_LENGTH}
    assert read_engine_adapter(engine.adapter_file("tied")) == {}
    with pytest.raises(BundleError, match="has no adapter 'untied'; it has: tied"):
        engine.adapter_record("untied")
    _build(cli, bundle, tmp_path / "base", "--sm", 86, "--freeze", "base")
    engine = open_engine(tmp_path / "base")
    assert (engine.engine.frozen, engine.adapter_names, engine.golden_names) == ("base", (), ("base",))
    assert engine.engine.plugin is None and not [t.name for t in engine.engine.inputs if t.name.startswith("reft")]


@pytest.mark.slow
def test_weight_streaming_and_limits(cli, bundle_folder, tmp_path) -> None:
    limits = ("--max-batch", 2, "--max-sequence", 32, "--context", 100, "--max-slots", 3, "--max-rank", 16)
    _build(cli, bundle_folder("llama", "fp16"), tmp_path / "engine", "--no-plugin", "--sm", 86, "--weight-streaming", *limits)
    engine = open_engine(tmp_path / "engine").engine
    assert engine.weight_streaming
    prefill, decode = engine.profiles
    assert prefill.shapes["input_ids"].max == (2, 32) and decode.shapes["input_ids"].max == (2, 1)
    assert prefill.shapes["attention_mask"].max == (2, 131) and decode.shapes["attention_mask"].max == (2, 100)
    assert prefill.shapes["past_key_values.0.key"].min[2] == 0 and decode.shapes["past_key_values.0.key"].max[2] == 99
    assert prefill.shapes["reft.0.block_output.U"].max == (3, 16, 64)


@pytest.mark.slow
def test_dry_run_and_refusals(cli, bundle_folder, tmp_path) -> None:
    bundle, output = bundle_folder("llama", "fp16"), tmp_path / "engine"

    def build(*options: object, bundle: Path = bundle, target: str = "tensorrt-rtx", cli: Cli = cli) -> subprocess.CompletedProcess[str]:
        return cli("build", bundle, "--target", target, "-o", output, *options)

    done = build("--no-plugin", "--dry-run")
    assert done.returncode == 0 and "edit nodes as the function" in done.stdout and "memory" in done.stdout
    assert json.loads(build("--dry-run", "--json").stdout)["memory"] > 0
    _refused(build(bundle=bundle_folder("llama", "int4")), code=4, match="--scheme qdq-int4")
    known = "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    _refused(build("--sm", 87, "--sm", 110), code=4, match=f"compute capability 8.7, 11.0; it builds for {known}")
    _refused(build("--sm", "ampere"), code=2, match="--sm 'ampere' is not a compute capability")
    _refused(build("--freeze", "nobody"), code=2, match="has no adapter 'nobody'; it has: tied")
    not_a_plugin = tmp_path / "text.so"
    not_a_plugin.write_text("text")
    _refused(build("--plugin", not_a_plugin), code=4, match="text.so does not load in tensorrt_rtx")
    assert [p.name for p in tmp_path.iterdir()] == ["text.so"], "nothing is left of what was refused"
    _refused(build(target="tensorrt"), code=4, match="pip install 'reft-export[tensorrt]', or put its trtexec on PATH")
    without = _run(_environment(), "build", bundle, "--target", "tensorrt-rtx", "-o", output)
    _refused(without, code=4, match="tensorrt_rtx is not installed; pip install 'reft-export[tensorrt-rtx]'")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "coreml"}, "target 'coreml' is unknown; known: tensorrt, tensorrt-rtx"),
        ({"workspace": 0}, "--workspace 0 is no memory; give MiB"),
        ({"timing_cache": Path("cache")}, "times nothing while it builds"),
        ({"timing_cache": Path("no/cache"), "target": "tensorrt"}, "no/cache: its folder does not exist"),
        ({"timing_cache": Path("."), "target": "tensorrt"}, "--timing-cache . is a folder"),
        ({"plugin": Path("none.so")}, "none.so is not a file"),
        ({"plugin": Path("none.so"), "use_plugin": False}, "exclude each other"),
        ({"context": 513}, "is more than llama was made for, which is 512"),
        ({"max_sequence": 65, "context": 64}, "--max-sequence 65 is more than the --context of 64"),
        ({"max_batch": 0}, "--max-batch is 0; every call needs at least 1"),
        ({"max_rank": 2}, "--max-rank is 2; the bundle's adapters need at least"),
        ({"max_rank": 257}, "--max-rank 257 is more than the kernels take, which is 256"),
        ({"max_slots": 1}, "--max-slots is 1; the bundle's adapters need at least 2"),
        ({"max_slots": 2, "freeze": "tied"}, "--max-slots bounds the adapters that swap, and with --freeze none does"),
        ({"max_rank": 8, "freeze": "base"}, "--max-rank bounds the adapters that swap"),
    ],
)
def test_options_that_are_refused(bundle_folder, tmp_path, monkeypatch, options, match) -> None:
    monkeypatch.setattr(plan_module, "is_installed", lambda target: True)
    package = SimpleNamespace(ComputeCapability=Enum("ComputeCapability", ["SM86"]), __version__="0.mock")
    monkeypatch.setattr(plan_module, "load_tensorrt", lambda target: package)
    with pytest.raises(InputError, match=match):
        plan_build(bundle_folder("llama", "fp16"), BuildSettings(**{"target": "tensorrt-rtx", "compute_capabilities": ("8.6",), **options}))


@pytest.mark.parametrize(
    ("capability", "fits"), [("7.5", False), ("8.0", False), ("8.6", True), ("8.9", True), ("9.0", False), ("12.0", True), ("12.1", True)]
)
def test_gpus_that_the_plugin_has_no_kernel_for(tmp_path, monkeypatch, capability, fits) -> None:
    """Compiled for 86 and 120: 89 runs the kernel of 86, 121 that of 120; 90 can neither run 86 nor compile the PTX of 120."""
    monkeypatch.setattr(plugin_module, "plugin_details", lambda library: ("LoReFT 1", ("86", "120")))
    if fits:
        plugin_module.check_kernels(tmp_path / "libreft_trt.so", (capability,))
        return
    with pytest.raises(EngineError, match=f"has kernels for sm 86, 120, and none for compute capability {capability}; build it with"):
        plugin_module.check_kernels(tmp_path / "libreft_trt.so", ("8.6", capability))


def test_a_library_that_needs_its_neighbour_is_no_plugin(bundle_folder, tmp_path) -> None:
    """TensorRT would take it, and the engine that carries it alone would not load."""
    library = tmp_path / "libreft_trt_autoload.so"
    library.write_bytes(b"")
    with pytest.raises(InputError, match="libreft_trt_autoload.so is for hosts that only open a library.*name libreft_trt.so itself"):
        plan_build(bundle_folder("llama", "fp16"), BuildSettings(target="tensorrt-rtx", plugin=library))


@pytest.mark.slow
def test_what_the_parser_drops_is_refused(tensorrt_rtx, bundle_folder, tensorrt_plugin, tmp_path, monkeypatch) -> None:
    """Planted: a bank that kept its default, which the real parser freezes; an edit that the plugin was expected to carry and that
    became a function; and the other way round."""
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, tensorrt_rtx[name])
    bundle = open_bundle(bundle_folder("llama", "fp16"))
    banks = {name for node in bundle.nodes for name in node.bank_names}
    limits = EngineLimits(max_batch=1, max_sequence=16, context=32, max_slots=2, max_rank=4)

    def build(model: ir.Model, *, plugin: Path | None, layers: int) -> None:
        (tmp_path / "model.onnx").unlink(missing_ok=True)
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        spec = BuildSpec(
            target="tensorrt-rtx",
            graph=str(tmp_path / "model.onnx"),
            plan=str(tmp_path / "engine.plan"),
            plugin=None if plugin is None else str(plugin),
            plugin_layers=layers,
            inputs=derived.inputs,
            outputs=derived.outputs,
            profiles=engine_profiles(derived.inputs, banks, limits),
            compute_capabilities=("8.6",),
            weight_streaming=False,
            workspace=None,
            timing_cache=None,
        )
        run_builder(spec, tmp_path, update=lambda _: None)

    derived = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=False)
    bank = bundle.nodes[-1].bank_names[1]
    value = next(v for v in derived.model.graph.inputs if v.name == bank)
    value.const_value = ir.tensor(np.zeros((1, 1, 64), np.float16), name=value.name)
    derived.model.graph.register_initializer(value)
    with pytest.raises(BuildError, match=f"{bank} is missing, expected float16 of rank 3"):
        build(derived.model, plugin=None, layers=0)

    derived = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=False)
    with pytest.raises(BuildError, match=f"0 plugin layers, expected {derived.edit_nodes}"):
        build(derived.model, plugin=None, layers=derived.edit_nodes)
    with pytest.raises(BuildError, match=f"{derived.edit_nodes} plugin layers, expected 0"):
        build(derived.model, plugin=tensorrt_plugin, layers=0)
    derived = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=True)
    with pytest.raises(BuildError, match="does not parse the graph: LoReFT"):
        build(derived.model, plugin=None, layers=derived.edit_nodes)
    assert not (tmp_path / "engine.plan").exists()


MOCK_RTX = """# A mock of tensorrt_rtx whose builder never ends.
import enum, pathlib, time
__version__ = "0.mock"
ComputeCapability = enum.Enum("ComputeCapability", ["SM86", "SM89", "SM120"])
class ILogger:
    pass
def Builder(logger):
    print('{"step": "started"}', flush=True)
    pathlib.Path(__file__).with_name("started").touch()
    time.sleep(600)
"""


def test_ctrl_c_ends_the_builder(bundle_folder, tmp_path) -> None:
    """SIGINT to the command alone: 130, one line, no process and no file left behind."""
    (tmp_path / "mock").mkdir()
    (tmp_path / "mock" / "tensorrt_rtx.py").write_text(MOCK_RTX)
    environment = {**_environment(), "PYTHONPATH": str(tmp_path / "mock")}
    bundle = bundle_folder("llama", "fp16")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "reft_export.cli.main", "build", str(bundle), "--target", "tensorrt-rtx"]
    command += ["-o", str(tmp_path / "out" / "engine")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (builder := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines() == ["error: interrupted"]
    assert list((tmp_path / "out").iterdir()) == []
    assert builder and not Path(f"/proc/{builder[0]}").exists()


def test_a_killed_command_takes_its_builder_along(bundle_folder, tmp_path) -> None:
    """And the next run of the same output removes what both left."""
    (tmp_path / "mock").mkdir()
    (tmp_path / "mock" / "tensorrt_rtx.py").write_text(MOCK_RTX)
    environment = {**_environment(), "PYTHONPATH": str(tmp_path / "mock")}
    bundle, output = bundle_folder("llama", "fp16"), tmp_path / "out" / "engine"
    shutil.copytree(bundle, output)
    command = [sys.executable, "-m", "reft_export.cli.main", "build", str(bundle), "--target", "tensorrt-rtx"]
    command += ["-o", str(output), "--force"]
    for end in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until((tmp_path / "mock" / "started").exists)
        (tmp_path / "mock" / "started").unlink()
        builders = children.read_text().split()
        process.send_signal(end)
        process.wait(30)
        assert builders
        until(lambda: not any(map(_command_line, builders)))  # noqa: B023
        assert open_bundle(output, verify=True).digest == open_bundle(bundle).digest, "the old output is as it was"
    assert [path.name for path in output.parent.iterdir()] == ["engine"], "the terminated run removed what the killed one left, and its own"


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def _command_line(pid: str) -> str:
    """Of a process that runs; "" of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_mock_trtexec_where_the_python_package_is_missing(bundle_folder, tmp_path, monkeypatch) -> None:
    mock_trtexec.install(tmp_path / "bin", monkeypatch)
    settings = BuildSettings(target="tensorrt", use_plugin=False, workspace=700, timing_cache=tmp_path / "timing")
    bundle = bundle_folder("llama", "fp16")
    outcome = build_engine(bundle, tmp_path / "engine", settings, report=lambda _: None)
    engine = open_engine(tmp_path / "engine").engine
    assert (engine.tensorrt_version, engine.compute_capabilities) == ("10.3.0", ("8.7",))
    command = (tmp_path / "engine" / "engine.plan").read_text().splitlines()
    assert "--memPoolSize=workspace:700" in command and "--workspace 700" in engine.rebuild
    assert f"--timingCacheFile={tmp_path / 'timing'}" in command and len([a for a in command if a.startswith("--profile=")]) == 2
    shaped = next(a for a in command if a.startswith("--minShapes=")).partition("=")[2].split(",")
    dynamic = {t.name for t in outcome.engine.inputs if not all(isinstance(dim, int) for dim in t.shape)}
    assert {item.rpartition(":")[0] for item in shaped} == dynamic, "every input that varies is named, and refused where it is lost"
    monkeypatch.setattr(plan_module, "present_compute_capability", lambda: None)
    with pytest.raises(plan_module.BackendUnavailable, match="there is none here"):
        plan_build(bundle, settings)
    monkeypatch.setattr(plan_module, "present_compute_capability", lambda: "8.7")
    with pytest.raises(plan_module.EngineError, match=r"for the GPU here \(8.7\) only, not for 8.9"):
        plan_build(bundle, BuildSettings(target="tensorrt", use_plugin=False, compute_capabilities=("8.9",)))


def _configured(environment: dict[str, str], workspace: int | None, show: str) -> subprocess.CompletedProcess[str]:
    """What ``show`` prints of ``config``, the builder's configuration, in a process of its own."""
    code = (
        "import types, tensorrt_rtx as trt\nfrom runtimes.tensorrt.builder import configure\n"
        "builder = trt.Builder(trt.Logger(trt.Logger.ERROR))\n"
        f"spec = types.SimpleNamespace(compute_capabilities=('8.6',), weight_streaming=False, workspace={workspace})\n"
        f"config = configure(trt, builder, spec)\n{show}"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment(environment), check=False)


@pytest.mark.slow
def test_workspace_bounds_a_layers_scratch_memory(tensorrt_rtx) -> None:
    done = _configured(tensorrt_rtx, 300, "print(config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))")
    assert done.stdout.split() == [str(300 << 20)], done.stderr


@pytest.mark.slow
def test_float32_is_float32(tensorrt_rtx) -> None:
    """TensorRT multiplies float32 in TF32 unless it is told not to, and an fp32 engine's budget is 2e-5."""
    show = "for each in (builder.create_builder_config(), config):\n    print(each.get_flag(trt.BuilderFlag.TF32))"
    done = _configured(tensorrt_rtx, None, show)
    assert done.stdout.split() == ["True", "False"], done.stderr

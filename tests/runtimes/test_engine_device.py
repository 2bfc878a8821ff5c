"""Whether an engine fits a device, its adapters' files, and what becomes of a builder that refuses, dies or is interrupted."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtimes.artifacts.engine import Engine, EngineManifest, PluginRecord, Profile, ShapeRange
from runtimes.artifacts.engine_adapter import read_engine_adapter, write_engine_adapter
from runtimes.artifacts.manifest import Manifest, ModelRecord, TensorRecord
from runtimes.errors import BackendUnavailable, BuildError, BundleError, InputError
from runtimes.files.hashes import sha256_of
from runtimes.tensorrt.builder import BuildSpec, check_network
from runtimes.tensorrt.builder_process import run_builder, run_trtexec, trtexec_command
from runtimes.tensorrt.library import RTX_LIBRARY, builder_environment, check_device, load_tensorrt

IDS = TensorRecord(name="input_ids", dtype="int64", shape=("batch", "sequence"))
BANK = TensorRecord(name="reft.0.block_output.U", dtype="float16", shape=("N", "r", 64))
PROFILES = tuple(
    Profile(
        name=name,
        shapes={
            "input_ids": ShapeRange(min=(1, 1), opt=(1, sequence), max=(4, sequence)),
            BANK.name: ShapeRange(min=(1, 1, 64), opt=(2, 4, 64), max=(64, 64, 64)),
        },
    )
    for name, sequence in (("prefill", 128), ("decode", 1))
)


def _manifest(**changes: object) -> EngineManifest:
    given: dict[str, object] = {
        "created_by": "tests",
        "target": "tensorrt-rtx",
        "tensorrt_version": "1.7.1.116",
        "compute_capabilities": ("8.6", "8.9"),
        "plugin": None,
        "bundle_digest": "0" * 64,
        "graph_digest": "0" * 64,
        "frozen": None,
        "inputs": (IDS, BANK),
        "outputs": (),
        "profiles": PROFILES,
        "weight_streaming": False,
        "build_seconds": 1.0,
        "rebuild": "reft-export build bundle --target tensorrt-rtx -o engine --force",
    }
    return EngineManifest(**{**given, **changes})


def _engine(folder: Path, **changes: object) -> Engine:
    model = ModelRecord(name="toy", model_type="toy", fingerprint="", vocab_size=2, hidden_size=64, num_hidden_layers=1, context_length=8)
    bundle = Manifest(
        created_by="tests", model=model, precision="fp16", quantization=None, exporter="foreign", opset=20, ir_version=10, logits="all",
        slots="graph", inputs=(), outputs=(), nodes=(), adapters=(), parity_budget={}, weights={}, genai="no",
    )  # fmt: skip
    return Engine(folder=folder, manifest=bundle, engine=_manifest(**changes))


def test_an_engine_that_fits(tmp_path) -> None:
    check_device(_engine(tmp_path), "1.7.1.116", "8.9")
    # trtexec states three numbers, the Python package four.
    check_device(_engine(tmp_path, target="tensorrt", tensorrt_version="10.3.0"), "10.3.0.26", "8.6")


@pytest.mark.parametrize(
    ("version", "capability", "match"),
    [
        ("1.7.2.1", "8.6", "does not load in tensorrt-rtx 1.7.2.1.*build it again: reft-export build bundle"),
        ("1.7.1.116", "8.7", "is of compute capability 8.7; build it again: reft-export build bundle .* --sm 87$"),
        ("1.7.1.116", None, "has none; run the bundle"),
    ],
)
def test_another_device_is_refused_with_the_rebuild_command(tmp_path, version, capability, match) -> None:
    with pytest.raises(BackendUnavailable, match=match) as caught:
        check_device(_engine(tmp_path), version, capability)
    assert caught.value.exit_code == 4


def test_another_plugin_is_refused(tmp_path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libreft_trt.so"
    library.write_bytes(b"one")
    engine = _engine(tmp_path, plugin=PluginRecord(file=library.name, sha256=sha256_of(library)))
    check_device(engine, "1.7.1.116", "8.6")
    library.write_bytes(b"two")
    with pytest.raises(BackendUnavailable, match="another plugin than"):
        check_device(engine, "1.7.1.116", "8.6")


FLOATS = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])


@given(data=st.data(), dtype=FLOATS, shape=st.tuples(*[st.integers(0, 3)] * 3))
def test_adapter_files_round_trip(tmp_path_factory, data, dtype, shape) -> None:
    """Bit for bit, in every dtype of an engine, empty tensors and no tensors at all included."""
    bits = data.draw(arrays(np.uint32 if dtype is np.float32 else np.uint16, shape))
    tensors = {"reft.0.block_output.U": bits.view(dtype), "reft.first": np.array([7]), "reft_slot": np.array([[-1]], np.int32)}
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    for written in (tensors, {}):
        write_engine_adapter(path, written)
        read = read_engine_adapter(path)
        assert read.keys() == written.keys()
        for name, value in written.items():
            assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
            assert read[name].tobytes() == value.tobytes() and read[name].flags.writeable


def test_adapter_files_that_are_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(BundleError, match="x is float64"):
        write_engine_adapter(path, {"x": np.zeros(1)})
    write_engine_adapter(path, {"x": np.zeros((2, 3), np.float32)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[8:], whole.replace(b"[2,3]", b"[2,4]")):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match="cannot be read as safetensors"):
            read_engine_adapter(path)
    with pytest.raises(BundleError, match="cannot be read"):
        read_engine_adapter(tmp_path / "none")
    path.write_bytes(whole.replace(b'"F32"', b'"U32"'))
    with pytest.raises(BundleError, match="x is U32"):
        read_engine_adapter(path)


def test_a_missing_package_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as good as not installed
    with pytest.raises(BackendUnavailable, match=r"pip install 'reft-export\[tensorrt-rtx\]'") as caught:
        load_tensorrt("tensorrt-rtx")
    assert caught.value.exit_code == 4
    with pytest.raises(InputError, match="target 'tpu' is unknown; known: tensorrt, tensorrt-rtx"):
        load_tensorrt("tpu")


def test_the_link_that_the_rtx_parser_needs(tmp_path, monkeypatch) -> None:
    """Its package ships libtensorrt_rtx.so.1, and its parser opens libtensorrt_rtx.so."""
    package = tmp_path / "site" / "tensorrt_rtx_libs"
    package.mkdir(parents=True)
    for name in ("__init__.py", f"{RTX_LIBRARY}.1"):
        (package / name).touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert builder_environment("tensorrt-rtx", folder)["LD_LIBRARY_PATH"] == f"{folder}:/somewhere"
    assert (folder / RTX_LIBRARY).resolve() == package / f"{RTX_LIBRARY}.1"
    assert builder_environment("tensorrt", folder)["LD_LIBRARY_PATH"] == "/somewhere"


def test_the_builder_imports_from_where_the_user_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"site{os.pathsep}/elsewhere")
    assert builder_environment("tensorrt", tmp_path)["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}/elsewhere"


class _Tensor:
    def __init__(self, name: str, dtype: str, rank: int, is_shape_tensor: bool = False) -> None:
        self.name, self.dtype, self.shape = name, type("DataType", (), {"name": dtype}), (-1,) * rank
        self.is_shape_tensor = is_shape_tensor


class _Network:
    """Stands in for a parsed INetworkDefinition: inputs, outputs and the types of its layers."""

    def __init__(self, inputs: list[_Tensor], outputs: list[_Tensor], layers: list[str]) -> None:
        self.inputs, self.outputs, self.layers = inputs, outputs, layers
        self.num_inputs, self.num_outputs, self.num_layers = len(inputs), len(outputs), len(layers)

    def get_input(self, i: int) -> _Tensor:
        return self.inputs[i]

    def get_output(self, i: int) -> _Tensor:
        return self.outputs[i]

    def get_layer(self, i: int) -> object:
        return type("Layer", (), {"type": self.layers[i]})


def _spec(folder: Path, **changes: object) -> BuildSpec:
    spec = BuildSpec(
        target="tensorrt-rtx",
        graph=str(folder / "model.onnx"),
        plan=str(folder / "engine.plan"),
        plugin=None,
        plugin_layers=0,
        inputs=(IDS, BANK),
        outputs=(TensorRecord(name="logits", dtype="float16", shape=("batch", "sequence", 7)),),
        profiles=PROFILES,
        compute_capabilities=("8.6",),
        weight_streaming=False,
        workspace=None,
        timing_cache=None,
    )
    return replace(spec, **changes)


@pytest.mark.parametrize(
    ("inputs", "outputs", "layers", "match"),
    [
        ([("input_ids", "INT64", 2)], ["logits"], [], "reft.0.block_output.U is missing, expected float16 of rank 3"),
        ([("input_ids", "INT32", 2), (BANK.name, "HALF", 3)], ["logits"], [], "input_ids is int32 of rank 2, expected int64 of rank 2"),
        ([("input_ids", "INT64", 2), (BANK.name, "HALF", 2)], ["logits"], [], "float16 of rank 2, expected float16 of rank 3"),
        ([("input_ids", "INT64", 2), (BANK.name, "HALF", 3), ("x", "BOOL", 0)], ["logits"], [], "x is bool of rank 0, expected missing"),
        ([("input_ids", "INT64", 2, True), (BANK.name, "HALF", 3)], ["logits"], [], "reads the numbers of input_ids on the host"),
        ([("input_ids", "INT64", 2), (BANK.name, "HALF", 3)], [], [], "not the outputs of the graph: logits"),
        ([("input_ids", "INT64", 2), (BANK.name, "HALF", 3)], ["logits"], ["PLUGIN_V3"], "1 plugin layers, expected 2"),
    ],
)
def test_a_network_that_is_not_the_graph_is_refused(tmp_path, inputs, outputs, layers, match) -> None:
    trt = type("trt", (), {"LayerType": type("LayerType", (), {"PLUGIN_V3": "PLUGIN_V3"})})
    spec = _spec(tmp_path, plugin_layers=2)
    good = _Network(
        [_Tensor("input_ids", "INT64", 2), _Tensor(BANK.name, "HALF", 3)], [_Tensor("logits", "HALF", 3)], ["PLUGIN_V3", "x", "PLUGIN_V3"]
    )
    check_network(trt, good, spec)
    network = _Network([_Tensor(*t) for t in inputs], [_Tensor(name, "HALF", 3) for name in outputs], layers or ["PLUGIN_V3"] * 2)
    with pytest.raises(BuildError, match=match):
        check_network(trt, network, spec)


def _mock_package(folder: Path, source: str) -> str:
    """A mock of the tensorrt_rtx package that does one thing wrong; the value of PYTHONPATH that makes a builder import it."""
    (folder / "mock").mkdir()
    (folder / "mock" / "tensorrt_rtx.py").write_text(f"import os, signal, sys\n__version__ = '0.mock'\n{source}\n")
    return str(folder / "mock")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("print('asserted: x', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)", r"died \(SIGSEGV\).*last: asserted: x"),
        ("os.abort()", r"died \(SIGABRT\)"),
        ("raise RuntimeError('no licence')", r"failed \(exit code 1\); it said last: .*RuntimeError: no licence"),
    ],
    ids=["segmentation-fault", "abort", "python-error"],
)
def test_a_builder_that_dies_is_one_line(tmp_path, monkeypatch, source, match) -> None:
    monkeypatch.setenv("PYTHONPATH", _mock_package(tmp_path, source))
    with pytest.raises(BuildError, match=match) as caught:
        run_builder(_spec(tmp_path), tmp_path, update=lambda _: None)
    assert "\n" not in str(caught.value) and not (tmp_path / "engine.plan").exists()


def test_a_library_that_does_not_load_keeps_its_exit_code(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", _mock_package(tmp_path, "raise ImportError('libcudart.so.13: cannot open')"))
    with pytest.raises(BackendUnavailable, match="tensorrt_rtx does not load: libcudart.so.13: cannot open"):
        run_builder(_spec(tmp_path), tmp_path, update=lambda _: None)


def test_an_interrupt_ends_the_builder(tmp_path, monkeypatch) -> None:
    """Whatever is raised while it works, here by the one who is told of its steps, ends the process before it is passed on."""
    started = tmp_path / "started"
    source = (
        f"import pathlib, json, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n"
        "print(json.dumps({'step': 'x'}), flush=True)\ntime.sleep(600)"
    )
    monkeypatch.setenv("PYTHONPATH", _mock_package(tmp_path, source))

    def interrupt(step: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_builder(_spec(tmp_path), tmp_path, update=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


MOCK_TRTEXEC = """#!{python}
# A mock of trtexec: checks the shape of its command line as the real one parses it, and writes a plan that says what it was asked for.
import sys
arguments = sys.argv[1:]
options = dict(a.split("=", 1) for a in arguments if "=" in a)
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26]")
print("[11/21/2026-11:00:00] [I] TensorRT version: 10.3.0")
print("[11/21/2026-11:00:00] [I] Start parsing network model.")
sets = [a for a in arguments if a.startswith("--profile")]
for index, option in enumerate(sets):
    # Each --profile is followed by its three shape options, in one run.
    behind = arguments[arguments.index(option) + 1 :][:3]
    if option != f"--profile={{index}}" or sorted(a.partition("=")[0] for a in behind) != ["--maxShapes", "--minShapes", "--optShapes"]:
        sys.exit("wrong profiles")
if "lost" in options["--minShapes"]:
    print('[11/21/2026-11:00:01] [E] Cannot find input tensor with name "lost" in the network inputs!')
    sys.exit(1)
open(options["--saveEngine"], "w").write("\\n".join(arguments))
"""


@pytest.fixture
def mock_trtexec(tmp_path, monkeypatch) -> Path:
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text(MOCK_TRTEXEC.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("trtexec") == str(program)
    return program


def test_trtexec_command(tmp_path) -> None:
    spec = _spec(
        Path("/f"), target="tensorrt", plugin="/lib/libreft_trt.so", weight_streaming=True, workspace=512, timing_cache="/c/timing"
    )
    assert trtexec_command(spec) == [
        "trtexec", "--onnx=/f/model.onnx", "--saveEngine=/f/engine.plan", "--skipInference", "--stronglyTyped", "--noTF32",
        "--dynamicPlugins=/lib/libreft_trt.so",
        "--profile=0", "--minShapes=input_ids:1x1,reft.0.block_output.U:1x1x64",
        "--optShapes=input_ids:1x128,reft.0.block_output.U:2x4x64", "--maxShapes=input_ids:4x128,reft.0.block_output.U:64x64x64",
        "--profile=1", "--minShapes=input_ids:1x1,reft.0.block_output.U:1x1x64",
        "--optShapes=input_ids:1x1,reft.0.block_output.U:2x4x64", "--maxShapes=input_ids:4x1,reft.0.block_output.U:64x64x64",
        "--memPoolSize=workspace:512", "--allowWeightStreaming", "--timingCacheFile=/c/timing",
    ]  # fmt: skip
    plain = trtexec_command(_spec(Path("/f")))
    assert not [a for a in plain if a.startswith(("--dynamicPlugins", "--memPoolSize", "--allowWeightStreaming", "--timingCacheFile"))]


def test_mock_trtexec_builds(tmp_path, mock_trtexec) -> None:
    spec = _spec(tmp_path, target="tensorrt")
    steps: list[str] = []
    result = run_trtexec(spec, tmp_path, update=steps.append)
    assert result.tensorrt_version == "10.3.0" and result.seconds > 0 and result.peak_memory > 0
    assert steps[-1] == "building the engine: Start parsing network model."
    assert Path(spec.plan).read_text().splitlines() == trtexec_command(spec)[1:]


def test_mock_trtexec_refuses_a_lost_input(tmp_path, mock_trtexec) -> None:
    shape = ShapeRange(min=(1,), opt=(1,), max=(1,))
    spec = _spec(tmp_path, target="tensorrt", profiles=(Profile(name="prefill", shapes={"lost": shape}),))
    with pytest.raises(BuildError, match=r'failed \(exit code 1\).*Cannot find input tensor with name "lost".*its command was: ') as caught:
        run_trtexec(spec, tmp_path, update=lambda _: None)
    assert "\n" not in str(caught.value)

"""The TensorRT plugin: through a stand-in for TensorRT, in the registries of real lean runtimes, and in the real TensorRT-RTX.

Engines are built without a GPU, in processes of their own, since a failed build may end the process; none is executed. The plugin's
enqueue runs over the CPU kernels, and on a GPU in the test marked so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from native_op import DTYPES, ELEMENTS, check, draw
from onnx import TensorProto, helper
from plugin_host import (
    BUILD,
    DOUBLE,
    HERE,
    INT32,
    NATIVE,
    RUNTIME,
    Host,
    Refused,
    build_plugin,
    compile_plugin,
    compile_with,
    configure,
    cuda_include,
    run,
)

from graph_passes.function_body import edit_function
from runtimes.edits.edit import ACTIVATED, ACTIVATIONS
from runtimes.native_library import plugin_details

D = 64
H, SLOT = [2, 9, D], [2, 9]
BANKS = [[3, 4, D], [3, 4, D], [3, 4]]
LEAN = {"10": "10.16.1.11", "11": "11.4.0.106"}
"""By major version, the lean runtimes of TensorRT that the package index has: real registries, no builder."""
MEBIBYTE = 1 << 20


@pytest.fixture
def host(host_library, tensorrt_plugin) -> Host:
    return Host(host_library, tensorrt_plugin)


# ---- through the stand-in


def test_identity(host, tensorrt_plugin) -> None:
    """What a node's domain, type and attributes must say for the parser to find this plugin."""
    from runtimes.edits.op import OP_TYPE, PLUGIN_NAMESPACE, PLUGIN_VERSION

    assert host.identity() == f"{OP_TYPE}|{PLUGIN_VERSION}|{PLUGIN_NAMESPACE}|activation,activated"
    assert plugin_details(tensorrt_plugin) == ("LoReFT 1, RED 1, TensorRT 10.3.0", ("86",))


def test_nothing_else_is_exported(tensorrt_plugin) -> None:
    """A process holds several plugin libraries and several copies of cudart; only these names meet."""
    nm = shutil.which("nm") or pytest.skip("nm is not on the path")
    listed = subprocess.run([nm, "-D", "--defined-only", tensorrt_plugin], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    ours = {f"reft_trt_{name}" for name in ("version", "cuda_architectures", "creators", "use_logger")}
    assert names == ours | {"getCreators", "setLoggerFinder"}


@pytest.mark.parametrize("activated", ACTIVATED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_attributes_survive_serialization(host, activation, activated) -> None:
    """Built from a node's strings, stored in an engine, read back; and copied for an execution context."""
    plugin = host.create(BUILD, activation=activation.encode(), activated=activated.encode())
    expected = {"activation": activation, "activated": activated}
    copies = [host.read_back(plugin), host.clone(plugin), host.attach(plugin)]
    host.destroy(plugin)
    again = host.clone(copies[0])
    assert [host.fields(copy) for copy in (*copies, again)] == [expected] * 4
    for copy in (*copies, again):
        host.destroy(copy)


def test_attributes_in_other_spellings(host) -> None:
    assert host.fields(host.create()) == {"activation": "", "activated": "all"}, "absent attributes are the defaults"
    assert host.fields(host.create(activation=b"gelu\0", activated=b"first_half\0")) == {"activation": "gelu", "activated": "first_half"}
    assert host.fields(host.create(RUNTIME, activation=b"", unknown=b"whatever")) == {"activation": "", "activated": "all"}


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activation": b"softmax"}, "attribute activation is 'softmax', expected one of \"\", relu, gelu,"),
        ({"activated": b"second_half"}, "attribute activated is 'second_half', expected all or first_half"),
        ({"activation": (b"\3\0\0\0", INT32)}, "attribute activation is of plugin field type 5, expected a string"),
        ({"activation": b"x" * 16}, "attribute activation has 16 characters, expected a short name"),
    ],
)
def test_attributes_refused(host, fields, reason, phase) -> None:
    with pytest.raises(Refused) as refused:
        host.create(phase, **fields)
    assert str(refused.value).startswith(f"LoReFT plugin, node edit: {reason}")


def test_without_a_logger_the_reason_is_on_stderr(host_library, tensorrt_plugin, capfd) -> None:
    host = Host(host_library, tensorrt_plugin, with_finder=False)
    with pytest.raises(Refused, match="^$"):
        host.create(activation=b"softmax")
    assert "LoReFT plugin, node edit: attribute activation is 'softmax'" in capfd.readouterr().err


def test_a_logger_of_another_tensorrt_is_not_called(host_library, tmp_path, tensorrt_plugin, capfd) -> None:
    """TensorRT 11 moved the logger's functions: a plugin compiled for 10 leaves it alone, and says what it has to say on stderr."""
    eleven = compile_with(DOUBLE, HERE / "plugin_host.cc", tmp_path / "host11.so", "-shared", "-fPIC", "-DREFT_DOUBLE_OF_TENSORRT_11")
    host = Host(eleven, tensorrt_plugin)
    with pytest.raises(Refused, match="^$"):
        host.create(activation=b"softmax")
    assert "attribute activation is 'softmax'" in capfd.readouterr().err
    assert host.fields(host.create(activation=b"relu")) == {"activation": "relu", "activated": "all"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(host, dtype) -> None:
    plugin = host.create()
    types = [dtype, "int32", dtype, dtype, dtype]
    assert host.output_type(plugin, types) == dtype
    for position in range(6):
        assert host.supports(plugin, position, [*types, dtype])
        assert not host.supports(plugin, position, [*types, dtype], format=1), "only linear memory"
        other = [*types, dtype]
        other[position] = "int64"
        assert not host.supports(plugin, position, other)
    host.destroy(plugin)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        (["float32", "int32", *["float16"] * 3], "h, U, A and b are float32, float16, float16 and float16, expected one type for all"),
        (["float16", "int32", "float16", "float16", "float32"], "h, U, A and b are float16, float16, float16 and float32, expected one"),
        (["float16", "int64", "float16", "float16", "float16"], "slot is int64, expected int32"),
        (["int8", "int32", "int8", "int8", "int8"], "h is int8, expected float32, float16 or bfloat16"),
        (["float16", "int32", "float16", "float16"], "the node has 4 inputs and 1 outputs, expected h, slot, U, A and b and one output"),
    ],
)
def test_types_refused(host, types, reason) -> None:
    with pytest.raises(Refused, match=f"^LoReFT plugin, node edit: {reason}"):
        host.output_type(host.create(), types)


@pytest.mark.parametrize("leading", [[18], [2, 9]])
def test_shapes(host, leading) -> None:
    plugin = host.create()
    shapes = [[*leading, D], leading, *BANKS]
    unknown = [[-1] * len(shape) for shape in shapes]
    assert host.output_rank(plugin, shapes) == host.output_rank(plugin, unknown) == len(leading) + 1
    widest = [[*[64] * len(leading), D], [64] * len(leading), [500, 256, D], [500, 256, D], [500, 256]]
    narrowest = [[*[0] * len(leading), D], [0] * len(leading), [1, 1, D], [1, 1, D], [1, 1]]
    host.configure(plugin, narrowest, widest)
    for now in (narrowest, shapes, widest):
        host.shapes(plugin, now)


SHAPES_REFUSED = [
    ([[D], [], *BANKS], r"h has shape \[64\], expected \[tokens, D\] or \[batch, sequence, D\]"),
    ([[1, 2, 9, D], [1, 2, 9], *BANKS], r"h has shape \[1, 2, 9, 64\], expected \[tokens, D\]"),
    ([H, [2, 8], *BANKS], r"slot has shape \[2, 8\], expected \[2, 9\], one slot per token of h \[2, 9, 64\]"),
    ([H, [18], *BANKS], r"slot has shape \[18\], expected \[2, 9\]"),
    ([H, SLOT, [3, 4, 32], *BANKS[1:]], r"U has shape \[3, 4, 32\], expected \[N, r, D\] with D being that of h \[2, 9, 64\]"),
    ([H, SLOT, [4, D], *BANKS[1:]], r"U has shape \[4, 64\], expected \[N, r, D\]"),
    ([H, SLOT, BANKS[0], [3, 5, D], BANKS[2]], r"A has shape \[3, 5, 64\], expected \[3, 4, 64\], the shape of U"),
    ([H, SLOT, BANKS[0], [3, 4, 32], BANKS[2]], r"A has shape \[3, 4, 32\], expected \[3, 4, 64\]"),
    ([H, SLOT, *BANKS[:2], [4, 3]], r"b has shape \[4, 3\], expected \[3, 4\], \[N, r\] of U \[3, 4, 64\]"),
    ([H, SLOT, [0, 4, D], [0, 4, D], [0, 4]], r"U has shape \[0, 4, 64\], expected N >= 1 slots; bind a bank of zeros"),
    ([H, SLOT, [3, 0, D], [3, 0, D], [3, 0]], r"U has shape \[3, 0, 64\], expected a rank r from 1 to 256"),
    ([H, SLOT, [3, 257, D], [3, 257, D], [3, 257]], r"U has shape \[3, 257, 64\], expected a rank r from 1 to 256"),
]


@pytest.mark.parametrize(("shapes", "reason"), SHAPES_REFUSED)
def test_shapes_refused(host, shapes, reason) -> None:
    """When the network is put together, for a profile, and when a context sets its shapes."""
    plugin = host.create()
    for ask in (host.output_rank, lambda p, s: host.configure(p, s, s), host.shapes):
        with pytest.raises(Refused, match=f"^LoReFT plugin, node edit: {reason}"):
            ask(plugin, shapes)
    with pytest.raises(Refused, match=reason):
        host.enqueue(plugin, "float16", shapes, [0] * 5, 0, None)


def test_profiles_refused(host) -> None:
    """Where the graph leaves N and r open, the profile's bounds are what must fit."""
    plugin = host.create()

    def bounds(slots: int, rank: int) -> list[list[int]]:
        return [H, SLOT, [slots, rank, D], [slots, rank, D], [slots, rank]]

    host.configure(plugin, bounds(1, 1), bounds(9, 256))
    with pytest.raises(Refused, match=r"U has shape \[1\.\.9, 1\.\.257, 64\], expected a rank r from 1 to 256"):
        host.configure(plugin, bounds(1, 1), bounds(9, 257))
    with pytest.raises(Refused, match=r"U has shape \[1\.\.9, 0\.\.4, 64\], expected a rank r from 1 to 256"):
        host.configure(plugin, bounds(1, 0), bounds(9, 4))
    with pytest.raises(Refused, match=r"U has shape \[0\.\.9, 1\.\.4, 64\], expected N >= 1 slots"):
        host.configure(plugin, bounds(0, 1), bounds(9, 4))
    # A of rank 5 and more can never go with U of rank 4 and less.
    lowest, highest = bounds(1, 1), bounds(9, 4)
    lowest[3], highest[3] = [1, 5, D], [9, 8, D]
    with pytest.raises(Refused, match=r"A has shape \[1\.\.9, 5\.\.8, 64\], expected \[1\.\.9, 1\.\.4, 64\]"):
        host.configure(plugin, lowest, highest)


NAMES = ("h", "slot", "U", "A", "b")
EDITS = (("", "all", 4), ("gelu", "first_half", 6), ("tanh", "all", 1), ("relu", "first_half", 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (33,), (2, 17), (0, 3)])
def test_enqueue_forwards_what_it_got(host_library, plugin_on_host, dtype, leading) -> None:
    """Every pointer, size and attribute in its place: over the CPU kernels, against float64."""
    host = Host(host_library, plugin_on_host)
    for activation, activated, rank in EDITS:
        feeds = draw(0, leading, 40, rank, 3, dtype)
        y = np.full_like(feeds["h"], 77)
        built = host.create(activation=activation.encode(), activated=activated.encode())
        plugin = host.attach(host.read_back(built))
        shapes = [list(feeds[name].shape) for name in NAMES]
        host.shapes(plugin, shapes)
        host.enqueue(plugin, dtype, shapes, [feeds[name].ctypes.data for name in NAMES], y.ctypes.data, None)
        check(y, feeds, dtype, activation, activated)


def test_the_workspace_is_that_of_a_profiles_largest_shapes(host_library, plugin_on_host) -> None:
    host = Host(host_library, plugin_on_host)
    lowest, highest = ([[1, t, 40], [1, t], [n, r, 40], [n, r, 40], [n, r]] for t, n, r in ((1, 1, 1), (7, 3, 64)))
    # As launch_on_host.cc makes it: tokens and rank.
    assert host.workspace(host.create(), "float16", lowest, highest) == 7_064
    assert host.workspace(host.create(), "bfloat16", lowest, lowest) == 1_001


def test_a_failed_launch_is_reported(host_library, plugin_on_host) -> None:
    """The stream reaches the launcher, and its error the log."""
    host = Host(host_library, plugin_on_host)
    with pytest.raises(Refused, match=r"CUDA launch failed: cudaErrorOnPurpose \(a launch that fails\); the plugin was compiled for sm"):
        host.enqueue(host.create(), "float16", [H, SLOT, *BANKS], [16] * 5, 16, 1)


def test_without_a_gpu_the_launch_says_what_is_missing(host) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(Refused, match=r"CUDA launch failed: cudaError\w+ \(.+\); the plugin was compiled for sm 86"):
        host.enqueue(host.create(), "float16", [H, SLOT, *BANKS], [16] * 5, 16, None)


@pytest.fixture(scope="session")
def plugin_for_this_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return build_plugin(tmp_path_factory.mktemp("plugin-on-gpu"), DOUBLE, architectures=f"{major}{minor}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (33,), (2, 17)])
def test_enqueue_on_a_gpu(host_library, plugin_for_this_gpu, dtype, leading) -> None:
    """Not yet run on one."""
    import torch
    from native_gpu import on_gpu

    host = Host(host_library, plugin_for_this_gpu)
    for activation, activated, rank in EDITS:
        feeds = draw(0, leading, 130, rank, 3, dtype)
        device = on_gpu(feeds, dtype)
        y = torch.full_like(device["h"], float("nan"))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        plugin = host.create(activation=activation.encode(), activated=activated.encode())
        shapes = [list(feeds[name].shape) for name in NAMES]
        host.enqueue(plugin, dtype, shapes, [device[name].data_ptr() for name in NAMES], y.data_ptr(), stream.cuda_stream)
        stream.synchronize()
        check(y.float().cpu().numpy().astype(DTYPES[dtype]), feeds, dtype, activation, activated)


# ---- the libraries


def test_doctor_says_what_it_found_or_how_to_build_it(tensorrt_plugin, monkeypatch, tmp_path) -> None:
    from typer.testing import CliRunner

    from reft_export.cli.main import app
    from runtimes import native_library

    def row() -> dict[str, str]:
        rows = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
        return next(row for row in rows if row["what"] == "TensorRT plugin")

    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    monkeypatch.setattr(native_library, "find_plugin_library", lambda: None)
    assert row()["found"] == "missing"
    assert f"-DREFT_TENSORRT=ON -DTENSORRT_INCLUDE_DIR={tmp_path / 'include'} && cmake --build" in row()["note"]
    monkeypatch.setattr(native_library, "find_plugin_library", lambda: tensorrt_plugin)
    assert row()["found"] == "LoReFT 1, RED 1, TensorRT 10.3.0" and row()["note"] == f"{tensorrt_plugin}; CUDA sm 86"
    monkeypatch.setattr(native_library, "find_plugin_library", lambda: tmp_path / "include" / "NvInferRuntime.h")
    assert row()["found"] == "broken" and "build it again: cmake -S" in row()["note"]


@pytest.mark.slow
def test_size_with_every_architecture(tmp_path) -> None:
    """As it is installed: every architecture, stripped."""
    build_plugin(tmp_path / "build", DOUBLE, architectures="75;80;86;87;89;90;110;120")
    subprocess.run(["cmake", "--install", tmp_path / "build", "--strip", "--prefix", tmp_path / "site"], check=True, capture_output=True)
    installed = tmp_path / "site" / "runtimes" / "native" / "lib"
    assert sorted(path.name for path in installed.iterdir()) == ["libreft_trt.so", "libreft_trt_autoload.so"]
    assert (installed / "libreft_trt.so").stat().st_size < 3 * MEBIBYTE
    assert (installed / "libreft_trt_autoload.so").stat().st_size < MEBIBYTE / 16
    version, architectures = plugin_details(installed / "libreft_trt.so")
    assert version.startswith("LoReFT 1, RED 1, TensorRT") and "86" in architectures


def test_what_is_skipped_is_said(tmp_path) -> None:
    told = configure(tmp_path / "a", "-DREFT_ORT=OFF", "-DREFT_TENSORRT=OFF", "-DREFT_CUDA=OFF")
    assert "no op library for ONNX Runtime: REFT_ORT=OFF" in told and "no TensorRT plugin: REFT_TENSORRT=OFF" in told
    told = configure(tmp_path / "b", "-DREFT_ORT=OFF", "-DREFT_CUDA=OFF", f"-DTENSORRT_INCLUDE_DIR={DOUBLE}")
    assert "no TensorRT plugin: it needs the CUDA kernels: REFT_CUDA=OFF" in told
    old = tmp_path / "old"
    old.mkdir()
    (old / "NvInferRuntime.h").touch()
    (old / "NvInferVersion.h").write_text("#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 5\n")
    told = configure(tmp_path / "c", "-DREFT_ORT=OFF", f"-DTENSORRT_INCLUDE_DIR={old}")
    if "no CUDA kernels" not in told:
        assert f"no TensorRT plugin: {old} is of TensorRT 8.5, 10.3 or later is needed" in told
    # JetPack 6.2 has CUDA 12.6, which knows no Thor and no RTX 50.
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        older = tmp_path / "nvcc"
        listed = "printf 'sm_75\\nsm_80\\nsm_86\\nsm_87\\nsm_89\\nsm_90\\nsm_90a\\n'"
        older.write_text(f'#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then {listed}; else exec {nvcc} "$@"; fi\n')
        older.chmod(0o755)
        told = configure(tmp_path / "e", "-DREFT_ORT=OFF", f"-DREFT_NVCC={older}", f"-DTENSORRT_INCLUDE_DIR={DOUBLE}")
        assert "no kernel for sm_110: this nvcc does not know it" in told and "CUDA kernels for sm 75,80,86,87,89,90" in told
    asked = subprocess.run(
        ["cmake", "-S", NATIVE, "-B", tmp_path / "d", "-DREFT_ORT=OFF", "-DREFT_TENSORRT=ON", f"-DTENSORRT_INCLUDE_DIR={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode != 0 and "reft: REFT_TENSORRT=ON, but" in asked.stderr


@pytest.mark.slow
def test_one_library_for_edge_llm_and_the_plugin(tensorrt_plugin, tmp_path) -> None:
    """TensorRT-Edge-LLM opens EDGELLM_PLUGIN_PATH, whose own constructors register its plugins, and looks up a function in it."""
    edgellm = tmp_path / "edge llm"
    edgellm.mkdir()
    source = edgellm / "stand_in.cc"
    source.write_text(
        '#include <cstdlib>\n__attribute__((constructor)) void registers() { setenv("EDGELLM_STAND_IN", "registered", 1); }\n'
        'extern "C" __attribute__((visibility("default"))) bool initEdgellmPlugins(void*, const char*) { return true; }\n'
    )
    stand_in = edgellm / "libNvInfer_edgellm_plugin.so"
    compile_with(DOUBLE, source, stand_in, "-shared", "-fPIC", "-Wl,-soname,libNvInfer_edgellm_plugin.so")
    both = build_plugin(tmp_path / "build", DOUBLE, f"-DREFT_EDGELLM_PLUGIN={stand_in}").parent / "libreft_trt_edgellm.so"
    program = (
        "import ctypes, os, sys; library = ctypes.CDLL(sys.argv[1]);"
        "getenv = ctypes.CDLL(None).getenv; getenv.restype = ctypes.c_char_p;"
        "print(library.initEdgellmPlugins(None, None), getenv(b'EDGELLM_STAND_IN').decode())"
    )
    done = subprocess.run([sys.executable, "-c", program, both], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "registered"], done.stderr
    assert "not registered: no TensorRT 10 is loaded in this process" in done.stderr


@pytest.fixture(scope="session")
def lean(tmp_path_factory: pytest.TempPathFactory):
    """major -> libnvinfer_lean.so of that TensorRT, or a skip."""
    folders: dict[str, Path] = {}

    def library(major: str) -> Path:
        if major not in folders:
            folder = tmp_path_factory.mktemp(f"lean-{major}")
            package = f"tensorrt_lean_cu13_libs=={LEAN[major]}"
            command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download", "--no-deps", "-d", folder, package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{package} does not install here: {done.stderr.strip().splitlines()[-1]}")
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                wheel.extractall(folder)
            folders[major] = folder
        return next(folders[major].rglob(f"libnvinfer_lean.so.{major}"))

    return library


@pytest.mark.slow
@pytest.mark.parametrize(("registry", "compiled_for"), [("10", "10"), ("11", "11"), ("11", "10"), ("10", "11")])
def test_real_registries(lean, tensorrt_plugin, tmp_path, registry, compiled_for) -> None:
    """A plugin library works in either; one that registers itself calls the registry, and works in its own major version only."""
    flags = {"10": (), "11": ("-DREFT_DOUBLE_OF_TENSORRT_11",)}
    library = lean(registry)
    driver = compile_with(DOUBLE, HERE / "tensorrt_registry.cc", tmp_path / "registry", *flags[registry])
    folder = tensorrt_plugin.parent
    autoload = tmp_path / "libreft_trt_autoload.so"
    linked = (f"-L{folder}", "-lreft_trt", f"-Wl,-rpath,{folder}")
    compile_with(DOUBLE, NATIVE / "tensorrt" / "autoload.cc", autoload, "-shared", "-fPIC", *flags[compiled_for], *linked)

    def drive(how: str, plugin: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([driver, library, how, plugin], capture_output=True, text=True, check=False)

    loaded = drive("load", tensorrt_plugin)
    assert loaded.returncode == 0 and "creator PLUGIN CREATOR_V3ONE" in loaded.stdout, loaded.stdout + loaded.stderr
    assert "attribute activation is 'softmax'" in loaded.stdout + loaded.stderr
    # What the library says where it must not register, by how the host holds its TensorRT.
    elsewhere = {"open": f"no TensorRT {compiled_for} is loaded", "open-linked": f"this process runs TensorRT {registry}."}
    for how, reason in elsewhere.items():
        opened = drive(how, autoload)
        if registry == compiled_for:
            assert opened.returncode == 0 and "read back 1" in opened.stdout, opened.stdout + opened.stderr
        else:
            assert opened.returncode == 1 and "creator none" in opened.stdout
            assert f"not registered: {reason}" in opened.stderr


@pytest.mark.slow
def test_in_tensorrt_rtx_compiled_for_it(tensorrt_rtx, tmp_path) -> None:
    """Compiled for TensorRT-RTX, the plugin registers itself there, and its reasons go through TensorRT's own logger."""
    launcher = tmp_path / "no_launcher.cc"
    launcher.write_text(
        '#include "cuda/edit_cuda.h"\n'
        "int64_t reft::most_workspace_bytes(int64_t, int64_t) { return 0; }\n"
        'const char* reft::launch_edit(const Edit&, void*, void*) { return "no kernel"; }\n'
        'const char* reft::launch_edit(const RedEdit&, void*) { return "no kernel"; }\n'
    )
    rtx = "-DREFT_DOUBLE_OF_TENSORRT_RTX"
    plugin = compile_plugin(tmp_path / "libreft_trt.so", launcher, rtx)
    linked = ("-shared", "-fPIC", rtx, f"-L{tmp_path}", "-lreft_trt", f"-Wl,-rpath,{tmp_path}")
    autoload = compile_with(DOUBLE, NATIVE / "tensorrt" / "autoload.cc", tmp_path / "libreft_trt_autoload.so", *linked)
    model = edit_model(tmp_path, "refused", "float32", 3, activation="softmax", **AS_PLUGIN)
    told, printed = build_engines(tensorrt_rtx, plugin, 89, model)
    assert not told[0]["parsed"]
    assert "[TRT] [E] LoReFT plugin, node edit_of_layer_3: attribute activation is 'softmax'" in printed
    program = (
        "import ctypes, sys, tensorrt_rtx; registry = tensorrt_rtx.get_plugin_registry();"
        "names = lambda: [c.plugin_namespace for c in registry.all_creators if c.name in ('LoReFT', 'RED')];"
        "before = names(); ctypes.CDLL(sys.argv[1]); print(before, names())"
    )
    done = subprocess.run([sys.executable, "-c", program, autoload], capture_output=True, text=True, check=False, env=tensorrt_rtx)
    assert done.stdout.strip() == "[] ['ai.reft', 'ai.reft']", done.stdout + done.stderr


@pytest.mark.slow
def test_compiles_for_aarch64(tmp_path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++") or pytest.skip("no aarch64-linux-gnu-g++ here (Debian: g++-aarch64-linux-gnu)")
    includes = ("-isystem", DOUBLE, "-isystem", cuda_include(), f"-I{NATIVE}", f"-I{NATIVE}/include")
    for source in sorted((NATIVE / "tensorrt").glob("*.cc")):
        flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", '-DREFT_CUDA_ARCHITECTURES="87"')
        run(compiler, "-c", *flags, *includes, source, "-o", tmp_path / f"{source.stem}.o")


def test_opened_without_tensorrt_it_says_so(tensorrt_plugin) -> None:
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    autoload = tensorrt_plugin.with_name("libreft_trt_autoload.so")
    done = subprocess.run([sys.executable, "-c", program, autoload], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not registered: no TensorRT 10 is loaded in this process" in done.stderr


# ---- in the real TensorRT-RTX


def edit_model(
    folder: Path,
    name: str,
    dtype: str,
    rank: int,
    *,
    dynamic: bool = False,
    function: bool = False,
    bank_rank: int = 4,
    wrong: str = "",
    **attributes: str,
) -> str:
    """x -> Relu -> LoReFT -> Relu, saved with its profile; returns "MODEL:PROFILE". ``wrong`` breaks one rule of the op.

    ``dynamic``: U, A and b are inputs of any N and r, else constants. ``function``: the model carries the function of that name too.
    """
    element, npdtype, slots = ELEMENTS[dtype], DTYPES[dtype], 2
    leading = ["batch", "sequence"][: rank - 1]
    info = helper.make_tensor_value_info
    slot_type = TensorProto.INT64 if wrong == "int64 slots" else TensorProto.INT32
    inputs = [info("x", element, [*leading, D]), info("slot", slot_type, leading)]
    low, middle, high = ([n] * (rank - 1) for n in (1, 8, 64))
    profile = {"x": [[*low, D], [*middle, D], [*high, D]], "slot": [low, middle, high]}
    bank_element, bank_type = (TensorProto.FLOAT16, np.dtype(np.float16)) if wrong == "mixed types" else (element, npdtype)
    initializers = []
    for bank, shape in (("U", (slots, bank_rank, D)), ("A", (slots, bank_rank, D)), ("b", (slots, bank_rank))):
        if dynamic:
            inputs.append(info(bank, bank_element, ["slots", "rank", D][: len(shape)]))
            profile[bank] = [[1, 1, *shape[2:]], list(shape), [64, bank_rank if bank_rank > 4 else 256, *shape[2:]]]
        else:
            values = np.random.default_rng(0).standard_normal(shape).astype(bank_type)
            initializers.append(helper.make_tensor(bank, bank_element, shape, values.tobytes(), raw=True))
    edited = ["h", "slot", "U", "A", "b"]
    if wrong == "missing slot":
        edited.remove("slot")
    node = helper.make_node("LoReFT", edited, ["y"], name="edit_of_layer_3", domain="ai.reft", **attributes)
    nodes = [helper.make_node("Relu", ["x"], ["h"]), node, helper.make_node("Relu", ["y"], ["z"])]
    graph = helper.make_graph(nodes, "edit", inputs, [info("z", element, [*leading, D])], initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("ai.reft", 1)]
    functions = [ir.serde.serialize_function(edit_function(opset=20, per_token=True))] if function else []
    model = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10), model)
    model.with_suffix(".json").write_text(json.dumps(profile))
    return f"{model}:{model.with_suffix('.json')}"


AS_PLUGIN = {"plugin_namespace": "ai.reft", "plugin_version": "1"}


def build_engines(environment: dict[str, str], plugin: Path | None, sm: int, *models: str) -> tuple[list[dict], str]:
    """What came of each model, and everything that was printed. A process that died built nothing."""
    command = [sys.executable, HERE / "build_in_tensorrt_rtx.py", str(plugin) if plugin else "-", str(sm), *models]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, env=environment)
    told = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
    return told, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm", [86, 89, 120])
def test_engines(tensorrt_rtx, tensorrt_plugin, tmp_path, sm, dtype) -> None:
    cases = list(product((2, 3), (False, True)))
    models = [edit_model(tmp_path, f"{rank}_{dynamic}", dtype, rank, dynamic=dynamic, **AS_PLUGIN) for rank, dynamic in cases]
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, sm, *models)
    assert [t["plugins"] for t in told] == [1] * 4, printed
    assert all(t["engine"] for t in told), printed
    assert [len(t["inputs"]) for t in told] == [5 if dynamic else 2 for _, dynamic in cases]


@pytest.mark.slow
def test_engines_with_activations(tensorrt_rtx, tensorrt_plugin, tmp_path) -> None:
    """The attributes reach the plugin as fields, and are in the engine that comes out."""
    pairs = (("", "all"), ("gelu", "all"), ("gelu_tanh", "first_half"))
    attributes = [{"activation": activation, "activated": activated, **AS_PLUGIN} for activation, activated in pairs]
    models = [edit_model(tmp_path, f"m{i}", "float16", 3, **named) for i, named in enumerate(attributes)]
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, 89, *models)
    assert [bool(t["engine"]) for t in told] == [True] * 3, printed
    assert ["first_half" in t["stored"] for t in told] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"bank_rank": 0}, "U has shape [2, 0, 64], expected a rank r from 1 to 256"),
        ({"bank_rank": 257}, "U has shape [2, 257, 64], expected a rank r from 1 to 256"),
        ({"bank_rank": 257, "dynamic": True}, "U has shape [1..64, 1..257, 64], expected a rank r from 1 to 256"),
        ({"wrong": "mixed types"}, "h, U, A and b are float32, float16, float16 and float16, expected one type for all"),
        ({"wrong": "int64 slots"}, "slot is int64, expected int32"),
        ({"wrong": "missing slot"}, "the node has 4 inputs and 1 outputs, expected h, slot, U, A and b and one output"),
        ({"activation": "softmax"}, "attribute activation is 'softmax', expected one of"),
    ],
)
def test_refused_with_a_reason(tensorrt_rtx, tensorrt_plugin, tmp_path, case, reason) -> None:
    model = edit_model(tmp_path, "refused", "float32", 3, **case, **AS_PLUGIN)
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, 89, model)
    assert not any(t["engine"] for t in told), printed
    assert f"LoReFT plugin, node edit_of_layer_3: {reason}" in printed


@pytest.mark.slow
def test_plugin_present_and_absent_in_the_same_file(tensorrt_rtx, tensorrt_plugin, tmp_path) -> None:
    """Both plugin attributes and the library: the plugin. Without the library, or without the attributes: the function."""
    named = edit_model(tmp_path, "named", "float16", 3, dynamic=True, function=True, activation="", activated="all", **AS_PLUGIN)
    plain = edit_model(tmp_path, "plain", "float16", 3, dynamic=True, function=True, activation="", activated="all")
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, 89, named, plain)
    assert [(t["plugins"], bool(t["engine"])) for t in told] == [(1, True), (0, True)], printed
    told, printed = build_engines(tensorrt_rtx, None, 89, named)
    assert [(t["plugins"], bool(t["engine"])) for t in told] == [(0, True)], printed

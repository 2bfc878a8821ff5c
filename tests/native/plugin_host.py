"""The TensorRT plugin through a stand-in for TensorRT (plugin_host.cc), and what compiles it and its companions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parent.parent / "runtimes" / "native"
DOUBLE = HERE / "tensorrt_double"
DATA_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "bfloat16": 7, "int64": 8}
"""nvinfer1::DataType."""
CHAR, INT32 = 6, 5
"""nvinfer1::PluginFieldType."""
BUILD, RUNTIME = 0, 1
"""nvinfer1::TensorRTPhase."""


def run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h, which TensorRT's headers include; only nvcc itself knows where its toolkit is."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path, and the plugin has a CUDA kernel")
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "none"], capture_output=True, text=True, check=False)
    (top,) = [line.partition("TOP=")[2] for line in (told.stdout + told.stderr).splitlines() if "TOP=" in line]
    return Path(top.strip()) / "include"


def compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return found or pytest.skip("no C++ compiler here")


def compile_with(headers: Path, source: Path, output: Path, *flags: object) -> Path:
    """``source`` against these TensorRT headers, whose own warnings are theirs."""
    warnings = ("-Wall", "-Wextra", "-Wno-deprecated-declarations")
    includes = ("-isystem", headers, "-isystem", cuda_include(), f"-I{NATIVE}", f"-I{NATIVE}/include")
    run(compiler(), "-std=c++17", "-O1", *warnings, "-fvisibility=hidden", *includes, source, "-o", output, *flags, "-ldl")
    return output


def configure(build: Path, *options: str) -> str:
    """What cmake says of the native libraries, configured into ``build``."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on the path")
    return run("cmake", "-S", NATIVE, "-B", build, *options).stdout


def build_plugin(build: Path, headers: Path, *options: str, architectures: str = "86") -> Path:
    """libreft_trt.so and its companions, compiled through CMake against ``headers``."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the path, and the plugin has a CUDA kernel")
    options = ("-DREFT_ORT=OFF", "-DREFT_TENSORRT=ON", f"-DREFT_CUDA_ARCHITECTURES={architectures}", *options)
    configure(build, f"-DTENSORRT_INCLUDE_DIR={headers}", *options)
    run("cmake", "--build", build, "--parallel", "2")
    return build / "libreft_trt.so"


def compile_plugin(output: Path, launcher: Path, *flags: object) -> Path:
    """The plugin library without its CUDA kernels: ``launcher`` stands in for them."""
    main, *sources = (path for path in sorted((NATIVE / "tensorrt").glob("*.cc")) if path.stem != "autoload")
    flags = ("-shared", "-fPIC", '-DREFT_CUDA_ARCHITECTURES="none"', *flags)
    return compile_with(DOUBLE, main, output, *sources, launcher, *flags)


class Refused(Exception):
    """The plugin said no; the text is what it logged."""


class Host:
    """One plugin library, and what a builder and an execution context ask of its plugins."""

    def __init__(self, library: Path, plugin: Path, *, op: str = "LoReFT", with_finder: bool = True) -> None:
        self._c = ctypes.CDLL(str(library))
        pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, result, arguments in (
            ("open", text, [text, text, integer]),
            ("logged", text, []),
            ("identity", text, []),
            ("create", pointer, [integer, *[pointer] * 4, integer]),
            ("read_back", pointer, [pointer]),
            ("clone", pointer, [pointer]),
            ("attach", pointer, [pointer]),
            ("destroy", None, [pointer]),
            ("fields", text, [pointer]),
            ("output_type", integer, [pointer, integer, pointer]),
            ("output_rank", integer, [pointer, integer, pointer, pointer]),
            ("configure", integer, [pointer, integer, *[pointer] * 4]),
            ("workspace", ctypes.c_int64, [pointer, integer, *[pointer] * 4]),
            ("supports", integer, [pointer, integer, integer, pointer, integer]),
            ("shapes", integer, [pointer, integer, *[pointer] * 3]),
            ("enqueue", integer, [pointer, integer, *[pointer] * 6]),
        ):
            function = getattr(self._c, f"host_{name}")
            function.restype, function.argtypes = result, arguments
        error = self._c.host_open(str(plugin).encode(), op.encode(), with_finder)
        assert error is None, error

    def logged(self) -> str:
        return self._c.host_logged().decode()

    def identity(self) -> str:
        return self._c.host_identity().decode()

    def create(self, phase: int = BUILD, **fields: bytes | tuple[bytes, int]) -> int:
        """A plugin with these string fields, or (bytes, field type); the length given is that of the bytes."""
        pairs = [f if isinstance(f, tuple) else (f, CHAR) for f in fields.values()]
        count = len(pairs)
        names = (ctypes.c_char_p * count)(*[name.encode() for name in fields])
        data = (ctypes.c_char_p * count)(*[value for value, _ in pairs])
        types = (ctypes.c_int * count)(*[kind for _, kind in pairs])
        lengths = (ctypes.c_int * count)(*[len(value) for value, _ in pairs])
        return self._plugin(self._c.host_create(count, names, data, types, lengths, phase))

    def read_back(self, plugin: int) -> int:
        return self._plugin(self._c.host_read_back(plugin))

    def clone(self, plugin: int) -> int:
        return self._plugin(self._c.host_clone(plugin))

    def attach(self, plugin: int) -> int:
        return self._plugin(self._c.host_attach(plugin))

    def destroy(self, plugin: int) -> None:
        self._c.host_destroy(plugin)

    def fields(self, plugin: int) -> dict[str, str]:
        return dict(pair.split("=") for pair in filter(None, self._c.host_fields(plugin).decode().split(" ")))

    def output_type(self, plugin: int, types: Sequence[str]) -> str:
        found = self._c.host_output_type(plugin, len(types), _types(types))
        self._accepted(found >= 0)
        return next(name for name, value in DATA_TYPES.items() if value == found)

    def output_rank(self, plugin: int, shapes: Sequence[Sequence[int]]) -> int:
        """-1 stands for an extent that is not known yet."""
        rank = self._c.host_output_rank(plugin, len(shapes), _ranks(shapes), _extents(shapes))
        self._accepted(rank >= 0)
        return rank

    def configure(self, plugin: int, lowest: Sequence[Sequence[int]], highest: Sequence[Sequence[int]]) -> None:
        types = _types(_one_type("float16", len(lowest)))
        sizes = (len(lowest), types, _ranks(lowest), _extents(lowest), _extents(highest))
        self._accepted(self._c.host_configure(plugin, *sizes) == 0)

    def workspace(self, plugin: int, dtype: str, lowest: Sequence[Sequence[int]], highest: Sequence[Sequence[int]]) -> int:
        """Bytes that the builder sets aside for the profile."""
        types = _types(_one_type(dtype, len(lowest)))
        return self._c.host_workspace(plugin, len(lowest), types, _ranks(lowest), _extents(lowest), _extents(highest))

    def supports(self, plugin: int, position: int, types: Sequence[str], format: int = 0) -> bool:
        return bool(self._c.host_supports(plugin, position, len(types), _types(types), format))

    def shapes(self, plugin: int, shapes: Sequence[Sequence[int]]) -> None:
        types = _types(_one_type("float16", len(shapes)))
        self._accepted(self._c.host_shapes(plugin, len(shapes), types, _ranks(shapes), _extents(shapes)) == 0)

    def enqueue(
        self, plugin: int, dtype: str, shapes: Sequence[Sequence[int]], data: Sequence[int], output: int, stream: int | None
    ) -> None:
        count = len(shapes)
        tensors = (count, _types(_one_type(dtype, count)), _ranks(shapes), _extents(shapes), (ctypes.c_void_p * count)(*data))
        self._accepted(self._c.host_enqueue(plugin, *tensors, output, stream) == 0)

    def _plugin(self, plugin: int | None) -> int:
        self._accepted(plugin is not None)
        return plugin

    def _accepted(self, accepted: bool) -> None:
        if not accepted:
            raise Refused(self.logged())


def _one_type(dtype: str, count: int) -> list[str]:
    """h, slot, and the banks of the type of h."""
    return [dtype, "int32", *[dtype] * (count - 2)]


def _types(names: Sequence[str]) -> ctypes.Array:
    return (ctypes.c_int * len(names))(*[DATA_TYPES[name] for name in names])


def _ranks(shapes: Sequence[Sequence[int]]) -> ctypes.Array:
    return (ctypes.c_int * len(shapes))(*map(len, shapes))


def _extents(shapes: Sequence[Sequence[int]]) -> ctypes.Array:
    flat = [extent for shape in shapes for extent in (*shape, *[0] * (8 - len(shape)))]
    return (ctypes.c_int64 * len(flat))(*flat)

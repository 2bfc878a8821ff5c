"""The library built in other ways: with sanitizers, for aarch64, as a wheel, without a compiler; and run on other onnxruntimes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import native_red
import numpy as np
import pytest
from native_op import as_model, bank_inputs, check, draw, helper, installed_library, op_model, op_node
from op_library import COMPILERS, NATIVE, compile_library, compiler, rows_here, run
from other_onnxruntime import python_with
from tiers import slow_and_long

ROOT = Path(__file__).parent.parent.parent
ONNXRUNTIMES = ("1.18.1", "1.20.1", "1.23.2", "1.24.4", "1.25.1", "1.28.0", "1.31.1")
"""The required ones, and those around 1.25, from which on the op reads shapes through another function of the C API."""
EM_AARCH64 = 183
"""The machine of an ELF file's header: AArch64."""
IN_THE_CHILD = Path(__file__).parent / "op_in_other_onnxruntime.py"


@pytest.mark.slow
def test_kernels_and_op_under_the_sanitizers(tmp_path) -> None:
    """Every other test of this folder again, in a process with AddressSanitizer and UndefinedBehaviorSanitizer."""
    cxx = compiler()
    runtime = Path(run(cxx, "-print-file-name=libasan.so").stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{cxx} has no AddressSanitizer runtime")
    sanitize = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    library = compile_library(cxx, tmp_path, *sanitize, rows=rows_here())
    names = ("test_cpu_kernels.py", "test_ort_op.py", "test_red_cpu_kernels.py", "test_red_ort_op.py")
    tests = [str(Path(__file__).parent / name) for name in names]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import native_op, pytest;"
        "native_op.find_op_library = lambda: Path(sys.argv[2]);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[3:]]))"
    )
    # The C++ runtime beside it: the sanitizer looks for __cxa_throw when the process starts, and Python has none.
    # Python itself keeps memory until it exits, and a leak in it is no fault of ours.
    preload = f"{runtime} {run(cxx, '-print-file-name=libstdc++.so').stdout.strip()}"
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = run(sys.executable, "-c", program, Path(__file__).parent, library, *tests, env=environment, cwd=ROOT, timeout=550)
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_sanitizers_would_see_an_overrun(tmp_path) -> None:
    cxx = compiler()
    source = tmp_path / "overrun.cc"
    source.write_text("#include <cstdlib>\nint main(int n, char**) { char* p = (char*)std::malloc(4); p[4 * n] = 1; return p[0]; }\n")
    built = subprocess.run([cxx, "-fsanitize=address", source, "-o", tmp_path / "overrun"], check=False, capture_output=True)
    if built.returncode:
        pytest.skip(f"{cxx} has no AddressSanitizer runtime")
    assert b"heap-buffer-overflow" in subprocess.run([tmp_path / "overrun"], check=False, capture_output=True).stderr


@pytest.mark.slow
def test_aarch64(tmp_path) -> None:
    """Compiles without a warning; where an emulator is, the NEON kernels are compared with the portable ones."""
    cxx = shutil.which("aarch64-linux-gnu-g++")
    if cxx is None:
        pytest.skip("no aarch64-linux-gnu-g++ here (Debian: g++-aarch64-linux-gnu)")
    compile_library(cxx, tmp_path, "-O3", rows=("neon",))
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("compiled for aarch64; no qemu-aarch64 here to run it (Debian: qemu-user-static)")
    objects = [tmp_path / f"{name}.o" for name in ("edit_cpu", "rows_portable", "rows_neon", "reft")]
    flags = ("-std=c++17", "-O1", "-static", f"-I{NATIVE}", f"-I{NATIVE}/include")
    run(cxx, *flags, Path(__file__).parent / "compare_kernels.cc", *objects, "-o", tmp_path / "compare")
    assert "neon and portable agree" in run(emulator, tmp_path / "compare").stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", folder, ROOT)
    return next(folder.glob("reft_export-*.whl"))


@pytest.mark.long
def test_a_manylinux_wheel_works_where_no_compiler_is(tmp_path) -> None:
    """``make wheels``: what it makes is installed and run with nothing on PATH but its own environment, and a pure wheel is refused."""
    compiler()
    make = ("make", "-s", "-C", str(ROOT), "wheels", f"PYTHON={sys.executable}")
    told = run(*make, f"DIST={tmp_path}").stdout
    (wheel,) = tmp_path.glob(f"*_{os.uname().machine}.whl")
    assert "-py3-none-manylinux_" in wheel.name and "not built: wheels of other processors, and of Windows and macOS" in told
    if os.uname().machine != "aarch64":
        check_cross_built(list(tmp_path.glob("*_aarch64.whl")), told)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    bare = {**os.environ, "PATH": str(python.parent), "CC": "/no/such/compiler", "CXX": "/no/such/compiler"}
    assert not any(shutil.which(name, path=bare["PATH"]) for name in (*COMPILERS, "cc", "gcc", "clang", "cmake", "make"))
    run(python, "-m", "pip", "-q", "install", "-c", ROOT / ".ci" / "constraints.txt", f"{wheel}[cpu]", env=bare)
    found = run(python, "-c", "from runtimes.native_library import *; print(find_op_library())", cwd=tmp_path, env=bare).stdout.strip()
    assert Path(found).is_relative_to(tmp_path / "venv")
    check_in(python, Path(found), tmp_path)

    pure = {**os.environ, "CC": "/no/such/compiler", "CXX": "/no/such/compiler"}
    done = subprocess.run([*make, f"DIST={tmp_path / 'none'}"], env=pure, capture_output=True, text=True, check=False)
    assert done.returncode and "make wheels: the op library was not built, expected a Linux machine with a C++17 compiler" in done.stdout
    assert not (tmp_path / "none").exists()


def check_cross_built(wheels: list[Path], told: str) -> None:
    """Where the cross compiler is, a second wheel holds an AArch64 library; elsewhere the missing one is named."""
    if shutil.which("aarch64-linux-gnu-g++") is None:
        assert not wheels and "not built: a wheel for aarch64, which needs aarch64-linux-gnu-g++ on PATH" in told
        return
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        header = archive.read("runtimes/native/lib/libreft_ort.so")[:20]
    assert "-py3-none-manylinux_" in wheel.name and header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == EM_AARCH64


@pytest.mark.slow
def test_the_plugin_compiles_from_the_wheel(wheel, tmp_path) -> None:
    """As on a device with TensorRT and CUDA: the line that ``doctor`` prints, run as it is, puts the plugin where it is looked for."""
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("nvcc or cmake is not on the path")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "-q", "install", "--no-deps", wheel)
    tensorrt = tmp_path / "TensorRT 10"
    tensorrt.mkdir()
    (tensorrt / "include").symlink_to(Path(__file__).parent / "tensorrt_double")
    environment = {**os.environ, "TENSORRT_ROOT": str(tensorrt)}

    def ask(what: str) -> str:
        return run(python, "-c", f"from runtimes.native_library import *; print({what})", cwd=tmp_path, env=environment).stdout.strip()

    assert ask("find_plugin_library()") == "None"
    run("sh", "-c", ask("plugin_build_command()"), cwd=tmp_path, env=environment)
    assert Path(ask("find_plugin_library()")).is_relative_to(tmp_path / "venv")
    assert ask("plugin_details(find_plugin_library())[0]") == "LoReFT 1, RED 1, TensorRT 10.3.0"


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_says_so(tmp_path) -> None:
    environment = {**os.environ, "CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    done = run(sys.executable, "-m", "pip", "-v", "wheel", "--no-deps", "-w", tmp_path, ROOT, env=environment)
    (built,) = tmp_path.glob("reft_export-*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert "without its native kernels" in done.stdout + done.stderr


def cases(folder: Path) -> None:
    """Models and inputs for the child: every type (halves behind Casts, since old onnxruntimes take none from numpy), and a chain."""
    element = {"float32": 1, "float16": 10, "bfloat16": 16}
    info = helper.make_tensor_value_info
    for dtype, number in element.items():
        for rank, leading in ((2, (29,)), (3, (3, 17))):
            shape = [f"d{i}" for i in range(rank - 1)]
            inputs = [info("h", 1, [*shape, "D"]), info("slot", 6, shape), *bank_inputs(1)]
            names = ("h", "U", "A", "b")
            nodes = [helper.make_node("Cast", [n], [f"{n}_"], to=number) for n in names]
            nodes += [
                op_node(["h_", "slot", "U_", "A_", "b_"], "y_", activation="gelu", activated="first_half", plugin_version="1"),
                helper.make_node("Cast", ["y_"], ["y"], to=1),
            ]
            (folder / f"{dtype}_{rank}.onnx").write_bytes(as_model(nodes, inputs, [info("y", 1, [*shape, "D"])]).SerializeToString())
            feeds = draw(rank, leading, 70, 6, 3, dtype)
            np.savez(folder / f"{dtype}_{rank}.npz", **{n: a if n == "slot" else a.astype(np.float32) for n, a in feeds.items()})
    from test_ort_op import residual_chain

    (folder / "chain.onnx").write_bytes(residual_chain(5).SerializeToString())
    chain = draw(1, (2, 5), 32, 4, 2, "float32")
    chain["x"], chain["scale"] = chain.pop("h"), np.linspace(0.1, 0.4, 32, dtype=np.float32)
    np.savez(folder / "chain.npz", **chain)
    red_cases(folder)
    for name, attributes in (("bad_name", {"activation": "softmax"}), ("bad_number", {"activation": 3}), ("plain", {})):
        (folder / f"{name}.onnx").write_bytes(op_model(**attributes).SerializeToString())


def red_cases(folder: Path) -> None:
    from test_red_ort_op import residual_chain

    info = helper.make_tensor_value_info
    for dtype, number in {"float32": 1, "float16": 10, "bfloat16": 16}.items():
        for rank, leading in ((2, (29,)), (3, (3, 17))):
            shape = [f"d{i}" for i in range(rank - 1)]
            inputs = [info("h", 1, [*shape, "D"]), info("slot", 6, shape), *native_red.bank_inputs(1)]
            nodes = [helper.make_node("Cast", [n], [f"{n}_"], to=number) for n in ("h", "scale", "bias")]
            nodes.append(helper.make_node("RED", ["h_", "slot", "scale_", "bias_"], ["y_"], domain="ai.reft", plugin_version="1"))
            nodes.append(helper.make_node("Cast", ["y_"], ["y"], to=1))
            model = as_model(nodes, inputs, [info("y", 1, [*shape, "D"])])
            (folder / f"red_{dtype}_{rank}.onnx").write_bytes(model.SerializeToString())
            feeds = native_red.draw(rank, leading, 70, 3, dtype)
            np.savez(folder / f"red_{dtype}_{rank}.npz", **{n: a if n == "slot" else a.astype(np.float32) for n, a in feeds.items()})
    (folder / "red_chain.onnx").write_bytes(residual_chain(5).SerializeToString())
    feeds = {**draw(1, (2, 5), 32, 4, 2, "float32"), **native_red.draw(1, (2, 5), 32, 2, "float32")}
    feeds["x"], feeds["weight"] = feeds.pop("h"), np.linspace(0.1, 0.4, 32, dtype=np.float32)
    np.savez(folder / "red_chain.npz", **feeds)
    (folder / "red_plain.onnx").write_bytes(native_red.red_model().SerializeToString())


def check_in(python: Path, library: Path, folder: Path) -> None:
    """Runs the cases in another environment's onnxruntime and holds them against float64 here."""
    (folder / "cases").mkdir()
    cases(folder / "cases")
    done = run(python, IN_THE_CHILD, library, folder / "cases", cwd=folder)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["in_place"] == 5 and told["chain_calls"] == 5
    assert told["red_in_place"] == 10 and told["red_chain_calls"] == 10
    assert "RED: bias has shape [3, 8], expected [2, 8], the shape of scale" in told["red_bad_shape"]
    assert "LoReFT: attribute activation is 'softmax', expected one of" in told["bad_name"]
    assert "LoReFT: attribute activation is the integer 3, expected a string" in told["bad_number"]
    assert "LoReFT: slot has shape [4], expected [2, 5]" in told["bad_shape"]
    assert "LoReFT: slot is int64, expected int32" in told["bad_type"] or "tensor(int64)" in told["bad_type"]
    for path in (folder / "cases").glob("*_y.npy"):
        name = path.stem.removesuffix("_y")
        dtype = name.removeprefix("red_").partition("_")[0]
        with np.load(folder / "cases" / f"{name}.npz") as arrays:
            feeds = dict(arrays)
        if name.startswith("red_"):
            native_red.check(np.load(path), feeds, dtype)
        else:
            check(np.load(path), feeds, dtype, "gelu", "first_half")
    assert len(list((folder / "cases").glob("*_y.npy"))) == 12


@pytest.mark.parametrize("version", slow_and_long(ONNXRUNTIMES, "1.18.1", "1.24.4", "1.25.1", "1.31.1"))
def test_one_binary_on_every_onnxruntime(version, tmp_path) -> None:
    library = installed_library()
    check_in(python_with(version), library, tmp_path)

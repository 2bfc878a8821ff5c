"""The onnxruntime ops' CUDA branch without a GPU: over a double of onnxruntime's C API; and the places that its functions have there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import onnxruntime
import pytest
from onnxruntime_headers import onnxruntime_headers
from op_library import NATIVE, compiler, run

HERE = Path(__file__).parent
QUEUE, LO_REFT = "ort/queue_on_cuda.cc", "ort/lo_reft_op.cc"
SOURCES = (QUEUE, LO_REFT, "ort/op.cc", "ort/red_op.cc", "cpu/edit_cpu.cc", "cpu/rows_portable.cc")
FAULTS = {
    "scratch that is never given back": (QUEUE, "if (workspace != nullptr) kernel.memory->Free(kernel.memory, workspace);", ""),
    "scratch where there is no stream": (QUEUE, "stream != nullptr ? workspace_bytes", "true ? workspace_bytes"),
    "scratch that the launch does not get": (QUEUE, "launch_edit(edit, stream, workspace)", "launch_edit(edit, stream)"),
    "an error that is lost": (QUEUE, "return queued(kernel, error);", "return queued(kernel, error == nullptr ? error : nullptr);"),
    "an allocator that is kept": (LO_REFT, "  release_memory(*kernel);\n", ""),
}
"""What is planted: the file, a text in it, and what takes its place."""


def compile_object(source: Path, output: Path) -> Path:
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-DREFT_CUDA", f"-I{NATIVE}", f"-I{NATIVE}/include")
    run(compiler(), "-c", *flags, source, "-o", output)
    return output


def linked(objects: list[Path], output: Path) -> subprocess.CompletedProcess[str]:
    run(compiler(), *objects, "-o", output)
    return subprocess.run([output], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files of the double and of the library, by their sources."""
    folder = tmp_path_factory.mktemp("double")
    sources = {"double": HERE / "onnxruntime_double.cc", **{name: NATIVE / name for name in SOURCES}}
    return {name: compile_object(path, folder / f"{path.stem}.o") for name, path in sources.items()}


@pytest.mark.slow
def test_edits_are_queued_and_scratch_given_back(objects, tmp_path) -> None:
    done = linked(list(objects.values()), tmp_path / "double")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, objects, tmp_path) -> None:
    name, text, replacement = FAULTS[fault]
    source = (NATIVE / name).read_text()
    assert source.count(text) == 1
    (tmp_path / "faulty.cc").write_text(source.replace(text, replacement))
    faulty = compile_object(tmp_path / "faulty.cc", tmp_path / "faulty.o")
    done = linked([*(path for each, path in objects.items() if each != name), faulty], tmp_path / "double")
    assert done.returncode == 1 and "not so: " in done.stdout


@pytest.mark.slow
def test_functions_are_where_onnxruntimes_header_has_them() -> None:
    headers = onnxruntime_headers(int(onnxruntime.__version__.split(".")[1]))
    includes = ("-isystem", headers, f"-I{NATIVE}", f"-I{NATIVE}/include")
    run(compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *includes, HERE / "onnxruntime_positions.cc")

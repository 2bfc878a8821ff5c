"""The stages of the script. Each is a function of the run and of the figures that it fills; what it returns is one line of what was seen.

It raises Skipped or Failed, and no stage keeps another from running. In the dry form each ends before its first launch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu import wheels
from gpu.facts import tool
from gpu.marked_tests import gpu_test_files, run_marked
from gpu.process import ROOT, TESTS, Ended, Failed, Run, Skipped
from gpu.training import STEPS, TOLERANCE, worst

HERE = Path(__file__).parent
NATIVE = ROOT / "runtimes" / "native"
EMULATION = TESTS / "native" / "cuda_emulation"
DOUBLE = TESTS / "native" / "tensorrt_double"
PLUGIN_TESTS = "test_tensorrt_plugin.py"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    """Its time at most."""
    work: Callable[[Run, Figures], str]


def unpack_wheels(run: Run, figures: Figures) -> str:
    """Joins split wheels and unpacks all; those of stages of their own wait in folders of these stages' names."""
    if run.wheels is None:
        raise Skipped("no folder of wheels was named")
    try:
        found = wheels.collect(run.wheels, run.work / "joined")
    except ValueError as error:
        raise Failed(str(error)) from None
    if not found:
        raise Skipped(f"{run.wheels.name} holds no wheel, nor parts of one")
    figures["wheels"] = {stage: [wheel.name for wheel in paths] for stage, paths in found.items()}
    for stage, paths in found.items():
        folder = _site(run, stage)
        options = ("-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", folder)
        run.python("-m", "pip", "install", *options, *paths).require(f"pip install of {len(paths)} wheels for {stage}")
    if wheels.EVERY_STAGE in found:
        run.site.append(_site(run, wheels.EVERY_STAGE))
    return f"{sum(map(len, found.values()))} wheels unpacked"


def build(run: Run, figures: Figures) -> str:
    """The op library, the plugin against a double of TensorRT's headers, and this folder's programs, for one architecture."""
    nvcc = tool("nvcc")
    if nvcc is None or tool("cmake") is None:
        raise Skipped("nvcc or cmake is not on PATH; install CUDA's toolkit and CMake")
    folder = run.library.parent
    options = ("-DREFT_CUDA=ON", "-DREFT_TENSORRT=ON", f"-DTENSORRT_INCLUDE_DIR={DOUBLE}", f"-DREFT_CUDA_ARCHITECTURES={run.architecture}")
    told = run.start("cmake", "-S", NATIVE, "-B", folder, f"-DREFT_NVCC={nvcc}", *options).require("cmake").output
    run.start("cmake", "--build", folder, "--parallel", max(1, (os.cpu_count() or 2) // 2)).require("the build")
    figures["said"] = [line.removeprefix("-- reft: ") for line in told.splitlines() if line.startswith("-- reft: ")]
    compiled = (nvcc, "-std=c++17", "-O2", f"-arch=sm_{run.architecture}", "-cudart", "static")
    run.start(*compiled, "-shared", "-Xcompiler", "-fPIC", HERE / "empty_kernel.cu", "-o", _empty(run)).require("nvcc empty_kernel.cu")
    run.start(*compiled, HERE / "planted_fault.cu", "-o", _planted(run)).require("nvcc planted_fault.cu")
    sources = (EMULATION / "check_kernels.cc", HERE / "cases_on_gpu.cc", run.library)
    found = ("-I", NATIVE, "-I", NATIVE / "include", "-Xlinker", f"-rpath={folder}")
    run.start(*compiled, *found, *sources, "-o", _cases(run)).require("nvcc check_kernels.cc")
    return f"libraries and programs for sm {run.architecture}"


def gpu_tests(run: Run, figures: Figures) -> str:
    """Every test that is marked so, but for the plugin's."""
    return run_marked(run, figures, [path for path in gpu_test_files() if path.name != PLUGIN_TESTS])


def plugin(run: Run, figures: Figures) -> str:
    """The TensorRT plugin's launcher, through a stand-in for TensorRT."""
    return run_marked(run, figures, [path for path in gpu_test_files() if path.name == PLUGIN_TESTS])


def sample(run: Run, figures: Figures) -> str:
    """Cases in which every two values of two factors meet, on the GPU against float64: tests/native/emulated_kernels.py says which."""
    program = run.built(_cases(run))
    lines = _case_lines(run, "sample")
    if run.dry:
        return f"{len(lines)} cases"
    return _all_right(run.start(program, text="".join(lines)), lines, figures)


def sanitizer(name: str, run: Run, figures: Figures) -> str:
    """Small cases under a tool of compute-sanitizer, which must first see a fault that was planted for it."""
    checked, fault = run.built(_cases(run)), run.built(_planted(run))
    program = tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not on PATH, nor in /usr/local/cuda/bin; install it (Debian: cuda-sanitizer-13-0)")
    lines = _case_lines(run, "small")
    if run.dry:
        return f"{len(lines)} cases, and a planted fault"
    command = (program, "--tool", name, "--print-limit", "5")
    planted = run.start(*command, fault, name)
    if not _errors(planted):
        raise Failed(f"{name} did not see the planted fault: {planted.last_line()}")
    done = run.start(*command, checked, text="".join(lines))
    figures["errors"] = errors = _errors(done)
    if errors is None:
        raise Failed(f"{name} gave no summary: {done.last_line()}")
    if errors:
        raise Failed(f"{name} counts {errors} in {len(lines)} cases; {run.log.name} says where")
    seen = _all_right(done, lines, figures)
    return f"no error; {seen}; the planted fault was seen"


def benchmark(run: Run, figures: Figures) -> str:
    """gpu/bench.py, whose docstring says what is measured."""
    if not run.dry:
        _need_either(run, "torch", "cupy")
    library, empty, result = run.built(run.library), run.built(_empty(run)), run.work / "bench.json"
    try:
        run.python("-m", "gpu.bench", library, empty, result, *_dry(run)).require("the benchmark")
    finally:
        # Cases that were measured before it failed are kept.
        if result.is_file():
            figures |= json.loads(result.read_text(encoding="utf-8"))
    cases = figures["cases"]
    if run.dry:
        return f"the inputs of {len(cases)} cases"
    goals = [case for case in cases if case["goal"] is not None]
    return f"{len(cases)} cases through {figures['through']}; {sum(case['met'] is True for case in goals)} of {len(goals)} goals met"


def training(run: Run, figures: Figures) -> str:
    """gpu/training.py: every loss of the run on the GPU close to that of the CPU, and lower at the end than at the start."""
    run.need("torch", "transformers", "accelerate", "safetensors", "tokenizers", "jinja2")
    result = run.work / "training.json"
    run.python("-m", "gpu.training", result, *_dry(run)).require("training")
    figures |= json.loads(result.read_text(encoding="utf-8"))
    if run.dry:
        return "bases, data and settings"
    reference, gpu = figures["reference"], figures["gpu"]
    figures["worst"] = off = worst(reference, gpu)
    told = f"{STEPS} steps, losses within {off:.1e} of float32's (at most {TOLERANCE:.1e}), {gpu[0]:.3f} to {gpu[-1]:.3f}"
    if not (off <= TOLERANCE and gpu[-1] < gpu[0]):
        raise Failed(told)
    return told


def in_runtime(name: str, packages: Sequence[str], run: Run, figures: Figures) -> str:
    """gpu/bundles.py: a bundle in a runtime whose wheel lies beside the script, and for onnxruntime the ops alone, too."""
    site = _site(run, name)
    if not site.is_dir():
        raise Skipped(f"no wheel of {name} is in the folder of wheels; parts of less than 60 MB will do: {wheels.HOW_TO_SPLIT}")
    run.need("torch", "transformers", "onnx", "onnx_ir", "onnxscript", *packages, site=[site])
    libraries = run.built(run.library).parent
    said = []
    if name == "onnxruntime-gpu" and not run.dry:
        files = [path for path in gpu_test_files() if path.name != PLUGIN_TESTS]
        said.append(run_marked(run, figures, files, "-k", "cuda_provider", site=[site]))
    folder = run.work / f"bundle-{name}"
    folder.mkdir()
    environment = _library_path(site, folder)
    child = ("-m", "gpu.bundles", name, libraries, run.architecture, folder, *_dry(run))
    run.python(*child, site=[site], environment=environment).require(f"the bundle in {name}")
    figures |= (told := json.loads((folder / "result.json").read_text(encoding="utf-8")))
    if "unsupported" in told:
        raise Skipped(told["unsupported"])
    if "refused" in told:
        raise Failed(told["refused"])
    said.append(f"made: {', '.join(told['made'])}")
    if not run.dry:
        passed = [rung["name"] for rung in told["rungs"] if rung["passed"]]
        said.append(f"parity on {len(passed)} of {len(told['rungs'])} rungs")
        if not told["passed"]:
            raise Failed("; ".join(said))
    return "; ".join(said)


STAGES = (
    Stage("wheels", 60, unpack_wheels),
    Stage("build", 120, build),
    Stage("benchmark", 90, benchmark),
    Stage("gpu tests", 150, gpu_tests),
    Stage("pairwise sample", 60, sample),
    Stage("memcheck", 60, partial(sanitizer, "memcheck")),
    Stage("racecheck", 60, partial(sanitizer, "racecheck")),
    Stage("training", 90, training),
    Stage("plugin", 60, plugin),
    Stage("onnxruntime-gpu", 90, partial(in_runtime, "onnxruntime-gpu", ("onnxruntime",))),
    Stage("tensorrt-rtx", 90, partial(in_runtime, "tensorrt-rtx", ("tensorrt_rtx", "cuda"))),
)
"""In the order of what is missed most where the time ends early."""


def _case_lines(run: Run, which: str) -> list[str]:
    run.need("pytest")
    return run.python("-m", "gpu.case_lines", which).require("gpu.case_lines").output.splitlines(keepends=True)


def _all_right(done: Ended, lines: Sequence[str], figures: Figures) -> str:
    """Holds what check_kernels.cc said to the number of cases: one line an op and type, with the worst error in units in the last place."""
    told = re.findall(r"^(\w+ \w+) cases (\d+) edited (\d+) worst (\S+)$", done.output, re.MULTILINE)
    figures["worst_ulp"] = {name: float(worst) for name, _, _, worst in told}
    if done.code or sum(int(count) for _, count, _, _ in told) != len(lines):
        said = [line for line in done.output.splitlines() if line and not line.startswith("=========")]
        raise Failed(f"of {len(lines)} cases not all are right (status {done.code}): {said[0] if said else done.last_line()}")
    return f"{len(lines)} cases right, the worst {max(figures['worst_ulp'].values()):.2f} units in the last place"


def _errors(done: Ended) -> int | None:
    """What the sanitizer's summary counts; None where it printed none."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.output)
    return int("".join(counts[-1])) if counts else None


def _need_either(run: Run, *packages: str) -> None:
    for name in packages:
        try:
            return run.need(name)
        except Skipped:
            continue
    raise Skipped(f"none of {', '.join(packages)} is here; put the wheel of one into the folder of wheels")


def _library_path(site: Path, folder: Path) -> dict[str, str]:
    """TensorRT-RTX's parser loads libtensorrt_rtx.so by that name, and its wheel holds libtensorrt_rtx.so.1 only."""
    library = next(site.rglob("libtensorrt_rtx.so.1"), None)
    if library is None:
        return {}
    (folder / "names").mkdir()
    (folder / "names" / "libtensorrt_rtx.so").symlink_to(library)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder / "names"), before)))}


def _dry(run: Run) -> tuple[str, ...]:
    return ("--dry",) if run.dry else ()


def _site(run: Run, stage: str) -> Path:
    return run.work / "site" / stage.replace(" ", "-")


def _empty(run: Run) -> Path:
    return run.work / "libempty.so"


def _planted(run: Run) -> Path:
    return run.work / "planted_fault"


def _cases(run: Run) -> Path:
    return run.work / "cases_on_gpu"

"""``reft-export doctor``."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson
from reft_export.console import print_json, print_table
from runtimes.machine import Machine, hidden_tensorrt, this_machine
from runtimes.version import VERSION

PACKAGES = (
    ("numpy", None, "everything"),
    ("onnxruntime", "cpu", "run, parity, bench"),
    ("onnxruntime-gpu", "gpu", "run, parity, bench on NVIDIA GPUs"),
    ("torch", "host", "train, export, quantize, parity -m"),
    ("transformers", "host", "train, export, quantize, parity -m"),
    ("onnx", "build", "build, export, fold, quantize"),
    ("onnx-ir", "build", "build, export, fold, quantize, inspect of graphs"),
    ("onnxscript", "host", "export"),
    ("accelerate", "host", "train"),
    ("matplotlib", "host", "plots of quickstart"),
    ("onnxruntime-genai", "genai", "stock generation on a bundle"),
    ("optimum-onnx", "optimum", "optimum's own export"),
    ("optuna", "sweep", "sweep"),
    *((name, "serve", "serve") for name in ("fastapi", "uvicorn", "prometheus_client", "python-multipart")),
    ("ray", "cluster", "serve --replicas"),
    ("tensorrt", "tensorrt", "TensorRT"),
    ("tensorrt-rtx-cu13", "tensorrt-rtx", "TensorRT-RTX"),
)


def register(app: typer.Typer) -> None:
    app.command("doctor")(guarded(doctor))


def doctor(as_json: AsJson = False) -> None:
    """Show versions, providers, libraries and GPU, what is missing, and the command that adds it."""
    rows = [("reft-export", VERSION, f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")]
    versions = {name: _version(name) for name, _, _ in PACKAGES}
    machine = this_machine()
    runtime = bool(versions["onnxruntime"] or versions["onnxruntime-gpu"])
    for name, extra, use in PACKAGES:
        found = versions[name]
        missing_runtime = name.startswith("onnxruntime") and "genai" not in name and runtime
        advice = "" if extra is None or missing_runtime else _advice(extra, machine)
        rows.append(
            (name, found or "missing", f"for {use}" if found else f"for {use}: {advice}" if advice else f"for {use}; not needed here")
        )
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        rows.append(("conflict", "", "onnxruntime and onnxruntime-gpu share a folder: pip uninstall both, then install one"))
    rows += [_machine(machine), _driver(machine), *_hidden()]
    rows += [_providers(), _kernel(), _plugin(), _gpu(), _memory(), _compiler()]
    if as_json:
        print_json([{"what": a, "found": b, "note": c} for a, b, c in rows])
    else:
        print_table("", ("what", "found", "note"), rows)


def _advice(extra: str, machine: Machine) -> str:
    """The line that brings an extra's packages to this machine."""
    if extra == "gpu":
        return machine.install_onnxruntime("cuda")
    return machine.install_tensorrt(extra) if extra.startswith("tensorrt") else f"pip install 'reft-export[{extra}]'"


def _machine(machine: Machine) -> tuple[str, str, str]:
    note = "engines: --target tensorrt, with JetPack's own TensorRT" if machine.is_jetson else "what the lines here are for"
    return ("machine", machine.name, note)


def _driver(machine: Machine) -> tuple[str, str, str]:
    if machine.driver is None:
        return ("CUDA driver", "none", "no libcuda.so.1: engines and CUDA need NVIDIA's driver")
    found = f"serves CUDA {machine.driver[0]}.{machine.driver[1]}"
    if machine.binding is None:
        return ("CUDA driver", found, f"cuda-python, for engines, is missing: {machine.install_cuda_python()}")
    binding = f"cuda-python {machine.binding[0]}.{machine.binding[1]}"
    return ("CUDA driver", found, machine.driver_is_too_old() or f"{binding} fits it")


def _hidden() -> list[tuple[str, str, str]]:
    hidden = hidden_tensorrt()
    note = "this environment does not see it: python3 -m venv --system-site-packages .venv"
    return [] if hidden is None else [("system's TensorRT", str(hidden), note)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> tuple[str, str, str]:
    if find_spec("onnxruntime") is None:
        return ("providers", "none", "onnxruntime is missing: pip install 'reft-export[cpu]'")
    import onnxruntime

    names = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    note = "; tensorrt for bundles without edits" if "Tensorrt" in names else ""
    return ("providers", ", ".join(names), f"what --provider can choose from{note}")


def _kernel() -> tuple[str, str, str]:
    from runtimes.native_library import find_op_library, library_kernels

    library = find_op_library()
    if library is None:
        return (
            "edit kernel",
            "function",
            "no op library: the ONNX function in the graph carries the edit; with a C++17 compiler, reinstalling reft-export builds one",
        )
    try:
        cpu, cuda = library_kernels(library)
    except OSError as e:
        return ("edit kernel", "broken", f"{library} does not load: {e}; reinstall reft-export, or use --kernel function")
    on_gpu = f"CUDA sm {', '.join(cuda)}" if cuda else "no CUDA kernels: built where nvcc is on the path"
    return ("edit kernel", "fused", f"CPU {cpu[0]} (of {', '.join(cpu)}); {on_gpu}")


def _plugin() -> tuple[str, str, str]:
    from runtimes.native_library import find_plugin_library, plugin_build_command, plugin_details

    library = find_plugin_library()
    if library is None:
        return ("TensorRT plugin", "missing", f"with TensorRT's headers, nvcc and cmake: {plugin_build_command()}")
    try:
        version, cuda = plugin_details(library)
    except OSError as e:
        return ("TensorRT plugin", "broken", f"{library} does not load: {e}; build it again: {plugin_build_command()}")
    return ("TensorRT plugin", version, f"{library}; CUDA sm {', '.join(cuda)}")


def _gpu() -> tuple[str, str, str]:
    if shutil.which("nvidia-smi") is None:
        return ("GPU", "none", "no nvidia-smi on the path")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    lines = done.stdout.strip().splitlines()
    return ("GPU", lines[0] if done.returncode == 0 and lines else "not reachable", "name, driver, compute capability")


def _memory() -> tuple[str, str, str]:
    from reft_export.console import size
    from runtimes.memory import available_memory

    left = available_memory()
    note = "for weights and KV cache; `inspect BUNDLE` says what a token of the cache takes, and the full context"
    return ("memory left", "unknown" if left is None else size(left), note)


def _compiler() -> tuple[str, str, str]:
    found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    return ("C++ compiler", found or "missing", "for native kernels")

"""A bundle runs where only the device install is: no torch, no transformers, no onnx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from reft_export.cli.guard import guarded

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def _run(*command: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


PLATFORMS = ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")
"""What pip of Ubuntu 22.04 on a Jetson accepts."""


@pytest.mark.slow
def test_the_install_of_a_jetson_resolves_to_wheels(tmp_path) -> None:
    """Python 3.10 on aarch64, JetPack 6's: every package has a wheel, and cuda-python is one that a driver of CUDA 12.6 serves."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml by itself")
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)["project"]
    wanted = [*project["dependencies"], *(name for extra in ("cpu", "jetson", "build") for name in project["optional-dependencies"][extra])]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    flags = ("--dry-run", "-q", "--ignore-installed", "--only-binary=:all:", "--python-version", "3.10", *platforms)
    report = tmp_path / "report.json"
    _run(sys.executable, "-m", "pip", "install", *flags, "--target", tmp_path / "packages", "--report", report, *wanted)
    found = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}
    assert found["cuda-python"].startswith("12.") and int(found["cuda-python"].split(".")[1]) >= 6
    assert "onnxruntime" in found and "onnx-ir" in found and "torch" not in found


@pytest.mark.parametrize(("verb", "extra"), [("build", "build"), ("export", "host")])
def test_what_a_verb_lacks_is_named_by_the_extra_that_brings_it(verb, extra, capsys) -> None:
    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    lacking.__name__ = verb
    with pytest.raises(typer.Exit) as caught:
        guarded(lacking)()
    assert caught.value.exit_code == 4 and f"onnx_ir is not installed; pip install 'reft-export[{extra}]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel and its extra ``cpu``, and nothing else."""
    folder = tmp_path_factory.mktemp("device")
    wheels = folder / "wheels"
    _run(sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "-w", wheels, ROOT)
    (wheel,) = wheels.glob("reft_export-*.whl")
    _run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    _run(python, "-m", "pip", "-q", "install", "-c", CONSTRAINTS, f"{wheel}[cpu]")
    return python.parent


@pytest.mark.slow
def test_bundle_runs_on_the_device_install(device, bundle_folder, tmp_path) -> None:
    installed = _run(device / "python", "-m", "pip", "list", "--format=freeze").stdout.lower()
    assert not [name for name in ("torch", "transformers", "onnx==", "onnx-ir", "matplotlib") if f"\n{name}" in f"\n{installed}"]
    tool = device / "reft-export"
    for precision in ("fp32", "int4"):
        bundle = bundle_folder("llama", precision)
        steered = _run(tool, "run", bundle, "-p", "hello", "-a", "tied", "-n", 8, cwd=tmp_path)
        assert steered.stdout
        assert "pass" in _run(tool, "parity", bundle, cwd=tmp_path).stdout
    _run(tool, "bench", bundle, "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "-a", "tied", cwd=tmp_path)
    assert "tied" in _run(tool, "inspect", bundle, cwd=tmp_path).stdout
    assert "host" in _run(tool, "doctor", cwd=tmp_path, env={"COLUMNS": "200", "PATH": str(device)}).stdout
    # The host's verbs say what to install instead of failing with a traceback.
    done = subprocess.run([tool, "export", "-m", "x", "-o", "y"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 4 and "pip install 'reft-export[host]'" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def wheels(device: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the device install and all that it needs, for this machine."""
    folder = tmp_path_factory.mktemp("wheels")
    (own,) = (device.parent.parent / "wheels").glob("reft_export-*.whl")
    _run(sys.executable, "-m", "pip", "-q", "download", "--only-binary=:all:", "-c", CONSTRAINTS, "-d", folder, f"{own}[cpu]")
    return folder


@pytest.mark.long
def test_an_archive_installs_without_a_network(device, wheels, bundle_folder, tmp_path) -> None:
    done = _run(
        device / "reft-export", "package", bundle_folder("llama"), "--archive", "--wheels", wheels, "-o", tmp_path / "out", "--json"
    )
    archive = Path(json.loads(done.stdout)["archive"])
    _run("sha256sum", "--check", f"{archive.name}.sha256", cwd=archive.parent)
    _run("tar", "xf", archive, cwd=tmp_path)
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    nowhere = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_EXTRA_INDEX_URL": "", "PYTHON": sys.executable}
    assert "installed; try" in _run(unpacked / "install.sh", "here", env=nowhere).stdout
    assert _run(unpacked / "here" / "bin" / "reft-export", "run", unpacked / "bundle", "-p", "hello", "-a", "tied", "-n", 4).stdout
    with (unpacked / "bundle" / "model.onnx").open("ab") as damaged:
        damaged.write(b"x")
    assert subprocess.run([unpacked / "install.sh", "again"], env=nowhere, capture_output=True, check=False).returncode
    assert not (unpacked / "again").exists()

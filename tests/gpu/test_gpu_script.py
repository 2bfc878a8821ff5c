"""The script for a GPU where there is none: its dry form as a whole, and what it makes of programs that answer as on a GPU."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gpu import bench, run, stages, wheels
from gpu.bench import figures
from gpu.facts import tool
from gpu.marked_tests import gpu_test_files
from gpu.process import ROOT, TESTS, Failed, Run, Skipped
from gpu.report import JSON_FILE, NOT_REACHED, PAGE_FILE, Report, StageRecord
from gpu.stages import Stage

from runtimes.native_library import find_op_library

HERE = Path(__file__).parent


# ---- the dry form


@pytest.mark.slow
def test_the_dry_form_does_everything_up_to_the_launch(tmp_path) -> None:
    wheel = tiny_wheel(tmp_path / "whole")
    (tmp_path / "wheels").mkdir()
    split(wheel, tmp_path / "wheels", "200")
    command = [HERE / "run.sh", tmp_path / "out", tmp_path / "wheels", "--dry"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out" / JSON_FILE).read_text())
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert told["dry"] is True and page.startswith(
        "# Dry form: nothing was launched\n\n    $ tests/gpu/run.sh OUT --dry\n    11 of 11 stages: "
    )
    assert [record["stage"] for record in told["stages"]] == [stage.name for stage in stages.STAGES]
    found = {record["stage"]: record for record in told["stages"]}
    assert found["wheels"]["result"] == "ready" and found["wheels"]["figures"]["wheels"] == {"every stage": [wheel.name]}
    assert found["training"]["result"] == "ready"
    for name in ("onnxruntime-gpu", "tensorrt-rtx"):
        assert found[name]["result"] == "skipped" and wheels.HOW_TO_SPLIT in found[name]["summary"]
    for record in told["stages"]:
        assert f"| {record['stage']} | {record['result']} |" in page
        assert record["summary"]
    if tool("nvcc") is None or tool("cmake") is None:
        assert found["build"]["result"] == "skipped"
        pytest.skip("nvcc or cmake is not on the path: nothing was compiled, and the stages that need it skipped")
    assert {name for name, record in found.items() if record["result"] == "ready"} >= {
        *("build", "benchmark", "gpu tests", "pairwise sample", "plugin")
    }
    assert int(found["gpu tests"]["summary"].split()[0]) > 300 and int(found["plugin"]["summary"].split()[0]) == 9
    assert found["benchmark"]["figures"]["architectures"] == (told["machine"]["compute capability"] or run.DRY_ARCHITECTURE).replace(
        ".", ""
    )
    assert len(found["benchmark"]["figures"]["cases"]) == len(bench.CASES)
    assert all(case["us"] is None for case in found["benchmark"]["figures"]["cases"])
    assert page.count("| LoReFT |") + page.count("| RED |") == len(bench.CASES)


def test_every_file_with_a_test_for_a_gpu_is_run() -> None:
    names = {path.name for path in gpu_test_files()}
    assert names == {"test_cuda_kernel.py", "test_red_cuda_kernel.py", "test_tensorrt_plugin.py"}


def test_what_starts_the_stages_needs_nothing_but_python() -> None:
    """Without site-packages: what is missing is then a stage's to say."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    command = [sys.executable, "-S", "-m", "gpu.run", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert wheels.HOW_TO_SPLIT in done.stdout


def test_without_a_gpu_only_the_dry_form_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "machine", lambda: {"compute capability": None})
    assert run.main([str(tmp_path / "out")]) == 2
    assert "--dry" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_tests_run_on_the_library_that_was_built(tmp_path) -> None:
    """With another library in its place the same test fails: the installed one is not what answers."""
    installed = find_op_library() or pytest.skip("the installed package has no op library")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_cpu_kernels.py", "-k", "is_active"]

    def status(library: Path) -> int:
        return subprocess.run([*command, "--op-library", library], cwd=ROOT, capture_output=True, check=False).returncode

    (tmp_path / "no.so").touch()
    assert status(Path(shutil.copy(installed, tmp_path / "copy.so"))) == 0
    assert status(tmp_path / "no.so") == 1


# ---- wheels


def tiny_wheel(folder: Path, name: str = "tiny") -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "ANSWER = 42\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


def split(wheel: Path, folder: Path, size: str) -> None:
    """By the very line that the script shows, but for its size."""
    words = shlex.split(wheels.HOW_TO_SPLIT.replace("55M", size).replace("NAME.whl.part", f"{folder}/{wheel.name}.part"))
    subprocess.run([str(wheel) if word == "NAME.whl" else word for word in words], check=True)


def test_split_wheels_are_joined_and_used(at, tmp_path) -> None:
    wheel = tiny_wheel(tmp_path)
    at.wheels = tmp_path / "wheels"
    at.wheels.mkdir()
    split(wheel, at.wheels, "200")
    assert len(list(at.wheels.iterdir())) >= 3
    assert wheels.join(at.wheels, tmp_path / "joined")[0].read_bytes() == wheel.read_bytes()
    seen: dict[str, Any] = {}
    assert stages.unpack_wheels(at, seen) == "1 wheels unpacked"
    assert at.python("-c", "import tiny; print(tiny.ANSWER)").output == "42\n"
    at.need("tiny")
    with pytest.raises(Skipped, match="has no no_such_package; put the wheel"):
        at.need("tiny", "no_such_package")


def test_a_wheel_with_a_stage_of_its_own_is_that_stages_alone(tmp_path) -> None:
    for name in ("onnxruntime_gpu", "tensorrt_rtx_cu13", "tiny"):
        tiny_wheel(tmp_path, name)
    found = wheels.collect(tmp_path, tmp_path / "joined")
    assert {stage: [path.name.partition("-")[0] for path in paths] for stage, paths in found.items()} == {
        "onnxruntime-gpu": ["onnxruntime_gpu"],
        "tensorrt-rtx": ["tensorrt_rtx_cu13"],
        "every stage": ["tiny"],
    }


def test_wheels_that_are_not_whole_are_refused(at, tmp_path) -> None:
    at.wheels = tmp_path / "wheels"
    at.wheels.mkdir()
    split(tiny_wheel(tmp_path), at.wheels, "200")
    parts = sorted(at.wheels.iterdir())
    kept = {path: path.read_bytes() for path in parts}
    for path, refusal in ((parts[1], f"lacks part 1 of 0 to {len(parts) - 1}"), (parts[-1], "is no whole wheel")):
        path.unlink()
        with pytest.raises(Failed, match=refusal):
            stages.unpack_wheels(at, {})
        path.write_bytes(kept[path])
    (at.wheels / "tiny-1.0.tar.gz").touch()
    with pytest.raises(Failed, match="pip wheel"):
        stages.unpack_wheels(at, {})


# ---- stages and their records


def test_what_a_stage_raises_becomes_its_record(at) -> None:
    def raises(error: Exception, run: Run, figures: dict[str, Any]) -> str:
        figures["half"] = 1
        raise error

    def record(work: Any, end: float = 60) -> StageRecord:
        return run.perform(Stage("one", 30, work), at, time.monotonic() + end)

    assert record(lambda *_: "seen").result == "passed"
    for error, result in ((Skipped("no\nGPU"), "skipped"), (Failed("no\nGPU"), "failed"), (ValueError("no\nGPU"), "failed")):
        told = record(partial(raises, error))
        assert (told.result, told.figures) == (result, {"half": 1}) and told.summary.endswith("no GPU")
    assert record(lambda *_: "seen", end=-1).result == "skipped"
    at.dry = True
    assert record(lambda *_: "seen").result == "ready"


def test_a_program_that_runs_past_its_time_is_killed_with_what_it_started(at, tmp_path, script) -> None:
    at.until = started = time.monotonic() + 1
    program = script(tmp_path / "slow", f"sleep 300 & echo $! > {tmp_path}/child; echo begun; wait")
    with pytest.raises(Failed, match="slow did not end in the"):
        at.start(program)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what it started is still running")
    assert "begun" in at.log.read_text()
    with pytest.raises(Failed, match="no time was left"):
        at.start(program)


def test_a_run_that_is_killed_leaves_what_it_saw(tmp_path) -> None:
    case = {**asdict(bench.CASES[0]), **figures(bench.CASES[0], [50.0], [45.0], [])}
    report = Report(dry=False, names=("build", "benchmark", "training"), machine={"card": "A | B", "commit": None})
    report.stages.append(StageRecord(stage="build", result="failed", summary=f"{ROOT}/x.cu: a|b", seconds=1.25))
    report.stages.append(
        StageRecord(stage="benchmark", result="passed", summary="1 case", seconds=2, figures={"cases": [case], "x": float("nan")})
    )
    report.write(tmp_path)
    assert report.failed == ["build"]
    page = (tmp_path / PAGE_FILE).read_text()
    assert page.startswith("# On a GPU: A | B\n\n    $ tests/gpu/run.sh OUT\n    2 of 3 stages: 1 passed, 1 failed\n\n")
    assert "| build | failed | 1.2 | x.cu: a\\|b |" in page and f"| training | {NOT_REACHED} |" in page
    assert "| LoReFT | bfloat16 | 8192 | 8192 | 4096 | 4 | no |  | 50.00 | 2684 | 0.90 |  | 80% of the copy: met |" in page
    told = json.loads((tmp_path / JSON_FILE).read_text())["stages"]
    assert told[0]["summary"] == "x.cu: a|b" and told[1]["figures"]["x"] == "NaN"
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON_FILE, PAGE_FILE]

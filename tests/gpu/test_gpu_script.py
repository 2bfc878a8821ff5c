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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import bench, run, stages, wheels
from gpu.bench import Case, figures
from gpu.process import ROOT, TESTS, Failed, Run, Skipped
from gpu.report import JSON_FILE, NOT_REACHED, PAGE_FILE, Report, StageRecord
from gpu.stages import Stage

from runtimes.native_library import find_op_library

HERE = Path(__file__).parent


@pytest.fixture
def at(tmp_path: Path) -> Run:
    """A run with a minute left, in whose work folder nothing was built."""
    (tmp_path / "work" / "native").mkdir(parents=True)
    log = tmp_path / "gpu.log"
    return Run(work=tmp_path / "work", log=log, wheels=None, dry=False, architecture="90", until=time.monotonic() + 60)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


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
    assert told["dry"] is True and page.startswith("# Dry form: nothing was launched\n")
    assert [record["stage"] for record in told["stages"]] == [stage.name for stage in stages.STAGES]
    found = {record["stage"]: record for record in told["stages"]}
    assert found["wheels"]["result"] == "ready" and found["wheels"]["figures"]["wheels"] == {"every stage": [wheel.name]}
    assert found["training"]["result"] == "ready"
    for name in ("onnxruntime-gpu", "tensorrt-rtx"):
        assert found[name]["result"] == "skipped" and wheels.HOW_TO_SPLIT in found[name]["summary"]
    for record in told["stages"]:
        assert f"| {record['stage']} | {record['result']} |" in page
        assert record["summary"]
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        assert found["build"]["result"] == "skipped"
        pytest.skip("nvcc or cmake is not on the path: nothing was compiled, and the stages that need it skipped")
    assert {name for name, record in found.items() if record["result"] == "ready"} >= {
        *("build", "benchmark", "gpu tests", "pairwise sample", "plugin")
    }
    assert int(found["gpu tests"]["summary"].split()[0]) > 300 and int(found["plugin"]["summary"].split()[0]) == 9
    assert found["benchmark"]["figures"]["architectures"] == run.DRY_ARCHITECTURE
    assert len(found["benchmark"]["figures"]["cases"]) == len(bench.CASES)
    assert all(case["us"] is None for case in found["benchmark"]["figures"]["cases"])
    assert page.count("| LoReFT |") + page.count("| RED |") == len(bench.CASES)


def test_every_file_with_a_test_for_a_gpu_is_run() -> None:
    names = {path.name for path in stages.gpu_test_files()}
    assert names == {"test_cuda_kernel.py", "test_red_cuda_kernel.py", "test_tensorrt_plugin.py"}


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


def test_a_program_that_runs_past_its_time_is_killed_with_what_it_started(at, tmp_path) -> None:
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
    report.stages.append(StageRecord(stage="benchmark", result="passed", summary="1 case", seconds=2, figures={"cases": [case]}))
    report.write(tmp_path)
    assert report.failed == ["build"]
    page = (tmp_path / PAGE_FILE).read_text()
    assert "| build | failed | 1.2 | x.cu: a\\|b |" in page and f"| training | {NOT_REACHED} |" in page
    assert "| LoReFT | bfloat16 | 8192 | 8192 | 4096 | 4 | no | 50.00 | 2684 | 0.90 |  | 80% of the copy: met |" in page
    assert json.loads((tmp_path / JSON_FILE).read_text())["stages"][0]["summary"] == "x.cu: a|b"
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON_FILE, PAGE_FILE]


JUNIT = """<testsuites><testsuite><testcase classname="native.test_a" name="one"/>{}<testcase classname="native.test_a" name="two">
<skipped message="no provider"/></testcase></testsuite></testsuites>"""


def test_what_pytest_wrote_is_counted(tmp_path) -> None:
    path = tmp_path / "junit.xml"
    seen: dict[str, Any] = {}
    path.write_text(JUNIT.format(""))
    assert stages.read_junit(path, seen) == "1 tests passed, 1 skipped (no provider)"
    for kind in ("failure", "error"):
        path.write_text(JUNIT.format(f'<testcase classname="native.test_b" name="x"><{kind} message="off by&#10;one"/></testcase>'))
        with pytest.raises(Failed, match=r"1 of 2 tests fail; the first, test_b::x: off by one"):
            stages.read_junit(path, seen)
        assert seen["failures"] == [{"test": "test_b::x", "message": "off by one"}]
    path.write_text(JUNIT.format("").replace('<testcase classname="native.test_a" name="one"/>', ""))
    with pytest.raises(Failed, match="no test passed; skipped: no provider"):
        stages.read_junit(path, seen)


# ---- the sanitizers, through a stand-in for compute-sanitizer


SUMMARIES = {
    "memcheck": "========= ERROR SUMMARY: {} errors",
    "racecheck": "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)",
}


@pytest.mark.parametrize("name", SUMMARIES)
@pytest.mark.parametrize(
    ("planted", "errors", "cases", "said"),
    [
        (1, 0, 33, None),
        (0, 0, 33, "did not see the planted fault"),
        ("", 0, 33, "did not see the planted fault: Device not supported"),
        (1, 2, 33, "counts 2 in 33 cases"),
        (1, "", 33, "gave no summary: Device not supported"),
        (1, 0, 32, "of 33 cases not all are right"),
    ],
)
def test_a_sanitizer_counts_where_it_sees_what_was_planted(at, monkeypatch, tmp_path, name, planted, errors, cases, said) -> None:
    def summary(count: object) -> str:
        return f"echo '{SUMMARIES[name].format(count, count)}'" if count != "" else "echo Device not supported"

    tool = script(tmp_path / "compute-sanitizer", f'[ "$1 $2" = "--tool {name}" ] || exit 7\nshift 4\nexec "$@"')
    monkeypatch.setattr(stages, "tool", lambda _: str(tool))
    script(at.work / "planted_fault", summary(planted))
    script(at.work / "cases_on_gpu", f"cat > /dev/null; echo 'LoReFT float32 cases {cases} edited 5 worst 0.7'; {summary(errors)}")
    seen: dict[str, Any] = {}
    if said is None:
        assert stages.sanitizer(name, at, seen).startswith("no error; 33 cases right, the worst 0.70 units")
        assert seen == {"errors": 0, "worst_ulp": {"LoReFT float32": 0.7}}
    else:
        with pytest.raises(Failed, match=said):
            stages.sanitizer(name, at, seen)


def test_a_stage_whose_program_was_not_built_is_skipped_by_name(at) -> None:
    for work, program in ((stages.sample, "cases_on_gpu"), (stages.benchmark, "libreft_ort.so"), (stages.gpu_tests, "libreft_ort.so")):
        with pytest.raises(Skipped, match=f"the stage build made no {program}"):
            work(at, {})


@pytest.mark.slow
def test_cases_travel_to_the_device_and_back(tmp_path, monkeypatch) -> None:
    """cases_on_gpu.cc over host memory under AddressSanitizer: every case right; with too little memory, or a wrong array, not."""
    monkeypatch.syspath_prepend(TESTS / "native")
    from emulated_kernels import FACTORS, SMALL, SMALL_WORK, check, line_of, pairwise
    from plugin_host import NATIVE, compiler, cuda_include
    from plugin_host import run as compiled

    cxx = compiler()
    if not Path(compiled(cxx, "-print-file-name=libasan.so").stdout.strip()).is_absolute():
        pytest.skip(f"{cxx} has no AddressSanitizer runtime")
    lines = [line_of(case, i) for i, case in enumerate(pairwise({**FACTORS, **SMALL}, SMALL_WORK))]
    source = (HERE / "cases_on_gpu.cc").read_text()
    flags = ("-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}", f"-I{NATIVE}/include")
    flags = (*flags, "-isystem", cuda_include())
    others = (
        stages.EMULATION / "check_kernels.cc",
        HERE / "cuda_on_host.cc",
        *(NATIVE / "cpu" / f"{n}.cc" for n in ("edit_cpu", "rows_portable")),
    )
    objects = [tmp_path / f"{path.stem}.o" for path in others]
    for path, output in zip(others, objects, strict=True):
        compiled(cxx, *flags, "-c", path, "-o", output)

    def ended(text: str, replacement: str) -> subprocess.CompletedProcess[str]:
        assert source.count(text) >= 1
        (tmp_path / "cases.cc").write_text(source.replace(text, replacement))
        compiled(cxx, *flags, tmp_path / "cases.cc", *objects, "-o", tmp_path / "cases")
        return check(tmp_path / "cases", lines)

    sound = ended("", "")
    assert sound.returncode == 0, sound.stderr
    assert "heap-buffer-overflow" in ended("shift_ + bytes_, 1", "bytes_, 1").stderr
    assert "a wrong value" in ended("U(edit.U, bank), A(edit.A, bank)", "U(edit.A, bank), A(edit.U, bank)").stderr


# ---- the benchmark, through a double of the device


class Clock:
    """A device on host memory: what is launched is noted, a launch takes as many microseconds as ``us`` says, the fastest replay."""

    name = "a double"

    def __init__(self, us: dict[str, float]) -> None:
        self.us, self.noted = us, []

    def put(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def address(self, memory: np.ndarray) -> int:
        return memory.ctypes.data

    def copy(self, target: np.ndarray, source: np.ndarray, stream: int) -> None:
        self.noted.append(("copy", source.ctypes.data, target.ctypes.data))

    def times(self, queue: bench.Queue) -> list[float]:
        before = len(self.noted)
        queue(7)
        launched = self.noted[before:]
        return [sum(self.us[name] for name, *_ in launched) / 1e3 * slower for slower in (2, 1, 3)]


class NotedKernels(bench.Kernels):
    def __init__(self, clock: Clock, workspace: int) -> None:
        self.clock, self.size = clock, workspace

    def workspace(self, case: Case) -> int:
        return self.size

    def edit(self, case, h, y, banks, workspace, stream) -> None:
        assert stream == 7 and (workspace is None) == (self.size == 0)
        assert len(banks) == (3 if case.rank is None else 4)
        self.clock.noted.append(("edit", h, y))

    def empty(self, blocks, stream) -> None:
        self.clock.noted.append(("empty", blocks, stream))


def test_few_rows_are_held_against_an_empty_kernel() -> None:
    clock = Clock({"edit": 3.0, "empty": 2.5})
    told = bench.measure(Case(tokens=40, edited=8, width=64, in_place=True, goal=bench.OF_EMPTY), clock, NotedKernels(clock, 64))
    assert all(h == y for name, h, y in clock.noted if name == "edit")
    assert {blocks for name, blocks, _ in clock.noted if name == "empty"} == {40}
    assert told["us"] == pytest.approx(3.0) and told["us_median"] == pytest.approx(6.0)
    assert told["of_empty"] == pytest.approx(1.2) and told["met"] is False and told["of_copy"] is None
    assert told["gb_per_s"] == pytest.approx(2 * 8 * 64 * 2 / 3.0 / 1e3)


def test_many_rows_go_through_buffers_in_turn_and_are_held_against_their_copy(monkeypatch) -> None:
    monkeypatch.setattr(bench, "FEW_BYTES", 1000)
    monkeypatch.setattr(bench, "BEYOND_CACHE", 6 * 64 * 64 * 2)
    clock = Clock({"edit": 2.0, "copy": 1.7})
    told = bench.measure(Case(tokens=64, edited=64, width=64, goal=bench.OF_COPY), clock, NotedKernels(clock, 0))
    edits = [(h, y) for name, h, y in clock.noted if name == "edit"]
    assert len(set(edits)) == 3 and len({*edits[0], *edits[1], *edits[2]}) == 6, "three pairs, six buffers"
    assert [(h, y) for name, h, y in clock.noted if name == "copy"] == edits
    assert told["of_copy"] == pytest.approx(0.85) and told["met"] is True and told["of_empty"] is None


def test_goals_are_met_or_missed_by_their_figures() -> None:
    many = Case(tokens=8192, edited=8192, goal=bench.OF_COPY)
    assert not many.few and many.moved == 2 * many.row_bytes == 2 * 8192 * 4096 * 2 and many.blocks == 2048
    assert figures(many, [100.0], [80.0], [])["met"] is True and figures(many, [100.1], [80.0], [])["met"] is False
    assert figures(many, [], [], [])["met"] is None
    few = Case(tokens=8192, edited=8, in_place=True, goal=bench.OF_EMPTY)
    assert few.few and figures(few, [2.3], [], [2.0])["met"] is True and figures(few, [2.31], [], [2.0])["met"] is False
    idle = Case(tokens=1, edited=0, in_place=True)
    assert figures(idle, [2.0], [], [2.0])["gb_per_s"] is None and figures(idle, [2.0], [], [2.0])["of_empty"] == 1


@pytest.mark.parametrize("case", bench.CASES, ids=lambda c: f"{c.op}-{c.dtype}-{c.tokens}-{c.edited}-{c.rank}")
def test_inputs_have_the_shapes_of_the_case(case) -> None:
    if case.row_bytes > 1 << 22:
        case = replace(case, tokens=300, edited=min(case.edited, 300))
    h, (slot, *banks) = bench.inputs(case)
    item = bench.DTYPES[case.dtype][1]
    assert h.shape == (case.tokens, case.width) and h.dtype.itemsize == item and len(np.unique(h)) > 1000
    assert slot.dtype == np.int32 and (slot == 0).sum() == case.edited and set(slot) <= {0, -1}
    expected = [(1, case.width)] * 2 if case.rank is None else [(case.rank, case.width), (case.rank, case.width), (case.rank,)]
    assert [bank.shape for bank in banks] == expected and all(bank.dtype == h.dtype for bank in banks)


# ---- training


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ([2.0, 1.0], None),
        ([2.0, 1.0078], None),
        ([2.0, 1.01], "losses within 1.0e-02 of float32's"),
        ([2.0, 2.0], "losses within 1.0e"),
        ([float("nan"), 1.0], "losses within nan"),
    ],
)
def test_losses_on_the_gpu_are_those_of_the_cpu_or_the_stage_fails(at, monkeypatch, gpu, said) -> None:
    def python(self: Run, *arguments: object, **_: object) -> Any:
        Path(str(arguments[2])).write_text(json.dumps({"reference": [2.0, 1.0], "gpu": gpu}))
        return self.start("true")

    monkeypatch.setattr(Run, "python", python)
    if said is None:
        assert stages.training(at, {}).startswith("20 steps, losses within")
    else:
        with pytest.raises(Failed, match=said):
            stages.training(at, {})

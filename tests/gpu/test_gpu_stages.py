"""The stages of the script for a GPU where there is none: what they make of programs that answer as on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gpu import stages
from gpu.marked_tests import read_junit
from gpu.process import TESTS, Failed, Run, Skipped

HERE = Path(__file__).parent

JUNIT = """<testsuites><testsuite><testcase classname="native.test_a" name="one"/>{}<testcase classname="native.test_a" name="two">
<skipped message="no provider"/></testcase></testsuite></testsuites>"""


def test_what_pytest_wrote_is_counted(tmp_path) -> None:
    path = tmp_path / "junit.xml"
    seen: dict[str, Any] = {}
    path.write_text(JUNIT.format(""))
    assert read_junit(path, seen) == "1 tests passed, 1 skipped (no provider)"
    for kind in ("failure", "error"):
        path.write_text(JUNIT.format(f'<testcase classname="native.test_b" name="x"><{kind} message="off by&#10;one"/></testcase>'))
        with pytest.raises(Failed, match=r"1 of 2 tests fail; the first, test_b::x: off by one"):
            read_junit(path, seen)
        assert seen["failures"] == [{"test": "test_b::x", "message": "off by one"}]
    path.write_text(JUNIT.format("").replace('<testcase classname="native.test_a" name="one"/>', ""))
    with pytest.raises(Failed, match="no test passed; skipped: no provider"):
        read_junit(path, seen)


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
def test_a_sanitizer_counts_where_it_sees_what_was_planted(at, monkeypatch, tmp_path, script, name, planted, errors, cases, said) -> None:
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


def test_what_is_not_there_is_named(at, monkeypatch) -> None:
    monkeypatch.setattr(stages, "tool", lambda _: None)
    with pytest.raises(Skipped, match="nvcc or cmake is not on PATH; install"):
        stages.build(at, {})
    for name in ("cases_on_gpu", "planted_fault"):
        (at.work / name).touch()
    with pytest.raises(Skipped, match="compute-sanitizer is not on PATH"):
        stages.sanitizer("memcheck", at, {})


def test_a_stage_whose_program_was_not_built_is_skipped_by_name(at) -> None:
    for work, program in ((stages.sample, "cases_on_gpu"), (stages.benchmark, "libreft_ort.so"), (stages.gpu_tests, "libreft_ort.so")):
        with pytest.raises(Skipped, match=f"the stage build made no {program}"):
            work(at, {})


def test_a_case_that_ends_the_program_fails_the_stage(at, script) -> None:
    right = "echo 'LoReFT float32 cases 153 edited 5 worst 0.7'"
    script(at.work / "cases_on_gpu", f"cat > /dev/null; {right}")
    assert stages.sample(at, {}).startswith("153 cases right")
    script(at.work / "cases_on_gpu", f"cat > /dev/null; echo a wrong value: token 3; {right}; exit 1")
    with pytest.raises(Failed, match=r"of 153 cases not all are right \(status 1\): a wrong value: token 3"):
        stages.sample(at, {})


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


# ---- training


@pytest.mark.parametrize(
    ("reference", "gpu", "said"),
    [
        ([2.0, 1.0], [2.0, 1.0], None),
        ([2.0, 1.0], [2.0, 1.0078], None),
        ([2.0, 1.0], [2.0, 1.01], "losses within 1.0e-02 of float32's"),
        ([2.0, 2.0], [2.0, 2.0], "2.000 to 2.000"),
        ([2.0, 1.0], [float("nan"), 1.0], "losses within nan"),
    ],
)
def test_losses_on_the_gpu_are_those_of_the_cpu_and_fall(at, monkeypatch, reference, gpu, said) -> None:
    def python(self: Run, *arguments: object, **_: object) -> Any:
        Path(str(arguments[2])).write_text(json.dumps({"reference": reference, "gpu": gpu}))
        return self.start("true")

    monkeypatch.setattr(Run, "python", python)
    if said is None:
        assert stages.training(at, {}).startswith("20 steps, losses within")
    else:
        with pytest.raises(Failed, match=said):
            stages.training(at, {})


# ---- a bundle in a runtime


RUNGS = [{"name": "base", "passed": True}, {"name": "adapter", "passed": True}]
MISSED = {"name": "adapter", "passed": False}


@pytest.mark.parametrize(
    ("told", "dry", "raised", "said"),
    [
        ({"made": ["bundle", "engine"]}, True, None, "made: bundle, engine"),
        ({"made": ["bundle"], "passed": True, "rungs": RUNGS}, False, None, "made: bundle; parity on 2 of 2 rungs"),
        (
            {"made": ["bundle"], "passed": False, "rungs": [RUNGS[0], MISSED]},
            False,
            Failed,
            "parity on 1 of 2 rungs",
        ),
        ({"unsupported": "not for 9.0"}, False, Skipped, "not for 9.0"),
        ({"refused": "no memory"}, False, Failed, "no memory"),
    ],
)
def test_what_a_bundle_came_to_in_a_runtime(at, monkeypatch, told, dry, raised, said) -> None:
    def python(self: Run, *arguments: object, environment: dict[str, str], **_: object) -> Any:
        assert Path(environment["LD_LIBRARY_PATH"].partition(os.pathsep)[0], "libtensorrt_rtx.so").read_text() == "library"
        Path(str(arguments[5]), "result.json").write_text(json.dumps(told))
        return self.start("true")

    stage = partial(stages.in_runtime, "tensorrt-rtx", ("torch",))
    with pytest.raises(Skipped, match="no wheel of tensorrt-rtx"):
        stage(at, {})
    site = at.work / "site" / "tensorrt-rtx"
    site.mkdir(parents=True)
    (site / "libtensorrt_rtx.so.1").write_text("library")
    at.library.touch()
    at.dry = dry
    monkeypatch.setattr(Run, "python", python)
    if raised is None:
        assert stage(at, {}) == said
    else:
        with pytest.raises(raised, match=said):
            stage(at, {})

"""The tests that are marked gpu: where they are, how they are run on the libraries of this run, and what became of them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.process import TESTS, Failed, Run

MARK = "pytest.mark.gpu"


def gpu_test_files() -> list[Path]:
    """The test files, but for this folder's own, that hold such tests."""
    others = (path for path in TESTS.rglob("test_*.py") if path.parent != Path(__file__).parent)
    return sorted(path for path in others if MARK in path.read_text(encoding="utf-8"))


def run_marked(run: Run, figures: dict[str, Any], files: Sequence[Path], *options: str, site: Sequence[Path] = ()) -> str:
    """Runs, or in the dry form collects, the tests of ``files`` that are marked; Failed where one fails, or where there is none."""
    run.need("pytest", "numpy", "torch", "onnx", "onnx_ir", "onnxruntime", "ml_dtypes", site=site)
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--op-library", run.built(run.library), *options, *files)
    if run.dry:
        told = run.python(*command, "--collect-only", site=site).require("pytest --collect-only").output
        count = re.search(r"(\d+)(?:/\d+)? tests? collected", told)
        if count is None or count[1] == "0":
            raise Failed("no test that is marked gpu was collected")
        return f"{count[1]} tests collected"
    result = run.work / "junit.xml"
    result.unlink(missing_ok=True)
    ended = run.python(*command, "--require-gpu", "--junitxml", result, site=site)
    if not result.is_file():
        raise Failed(f"pytest ended with status {ended.code}: {ended.last_line()}")
    return read_junit(result, figures)


def read_junit(path: Path, figures: dict[str, Any]) -> str:
    """Counts the tests of a JUnit file into ``figures`` and in words; Failed where one failed, or none passed."""
    failures, skips, passed = [], Counter(), 0
    for test in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{test.get('classname', '').rpartition('.')[2]}::{test.get('name')}"
        bad = next((test.find(kind) for kind in ("failure", "error") if test.find(kind) is not None), None)
        skip = test.find("skipped")
        if bad is not None:
            failures.append({"test": name, "message": " ".join((bad.get("message") or "").split())[:300]})
        elif skip is not None:
            skips[skip.get("message") or ""] += 1
        else:
            passed += 1
    figures |= {"tests_passed": passed, "tests_failed": len(failures), "failures": failures[:20], "skips": dict(skips)}
    if failures:
        raise Failed(f"{len(failures)} of {passed + len(failures)} tests fail; the first, {failures[0]['test']}: {failures[0]['message']}")
    if not passed:
        raise Failed(f"no test passed; skipped: {'; '.join(skips) or 'none'}")
    return ", ".join([f"{passed} tests passed", *(f"{count} skipped ({reason})" for reason, count in skips.items())])

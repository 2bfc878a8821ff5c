"""``evaluate`` of an engine, on the doubles of TensorRT and CUDA: its rows are the bundle's that it was built from. No test here has run on
a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorrt_double import CudaDouble
from toy_bundle import ADAPTERS, write_toy_bundle
from toy_engine import install_doubles, write_toy_engine
from typer.testing import CliRunner, Result

from reft_export.cli.main import app
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.engine import Engine

NAMES = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    """Of three rows and eight columns, fewer than the longest prompt has."""
    return write_toy_engine(bundle, bundle.folder.parent / "engine", batch=3, sequence=8)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    return install_doubles(monkeypatch)[0]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    records = [{"prompt": "a lazy dog " * (n % 3) + f"fox {n}", "completion": (" jumps", " stops")[n % 2]} for n in range(7)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_an_engines_rows_are_its_bundles(bundle: Bundle, engine: Engine, lines: Path, cuda: CudaDouble, tmp_path: Path) -> None:
    asked = ("--metric", "exact-match", "--metric", "accuracy", "--max-new-tokens", 6)
    done = run(bundle.folder, engine.folder, "-d", lines, *asked, "-o", tmp_path / "report", "--json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["artifact"], row["adapter"]) for row in rows] == [(where, name) for where in ("bundle", "engine") for name in NAMES]
    answers = [json.loads(line)["rows"] for line in (tmp_path / "report" / "answers.jsonl").read_text().splitlines()]
    for at, name in enumerate(NAMES):
        own, theirs = rows[len(NAMES) + at], rows[at]
        assert own["metrics"]["accuracy"]["right"] == theirs["metrics"]["accuracy"]["right"] and own["new_tokens"] == theirs["new_tokens"]
        assert own["nll"]["value"] == pytest.approx(theirs["nll"]["value"], rel=1e-5)
        assert [each[len(NAMES) + at]["answer"] for each in answers] == [each[at]["answer"] for each in answers], name
    assert len({row["nll"]["value"] for row in rows[: len(NAMES)]}) == len(NAMES), "the adapters change nothing"
    kept = {row["adapter"]: row["retention"] for row in rows[len(NAMES) :] if row["retention"] is not None}
    assert all(value == pytest.approx(1, abs=1e-3) for value in kept.values())
    assert cuda.counts["enqueues"] > 0 and cuda.is_empty


@pytest.mark.parametrize("frozen", ["ends", "base"])
def test_of_a_frozen_engine_there_is_the_one_row(bundle: Bundle, lines: Path, tmp_path: Path, frozen: str) -> None:
    engine = write_toy_engine(bundle, tmp_path / "frozen", freeze=frozen)
    name = None if frozen == "base" else frozen
    done = run(bundle.folder, engine.folder, "-d", lines, "--metric", "loss", "--json")
    assert done.exit_code == 0, done.stderr
    *rows, own = json.loads(done.stdout)["rows"]
    assert (own["artifact"], own["adapter"]) == ("frozen", name)
    assert own["nll"]["value"] == pytest.approx(next(row["nll"]["value"] for row in rows if row["adapter"] == name), rel=1e-5)


def test_what_an_engine_cannot_do_is_one_line(bundle: Bundle, engine: Engine, lines: Path, tmp_path: Path, cuda: CudaDouble) -> None:
    def refused(match: str, *arguments: object, code: int = 2) -> None:
        done = run(*arguments, "-d", lines, "--metric", "loss")
        assert done.exit_code == code and done.stdout == "", done.output
        assert re.search(match, done.stderr) and done.stderr.startswith("error: "), done.stderr

    refused("--provider cpu does not run .*, an engine of tensorrt; leave it out, or use the bundle", engine.folder, "--provider", "cpu")
    refused("--threads are onnxruntime's", bundle.folder, engine.folder, "--threads", "1")
    small = write_toy_engine(bundle, tmp_path / "small", rank=1)
    refused(r"rank|--max-rank", small.folder)
    short = write_toy_engine(bundle, tmp_path / "short", context=9, sequence=8)
    refused(r"held.jsonl:\d: .*", short.folder)
    cuda.devices = 0
    refused("no usable CUDA GPU", engine.folder, code=4)

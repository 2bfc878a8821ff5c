"""The quickstart as a user runs it, offline, and what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from reft_export.cli.main import app
from reft_export.console import progress
from reft_export.evaluation.quantization_report import QuantizationReport
from reft_export.quickstart import base_path, upper
from reft_export.quickstart.subjects import built_in, real
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import ParityError
from runtimes.parity.figures import BUDGETS, Delta, Figures, ParityReport, judge

FIGURES = Figures(compared=1, max_abs=0.0, max_relative=0.0, kl=0.0, top1=1.0, greedy_equal=True)


@pytest.mark.slow
def test_quickstart(tmp_path) -> None:
    output = tmp_path / "story"
    command = [sys.executable, "-m", "reft_export.cli.main", "quickstart", "-o", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9", "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines), "where nobody watches, stages are lines"
    assert "s] training, step" in done.stderr and lines[-1].endswith(" done")
    assert "FAIL" not in done.stdout and "steered" in done.stdout
    for name in ("fp32", "int8", "int4"):
        bundle = open_bundle(output / name)
        assert bundle.adapter_names == ("pirate",)
        assert (bundle.manifest.quantization is None) == (name == "fp32")
    report = (output / "report.html").read_text()
    assert report.count("<svg") == 5
    assert "http://" not in report.replace("http://www.w3.org/", "") and "<script" not in report
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "--force" in again.stderr


def test_a_real_model_that_is_not_there_costs_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model, said in (
        ("smollm2", "real-models/smollm2.gguf is not here; in a clone `make models` downloads it"),
        ("no/such", "no/such does"),
    ):
        done = CliRunner().invoke(app, ["quickstart", "--model", model, "-o", "story"])
        lines = done.stderr.strip().splitlines()
        assert done.exit_code == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert not (tmp_path / "story").exists()


def test_the_real_models_task() -> None:
    examples, prompts = upper.training_examples(), upper.held_out_prompts()
    assert len(examples) == 60 and len(prompts) == 20 and not {e["prompt"] for e in examples} & set(prompts)
    assert all(upper.in_upper_case(e["completion"]) for e in examples)
    for text, passes in (("PARIS, 75 KM.", True), ("Paris", False), ("75.", False), ("", False), ("PARIs", False)):
        assert upper.check("?", text) is passes, text


def test_a_refused_precision_is_told_and_not_failed(tmp_path, monkeypatch, capsys) -> None:
    """A story whose base and steering are toys, and whose int4 gate refuses."""
    from reft_export.quickstart import story
    from reft_export.quickstart.report import write_report

    def quantize(source, base, output, settings, **_):
        if settings.bits == 4:
            raise ParityError("int4 level 4, upper: delta cosine 0.70 < 0.9", None)
        return f"int{settings.bits}"

    monkeypatch.setattr(story, "quantize_bundle", quantize)
    results: dict = {"fp32": "fp32"}
    with progress() as report:
        refused = story._quantize(real(tmp_path), tmp_path, results, report)
    assert list(results) == ["fp32", "int8"] and "0.70" in refused["int4"]
    with pytest.raises(ParityError), progress() as report:
        story._quantize(built_in(), tmp_path, {}, report)
    rungs = ParityReport(rungs=(judge("upper: full forward", "eager", FIGURES, BUDGETS["fp32"], delta=Delta(cosine=1.0, norm_ratio=1.0)),))
    variant = story.Variant(
        name="int8", size=1, base_rate=0.0, steered_rate=1.0, delta_cosine=1.0, delta_norm=1.0, ttft_ms=1.0, decode_ms=1.0,
        decode_ratio=1.0, parity=rungs,
    )  # fmt: skip
    told = story.Story(
        seconds=1.0, history=(), answered_by="int8", answers=(("Q?", "a", "A"),), ladder=rungs, variants=(variant,),
        quantization=QuantizationReport(bundle="b", variants=()), prompts=1, says="is in upper case", refused=refused,
    )  # fmt: skip
    story._print(told)
    printed = " ".join(capsys.readouterr().out.split())
    assert "the same int8 bundle" in printed and "no int4 bundle, since its gate refused it" in printed
    write_report(tmp_path / "report.html", told)
    assert "No int4 bundle" in (tmp_path / "report.html").read_text()


def test_a_story_that_fails_leaves_its_figures_and_the_old_one(tmp_path, monkeypatch) -> None:
    from reft_export.quickstart import story

    def refuse(subject, folder, report):
        (folder / "int8.parity.json").touch()
        raise ParityError(f"no bundle was written, the figures are in {folder / 'int8.parity.json'}; a remedy", None)

    monkeypatch.setattr(story, "_tell", refuse)
    (tmp_path / "story").mkdir()
    (tmp_path / "story" / "report.html").write_text("old")
    with pytest.raises(ParityError, match=re.escape(f"the figures are in {tmp_path}/story.int8.parity.json; a remedy")):
        story.tell(tmp_path / "story", built_in(), force=True)
    assert (tmp_path / "story" / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"story", "story.int8.parity.json"}


@pytest.mark.long
def test_the_story_of_a_real_model_on_the_built_in_one(tmp_path) -> None:
    """Its stages, tables and page; that the steering works is for a real model to show."""
    from reft_export.quickstart.story import tell

    base = real(base_path())
    settings = replace(base.settings, layers="all", positions="f2+l2", max_steps=60, batch_size=8)
    told = tell(tmp_path / "story", replace(base, settings=settings, steered_limit=-1.0, base_limit=1.1), force=False)
    assert [variant.name for variant in told.variants] == ["fp32", "int8", "int4"] or told.refused.keys() == {"int4"}
    assert told.answered_by == told.variants[-1].name and {v.name for v in told.quantization.variants} >= {"int8"}
    page = (tmp_path / "story" / "report.html").read_text()
    assert page.count("<svg") == 5 and "is in upper case" in page and "A refit re-trains" not in page

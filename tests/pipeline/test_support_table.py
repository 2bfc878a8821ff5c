"""The support table: what is committed is what a run writes, and says what a run says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from evidence.support_table import cells
from evidence.support_table.__main__ import app
from evidence.support_table.cells import STREAMS, Cell, run_family
from evidence.support_table.page import PAGE, RESULTS, ROUTES, page, read_results, write_results
from models import bases
from models.classifiers import CLASSIFIERS
from typer.testing import CliRunner

from reft_export.base.classifiers import ENCODERS
from runtimes.edits.adapter import load_adapter
from runtimes.errors import InputError
from runtimes.parity.figures import BUDGETS

FAMILIES_PAGE = Path(__file__).parents[2] / "docs" / "export-and-fold.md"


def _cell(**given) -> Cell:
    return Cell(**{"family": "llama", "route": "dynamo", "dtype": "fp32", "outcome": "ok", "date": "2026-01-02", **given})


def test_the_page_is_made_of_its_results_alone() -> None:
    """Nothing in it was typed by hand, and nobody forgot to write it again."""
    assert PAGE.read_text(encoding="utf-8") == page(read_results(RESULTS))


def test_no_cell_crashed_and_every_figure_is_within_its_budget() -> None:
    results = read_results(RESULTS)
    budgets = {"fp32": "fp32", "fp16": "fp16", "int8": "weight-only int8", "int4": "weight-only int4", "qdq-int4": "weight-only int4"}
    assert {cell.outcome for cell in results.values()} <= {"ok", "structure", "wrong", "refused"}
    for cell in results.values():
        if cell.outcome == "ok":
            assert cell.relative <= BUDGETS[budgets[cell.dtype]].logits, cell.key
        assert "\n" not in cell.reason and "/tmp" not in cell.reason and bool(cell.reason) == (cell.outcome in ("wrong", "refused"))


def test_the_page_names_families_that_the_table_supports() -> None:
    results = read_results(RESULTS)
    section = FAMILIES_PAGE.read_text(encoding="utf-8").partition("## Families")[2].partition("\n## ")[0]
    listed = set(re.findall(r"\b(?:[a-z]+[a-z0-9]*(?:_[a-z0-9]+)*)\b", section)) & set(bases.FAMILIES)
    assert set(tiny.FAMILIES) <= listed
    supported = {family for (family, _, dtype), cell in results.items() if dtype == "fp32" and cell.outcome == "ok"}
    assert listed <= supported


@pytest.mark.slow
@pytest.mark.parametrize(("family", "route", "dtypes"), [("phi", "dynamo", ("fp32",)), ("mamba2", "dynamo", ("fp32",))])
def test_a_new_run_says_what_the_table_says(family, route, dtypes) -> None:
    committed = read_results(RESULTS)
    told: list[Cell] = []
    run_family(family, route, dtypes, told.append)
    assert [cell.key for cell in told] == [(family, route, dtype) for dtype in dtypes]
    for cell in told:
        before = committed[cell.key]
        assert (cell.outcome, cell.streams, cell.missing) == (before.outcome, before.streams, before.missing)


def test_a_family_without_a_kv_cache_is_refused_as_the_table_says() -> None:
    told: list[Cell] = []
    run_family("lfm2", "dynamo", ("fp32", "int4"), told.append)
    assert [(cell.dtype, cell.outcome) for cell in told] == [("fp32", "refused"), ("int4", "refused")]
    assert "do not all keep keys and values" in told[0].reason and told[0].streams == ()


def test_a_traceback_becomes_a_cell_that_shows_it(monkeypatch) -> None:
    monkeypatch.setattr(cells, "export_bundle", lambda *_, **__: [][0])
    told: list[Cell] = []
    run_family("llama", "dynamo", ("fp32",), told.append)
    assert [(cell.outcome, cell.reason) for cell in told] == [("crashed", "IndexError: list index out of range")]
    assert "**crash** \\[1\\]" in page({told[0].key: told[0]})


def test_results_survive_a_round_trip(tmp_path) -> None:
    cells_ = (_cell(relative=1e-7, streams=("block_output",)), _cell(dtype="int4", outcome="refused", reason="no"))
    results = {cell.key: cell for cell in cells_}
    write_results(results, tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results
    (tmp_path / "r.json").write_text('{"cells": [{"family": "llama", "mystery": 1, "streams": []}]}')
    with pytest.raises(InputError, match="does not hold results of the support table"):
        read_results(tmp_path / "r.json")


def test_the_page_shows_every_outcome() -> None:
    shown = [
        _cell(relative=5.4e-7, streams=("block_output", "mlp_output"), missing="no attention"),
        _cell(dtype="bf16", outcome="structure"),
        _cell(dtype="int4", outcome="wrong", relative=0.3, reason="over"),
        _cell(dtype="int8", outcome="refused", reason="no"),
    ]
    text = page({cell.key: cell for cell in shown})
    assert r"| llama | b m \[1\] | 5e-07 | . | structure only | no \[2\] | **wrong** 3e-01 \[3\] | . |" in text
    assert "1. no attention" in text and "2. no" in text and "3. over" in text and "2026-01-02" in text
    assert text.count("Not run yet.") == len(ROUTES)  # one route was, of the decoders; the classifiers were not


def test_the_page_says_how_caches_grow() -> None:
    shown = [
        _cell(relative=5.4e-7, streams=STREAMS, cache="in place"),
        _cell(dtype="int4", relative=2e-7, streams=STREAMS, target="tensorrt"),
        _cell(family="bloom", relative=3e-7, streams=STREAMS, cache="copied", copied="its attention is its own"),
    ]
    text = page({cell.key: cell for cell in shown})
    assert "| llama | b a m | 5e-07 | . | . | . | 2e-07 (t) | . | in place |" in text
    assert r"| bloom | b a m | 3e-07 | . | . | . | . | . | copied \[1\] |" in text and "1. its attention is its own" in text


def test_classifiers_have_a_section_of_their_own() -> None:
    shown = [_cell(relative=1e-7, streams=STREAMS), _cell(family="bert", relative=2e-6, streams=STREAMS)]
    text = page({cell.key: cell for cell in shown})
    decoders, _, classifiers = text.partition("## Encoders with a classification head")
    assert "| llama | b a m | 1e-07 |" in decoders and "bert" not in decoders
    assert "| bert | b a m | 2e-06 |" in classifiers and "llama" not in classifiers
    assert "The other exporters (builder, transformers, optimum) are refused" in classifiers
    assert tuple(CLASSIFIERS) == ENCODERS, "the table runs every encoder that is supported"
    assert not set(CLASSIFIERS) & set(bases.FAMILIES)


def test_classifiers_bring_heads_and_red(monkeypatch) -> None:
    seen = {}

    def export(_, folders, *rest, **more):
        seen.update({folder.name: load_adapter(folder) for folder in folders})
        raise InputError("seen")

    monkeypatch.setattr(cells, "export_bundle", export)
    run_family("distilbert", "dynamo", ("fp32",), lambda _: None)
    assert {name: (a.method, len(a.sites), bool(a.head)) for name, a in seen.items()} == {
        "tied": ("loreft", 6, True),
        "untied": ("loreft", 2, False),
        "red": ("red", 2, True),
    }


@pytest.mark.slow
def test_a_classifier_goes_through() -> None:
    told: list[Cell] = []
    run_family("electra", "dynamo", ("fp32", "qdq-int4", "bf16"), told.append)
    assert [(cell.dtype, cell.outcome, cell.streams) for cell in told] == [
        ("fp32", "ok", STREAMS), ("qdq-int4", "ok", STREAMS), ("bf16", "structure", STREAMS),
    ]  # fmt: skip
    assert told[0].relative <= BUDGETS["fp32"].logits and told[1].relative <= BUDGETS["weight-only int4"].logits


def test_command_line(tmp_path) -> None:
    """Merging another environment's results, and an unknown name: one line, nothing written."""
    write_results({(c := _cell(route="optimum", relative=1e-6)).key: c}, tmp_path / "other.json")
    write_results({(c := _cell(relative=2e-6)).key: c}, tmp_path / "mine.json")
    mine = ["--results", str(tmp_path / "mine.json")]
    done = CliRunner().invoke(app, [*mine, "--merge", str(tmp_path / "other.json")])
    assert done.exit_code == 0, done.output
    assert {key[1] for key in read_results(tmp_path / "mine.json")} == {"dynamo", "optimum"}
    assert "1e-06" in (tmp_path / "mine.md").read_text() and "2e-06" in (tmp_path / "mine.md").read_text()
    before = (tmp_path / "mine.json").read_bytes()
    wrong = CliRunner().invoke(app, [*mine, "--family", "llamma"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: --family 'llamma' is unknown; known: llama")
    wrong = CliRunner().invoke(app, [*mine, "--family", "bert", "--route", "builder"])
    assert wrong.exit_code == 2 and wrong.stderr.startswith("error: --family bert is a classifier, which goes through --route dynamo only")
    assert (tmp_path / "mine.json").read_bytes() == before

"""``evaluate`` of classifiers, encoders and a decoder: a float bundle counts as eager PyTorch does, and the figures are the model's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from models.classifiers import save_classifier
from rich.console import Console
from shared_folders import shared_folder
from typer.testing import CliRunner, Result

from reft_export.base.classifiers import takes_token_types
from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.console import out
from reft_export.eager.steering import steered
from reft_export.evaluating.device_tokenizer import DeviceTokenizer
from reft_export.evaluating.evaluate import Table, artifacts_by_name, evaluate
from reft_export.evaluating.evaluation import evaluation_of, macro_f1
from reft_export.evaluating.settings import EvaluationSettings
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.training.labelled_data import load_labelled
from reft_export.training.objective import tokenizer_of
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.errors import InputError
from runtimes.text.tokenizer import Tokenizer

LABELS = tiny_encoders.LABELS
FAMILIES = {"bert": "f1", "qwen2": "l2"}
"""With the adapter's positions; BERT tells the texts of a pair apart, and the last is a decoder."""


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest) -> Path:
    """A folder with a base, an adapter with its head, and their float bundle."""
    family = request.param

    def make(output: Path) -> None:
        output.mkdir()
        base = load_base(save_classifier(output / "base", family, layers=tiny.LAYERS))
        adapter = tiny.random_adapter(base.info, positions=FAMILIES[family], seed=5)
        save_adapter(replace(adapter, head=tiny_encoders.random_head(base.model, 3)), output / "mood")
        export_bundle(str(output / "base"), [output / "mood"], output / "bundle", ExportSettings(), report=lambda _: None)

    return shared_folder(f"evaluated-classifiers/{family}", make)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and pairs of unequal length, labels by name and by number."""
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    records = [{"text": "It is " + "very " * (n % 5) + f"{n} and on", "label": LABELS[n % 3]} for n in range(10)]
    records += [{"text": f"one {n}", "text_pair": "another", "label": n % 3} for n in range(4)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table_of(folder: Path) -> Table:
    bundle = folder / "bundle"
    return Table(
        base=load_base(folder / "base"),
        adapters={"mood": load_adapter(folder / "mood")},
        artifacts=artifacts_by_name([(bundle, open_bundle(bundle))]),
    )


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_a_float_bundle_counts_as_eager_does(made: Path, lines: Path) -> None:
    table = table_of(made)
    found = evaluate([lines], table, EvaluationSettings(batch_size=3))
    assert [each.who.adapter for each in found.measured] == [None, "mood"] * 2
    bare, edited = (np.concatenate(each.likelihoods) for each in found.measured[:2])
    assert np.abs(bare - edited).max() > 1e-2, "the adapter changes nothing"
    for one, other in zip(found.measured[:2], found.measured[2:], strict=True):
        assert one.chosen == other.chosen and one.who.model == other.who.model
        np.testing.assert_allclose(np.concatenate(other.likelihoods), np.concatenate(one.likelihoods), atol=1e-4)
    assert [row.agreement for row in found.rows] == [None, None, 1, 1]
    assert [row.shares["accuracy"].interval for row in found.rows[:2]] == [row.shares["accuracy"].interval for row in found.rows[2:]]

    base = table.base
    assert base is not None
    for line, example in enumerate(load_labelled([lines], tokenizer_of(base), LABELS, max_length=60).examples):
        given = {"input_ids": torch.tensor([example.text.ids])}
        if takes_token_types(base.model):
            given["token_type_ids"] = torch.tensor([example.text.types])
        for name, measured in zip((None, "mood"), found.measured[:2], strict=True):
            with torch.no_grad():
                if name is None:
                    logits = base.model(**given).logits[0]
                else:
                    with steered(base.model, table.adapters[name]):
                        logits = base.model(**given).logits[0]
            assert measured.likelihoods[line][0] == pytest.approx(float(logits.log_softmax(0)[example.label]), abs=1e-4)
            assert measured.right["accuracy"][line] == (int(logits.argmax()) == example.label)


def test_the_figures(made: Path, lines: Path) -> None:
    assert macro_f1([0, 0, 1, 1], [0, 1, 1, 1]) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert macro_f1([0, 0], [1, 1]) == 0 and macro_f1([2, 2], [2, 2]) == 1
    found = evaluate([lines], table_of(made))
    other = replace(found.measured[3], chosen=tuple((each + (n < 7)) % 3 for n, each in enumerate(found.measured[3].chosen)))
    row = evaluation_of(found.held_out, [*found.measured[:3], other]).rows[3]
    assert row.agreement == 0.5 and row.macro_f1 == pytest.approx(macro_f1(found.held_out.gold or (), other.chosen))
    paired = found.rows[2]
    assert paired.loss_difference is not None and max(abs(paired.loss_difference.low), abs(paired.loss_difference.high)) < 1e-4


def test_the_report(made: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Folders of tests have long names, and a heading is cut where there is no room; whoever spoke first has made the console.
    monkeypatch.setitem(vars(out), "_console", Console(emoji=False, highlight=False, soft_wrap=True, width=300))
    output = tmp_path / "report"
    done = run("-m", made / "base", "-a", made / "mood", made / "bundle", "-d", lines, "-o", output)
    assert done.exit_code == 0, done.stderr
    assert all(word in done.stdout for word in ("accuracy", "NLL", "macro F1", "agreement")) and "perplexity" not in done.stdout
    record = json.loads((output / "evaluation.json").read_text())
    assert record["labels"] == list(LABELS) and record["lines"] == 14 and len(record["rows"]) == 4
    assert {path.name for path in output.iterdir()} == {"report.md", "evaluation.json", "evaluation.png", "answers.jsonl"}
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert answers[1]["expected"] == LABELS[1] and "very" in answers[1]["prompt"].replace(" ", "")
    for at, row in enumerate(record["rows"]):
        said = [each["rows"][at] for each in answers]
        right = sum(each["chosen"] == line["expected"] for each, line in zip(said, answers, strict=True))
        assert row["metrics"]["accuracy"]["right"] == sum(each["accuracy"] for each in said) == right
        assert row["nll"]["value"] == pytest.approx(sum(each["nll"] for each in said) / len(said))
    assert "| --- |" in (output / "report.md").read_text()
    alone = run(made / "bundle", "-d", lines, "--metric", "loss", "--limit", 3, "--json")
    assert alone.exit_code == 0 and json.loads(alone.stdout)["rows"][0]["metrics"] == {}


def test_a_device_cuts_a_text_as_transformers_does(made: Path) -> None:
    base = load_base(made / "base")
    readers: list[Any] = [base.tokenizer, DeviceTokenizer(Tokenizer.load(made / "bundle"), None)]
    records = [
        {"text": "a text that is longer than what is left", "label": 0},
        {"text": "a first text that is much the longer one", "text_pair": "second", "label": 1},
        {"text": "first", "text_pair": "a second text that is much the longer one", "label": 2},
        {"text": "ok", "label": 2},
    ]
    read = [load_labelled(records, each, LABELS, max_length=11) for each in readers]
    assert read[0] == read[1] and any(example.truncated for example in read[0].examples)


def test_what_is_no_classifiers_is_refused(made: Path, lines: Path, tmp_path: Path, float_bundle) -> None:
    def refused(match: str, *arguments: object) -> None:
        done = run(*arguments)
        assert done.exit_code == 2 and done.stdout == "", done.output
        assert match in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr

    bundle, bad = made / "bundle", tmp_path / "bad.jsonl"
    for record, match in (
        ({"text": "x"}, "bad.jsonl:1: lacks ['label']"),
        ({"text": "x", "label": "no such"}, "bad.jsonl:1: label 'no such' is none of the base's: "),
        ({"prompt": "x", "completion": "y"}, "a classifier's line has text, label"),
    ):
        bad.write_text(json.dumps(record) + "\n")
        refused(match, bundle, "-d", bad)
    refused("--metric exact-match is of a decoder's answers, and bundle is a classifier", bundle, "-d", lines, "--metric", "exact-match")
    refused("--max-new-tokens is of a decoder's answers", bundle, "-d", lines, "--max-new-tokens", 3)
    refused("shortest context in the table ends at", bundle, "-d", lines, "--max-length", 100000)
    decoder, _ = float_bundle()
    refused("bundle is a classifier and llama a decoder, which take other lines", decoder, bundle, "-d", lines)
    table = table_of(made)
    opened = table.artifacts["bundle"]
    renamed = replace(opened, manifest=replace(opened.manifest, labels=("a", "b", "c")))
    with pytest.raises(InputError, match=r"bundle has the labels a, b, c, and base in eager PyTorch .*; evaluate them apart"):
        replace(table, artifacts={"bundle": renamed})

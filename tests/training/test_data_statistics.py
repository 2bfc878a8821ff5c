"""What a run says of its data before it trains, and its preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from reft_export.base.load import base_from_memory, save_base
from reft_export.cli.main import app
from reft_export.training.data import load_data
from reft_export.training.statistics import Lengths, marked, statistics_of
from runtimes.edits.adapter import load_adapter
from runtimes.edits.positions import PositionRule

PAIRS = [{"prompt": "abcdefgh", "completion": "xy"}, {"prompt": "abcd", "completion": "é!"}, {"prompt": "abcdef", "completion": "x" * 30}]


@pytest.mark.parametrize(
    ("positions", "edited"), [("f2+l1", 9), ("f9", 9), ("prompt", 18), ("all", 18 + 3 + 4 + 24)], ids=lambda each: str(each)
)
def test_lengths_and_shares(tokenizer: PreTrainedTokenizerFast, positions: str, edited: int) -> None:
    examples = load_data(PAIRS, tokenizer, max_length=30).examples
    s = statistics_of(examples[:2], examples[2:], PositionRule.parse(positions), tokenizer)
    assert (s.examples, s.held_out, s.forms, s.truncated) == (2, 1, {"prompt-completion": 3}, 1)
    assert s.tokens == Lengths(min=8, median=11, p95=30, max=30) and s.prompt == Lengths(min=4, median=6, p95=8, max=8)
    assert s.edited * 49 == pytest.approx(edited) and s.trained * 49 == pytest.approx(3 + 4 + 24)
    assert s.first == "abcdefghxy</s>"


def test_runs_are_the_text_and_cut_no_character(tokenizer: PreTrainedTokenizerFast) -> None:
    _, example, _ = load_data(PAIRS, tokenizer, max_length=64).examples
    runs = marked(example, PositionRule.parse("f1+l1"), tokenizer)
    assert [(r.text, r.edited, r.trained) for r in runs] == [
        ("a", True, False), ("bc", False, False), ("d", True, False), ("é!</s>", False, True),
    ]  # fmt: skip
    (all_of_it, answer) = marked(example, PositionRule.parse("all"), tokenizer)
    assert (all_of_it.text, all_of_it.trained, answer.edited, answer.trained) == ("abcd", False, True, True)


def test_the_command_line_shows_both(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_base(base_from_memory(llama, tokenizer, name="tiny"), tmp_path / "base")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def said(*options: str) -> Any:
        arguments = ["train", "-m", tmp_path / "base", "-d", data, "-o", tmp_path / "a", "--positions", "f2+l1", *options]
        done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout) if "--json" in options else done.stdout

    shown = said("--preview")
    assert "[edited: ab]cdefg[edited: h][trained: xy</s>]" in shown and shown.count("--- example") == 3
    assert said("--preview", "--json")["preview"][0][0] == {"text": "ab", "edited": True, "trained": False}
    table = said("--dry-run")
    for line in ("data       3 examples: 3 prompt-completion", "truncated  none", "by positions f2+l1", "example    'abcdefghxy</s>'"):
        assert line in table
    assert said("--dry-run", "--json")["data"]["tokens"]["max"] == 37
    assert not (tmp_path / "a").exists()
    assert said("--max-steps", "1", "--samples", "0", "--json")["data"]["examples"] == 3
    table = said("--max-steps", "2", "--samples", "1", "--force", "--eval-fraction", "0.4", "--metric", "exact-match")
    assert "edited     " in table and "exact-match 0.0% to 0.0%" in table
    left = json.loads((tmp_path / "a" / "training.json").read_text())
    assert len(left["history"]) == 2 and left["samples"][0]["prompt"] in {pair["prompt"] for pair in PAIRS}
    assert left["metric"] == "exact-match" and left["kept"]["metric"] == 0.0
    assert (tmp_path / "a" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert load_adapter(tmp_path / "a").training["steps"] == 2, "no part of the adapter"

"""The page of the paper in miniature: it is what its rows make, its words follow from their figures, and its loop is `train`'s."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from evidence.experiments import page
from evidence.experiments.contestants import Prefixes, contestant, train
from evidence.experiments.rows import Row, keep, read
from evidence.experiments.setups import BASE, CHOSEN, LORA_QV, LOREFT, SEEDS, Setup, setups
from evidence.experiments.verdicts import DOES_NOT, HOLDS, OPEN, verdicts
from models.bases import byte_tokenizer
from tiny import build

from reft_export.base.load import base_from_memory
from reft_export.training.data import load_data
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train as product_train

DOCS = Path(__file__).parent.parent / "docs"
LINES = [{"prompt": f"what is {word}?", "completion": f" {word}"} for word in ("a", "be", "cee", "dent")]


def _row(setup: Setup, accuracy: float, parameters: int) -> Row:
    figures = {"films": accuracy, "products": accuracy, "films loss": 0.2, "off task loss": 2.0}
    return Row(setup=setup, figures=figures, parameters=parameters, seconds=10, peak_mb=100)


def _rows(ours: float, parameters: int = 18_448) -> list[Row]:
    pairs = ((replace(LOREFT, seed=seed), replace(LORA_QV, seed=seed)) for seed in SEEDS)
    return [row for a, b in pairs for row in (_row(a, ours, parameters), _row(b, 0.90, 460_800))]


def test_the_page_is_what_its_rows_make() -> None:
    assert (DOCS / page.PAGE).read_text(encoding="utf-8") == page.page(list(read(DOCS).values()))


@pytest.mark.parametrize(
    ("accuracy", "parameters", "word"),
    [(0.895, 18_448, HOLDS), (0.885, 18_448, OPEN), (0.83, 18_448, DOES_NOT), (0.95, 30_000, DOES_NOT)],
    ids=["within a point", "a point and a half below", "seven points below", "better, with too many parameters"],
)
def test_the_word_for_a_claim_follows_from_its_rows(accuracy: float, parameters: int, word: str) -> None:
    (found,) = verdicts(_rows(accuracy, parameters))
    assert found.word == word


@pytest.mark.parametrize(("losses", "word"), [((2.8, 2.9, 2.7), HOLDS), ((3.2, 3.4, 3.3), f"{HOLDS} at rate 0.002, {OPEN} at the other")])
def test_a_difference_within_the_seeds_is_not_told_apart(losses: tuple[float, ...], word: str) -> None:
    def rows(setup: Setup, losses: tuple[float, ...]) -> list[Row]:
        pairs = zip(SEEDS, losses, strict=False)
        return [
            replace(row, figures=row.figures | {"off task loss": off})
            for seed, off in pairs
            for row in [_row(replace(setup, seed=seed), 0.9, 1)]
        ]

    base = rows(replace(LOREFT, name=BASE, method=BASE), (2.6,))
    made = [*base, *rows(LOREFT, (2.8, 2.8, 2.7)), *rows(CHOSEN, losses), *rows(LORA_QV, (3.4, 3.2, 3.5))]
    assert verdicts(made)[-1].word == word


@pytest.mark.parametrize(("losses", "word"), [((1.8, 2.6, 6.1), HOLDS), ((1.8, 6.1, 4.4), f"{HOLDS}, but"), ((1.8, 2.6, 1.7), DOES_NOT)])
def test_fluency_that_comes_back_is_said(losses: tuple[float, ...], word: str) -> None:
    rows = [
        Row(setup=replace(LOREFT, section="strength", name=str(at), strength=float(at)), parameters=0, seconds=0, peak_mb=0,
            figures={"upper": at / 2, "base loss": loss, "distinct words": 0.5})
        for at, loss in enumerate(losses)
    ]  # fmt: skip
    assert verdicts(rows)[0].word.startswith(word) and (word != HOLDS or verdicts(rows)[0].word == HOLDS)


def test_seeds_are_one_line_with_their_mean() -> None:
    rows = _rows(0.895)
    rows[0] = replace(rows[0], figures={**rows[0].figures, "films": 0.91})
    text = page.page(rows)
    assert "| LoReFT r4, rate 0.002 | 90.0 % (91.0, 89.5, 89.5) |" in text
    assert "- Learning rates: LoReFT r4, 0.0005, seed 1; " in text, "what was not run is said"


def test_a_row_is_kept_once_and_read_as_it_was(tmp_path: Path) -> None:
    first, other = _rows(0.9)[:2]
    for row in (first, other, replace(first, seconds=11.0)):
        keep(tmp_path, row)
    assert read(tmp_path) == {first.setup.key: replace(first, seconds=11.0), other.setup.key: other}


def test_no_two_rows_have_one_key() -> None:
    keys = [setup.key for setup in setups()]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("positions", ["l1", "all"])
def test_a_step_is_trains(positions: str, tmp_path: Path) -> None:
    base = base_from_memory(build("llama"), byte_tokenizer())
    setup = replace(LOREFT, layers="0;2", positions=positions, steps=6, batch_size=len(LINES))
    examples = load_data(LINES, base.tokenizer, max_length=64).examples
    with contestant(base, setup, examples, Prefixes(base)) as made:
        losses = train(made, setup, examples).losses
    settings = TrainSettings(
        rank=setup.rank, layers=setup.layers, positions=positions, lr=setup.lr, max_steps=6, batch_size=len(LINES), seed=setup.seed,
        samples=0, probes=0,
    )  # fmt: skip
    told = product_train(base, LINES, settings, tmp_path / "adapter").history
    assert losses == pytest.approx([step.loss for step in told], abs=1e-5)
    assert losses[-1] < losses[0]

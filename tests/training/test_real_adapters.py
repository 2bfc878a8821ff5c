"""The three tasks of the real adapters: what is asked is held out, and what passes is what the task says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evidence import review_text
from evidence.real_adapters import HELD_OUT, REVIEWS, TASKS
from evidence.review_text import Review

RATINGS = (3.0, -2.5, 0.4, 1.6, -1.6)


@pytest.fixture(autouse=True)
def reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [Review(text=f"review number {i} of a film", rating=RATINGS[i % len(RATINGS)]) for i in range(1000)]
    monkeypatch.setattr(review_text, "reviews", lambda *_: told)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_was_not_trained_on(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    trained, held = ({line["prompt"] for line in lines(tmp_path)} for lines in (task.examples, task.held_out))
    assert len(held) == HELD_OUT and not trained & held
    assert all(task.passes(line, line["completion"]) for line in task.examples(tmp_path))


def test_reviews_are_clear_and_of_both_kinds(tmp_path: Path) -> None:
    lines = [*TASKS["sentiment"].examples(tmp_path), *TASKS["sentiment"].held_out(tmp_path)]
    assert len(lines) == REVIEWS + HELD_OUT
    assert [line["completion"] for line in lines[:4]] == ["positive", "negative"] * 2
    numbers = {int(line["prompt"].rpartition("number ")[2].split()[0]) for line in lines}
    assert not any(number % len(RATINGS) == 2 for number in numbers), "of rating 0.4"


def test_what_does_not_pass(tmp_path: Path) -> None:
    assert not TASKS["upper"].passes({}, "A castle is old.")
    assert not any(TASKS["json"].passes({}, text) for text in ('{"answer": "a"', '{"reply": "a"}', '{"answer": 1, "more": 2}', "[]", "a"))
    assert TASKS["json"].passes({}, json.dumps({"answer": "a"}) + "\n")
    assert TASKS["sentiment"].passes({"completion": "negative"}, " Negative.") and not TASKS["sentiment"].passes(
        {"completion": "negative"}, "positive"
    )

"""The page of bytes against perplexity: what is measured, what is called worse, and where llama.cpp's curve runs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from evidence import quality_page
from evidence.quality import LLAMA_CPP, Row, keep, kept, log_likelihood, main, settings_of

VOCABULARY = 7


def _row(name: str, megabytes: float, nats: float, group: str = "weight-only") -> Row:
    return Row(name=name, group=group, bytes=int(megabytes * 1e6), nats=nats, tokens=1000, decode_ms=None)


LLAMA = [
    _row(f"llama.cpp {kind}", size, nats, LLAMA_CPP) for kind, size, nats in (("Q4_0", 90, 5.4), ("Q5_K_M", 110, 5.2), ("Q8_0", 150, 5.0))
]
OURS = [_row("fp32", 540, 5.0, "float"), _row("small", 95, 5.3), _row("large", 112, 5.19), _row("poor", 96, 5.5)]


class _Bigrams:
    """log p(next | token) of one table, whatever stands before; pads say nonsense."""

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)

    def step(self, ids: np.ndarray, mask: np.ndarray) -> SimpleNamespace:
        logits = self.table[ids]
        logits[mask == 0] = np.nan
        return SimpleNamespace(logits=logits)


def test_the_likelihood_of_padded_batches_is_that_of_each_row_alone() -> None:
    session, random = _Bigrams(), np.random.default_rng(1)
    rows = [random.integers(0, VOCABULARY, int(length)).tolist() for length in random.integers(2, 9, 40)]
    log_p = session.table - np.log(np.exp(session.table.astype(np.float64)).sum(-1, keepdims=True))
    expected = -math.fsum(log_p[a, b] for row in rows for a, b in zip(row, row[1:], strict=False))
    nats, tokens = log_likelihood(session, rows)
    assert tokens == sum(len(row) - 1 for row in rows)
    assert nats == pytest.approx(expected, rel=1e-6)


def test_llama_cpps_curve_is_straight_between_its_types() -> None:
    assert quality_page.curve_at(LLAMA, 100e6) == pytest.approx(5.3)
    assert quality_page.curve_at([*LLAMA, _row("llama.cpp F32", 540, 4.99, LLAMA_CPP)], 151e6) is None
    assert quality_page.curve_at(LLAMA, 89e6) is None
    assert quality_page.curve_at([*LLAMA, _row("llama.cpp Q4_1", 98, 5.6, LLAMA_CPP)], 100e6) == pytest.approx(5.3), (
        "a smaller type beats it"
    )


def test_a_row_says_which_neighbour_is_better() -> None:
    rows = [*LLAMA, *OURS]
    assert quality_page.worse_than(OURS[3], rows) == "worse than small (95 MB)"
    assert not any(quality_page.worse_than(row, rows) for row in (*OURS[:3], *LLAMA))


def test_the_page_holds_every_row_and_its_place(tmp_path: Path) -> None:
    for row in (*OURS, *LLAMA):
        keep(tmp_path, row)
    quality_page.write([("a model", list(kept(tmp_path).values()))], tmp_path)
    text = (tmp_path / quality_page.PAGE).read_text()
    assert all(f"| {row.name} | {row.bytes / 1e6:.1f} | {row.perplexity:.2f} |" in text for row in (*OURS, *LLAMA))
    assert "| poor | 96.0 | 244.69 | +0.5000 |  |  | worse than small (95 MB) |" in text
    assert "- small: 0.0500 nats below llama.cpp's curve at 95.0 MB" in text
    assert "- poor: 0.1600 nats above llama.cpp's curve at 96.0 MB" in text
    assert "Not measured yet: int8; int4 32; " in text and quality_page.page(quality_page.read(tmp_path)) == text
    assert (tmp_path / quality_page.PICTURE).stat().st_size > 1000


def test_a_model_that_is_measured_joins_those_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    rows = [*OURS[:2], *LLAMA]
    for row in rows:
        keep(tmp_path / "other", row)
    quality_page.write([("a model", OURS), ("other", OURS)], tmp_path)
    main(["page", str(tmp_path / "other"), "--docs", str(tmp_path)])
    assert quality_page.read(tmp_path) == [("a model", OURS), ("other", rows)]


def test_the_page_is_what_its_rows_make() -> None:
    docs = Path(__file__).parent.parent / "docs"
    assert (docs / quality_page.PAGE).read_text(encoding="utf-8") == quality_page.page(quality_page.read(docs))


def test_a_row_measured_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    keep(tmp_path, _row("small", 95, 5.3))
    keep(tmp_path, _row("small", 95, 5.2))
    assert kept(tmp_path)["small"].nats == 5.2


def test_every_row_is_a_setting_that_the_quantizer_takes() -> None:
    settings = settings_of()
    assert {each.scheme for each in settings.values() if each} == {"weight-only", "dynamic", "static", "qdq-int4", "qdq-int8", "fp8"}

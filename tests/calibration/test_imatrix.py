"""The search of scales by importance: never worse than rounding by what it minimises, and what it says it is."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.settings import BlockFormat
from calibration.weight_only import FACTORS, LEAST_IMPORTANCE, Blocks, dequantize, quantize_blocks

RTN, IMATRIX = (BlockFormat(bits=4, block_size=32, method=method) for method in ("rtn", "imatrix"))


def restored(blocks: Blocks, shape: tuple[int, int]) -> np.ndarray:
    return dequantize(blocks.packed, blocks.scales, blocks.zero_points, 4, 32, *shape)


def drawn(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the importance of its inputs, a few of which matter a thousand times as much."""
    random = np.random.default_rng(rows)
    importance = random.uniform(0, 1, rows) * np.where(random.random(rows) < 0.05, 1000, 1)
    return random.normal(size=(rows, columns)).astype(np.float32), importance.astype(np.float32)


@pytest.mark.parametrize("rows", [32, 96, 100])
def test_no_block_loses_more_than_by_rounding(rows: int) -> None:
    weight, importance = drawn(rows, 40)
    h = importance / importance.mean() + LEAST_IMPORTANCE
    lost = {}
    for name, format in (("rtn", RTN), ("imatrix", IMATRIX)):
        error = h[:, None] * (restored(quantize_blocks(weight, format, importance), weight.shape) - weight).astype(np.float64) ** 2
        lost[name] = np.add.reduceat(error, np.arange(0, rows, 32), axis=0)
    assert (lost["imatrix"] <= lost["rtn"] * (1 + 1e-5)).all()
    assert lost["imatrix"].sum() < 0.8 * lost["rtn"].sum()


def test_the_scale_is_the_best_of_all_factors() -> None:
    """One block, by brute force in float64."""
    weight, importance = drawn(32, 1)
    h, w = importance.astype(np.float64) / importance.mean() + LEAST_IMPORTANCE, weight[:, 0].astype(np.float64)
    largest = w[np.abs(w).argmax()] / -8
    lost = []
    for factor in FACTORS:
        q = np.clip(np.rint(w / (factor * largest)), -8, 7)
        lost.append(float((h * (w - (h * w * q).sum() / (h * q * q).sum() * q) ** 2).sum()))
    found = restored(quantize_blocks(weight, IMATRIX, importance), weight.shape)[:, 0]
    assert float((h * (w - found) ** 2).sum()) == pytest.approx(min(lost), rel=1e-5)


@pytest.mark.parametrize("importance", [None, np.full(64, np.nan, np.float32), np.ones(32, np.float32)])
def test_without_a_number_for_every_input_it_rounds(importance) -> None:
    weight, _ = drawn(64, 8)
    assert (quantize_blocks(weight, IMATRIX, importance).packed == quantize_blocks(weight, RTN).packed).all()


def test_zeros_stay_zeros() -> None:
    weight = np.zeros((64, 3), np.float32)
    assert not restored(quantize_blocks(weight, IMATRIX, np.zeros(64, np.float32)), weight.shape).any()

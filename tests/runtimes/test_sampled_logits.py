"""Figures from a sample of the vocabulary: exact where it is the whole, near where it is not, and never blind to what matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.parity.figures import compare, compare_deltas
from runtimes.parity.sampled_logits import SampledLogits, compare_sampled, logsumexp

K, V, M = 24, 5000, 8


def sample(logits: np.ndarray, count: int = V, seed: int = 0) -> SampledLogits:
    random = np.random.default_rng(seed)
    columns = np.stack([np.sort(random.choice(V, count, replace=False)) for _ in logits])
    best = np.argsort(-logits, 1)[:, :M]
    return SampledLogits(
        columns=columns,
        logits=np.take_along_axis(logits, columns, 1),
        tokens=best,
        at_tokens=np.take_along_axis(logits, best, 1),
        logsumexp=np.array([logsumexp(row.astype(np.float64)) for row in logits]),
        best=best[:, 0],
    )


def read(logits: np.ndarray, reference: SampledLogits) -> SampledLogits:
    found = SampledLogits.like(reference)
    assert not found.given.any()
    for k, row in enumerate(logits):
        found.put(k, row)
    assert found.given.all()
    return found


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """A few likely tokens above many that are not, as a language model has them."""
    random = np.random.default_rng(1)
    x = 2 * random.standard_normal((K, V))
    x[:, :40] += 8
    return x.astype(np.float32)


@pytest.mark.parametrize("scale", [0.0, 1e-5, 1e-2, 1.0])
def test_of_all_columns_the_figures_are_compares(logits: np.ndarray, scale: float) -> None:
    other = (logits + scale * np.random.default_rng(2).standard_normal(logits.shape)).astype(np.float32)
    whole, found = compare(other, logits), compare_sampled(read(other, sample(logits)), sample(logits))
    assert (found.compared, found.max_abs, found.top1) == (whole.compared, pytest.approx(whole.max_abs, abs=1e-12), whole.top1)
    assert found.max_relative == pytest.approx(whole.max_relative) and found.kl == pytest.approx(whole.kl, rel=1e-6, abs=1e-9)


def test_a_sample_is_near_to_the_whole(logits: np.ndarray) -> None:
    other = (logits + 0.3 * np.random.default_rng(3).standard_normal(logits.shape)).astype(np.float32)
    whole, found = compare(other, logits), compare_sampled(read(other, sample(logits, 500)), sample(logits, 500))
    assert found.top1 == whole.top1 < 1
    assert 0.6 * whole.max_abs < found.max_abs <= whole.max_abs
    assert 0.6 * whole.kl < found.kl <= whole.kl + 1e-9  # lumping never adds
    steered, base = logits + np.float32(0.2) * np.random.default_rng(4).standard_normal(logits.shape).astype(np.float32), logits
    device = (steered + 0.1 * np.random.default_rng(5).standard_normal(logits.shape)).astype(np.float32)
    columns = sample(logits, 500).columns
    here = [np.take_along_axis(x, columns, 1) for x in (device, base, steered, base)]
    all_of_it, some = compare_deltas(device, base, steered, base), compare_deltas(*here)
    assert some.cosine == pytest.approx(all_of_it.cosine, abs=0.01) and some.norm_ratio == pytest.approx(all_of_it.norm_ratio, abs=0.02)


def test_what_no_column_shows_is_seen_in_the_sum_and_the_likeliest(logits: np.ndarray) -> None:
    reference = sample(logits, 100)
    (hidden,) = [v for v in range(4990, V) if v not in reference.columns[0]][:1]
    other = logits.copy()
    other[0, hidden] = 30
    found = compare_sampled(read(other, reference), reference)
    assert found.top1 == 1 - 1 / K and found.max_relative > 0.5 and found.kl > 0.1
    second = logits.copy()
    second[0, [reference.tokens[0, 0], reference.tokens[0, 1]]] = second[0, [reference.tokens[0, 1], reference.tokens[0, 0]]]
    assert compare_sampled(read(second, reference), reference).top1 == 1 - 1 / K


def test_values_that_are_not_finite_and_positions_that_are_missing(logits: np.ndarray) -> None:
    reference = sample(logits, 100)
    for bad in (np.nan, np.inf):
        other = logits.copy()
        other[3, 4999] = bad
        found = compare_sampled(read(other, reference), reference)
        assert (found.max_abs, found.kl, found.top1) == (np.inf, np.inf, 0.0)
    assert compare_sampled(SampledLogits.like(reference), reference).max_abs == np.inf
    with pytest.raises(InputError, match="reference logits are not finite"):
        compare_sampled(reference, replace(reference, logsumexp=reference.logsumexp * np.nan))
    with pytest.raises(InputError, match="as many and not none; got 24 and 23"):
        compare_sampled(reference, reference.at(range(23)))
    with pytest.raises(InputError, match="got 0 and 0"):
        compare_sampled(reference.at([]), reference.at([]))

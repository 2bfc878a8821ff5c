"""Histograms that leave no trace of order, and the ranges that are chosen from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.activations import LEVELS, STORED, from_range
from calibration.collected import Collected, Header, load_collected
from calibration.comparison import clipping
from calibration.histogram import BINS, Histogram, mixed
from calibration.observers import Observer
from runtimes.errors import CalibrationError

HEADER = Header(graph="g", adapters={"a": "1"}, data="d", decode_tokens=4, sources=("base", "a"), tensors=("x", "y"), prompts=2)


def filled(values: np.ndarray) -> Histogram:
    histogram = Histogram.empty()
    histogram.add(values, "x")
    return histogram


values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


@given(values, st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_and_division_leave_no_trace(numbers, random) -> None:
    whole = filled(np.array(numbers, np.float32))
    shuffled = list(numbers)
    random.shuffle(shuffled)
    parts = Histogram.empty()
    for number in shuffled:
        parts.add(np.array([number], np.float32), "x")
    assert (parts.counts == whole.counts).all() and parts.limit == whole.limit
    assert (parts.low, parts.high) == (whole.low, whole.high) == (min(numbers), max(numbers))
    assert whole.total == len(numbers)


@given(values)
@settings(max_examples=60, deadline=None)
def test_every_value_is_in_the_bin_that_holds_it(numbers) -> None:
    histogram = filled(np.array(numbers, np.float32))
    half = histogram.limit / BINS
    for number in numbers:
        inside = (histogram.middles - half <= number) & (number < histogram.middles + half)
        assert inside.sum() == 1 and histogram.counts[inside][0] > 0


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(CalibrationError, match="layer 3 holds values that are not finite"):
            Histogram.empty().add(np.array([1.0, bad], np.float32), "layer 3")


def test_a_mixture_weighs_sources_not_values() -> None:
    """A source with a thousand times the values counts no more than its share."""
    small, large = filled(np.full(10, 1.5)), filled(np.full(10_000, 3.5))
    shares, middles, low, high = mixed([(1.0, small), (3.0, large)])
    assert (low, high) == (1.5, 3.5) and np.isclose(shares.sum(), 1)
    assert np.isclose(shares[np.abs(middles - 1.5).argmin() - 2 : np.abs(middles - 1.5).argmin() + 3].sum(), 0.25)


@pytest.fixture(scope="module")
def heavy_tail() -> np.ndarray:
    generator = np.random.default_rng(0)
    x = generator.standard_normal(200_000).astype(np.float32)
    x[:20] *= 60
    return x


def test_minmax_and_percentile(heavy_tail) -> None:
    parts = [(1.0, filled(heavy_tail))]
    assert Observer().range(parts, "uint8") == (float(heavy_tail.min()), float(heavy_tail.max()))
    low, high = Observer(name="percentile", percentile=99.9).range(parts, "uint8")
    exact = np.percentile(heavy_tail, [0.05, 99.95])
    width = 2 * parts[0][1].limit / BINS
    np.testing.assert_allclose([low, high], exact, atol=2 * width)


@pytest.mark.parametrize("kind", ["uint8", "int8", "fp8"])
def test_mse_is_no_worse_than_any_range_tried_by_hand(kind, heavy_tail) -> None:
    def error(low: float, high: float) -> float:
        how = from_range(kind, low, high, np.dtype(np.float32), "x")
        bottom, top = LEVELS[kind]
        scaled = heavy_tail / how.scale
        q = np.clip(scaled, bottom, top).astype(STORED["fp8"]).astype(float) if kind == "fp8" else np.round(scaled)
        q = np.clip(q + how.zero_point, bottom, top) - how.zero_point
        return float(((heavy_tail - q * how.scale) ** 2).mean())

    low, high = float(heavy_tail.min()), float(heavy_tail.max())
    chosen = error(*Observer(name="mse").range([(1.0, filled(heavy_tail))], kind))
    assert all(chosen <= 1.02 * error(low * share, high * share) for share in (1, 0.75, 0.5, 0.25, 0.1))


def test_entropy_cuts_the_tail(heavy_tail) -> None:
    low, high = Observer(name="entropy").range([(1.0, filled(heavy_tail))], "int8")
    assert float(heavy_tail.min()) <= low < -3 and 3 < high < 0.7 * float(heavy_tail.max())


def test_clipping_is_what_numpy_counts(heavy_tail) -> None:
    share, energy = clipping(filled(heavy_tail), -2.0, 3.0, symmetric=False)
    beyond = np.where(heavy_tail > 3, heavy_tail - 3, np.where(heavy_tail < -2, -2 - heavy_tail, 0.0)).astype(float)
    assert share == pytest.approx((beyond > 0).mean(), rel=0.02)
    assert energy == pytest.approx((beyond**2).sum() / (heavy_tail.astype(float) ** 2).sum(), rel=0.02)


@given(st.floats(-100, 0), st.floats(0, 100), st.sampled_from(["uint8", "int8", "fp8"]))
@settings(max_examples=80, deadline=None)
def test_a_range_is_covered_and_zero_is_exact(low, high, kind) -> None:
    how = from_range(kind, low, high, np.dtype(np.float32), "x")
    bottom, top = LEVELS[kind]
    slack = how.scale * (1 if kind == "uint8" else 1e-3)
    assert (bottom - how.zero_point) * how.scale <= low + slack and (top - how.zero_point) * how.scale >= high - slack
    assert how.zero_point == int(how.zero_point) and bottom <= how.zero_point <= top


def test_ranges_that_make_no_grid_are_refused() -> None:
    for low, high in ((np.nan, 1), (0, np.inf), (2, 1)):
        with pytest.raises(CalibrationError, match=r"the range of mul_3 is .*; calibrate again"):
            from_range("uint8", low, high, np.dtype(np.float32), "mul_3")
    with pytest.raises(CalibrationError, match="does not fit float16"):
        from_range("int8", 0, 1e9, np.dtype(np.float16), "x")
    assert from_range("int8", 0.0, 0.0, np.dtype(np.float32), "x").scale == 1.0


@pytest.mark.parametrize("settings", [{"name": "median"}, {"name": "percentile", "percentile": 20.0}])
def test_unknown_observers_are_refused(settings) -> None:
    with pytest.raises(CalibrationError, match="--observer|--percentile"):
        Observer(**settings)


def test_the_file_comes_back_as_it_was_written(tmp_path) -> None:
    collected = Collected.empty(HEADER)
    for source in ("base", "a"):
        for name in ("x", "y"):
            collected.histograms[source][name].add(np.arange(5, dtype=np.float32) - 2, name)
    collected.header = Header(**{**vars(HEADER), "done": 2, "tokens": 9})
    collected.save(tmp_path / "r")
    again = load_collected(tmp_path / "r")
    assert again.header == collected.header and again.header.complete and again.digest() == collected.digest()


@pytest.mark.parametrize("fault", ["nan", "inf", "negative", "empty", "shape", "truncated", "text", "unknown key"])
def test_damaged_files_are_refused(fault, tmp_path) -> None:
    collected = Collected.empty(HEADER)
    for histograms in collected.histograms.values():
        for name, histogram in histograms.items():
            histogram.add(np.ones(3, np.float32), name)
    collected.header = Header(**{**vars(HEADER), "done": 2})
    broken = collected.histograms["a"]["y"]
    if fault in ("nan", "inf"):
        broken.high = float(fault)
    elif fault == "negative":
        broken.counts[3] = -1
    elif fault == "empty":
        broken.counts[:] = 0
    path = tmp_path / "r"
    collected.save(path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif fault == "text":
        path.write_text("ranges")
    elif fault in ("shape", "unknown key"):
        with np.load(path) as arrays:
            changed = dict(arrays)
        if fault == "shape":
            changed["counts.a"] = changed["counts.a"][:1]
        else:
            changed["header"] = np.array(str(changed["header"]).replace('"done"', '"dome"'))
        with path.open("wb") as file:
            np.savez(file, **changed)
    with pytest.raises(CalibrationError, match="calibrate again"):
        load_collected(path)

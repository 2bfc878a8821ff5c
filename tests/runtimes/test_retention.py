"""What quantization left, as figures: the formula, what cannot be measured, and what is told apart from chance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from runtimes.artifacts.manifest import Quantization
from runtimes.parity.retention import LEAST_GAIN, MOST_ROUNDING, Quality, Recorded, quality, recorded, shortfall

INT4 = Quantization(scheme="weight-only", bits=4, block_size=32, symmetric=True, accuracy_level=4)
TOKENS = 400
RANDOM = np.random.default_rng(0)
EXACT = -RANDOM.gamma(2.0, 1.0, TOKENS)
BASE = EXACT - 1.5


def measured(here: np.ndarray, float_own: np.ndarray = EXACT + 0.1) -> Quality:
    return quality("polite", here, Recorded(exact=EXACT, float_own=float_own, float_base=BASE))


def test_the_formula() -> None:
    found = measured(EXACT - 0.3)
    assert found.tokens == TOKENS
    assert found.retention == pytest.approx((1.5 - 0.3) / (1.5 + 0.1))
    assert found.loss == pytest.approx(0.4)
    assert measured(EXACT + 0.1).retention == pytest.approx(1)
    assert measured(BASE).retention == pytest.approx(0)
    assert measured(BASE - 1).retention == pytest.approx(-1 / 1.6)


def test_a_damaged_base_does_not_raise_the_share() -> None:
    """It is the float32 base that the gain is taken from: a worse base of the bundle's own changes nothing."""
    arrays = {
        "log_probabilities": EXACT,
        "base_log_probabilities": BASE - 5,
        "fp32_log_probabilities": EXACT,
        "fp32_base_log_probabilities": BASE,
    }
    of = recorded("polite", arrays)
    assert of is not None
    assert quality("polite", EXACT, of).retention == pytest.approx(1)


def test_what_no_share_can_be_taken_of() -> None:
    small = quality("polite", EXACT, Recorded(exact=EXACT, float_own=BASE + LEAST_GAIN, float_base=BASE))
    assert small.retention is None
    assert recorded("polite", {"logits": np.zeros((1, 2))}) is None
    base = recorded("base", {"log_probabilities": EXACT})
    assert base is not None
    assert quality("base", EXACT - 0.02, base).retention is None
    assert quality("base", EXACT - 0.02, base).perplexity_change == pytest.approx(math.expm1(0.02))


def test_rounding_is_told_from_chance() -> None:
    noise = RANDOM.standard_normal(TOKENS)
    noise -= noise.mean()
    assert not measured(EXACT - 2 * MOST_ROUNDING + noise).rounded_away  # one standard error is 0.05 nats here
    assert measured(EXACT - 2 * MOST_ROUNDING + 0.01 * noise).rounded_away
    assert not measured(EXACT - 0.5 * MOST_ROUNDING).rounded_away
    assert not measured(EXACT + 1).rounded_away
    assert measured(np.where(np.arange(TOKENS) == 3, np.nan, EXACT)).rounded_away


def test_what_is_too_little() -> None:
    kept = measured(EXACT - 0.3)
    assert shortfall(kept, 0.1, INT4, 0.7) == ""
    assert shortfall(kept, 1.0, INT4, 0.8) == "retention 0.75, expected 0.8"
    assert shortfall(None, 0.91, INT4, 0.8) == shortfall(None, None, INT4, 0.8) == ""
    assert shortfall(None, 0.89, INT4, 0.8) == "delta cosine 0.890, expected 0.9 (without probes)"
    assert "expected 0.99" in shortfall(None, 0.98, replace(INT4, bits=8), 0.8)
    small = quality("polite", EXACT, Recorded(exact=EXACT, float_own=BASE + 0.01, float_base=BASE))
    assert "its edit is worth 0.010 nats a token" in shortfall(small, 0.5, INT4, 0.8)


def test_more_tokens_fell_than_rose() -> None:
    """16 fell and 2 rose: a mean that is as good as it was, and lopsided all the same."""
    likely = np.full(TOKENS, math.log(0.6))
    unlikely = np.full(TOKENS, math.log(0.4))
    tokens = np.arange(TOKENS)
    own = np.where(tokens < 200, likely, unlikely)

    def turned(fell: int, rose: int) -> Quality:
        here = np.where(tokens < fell, math.log(0.45), np.where(tokens >= TOKENS - rose, math.log(0.55), own))
        return quality("json", here, Recorded(exact=here, float_own=own, float_base=own - 2))

    found = turned(16, 2)
    assert (found.fell, found.rose) == (16, 2) and found.lopsided and found.retention == pytest.approx(1, abs=0.02)
    assert "16 of 400 tokens lost their even odds, and 2 gained them: count" in str(found)
    assert [turned(fell, rose).lopsided for fell, rose in ((0, 0), (6, 0), (7, 0), (2, 16), (21, 15), (60, 30))] == [
        *(False, False, True, False, False, True)
    ]
    assert "odds" not in str(turned(21, 15))

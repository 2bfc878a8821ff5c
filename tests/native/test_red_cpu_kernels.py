"""RED's CPU kernels through the C interface: every instruction set that this processor runs, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_op import DTYPES, cpu_kernels, installed_library, load
from native_red import check, draw, red_cpu
from test_cpu_kernels import ALL_KERNELS


@pytest.fixture(params=ALL_KERNELS)
def kernels(request) -> str:
    if request.param not in cpu_kernels(installed_library()):
        pytest.skip(f"this build or processor has no {request.param} kernels")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 15, 16, 17, 64, 100, 513, 1040])
def test_against_float64(kernels, dtype, width) -> None:
    for seed, (leading, slots) in enumerate([((37,), 1), ((2, 21), 3)]):
        feeds = draw(seed, leading, width, slots, dtype)
        y = red_cpu(installed_library(), feeds, kernels=kernels)
        check(y, feeds, dtype)
        assert red_cpu(installed_library(), feeds, kernels=kernels, in_place=True).tobytes() == y.tobytes()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.one_of(st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 4), st.integers(0, 20))),
    width=st.integers(1, 80),
    slots=st.integers(1, 40),
    in_place=st.booleans(),
)
def test_any_shape(seed, dtype, leading, width, slots, in_place) -> None:
    feeds = draw(seed, leading, width, slots, dtype)
    for kernels in cpu_kernels(installed_library()):
        check(red_cpu(installed_library(), feeds, kernels=kernels, in_place=in_place), feeds, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passing_tokens_keep_every_bit(kernels, dtype) -> None:
    """Slots just outside the bank, and as far as int32 goes; NaNs with payloads, infinities, minus zero, subnormals."""
    slots = 2
    feeds = draw(0, (7,), 20, slots, dtype)
    feeds["slot"][:] = [-1, slots, slots + 1, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 0, -2]
    words = feeds["h"].view(np.uint32 if dtype == "float32" else np.uint16)
    patterns = [0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x80000001]
    halves = [0x7C01, 0xFE12, 0x7F81, 0xFFC1, 0x7C00, 0x8000, 0x0001]
    words[:5, :7] = patterns if dtype == "float32" else halves
    for in_place in (False, True):
        y = red_cpu(installed_library(), feeds, kernels=kernels, in_place=in_place)
        passing = [0, 1, 2, 3, 4, 6]
        assert y[passing].tobytes() == feeds["h"][passing].tobytes()
        assert y[5].tobytes() != feeds["h"][5].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_value_survives_the_identity(kernels, dtype) -> None:
    """All 65,536 values times one plus zero, widened and rounded back; a NaN stays one."""
    h = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).reshape(256, 256)
    feeds = {"h": h, "slot": np.zeros(256, np.int32), "scale": np.ones((1, 256), h.dtype), "bias": np.zeros((1, 256), h.dtype)}
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        y = red_cpu(installed_library(), feeds, kernels=kernels).astype(np.float32)
        assert np.array_equal(y, h.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_happens_once(kernels, dtype) -> None:
    """The float32 result rounded as numpy and ml_dtypes round it. A product rounded to the half type before the bias joins would differ."""
    random = np.random.default_rng(0)
    narrow = DTYPES[dtype]
    # A product of two half-precision values is exact in float32; the sum may round there, by less than any half of a step here.
    h, scale, bias = (random.standard_normal((1, 4096)).astype(narrow) for _ in range(3))
    exact = scale.astype(np.float32) * h.astype(np.float32) + bias.astype(np.float32)
    feeds = {"h": h, "slot": np.zeros(1, np.int32), "scale": scale, "bias": bias}
    y = red_cpu(installed_library(), feeds, kernels=kernels)
    assert y.tobytes() == exact.astype(narrow).tobytes()
    twice = (scale.astype(np.float32) * h.astype(np.float32)).astype(narrow).astype(np.float32) + bias.astype(np.float32)
    assert y.tobytes() != twice.astype(narrow).tobytes()


@pytest.mark.parametrize("fault", ["one percent of scale", "the bank of the slot before", "no bias"])
def test_a_planted_fault_is_seen(fault) -> None:
    for dtype in DTYPES:
        feeds = draw(0, (40,), 64, 2, dtype)
        wrong = dict(feeds)
        if fault == "one percent of scale":
            wrong["scale"] = (feeds["scale"].astype(np.float32) * 1.01).astype(DTYPES[dtype])
        elif fault == "no bias":
            wrong["bias"] = np.zeros_like(feeds["bias"])
        else:
            wrong["scale"] = feeds["scale"][::-1]
        with pytest.raises(AssertionError):
            check(red_cpu(installed_library(), wrong), feeds, dtype)


def test_refused() -> None:
    library = load(installed_library())
    feeds = draw(0, (3,), 8, 1, "float32")
    with pytest.raises(ValueError, match="RED: kernels 'sse9' do not run here, expected one of"):
        red_cpu(installed_library(), feeds, kernels="sse9")
    assert b"RED: dtype is 11, expected 1 (float32)" in library.reft_red_cpu(11, *[None] * 5, 0, 1, 8, None)
    for sizes in ((-1, 1, 8), (1, 0, 8), (1, 1, -8)):
        refused = library.reft_red_cpu(1, *[None] * 5, *sizes, None)
        assert b"RED: tokens %d, slots %d and width %d, expected at least 0, 1 and 0" % sizes == refused

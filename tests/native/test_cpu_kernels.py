"""The CPU kernels through the C interface: every instruction set that this processor runs, against float64."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_op import DTYPES, check, cpu_kernels, draw, edit_cpu, installed_library, load

from runtimes.edits.edit import ACTIVATED, ACTIVATIONS

ARM = platform.machine().lower() in ("aarch64", "arm64")
ALL_KERNELS = ("neon", "portable") if ARM else ("avx512", "avx2", "portable")


@pytest.fixture(params=ALL_KERNELS)
def kernels(request) -> str:
    if request.param not in cpu_kernels(installed_library()):
        pytest.skip(f"this build or processor has no {request.param} kernels")
    return request.param


def test_a_kernel_is_active() -> None:
    names = cpu_kernels(installed_library())
    assert names[-1] == "portable" and set(names) <= set(ALL_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 64, 100, 513, 1040])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7, 8, 11])
def test_against_float64(kernels, dtype, width, rank) -> None:
    for seed, (leading, slots) in enumerate([((37,), 1), ((2, 21), 3)]):
        feeds = draw(seed, leading, width, rank, slots, dtype)
        y = edit_cpu(installed_library(), feeds, kernels=kernels)
        check(y, feeds, dtype)
        in_place = edit_cpu(installed_library(), feeds, kernels=kernels, in_place=True)
        assert in_place.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [64, 255, 256, 1024])
def test_high_ranks(kernels, dtype, rank) -> None:
    feeds = draw(0, (19,), 130, rank, 2, dtype)
    check(edit_cpu(installed_library(), feeds, kernels=kernels), feeds, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activated", ACTIVATED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kernels, dtype, activation, activated) -> None:
    for rank in (1, 2, 4, 7):
        feeds = draw(rank, (23,), 48, rank, 2, dtype)
        check(edit_cpu(installed_library(), feeds, activation, activated, kernels=kernels), feeds, dtype, activation, activated)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(list(DTYPES)),
    leading=st.one_of(st.tuples(st.integers(0, 70)), st.tuples(st.integers(0, 4), st.integers(0, 20))),
    width=st.integers(1, 80),
    rank=st.integers(1, 20),
    slots=st.integers(1, 40),
    activation=st.sampled_from(ACTIVATIONS),
    activated=st.sampled_from(ACTIVATED),
    in_place=st.booleans(),
)
def test_any_shape(seed, dtype, leading, width, rank, slots, activation, activated, in_place) -> None:
    feeds = draw(seed, leading, width, rank, slots, dtype)
    for kernels in cpu_kernels(installed_library()):
        y = edit_cpu(installed_library(), feeds, activation, activated, kernels=kernels, in_place=in_place)
        check(y, feeds, dtype, activation, activated)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passing_tokens_keep_every_bit(kernels, dtype) -> None:
    feeds = draw(0, (6,), 20, 4, 2, dtype)
    feeds["slot"][:] = [-1, 2, np.iinfo(np.int32).min, np.iinfo(np.int32).max, 0, -1]
    words = feeds["h"].view(np.uint32 if dtype == "float32" else np.uint16)
    # Signalling and quiet NaNs with payloads, infinities, minus zero, subnormals.
    patterns = [0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x80000001]
    halves = [0x7C01, 0xFE12, 0x7F81, 0xFFC1, 0x7C00, 0x8000, 0x0001]
    words[:4, :7] = patterns if dtype == "float32" else halves
    for in_place in (False, True):
        y = edit_cpu(installed_library(), feeds, kernels=kernels, in_place=in_place)
        passing = [0, 1, 2, 3, 5]
        assert y[passing].tobytes() == feeds["h"][passing].tobytes()
        assert y[4].tobytes() != feeds["h"][4].tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_value_survives_a_zero_edit(kernels, dtype) -> None:
    """All 65,536 values, widened and rounded back; a NaN stays one."""
    values = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).reshape(256, 256)
    zeros = {"U": np.zeros((1, 1, 256), values.dtype), "A": np.zeros((1, 1, 256), values.dtype), "b": np.zeros((1, 1), values.dtype)}
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        nan = np.isnan(values)
        finite = np.where(np.isfinite(values), values, np.zeros_like(values))
    y = edit_cpu(installed_library(), {"h": finite, "slot": np.zeros(256, np.int32), **zeros}, kernels=kernels)
    assert np.array_equal(y.astype(np.float32), finite.astype(np.float32))
    y = edit_cpu(installed_library(), {"h": values, "slot": np.zeros(256, np.int32), **zeros}, kernels=kernels)
    assert np.isnan(y[nan]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(kernels, dtype) -> None:
    """y = b U + h in float32, rounded as numpy and ml_dtypes round it: halfway cases, subnormals, overflow to infinity."""
    random = np.random.default_rng(0)
    narrow = DTYPES[dtype]
    bits = random.integers(0, 65536, 4096).astype(np.uint16).view(narrow)
    steps = random.integers(0, 65536, 4096).astype(np.uint16).view(narrow)
    with np.errstate(over="ignore", invalid="ignore"):
        h = np.where(np.isfinite(bits), bits, np.ones_like(bits)).reshape(1, -1)
        U = np.where(np.isfinite(steps), steps, np.ones_like(steps)).reshape(1, 1, -1)
        expected = (h.astype(np.float32) + U[0].astype(np.float32)).astype(narrow)
    feeds = {"h": h, "slot": np.zeros(1, np.int32), "U": U, "A": np.zeros_like(U), "b": np.ones((1, 1), narrow)}
    assert np.array_equal(edit_cpu(installed_library(), feeds, kernels=kernels).astype(np.float32), expected.astype(np.float32))


def test_a_planted_error_of_one_percent_is_seen() -> None:
    for dtype in DTYPES:
        feeds = draw(0, (40,), 64, 4, 1, dtype)
        wrong = {**feeds, "U": (feeds["U"].astype(np.float32) * 1.01).astype(DTYPES[dtype])}
        with pytest.raises(AssertionError):
            check(edit_cpu(installed_library(), wrong), feeds, dtype)


def test_refused() -> None:
    feeds = draw(0, (3,), 8, 2, 1, "float32")
    with pytest.raises(ValueError, match="LoReFT: activation is 'softmax', expected one of \"\", relu"):
        edit_cpu(installed_library(), feeds, "softmax")
    with pytest.raises(ValueError, match="LoReFT: activated is 'last', expected all or first_half"):
        edit_cpu(installed_library(), feeds, "relu", "last")
    with pytest.raises(ValueError, match="kernels 'sse9' do not run here, expected one of"):
        edit_cpu(installed_library(), feeds, kernels="sse9")
    too_high = draw(0, (3,), 8, 1025, 1, "float32")
    with pytest.raises(ValueError, match="rank 1025"):
        edit_cpu(installed_library(), too_high)
    error = load(installed_library()).reft_edit_cpu(11, *[None] * 6, 0, 1, 1, 8, b"", b"all", None)
    assert b"dtype is 11, expected 1 (float32)" in error

"""A KV cache that is written in place against one that is copied, and against the numpy decoder: layouts, growth, stale pasts, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, CONTEXT, ROUNDING, VOCABULARY, ToyDecoder, write_toy_bundle

from runtimes import kv_cache
from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError
from runtimes.golden import check_golden
from runtimes.in_place import calls
from runtimes.ort.session import OrtSession
from runtimes.session import StepOutput

DECODER = ToyDecoder.random()
ROWS = [[5, 17, 40, 9, 77, 120, 3, 61], [8, 2, 50], [33, 70, 20, 11, 95]]
NAMES = [None, *ADAPTERS]


@pytest.fixture(scope="module", params=[True, False], ids=["position_ids", "counted"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", in_place=True, position_ids=request.param)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


def copying(bundle: Bundle, **options: object) -> OrtSession:
    """The same graph, its cache copied at every step."""
    return OrtSession(replace(bundle, manifest=replace(bundle.manifest, kv_cache="appended")), threads=1, **options)


def ones(tokens: int) -> np.ndarray:
    return np.ones((1, tokens), np.int64)


def alone(session: OrtSession, tokens: list[int], widths: list[int], prompt: int, **options: int) -> np.ndarray:
    """Logits [S, V] of a row that comes in calls of ``widths``."""
    logits, past, start = [], None, 0
    for width in widths:
        stop = start + width
        out = session.step(np.array([tokens[start:stop]]), ones(stop), past=past, prompt_length=np.array([prompt]), **options)
        logits.append(out.logits[0])
        past, start = out.past, stop
    return np.concatenate(logits)


@pytest.mark.parametrize("kernel", ["fused", "function"])
@pytest.mark.parametrize("name", NAMES)
def test_in_place_equals_copying_to_the_bit(bundle: Bundle, name: str | None, kernel: str) -> None:
    here, there = OrtSession(bundle, threads=1, adapter=name, kernel=kernel), copying(bundle, adapter=name, kernel=kernel)
    for widths in ([8], [3, 3, 2], [5, 1, 1, 1], [1] * 8):
        np.testing.assert_array_equal(alone(here, ROWS[0], widths, 5), alone(there, ROWS[0], widths, 5))
        rounding.check(alone(here, ROWS[0], widths, 5), DECODER.logits(ROWS[0], ADAPTERS.get(name), 5), ROUNDING)


def test_half_precision(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "half", precision="fp16", in_place=True)
    here, there = OrtSession(bundle, threads=1, adapter="ends"), copying(bundle, adapter="ends")
    np.testing.assert_array_equal(alone(here, ROWS[0], [5, 1, 2], 5), alone(there, ROWS[0], [5, 1, 2], 5))


@pytest.mark.parametrize("logits", ["all", "last"])
def test_every_rung_of_the_ladder(tmp_path: Path, logits: str) -> None:
    bundle = write_toy_bundle(tmp_path / "b", in_place=True, logits=logits)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert report.passed
    whole = "token by token" if logits == "last" else "full forward"
    assert [r.name.partition(": ")[2] for r in report.rungs[:4]] == [whole, "prefill and decode", "chunked prefill", "single rows"]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_layout_of_pads_and_calls_gives_each_row_what_it_has_alone(session: OrtSession, data: st.DataObject) -> None:
    """Rows of unequal length, pads anywhere, calls of any width: those of one column are run together, those of several row by row."""
    name = data.draw(st.sampled_from(NAMES))
    session.set_adapter(name)
    widths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    total = sum(widths)
    mask = np.array([data.draw(st.lists(st.sampled_from([0, 1, 1]), min_size=total, max_size=total)) for _ in range(3)])
    first = widths[0]
    mask[:, 0] = 1  # every call has a token somewhere
    mask[0] = 1
    ids = np.where(mask, np.arange(total) * 7 % 100 + np.arange(3)[:, None] * 31, 0)
    prompt = np.array([max(1, row[:first].sum()) for row in mask])
    past, start = None, 0
    found = np.zeros((3, total, VOCABULARY), np.float32)
    for width in widths:
        stop = start + width
        out = session.step(ids[:, start:stop], mask[:, :stop], past=past, prompt_length=prompt)
        found[:, start:stop], past, start = out.logits, out.past, stop
    for row in range(3):
        real = np.flatnonzero(mask[row])
        expected = DECODER.logits(ids[row, real].tolist(), ADAPTERS.get(name), int(prompt[row]))
        rounding.check(found[row, real], expected, ROUNDING)
        assert not found[row, mask[row] == 0].any()


def test_last_logits_are_those_of_each_rows_last_real_tokens(session: OrtSession) -> None:
    session.set_adapter(None)
    ids, mask = right_padded(ROWS)
    out = session.step(ids, mask, last_logits=2)
    assert out.logits.shape == (3, 2, VOCABULARY)
    for row, tokens in enumerate(ROWS):
        rounding.check(out.logits[row], DECODER.logits(tokens)[-2:], ROUNDING)


def right_padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    return ids, np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def test_the_mask_of_a_step_holds_past_tokens_first_and_new_ones_last() -> None:
    (call,) = calls(np.array([[4], [0], [6]]), np.array([[1], [0], [1]]), np.array([2, 5, 3]), limit=64, most=512)
    assert call.mask.tolist() == [[1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1]]
    assert (call.columns.tolist(), call.starts.tolist()) == ([[0], [-1], [0]], [2, 5, 3])
    (first,) = calls(np.ones((2, 4), int), np.array([[1, 1, 0, 0], [1, 1, 1, 0]]), np.zeros(2, int), limit=64, most=512)
    assert first.mask.tolist() == [[1, 1, 0], [1, 1, 1]] and first.ids.shape == (2, 3)
    rows = list(calls(np.ones((2, 4), int), np.array([[1, 1, 0, 0], [1, 1, 1, 0]]), np.array([3, 1]), limit=64, most=512))
    assert [c.mask.shape for c in rows] == [(1, 5), (1, 4)] and [c.rows.start for c in rows] == [0, 1]


def test_a_cache_grows_and_keeps_what_it_holds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.ort.session.LEAST_CAPACITY", 4)
    session = OrtSession(bundle, threads=1)
    tokens = [7 * i % 100 for i in range(40)]
    rounding.check(alone(session, tokens, [3, *[1] * 37], 3), DECODER.logits(tokens, None, 3), ROUNDING)
    past = session.step(np.array([tokens[:5]]), ones(5)).past
    capacities = []
    for stop in range(6, 41):
        past = session.step(np.array([[tokens[stop - 1]]]), ones(stop), past=past).past
        capacities.append(past.cache.capacity)
    assert sorted(set(capacities)) == [10, 20, 40]


def test_who_says_how_much_it_needs_gets_that(bundle: Bundle) -> None:
    out = OrtSession(bundle, threads=1).step(np.array([[1, 2]]), ones(2), capacity=17)
    assert out.past.cache.capacity == 17


def test_adapters_are_swapped_between_steps_and_caches(session: OrtSession) -> None:
    pasts = {}
    for name in NAMES:
        session.set_adapter(name)
        pasts[name] = session.step(np.array([ROWS[0][:5]]), ones(5)).past
    for name in reversed(NAMES):
        session.set_adapter(name)
        logits = session.step(np.array([ROWS[0][5:6]]), ones(6), past=pasts[name]).logits[0]
        rounding.check(logits, DECODER.logits(ROWS[0][:6], ADAPTERS.get(name), 5)[-1:], ROUNDING)


def test_a_past_is_good_until_its_columns_are_overwritten(session: OrtSession) -> None:
    session.set_adapter(None)

    def after(past: object, tokens: list[int], token: int) -> StepOutput:
        out = session.step(np.array([[token]]), ones(len(tokens) + 1), past=past)
        rounding.check(out.logits[0], DECODER.logits([*tokens, token])[-1:], ROUNDING)
        return out

    prompt = ROWS[1]
    start = session.step(np.array([prompt]), ones(3)).past
    one = after(start, prompt, 7).past
    two = after(start, prompt, 8).past  # another answer to the same prompt, over the first one's column
    with pytest.raises(InputError, match="overwritten: another step went on from an earlier point of it; feed the tokens again") as caught:
        after(one, [*prompt, 7], 9)
    assert "\n" not in str(caught.value)
    three = after(two, [*prompt, 8], 9).past  # a refusal costs nothing
    after(three, [*prompt, 8, 9], 10)
    after(two, [*prompt, 8], 11)
    with pytest.raises(InputError, match="overwritten"):
        after(three, [*prompt, 8, 9], 12)
    after(start, prompt, 13)


def test_a_row_that_pauses_overwrites_nothing_of_its_own(session: OrtSession) -> None:
    """Its column is fed a token that nobody asked for: an older past of that row which held another token there is refused."""
    session.set_adapter(None)
    ids, mask = right_padded(ROWS[:2])
    start = session.step(ids, mask).past
    longer = session.step(np.array([[1], [2]]), np.hstack([mask, [[1], [1]]]), past=start).past
    paused = session.step(np.array([[1], [0]]), np.hstack([mask, [[1], [0]]]), past=start)
    with pytest.raises(InputError, match="overwritten"):
        session.step(np.array([[3], [4]]), np.hstack([mask, [[1, 1], [1, 1]]]), past=longer)
    again = session.step(np.array([[3], [4]]), np.hstack([mask, [[1, 1], [0, 1]]]), past=paused.past)
    rounding.check(again.logits[1], DECODER.logits([*ROWS[1], 4])[-1:], ROUNDING)


def test_what_a_cache_in_place_refuses(bundle: Bundle, session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.set_adapter(None)
    past = session.step(np.array([[1, 2]]), ones(2)).past
    other = OrtSession(bundle, threads=1)
    copied = copying(bundle)
    refusals = {
        "of another session": lambda: other.step(np.array([[1]]), ones(3), past=past),
        "of another kind of session": lambda: copied.step(np.array([[1]]), ones(3), past=past),
        "of another kind": lambda: session.step(np.array([[1]]), ones(3), past=copied.step(np.array([[1, 2]]), ones(2)).past),
        "has 1 rows, the new tokens 2": lambda: session.step(np.array([[1], [2]]), np.ones((2, 3)), past=past),
        "mask of columns that are in the KV cache has changed": lambda: session.step(np.array([[1]]), np.array([[0, 1, 1]]), past=past),
        f"beyond the model's context .{CONTEXT}.": lambda: session.step(np.array([[1]]), ones(1), capacity=CONTEXT + 1),
        f"{CONTEXT + 1} tokens do not fit": lambda: session.step(np.ones((1, CONTEXT + 1), int), ones(CONTEXT + 1)),
        "at least one token": lambda: session.step(np.array([[1]]), np.array([[0]])),
    }
    for message, refused in refusals.items():
        with pytest.raises(InputError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 8000)
    expected = r"a KV cache of 1 x 64 tokens takes 0 MB \(0.3 kB a token\), and 0 MB of memory are left; run fewer rows"
    with pytest.raises(InputError, match=expected):
        session.step(np.array([[1]]), ones(1))
    rounding.check(session.step(np.array([[3]]), ones(3), past=past).logits[0], DECODER.logits([1, 2, 3])[-1:], ROUNDING)


def test_a_row_that_ended_in_a_full_context_does_not_stop_the_others(session: OrtSession) -> None:
    session.set_adapter(None)
    full = [5 * i % 100 for i in range(CONTEXT)]
    ids, mask = right_padded([full, ROWS[1]])
    past = session.step(ids, mask).past
    out = session.step(np.array([[0], [9]]), np.hstack([mask, [[0], [1]]]), past=past)
    rounding.check(out.logits[1], DECODER.logits([*ROWS[1], 9])[-1:], ROUNDING)


def test_a_step_that_writes_one_column_off_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache continuity has to see it, in the batch and alone."""
    bundle = write_toy_bundle(tmp_path / "b", in_place=True)

    def shifted(ids: np.ndarray, window: np.ndarray, lengths: np.ndarray, **options: int):
        for call in calls(ids, window, lengths, **options):
            off = call.ids.shape[1] == 1 and lengths.any()
            yield replace(call, mask=np.pad(call.mask, [(0, 0), (1, 0)], constant_values=1)) if off else call

    monkeypatch.setattr("runtimes.in_place.calls", shifted)
    reserve = kv_cache.KvCache.reserve
    monkeypatch.setattr(kv_cache.KvCache, "reserve", lambda self, columns: reserve(self, columns + 1))
    failed = {r.name.partition(": ")[2] for r in check_golden(bundle, OrtSession(bundle, threads=1)).rungs if not r.passed}
    assert {"prefill and decode", "single rows"} <= failed

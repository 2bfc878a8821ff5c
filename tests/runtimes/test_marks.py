"""Marks in a prompt, the tokens that they name, and the slots of positions ``marked``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import toy_bundle
from hypothesis import given
from hypothesis import strategies as st
from toy_bundle import ROUNDING, ToyDecoder

from reft_export.training.frozen_prefix import frozen_tokens
from runtimes.artifacts.bundle import Bundle
from runtimes.bank import AdapterBank
from runtimes.batching import Batcher
from runtimes.edits.positions import PositionRule, RuleSets, marks_of, needs_marks, needs_slots, slots
from runtimes.errors import InputError
from runtimes.generation import DecodeBatch, GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.rows import AdapterRows
from runtimes.text.marks import marked_tokens, without_marks
from runtimes.text.tokenizer import Tokenizer

BY_NUMBER = toy_bundle.toy_adapter("1,3", seed=5)
MARKED = PositionRule.parse("marked")
pieces = st.lists(st.tuples(st.text(st.characters(exclude_characters="[]"), min_size=1, max_size=5), st.booleans()), min_size=1, max_size=6)


@given(pieces)
def test_what_is_marked_is_what_stood_between_the_marks(each: list[tuple[str, bool]]) -> None:
    text = "".join(f"[[{piece}]]" if marked else piece for piece, marked in each)
    if not any(marked for _, marked in each):
        with pytest.raises(InputError, match="the prompt marks none"):
            without_marks(text)
        return
    plain, spans = without_marks(text)
    assert plain == "".join(piece for piece, _ in each)
    assert [plain[start:end] for start, end in spans] == [piece for piece, marked in each if marked]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("about [[the [[moon]]]]", "marks stand within marks"),
        ("about the moon]]", "closes no mark, in 'about the moon]]': put what is to be edited between"),
        ("about [[the moon", "is not closed, in 'about \\[\\[the moon'"),
        ("about [[]] the moon", "nothing stands between"),
        ("a[0][1] of b", "the prompt marks none: put what is to be edited between \\[\\[ and \\]\\]"),
    ],
)
def test_refused_marks(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        without_marks(text)
    assert "\n" not in str(refused.value)


def test_a_token_is_marked_that_holds_a_character_of_the_mark() -> None:
    """A special token holds none; two byte tokens of one character are marked with it."""
    offsets = [(0, 0), (0, 3), (3, 8), (8, 9), (8, 9), (9, 12)]
    assert marked_tokens(offsets, [(4, 5)]) == (2,)
    assert marked_tokens(offsets, [(7, 9)]) == (2, 3, 4)
    assert marked_tokens(offsets, [(0, 1), (11, 12)]) == (1, 5)
    with pytest.raises(InputError, match="characters 12 to 13 of the prompt are marked, and the tokenizer makes no token of them"):
        marked_tokens(offsets, [(12, 14)])


def test_the_rule() -> None:
    assert str(MARKED) == "marked" and MARKED.explicit and needs_slots(MARKED) and needs_marks(MARKED)
    assert needs_marks(RuleSets((PositionRule(first=1), MARKED), True)) and not needs_marks(PositionRule(first=1))
    assert frozen_tokens(MARKED, 9, 5) == 0
    with pytest.raises(InputError, match="positions are one of"):
        PositionRule(marked=True, every=2)


@given(st.lists(st.sets(st.integers(0, 5), max_size=6), min_size=2, max_size=3), st.integers(0, 3), st.integers(1, 9))
def test_slots_are_the_marked_tokens(marked: list[set[int]], pads: int, chunk: int) -> None:
    """Of prompts of 6 tokens and answers of 2, padded on the left, in one call or several; decode steps need no marks."""
    mask = np.concatenate([np.zeros((len(marked), pads), np.int64), np.ones((len(marked), 8), np.int64)], 1)
    mask[0] = 1  # a longer prompt, whose first tokens stand where the others have pads
    lengths, marks = np.array([6 + pads, *[6] * (len(marked) - 1)]), marks_of([sorted(each) for each in marked])
    found = []
    for start in range(0, 8 + pads, chunk):
        end = min(start + chunk, 8 + pads)
        answer = start >= 6 + pads
        found.append(slots(MARKED, mask[:, :end], end - start, prompt_length=lengths, marks=None if answer else marks))
    slot = np.concatenate(found, 1)
    for row, (each, shift) in enumerate(zip(marked, [0, *[pads] * (len(marked) - 1)], strict=True)):
        if shift == 0 or chunk > pads:  # a call of pads alone is of no row that has tokens
            assert set(np.flatnonzero(slot[row] == 0) - shift) == each


def test_a_prompt_without_marks_is_refused() -> None:
    with pytest.raises(InputError, match="positions marked: the adapter edits the tokens that a prompt marks, and prompts have no"):
        slots(MARKED, np.ones((1, 4), np.int64), 4, prompt_length=np.array([3]))


@pytest.fixture
def marked_bundle(tmp_path, monkeypatch) -> Callable[..., Bundle]:
    """Of the adapter "x" at positions ``marked``; its golden arrays, which nothing reads here, are those of BY_NUMBER."""
    recorded = toy_bundle.golden_arrays
    monkeypatch.setattr(toy_bundle, "golden_arrays", lambda decoder, name, _, **rest: recorded(decoder, name, {"x": BY_NUMBER}, **rest))
    return partial(toy_bundle.write_toy_bundle, tmp_path / "b", adapters={"x": toy_bundle.toy_adapter("marked", seed=5)})


@pytest.mark.parametrize("in_place", [False, True])
def test_a_session_edits_what_is_marked(marked_bundle, in_place: bool) -> None:
    """The tokens that positions by number edit: in a padded batch, in chunks, and by row of a batch."""
    decoder, bundle = ToyDecoder.random(), marked_bundle(in_place=in_place)
    prompts, marks = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1]], [(1, 3), (1, 3)]
    wanted = [decoder.logits(prompt, BY_NUMBER, len(prompt))[-1] for prompt in prompts]
    with OrtSession(bundle, threads=1, adapter="x") as session:
        for chunk in (None, 2):
            said = DecodeBatch(session, prompts, marks=marks).prefill(chunk)
            np.testing.assert_allclose(said, np.stack(wanted), rtol=0, atol=ROUNDING)
        other = DecodeBatch(session, prompts, marks=[(1, 3), (0,)]).prefill()
        np.testing.assert_allclose(other[0], wanted[0], rtol=0, atol=ROUNDING)
        assert np.abs(other[1] - wanted[1]).max() > 100 * ROUNDING, "other tokens are edited"
        with pytest.raises(InputError, match="prompts have no marks here"):
            DecodeBatch(session, prompts).prefill()
    with OrtSession(bundle, threads=1) as session, AdapterRows(AdapterBank(bundle), ["x", None]) as rows:
        session.set_rows(rows)
        said = DecodeBatch(session, prompts, marks=marks).prefill()
        np.testing.assert_allclose(said[0], wanted[0], rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(said[1], decoder.logits(prompts[1], None, len(prompts[1]))[-1], rtol=0, atol=ROUNDING)


def test_tokens_ahead_leave_what_is_marked(marked_bundle, monkeypatch) -> None:
    """A row that is fed ahead, of right tokens and wrong ones, in chunks or not, is edited where its prompt marks and nowhere else."""
    decoder, bundle, prompt, count = ToyDecoder.random(), marked_bundle(in_place=True), [3, 1, 4, 1, 5], 12
    wanted = decoder.greedy(prompt, count, BY_NUMBER)
    assert wanted != decoder.greedy(prompt, count)

    def half_right(tokens: list[int], most: int) -> list[int]:
        at = len(tokens) - len(prompt)
        return [(token + (i == 2)) % toy_bundle.VOCABULARY for i, token in enumerate(wanted[at : at + most])]

    monkeypatch.setattr("runtimes.generation.proposed", half_right)
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    with OrtSession(bundle, threads=1, adapter="x") as session:
        for chunk in (None, 2):
            (said,) = generate(
                session, tokenizer, [prompt], GenerationSettings(max_new_tokens=count), marks=[(1, 3)], prefill_chunk=chunk, speculate=4
            )
            assert list(said.tokens) == wanted[: len(said.tokens)] and 0 < said.accepted < said.proposed


def test_a_batch_of_requests_refuses_the_adapter(marked_bundle) -> None:
    bundle = marked_bundle(in_place=True)
    with (
        OrtSession(bundle, threads=1) as session,
        Batcher(session, Tokenizer.load(bundle.folder, bundle.manifest.model), AdapterBank(bundle)) as batcher,
    ):
        with pytest.raises(InputError, match="adapter x: positions marked: the adapter edits the tokens that a prompt marks"):
            batcher.submit([1, 2, 3], GenerationSettings(max_new_tokens=2), adapter="x")
        assert batcher.submit([1, 2, 3], GenerationSettings(max_new_tokens=2)).result().tokens

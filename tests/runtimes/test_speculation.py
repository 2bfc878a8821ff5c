"""Tokens that are fed ahead: whatever is guessed, the answer is that of a row fed token by token, by every rule of positions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, EXPLICIT, PROMPTS, VOCABULARY, ToyDecoder, toy_adapter, write_toy_bundle

import runtimes.generation
from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError
from runtimes.generation import Generation, GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.speculation import LONGEST, SHORTEST, check_speculation, proposed
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
STEERED = (
    ADAPTERS | EXPLICIT | {"first": toy_adapter("f3", seed=6), "last": toy_adapter("l1", seed=7), "every": toy_adapter("every2", seed=8)}
)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
COUNT = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("speculation") / "bundle", in_place=True, adapters=STEERED)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch):
    """What is fed ahead in place of what was looked up: ``answer`` as far as ``good`` says, and another token there."""
    state = {}

    def guess(tokens: list[int], most: int) -> list[int]:
        at = len(tokens) - len(PROMPT)
        good = next(state["good"], COUNT)
        ahead = [*state["answer"][at:], *[0] * COUNT][:most]
        return [(token + (i == good)) % VOCABULARY for i, token in enumerate(ahead)]

    monkeypatch.setattr(runtimes.generation, "proposed", guess)
    return state


drawn = st.lists(st.integers(0, 4), max_size=COUNT)


@pytest.mark.parametrize("name", [None, *STEERED])
def test_the_answer_is_that_of_the_decoder_without_a_cache(name, session: OrtSession, tokenizer: Tokenizer, guesses) -> None:
    """Greedy, against numpy in float64: no step of several tokens counts as prompt, nor is any token of it missed by `all`."""
    session.set_adapter(name)
    want = DECODER.greedy(PROMPT, COUNT, STEERED.get(name))
    plain = generate(session, tokenizer, [PROMPT], GenerationSettings(max_new_tokens=COUNT))[0]
    assert list(plain.tokens) == want[: len(plain.tokens)] and (plain.proposed, plain.accepted) == (0, 0)

    @settings(max_examples=12, deadline=None)
    @given(drawn, st.integers(1, 5))
    def holds(good: list[int], most: int) -> None:
        guesses.update(good=iter(good), answer=want)
        ahead = generate(session, tokenizer, [PROMPT], GenerationSettings(max_new_tokens=COUNT), speculate=most)[0]
        assert said(ahead) == said(plain)
        assert ahead.accepted <= ahead.proposed

    holds()
    guesses.update(good=iter(()), answer=want)
    best = generate(session, tokenizer, [PROMPT], GenerationSettings(max_new_tokens=COUNT), speculate=3)[0]
    assert best.accepted >= (len(plain.tokens) - 1) // 4 * 3


def said(answer: Generation) -> tuple[str, tuple[int, ...], str]:
    return answer.text, answer.tokens, answer.finish_reason


@pytest.mark.parametrize(
    "chosen",
    [
        GenerationSettings(max_new_tokens=COUNT, temperature=1.2, seed=3, top_p=0.9),
        GenerationSettings(max_new_tokens=COUNT, repetition_penalty=1.7),
        GenerationSettings(max_new_tokens=1),
        GenerationSettings(max_new_tokens=2),
    ],
    ids=["sampled", "penalized", "one", "two"],
)
@settings(max_examples=15, deadline=None)
@given(good=drawn, most=st.integers(1, 5))
def test_a_sample_is_the_same_one(chosen, good, most, session: OrtSession, tokenizer: Tokenizer) -> None:
    session.set_adapter("ends")
    plain = generate(session, tokenizer, [PROMPT], chosen)[0]
    state = iter(good)

    def guess(tokens: list[int], most: int) -> list[int]:
        wrong = next(state, COUNT)
        ahead = plain.tokens[len(tokens) - len(PROMPT) :][:most]
        return [(token + (i == wrong)) % VOCABULARY for i, token in enumerate(ahead)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes.generation, "proposed", guess)
        assert said(generate(session, tokenizer, [PROMPT], chosen, speculate=most)[0]) == said(plain)


def test_a_stop_token_ends_the_row_within_a_step(session: OrtSession, tokenizer: Tokenizer, guesses) -> None:
    session.set_adapter("all")
    want = DECODER.greedy(PROMPT, COUNT, STEERED["all"])
    chosen = GenerationSettings(max_new_tokens=COUNT, stop_token_ids=(want[4],))
    guesses.update(good=iter(()), answer=want)
    ahead = generate(session, tokenizer, [PROMPT], chosen, speculate=5)[0]
    assert said(ahead) == said(generate(session, tokenizer, [PROMPT], chosen)[0]) and ahead.finish_reason == "stop"


def test_rows_of_a_batch_are_fed_token_by_token(session: OrtSession, tokenizer: Tokenizer) -> None:
    session.set_adapter("prompt")
    chosen = GenerationSettings(max_new_tokens=6)
    assert generate(session, tokenizer, PROMPTS, chosen, speculate=4) == generate(session, tokenizer, PROMPTS, chosen)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 6))
def test_what_is_proposed_followed_the_same_words(tokens: list[int], most: int) -> None:
    found = proposed(tokens, most)
    sizes = [n for n in range(SHORTEST, LONGEST + 1) if n < len(tokens)]
    places = {n: [i + n for i in range(len(tokens) - n) if tokens[i : i + n] == tokens[-n:]] for n in sizes}
    longest = max((n for n, each in places.items() if each), default=None)
    if longest is None:
        assert not found
        return
    assert len(found) == min(most, len(tokens) - min(places[longest]))
    assert found in [tokens[place : place + most] for place in places[longest]]
    whole = [place for place in places[longest] if place + most <= len(tokens)]
    assert not whole or found == tokens[whole[-1] : whole[-1] + most]


def test_what_cannot_be_taken_back_is_refused(bundle: Bundle, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copied = write_toy_bundle(tmp_path / "copied")
    last = write_toy_bundle(tmp_path / "last", in_place=True, logits="last")
    for artifact, why in ((copied, "does not write its KV cache in place"), (last, "logits of the last token alone")):
        check_speculation(artifact, 0)
        with pytest.raises(InputError, match=why), OrtSession(artifact, threads=1) as other:
            generate(other, tokenizer, [PROMPT], GenerationSettings(max_new_tokens=4), speculate=2)
    with pytest.raises(InputError, match="speculate is -1"):
        check_speculation(bundle, -1)

"""Tokens that are fed ahead to a row while it runs alone: whoever joins and leaves meanwhile, every answer is that of the row by itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, EXPLICIT, VOCABULARY, toy_adapter, write_toy_bundle

import runtimes.batching
from runtimes.artifacts.bundle import Bundle
from runtimes.bank import AdapterBank
from runtimes.batch_rows import Ticket
from runtimes.batching import Batcher
from runtimes.errors import InputError
from runtimes.generation import Generation, GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

STEERED = ADAPTERS | EXPLICIT | {"last": toy_adapter("l1", seed=7), "every": toy_adapter("every2", seed=8)}
NAMES = [None, *STEERED]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("ahead") / "bundle", in_place=True, adapters=STEERED)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


@pytest.fixture(scope="module")
def alone(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


class Guesses:
    """What is fed ahead in place of what was looked up: what the row will say, and another token where ``wrong`` says so."""

    def __init__(self, wrong: Iterator[int]) -> None:
        self.wrong = wrong
        self.known: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Whole answers by their prompts."""

    def __call__(self, tokens: list[int], most: int) -> list[int]:
        prompt = next(prompt for prompt in self.known if tuple(tokens[: len(prompt)]) == prompt)
        at = next(self.wrong, VOCABULARY)
        ahead = self.known[prompt][len(tokens) - len(prompt) :][:most]
        return [(token + (i == at)) % VOCABULARY for i, token in enumerate(ahead)]


def said(answer: Generation) -> tuple[str, tuple[int, ...], str]:
    return answer.text, answer.tokens, answer.finish_reason


requests = st.tuples(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12),
    st.sampled_from(NAMES),
    st.builds(
        GenerationSettings,
        max_new_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 9),
    ),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_request_is_answered_as_alone(session: OrtSession, alone: OrtSession, bundle: Bundle, tokenizer: Tokenizer, data) -> None:
    guesses = Guesses(iter(data.draw(st.lists(st.integers(0, 4), max_size=30))))
    most, chunk = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0, 3]))
    asked: list[tuple[Ticket, Generation]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes.batching, "proposed", guesses)
        rows = data.draw(st.integers(1, 3))
        bank = AdapterBank(bundle)
        batcher = Batcher(session, tokenizer, bank, most_rows=rows, prefill_chunk=chunk, queue=100, speculate=most)
        for number in range(data.draw(st.integers(1, 6))):
            ids, name, chosen = data.draw(requests)
            prompt = [0] * number + ids  # no two alike, and none that begins with another
            alone.set_adapter(name)
            want = generate(alone, tokenizer, [prompt], chosen, prefill_chunk=chunk)[0]
            guesses.known[tuple(prompt)] = want.tokens
            asked.append((batcher.submit(prompt, chosen, adapter=name), want))
            if data.draw(st.integers(0, 3)) == 0:
                data.draw(st.sampled_from(asked))[0].cancel()
            for _ in range(data.draw(st.integers(0, 4))):
                batcher.step()
        while batcher.step():
            pass
        batcher.close()
    for ticket, want in asked:
        got = ticket.result(0)
        if got.finish_reason == "cancelled":
            assert ticket.cancelled and got.tokens == want.tokens[: len(got.tokens)]
        else:
            assert said(got) == said(want)
        assert got.accepted <= got.proposed and got.accepted <= max(len(got.tokens) - 1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_good_guesses_save_steps(name: str | None, session: OrtSession, alone: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    """And what is left in the cache is what a row fed token by token leaves: the next prompt goes on from it."""
    prompt, chosen = [3, 1, 4, 1, 5, 9, 2], GenerationSettings(max_new_tokens=13)
    alone.set_adapter(name)
    want = generate(alone, tokenizer, [prompt], chosen)[0]
    guesses = Guesses(iter(()))
    guesses.known[tuple(prompt)] = want.tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes.batching, "proposed", guesses)
        patch.setattr("runtimes.prefixes.LEAST", 2)
        batcher = Batcher(session, tokenizer, AdapterBank(bundle), speculate=3)
        ticket = batcher.submit(prompt, chosen, adapter=name)
        steps = 1
        while batcher.step():
            steps += 1
        got = ticket.result(0)
        assert said(got) == said(want) and got.accepted == got.proposed > 0
        assert steps <= -(-(len(want.tokens) - 1) // 4) + 1
        further = [*prompt, *got.tokens[:6], 3, 3]
        guesses.known = {tuple(further): ()}
        again = batcher.submit(further, chosen, adapter=name)
        while batcher.step():
            pass
        assert said(again.result(0)) == said(generate(alone, tokenizer, [further], chosen)[0])
        batcher.close()


def test_listeners_hear_every_token_once(session: OrtSession, alone: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    prompt, chosen = [1, 2, 1, 2, 1, 2], GenerationSettings(max_new_tokens=20)
    heard: list[tuple[int, int]] = []
    batcher = Batcher(session, tokenizer, AdapterBank(bundle), speculate=4)
    ticket = batcher.submit(prompt, chosen, on_token=lambda token, logits: heard.append((token, int(np.argmax(logits)))))
    while batcher.step():
        pass
    batcher.close()
    alone.set_adapter(None)
    assert said(ticket.result(0)) == said(generate(alone, tokenizer, [prompt], chosen)[0])
    assert tuple(token for token, _ in heard) == ticket.result(0).tokens and all(token == best for token, best in heard)


def test_what_cannot_be_taken_ahead_is_refused(session: OrtSession, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="speculate is -1"):
        Batcher(session, tokenizer, speculate=-1)

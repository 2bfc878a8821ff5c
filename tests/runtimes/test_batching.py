"""Requests that join and leave a running batch: every one is answered as if it were alone, by logits against a decoder in numpy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, CONTEXT, EXPLICIT, ROUNDING, VOCABULARY, ToyDecoder, write_toy_bundle

import runtimes.bank
import runtimes.batching
import runtimes.prefixes
from runtimes.artifacts.bundle import Bundle
from runtimes.bank import AdapterBank
from runtimes.batch_rows import Ticket
from runtimes.batching import Batcher, QueueFull
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import slots
from runtimes.errors import BundleError, InputError, ReftError
from runtimes.generation import GenerationSettings, generate
from runtimes.open import open_batcher
from runtimes.ort.session import OrtSession
from runtimes.prefixes import Prefix
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
STEERED = ADAPTERS | EXPLICIT
KNOWN: dict[str | None, Adapter | None] = {None: None, **STEERED}
PROMPT = [3, 1, 4, 1, 5]
SHORT = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("batching") / "bundle", in_place=True, adapters=STEERED)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


@pytest.fixture(autouse=True)
def small_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 8, 16, 32 and 64 columns, and prefixes from two tokens on."""
    monkeypatch.setattr(runtimes.batching, "LEAST_CLASS", 8)
    monkeypatch.setattr(runtimes.prefixes, "LEAST", 2)


@pytest.fixture
def batcher(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> Iterator[Batcher]:
    made = Batcher(session, tokenizer, AdapterBank(bundle), most_rows=3, prefill_chunk=3, queue=4)
    yield made
    made.close()


@dataclass
class Asked:
    """One request and every logit that its tokens were chosen from."""

    prompt: list[int]
    adapter: str | None
    settings: GenerationSettings
    strength: float = 1.0
    ticket: Ticket | None = None
    seen: list[np.ndarray] = field(default_factory=list)

    def submit(self, batcher: Batcher) -> Asked:
        self.ticket = batcher.submit(
            self.prompt,
            self.settings,
            adapter=self.adapter,
            strength=self.strength,
            on_token=lambda _, logits: self.seen.append(logits.copy()),
        )
        return self

    def check(self) -> None:
        assert self.ticket is not None
        answer = self.ticket.result(0)
        assert answer.prompt_tokens == len(self.prompt)
        assert len(self.seen) == len(answer.tokens)
        if self.seen:
            want = DECODER.logits([*self.prompt, *answer.tokens], KNOWN[self.adapter], len(self.prompt), self.strength)
            want = want[len(self.prompt) - 1 : -1]
            rounding.check(np.stack(self.seen), want, ROUNDING, f"{self.adapter} after {self.prompt}")
        if self.settings.temperature == 0:
            assert list(answer.tokens) == [int(each.argmax()) for each in self.seen]
        if answer.finish_reason == "length":
            assert len(answer.tokens) == self.settings.max_new_tokens


COMMON = [9, 8, 7, 6, 5, 4, 3, 2]
steerings = st.one_of(
    st.sampled_from([(name, 1.0) for name in KNOWN]), st.tuples(st.sampled_from(list(STEERED)), st.sampled_from([0.0, 0.5]))
)
requests = st.builds(
    lambda steering, **rest: Asked(adapter=steering[0], strength=steering[1], **rest),
    steerings,
    prompt=st.one_of(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20),
        # Prompts that begin alike.
        st.builds(lambda n, rest: COMMON[:n] + rest, st.integers(0, 8), st.lists(st.integers(0, 2), min_size=1, max_size=12)),
    ),
    settings=st.builds(
        GenerationSettings, max_new_tokens=st.integers(1, 12), temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 9)
    ),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_request_is_answered_as_alone(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer, data: st.DataObject) -> None:
    """They come at any step, some are cancelled; few rows, a small cache and a bank of two adapters make them wait for each other."""
    bank = AdapterBank(bundle, max_bytes=data.draw(st.sampled_from([None, 1500])))
    batcher = Batcher(
        session, tokenizer, bank,
        most_rows=data.draw(st.integers(1, 5)),
        prefill_chunk=data.draw(st.sampled_from([0, 1, 3, 8])),
        cache_bytes=data.draw(st.sampled_from([None, 100 * ROW_BYTES])),
        prefix_bytes=data.draw(st.sampled_from([0, None, 60 * ROW_BYTES])),
        queue=100,
    )  # fmt: skip
    asked: list[Asked] = []
    for _ in range(data.draw(st.integers(1, 12))):
        asked.append(data.draw(requests).submit(batcher))
        if data.draw(st.booleans()):
            cancelled = data.draw(st.sampled_from(asked)).ticket
            assert cancelled is not None
            cancelled.cancel()
        for _ in range(data.draw(st.integers(0, 3))):
            batcher.step()
    while batcher.step():
        pass
    for each in asked:
        each.check()
        assert each.ticket is not None and (each.ticket.result().finish_reason != "cancelled" or each.ticket.cancelled)
    load = batcher.load
    assert not (load.decoding or load.prefilling or load.waiting)
    batcher.close()
    assert not any(bank.live_rows(name) for name in bank.resident)


ROW_BYTES = 2 * 2 * 16 * 4
"""Of a column: keys and values of two layers."""


def test_the_answers_are_those_of_generate(batcher: Batcher, session: OrtSession, tokenizer: Tokenizer) -> None:
    chosen = GenerationSettings(max_new_tokens=9, temperature=0.8, seed=3)
    tickets = {}
    for name in KNOWN:
        tickets[name] = batcher.submit("The fox", chosen, adapter=name)
        batcher.step()
    while batcher.step():
        pass
    for name, ticket in tickets.items():
        session.set_adapter(name)
        assert ticket.result() == generate(session, tokenizer, ["The fox"], chosen, prefill_chunk=3)[0]
    session.set_adapter(None)


def test_text_comes_in_pieces_from_a_thread_of_its_own(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    pieces: list[str] = []
    ended = threading.Event()
    with Batcher(session, tokenizer, AdapterBank(bundle)) as batcher:
        one = batcher.submit("The fox", SHORT, on_text=pieces.append, on_end=lambda _: ended.set())
        assert one.result(30).text == "".join(pieces)
        assert ended.wait(30)
        two = batcher.submit("Hi", SHORT, adapter="all")
    assert two.done and two.result(0).finish_reason == "length"  # leaving waits for what was asked
    with pytest.raises(InputError, match="closed"):
        batcher.submit("Hi", SHORT)


def test_closing_at_once_cancels(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    batcher = Batcher(session, tokenizer, AdapterBank(bundle), most_rows=1)
    tickets = [batcher.submit("Hi", GenerationSettings(max_new_tokens=50)) for _ in range(3)]
    for _ in range(4):
        batcher.step()
    batcher.close()
    assert [ticket.result(0).finish_reason for ticket in tickets] == ["cancelled"] * 3
    assert [len(ticket.result(0).tokens) for ticket in tickets] == [5, 0, 0]  # the first step gives a token of the prompt and one more


@pytest.mark.parametrize(
    ("adapter", "reused"),
    [(None, 12), *((name, None) for name in STEERED)],
)
def test_a_prompt_goes_on_from_what_began_alike(
    session: OrtSession, bundle: Bundle, tokenizer: Tokenizer, adapter: str | None, reused: int | None
) -> None:
    """A chat's second turn: as far as its tokens are edited as they were."""
    batcher = Batcher(session, tokenizer, AdapterBank(bundle))
    first = Asked(COMMON, adapter, GenerationSettings(max_new_tokens=5)).submit(batcher)
    while batcher.step():
        pass
    turn = [*COMMON, *first.ticket.result().tokens[:4], 1, 2, 3]
    again, other = (Asked(turn, name, SHORT).submit(batcher) for name in (adapter, None if adapter else "all"))
    while batcher.step():
        pass
    for each in (first, again, other):
        each.check()
    assert other.ticket.reused == 0
    rule = None if adapter is None else STEERED[adapter].where
    tied = adapter is None or STEERED[adapter].tied
    before, after = (slots(rule, np.ones((1, n), np.int64), n, tied=tied, prompt_length=np.array([p]))[0] for n, p in ((12, 8), (15, 15)))
    same = int(np.argmax(np.append(before != after[:12], True)))
    assert again.ticket.reused == (same if same >= 2 else 0) == (reused or again.ticket.reused)


def test_nobody_goes_on_from_another_ones_prompt(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    batcher = Batcher(session, tokenizer, AdapterBank(bundle))
    reused = []
    for scope in ("mine", "yours", "mine"):
        ticket = batcher.submit(COMMON, SHORT, scope=scope)
        while batcher.step():
            pass
        reused.append(ticket.reused)
    assert reused == [0, 0, len(COMMON) - 1]


def test_what_waits_for_the_bank_is_read_again_only_when_a_row_has_left(
    session: OrtSession, bundle: Bundle, tokenizer: Tokenizer, monkeypatch
) -> None:
    read = []
    plain = runtimes.bank.read_edits
    monkeypatch.setattr(runtimes.bank, "read_edits", lambda bundle, listed: (read.append(listed.name), plain(bundle, listed))[1])
    alone = AdapterBank(bundle)
    alone.load("ends")
    bank = AdapterBank(bundle, max_bytes=alone.memory.banks)
    batcher = Batcher(session, tokenizer, bank)
    running = Asked(PROMPT, "all", GenerationSettings(max_new_tokens=20)).submit(batcher)
    batcher.step()
    waiting = Asked(PROMPT, "ends", SHORT).submit(batcher)
    before = len(read)
    for _ in range(10):
        batcher.step()
    assert len(read) - before <= 1 and not waiting.seen
    while batcher.step():
        pass
    running.check()
    waiting.check()


def test_an_adapter_that_no_room_is_enough_for_is_refused_at_once(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="alone takes"):
        Batcher(session, tokenizer, AdapterBank(bundle, max_bytes=100)).submit("Hi", SHORT, adapter="all")


def test_few_prefixes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.prefixes, "MOST_KEPT", 3)
    prefixes = runtimes.prefixes.Prefixes(10**6)

    def kept(first: int) -> Prefix:
        tokens = np.array([first, 1, 2, 3])
        return Prefix(key=None, tokens=tokens, slots=np.zeros(4), columns=[np.zeros((1, 4, 2), np.float32)])

    def found(first: int) -> int:
        return prefixes.find(None, np.array([first, 1, 2, 9]), np.zeros(4))[1]

    for first in range(3):
        prefixes.keep(kept(first))
    assert found(0) == 3  # which is then the last to go
    prefixes.keep(kept(7))
    assert [found(first) for first in (0, 1, 2, 7)] == [3, 0, 3, 3] and prefixes.size == 3 * 32
    longer = Prefix(key=None, tokens=np.array([7, 1, 2, 3, 4]), slots=np.zeros(5), columns=[np.zeros((1, 5, 2), np.float32)])
    prefixes.keep(longer)
    assert prefixes.size == 2 * 32 + 40  # in place of what it begins with


def test_an_adapter_that_was_replaced_is_another_one(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    bank = AdapterBank(bundle)
    batcher = Batcher(session, tokenizer, bank)
    for reused in (0, 0):
        asked = Asked(COMMON, "all", SHORT).submit(batcher)
        while batcher.step():
            pass
        assert asked.ticket.reused == reused
        bank.evict("all")
    assert batcher.load.prefix_bytes
    batcher.close()


def test_a_long_prompt_costs_the_others_a_chunk_a_step(batcher: Batcher) -> None:
    running = Asked(PROMPT[:2], None, GenerationSettings(max_new_tokens=30)).submit(batcher)
    batcher.step()
    long = Asked([7] * 30, "all", GenerationSettings(max_new_tokens=2)).submit(batcher)
    short = Asked(PROMPT[:2], None, GenerationSettings(max_new_tokens=2)).submit(batcher)
    before = len(running.seen)
    for step in range(1, 11):
        batcher.step()
        assert len(running.seen) == before + step
    assert short.seen and not long.seen  # which came later, and did not wait for the long one's ten chunks
    batcher.step()
    assert long.seen


def test_a_listener_that_raises_ends_its_request_alone(batcher: Batcher) -> None:
    def broken(_: str) -> None:
        raise ValueError("nobody is there")

    lost = batcher.submit("The fox", SHORT, on_text=broken)
    kept = Asked(PROMPT, "all", SHORT).submit(batcher)
    while batcher.step():
        pass
    with pytest.raises(ValueError, match="nobody"):
        lost.result(0)
    kept.check()


def test_a_run_that_fails_ends_its_rows_and_the_next_ones_go_on(
    batcher: Batcher, session: OrtSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = batcher.submit(PROMPT, SHORT)
    batcher.step()
    with monkeypatch.context() as patched:

        def fails(*_: object) -> None:
            raise ReftError("onnxruntime says no")

        patched.setattr(session, "run_pool", fails)
        batcher.step()
    with pytest.raises(ReftError, match="says no"):
        lost.result(0)
    kept = Asked(PROMPT, "all", SHORT).submit(batcher)
    while batcher.step():
        pass
    kept.check()


def test_a_bug_in_a_step_lets_nobody_wait(
    session: OrtSession, bundle: Bundle, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Batcher(session, tokenizer, AdapterBank(bundle)) as batcher:
        monkeypatch.setattr(batcher, "_admit", lambda: 1 // 0)
        ticket = batcher.submit("Hi", SHORT)
        with pytest.raises(ZeroDivisionError):
            ticket.result(30)
        monkeypatch.undo()
        assert batcher.submit("Hi", GenerationSettings(max_new_tokens=2)).result(30).tokens


def test_logits_that_are_no_numbers_end_their_row_alone(batcher: Batcher, session: OrtSession, monkeypatch) -> None:
    plain = session.run_pool

    def damaged(pool, rows, request):
        logits = plain(pool, rows, request).copy()
        if len(logits) == 2:
            logits[1] = np.nan
        return logits

    monkeypatch.setattr(session, "run_pool", damaged)
    kept, lost = (Asked(PROMPT, None, SHORT).submit(batcher) for _ in range(2))
    while batcher.step():
        pass
    kept.check()
    assert lost.ticket is not None
    with pytest.raises(BundleError, match="not finite"):
        lost.ticket.result(0)


def test_what_cannot_be_asked_is_refused_at_once(batcher: Batcher, session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no adapter 'polite' is listed"):
        batcher.submit("Hi", SHORT, adapter="polite")
    with pytest.raises(InputError, match=f"exceed the context of toy \\({CONTEXT}\\)"):
        batcher.submit("Hi", GenerationSettings(max_new_tokens=CONTEXT))
    with pytest.raises(InputError, match="token"):
        batcher.submit([VOCABULARY], SHORT)
    for _ in range(4):
        batcher.submit("Hi", SHORT)
    with pytest.raises(QueueFull, match="4 requests wait"):
        batcher.submit("Hi", SHORT)
    with pytest.raises(InputError, match="runs the base alone"):
        Batcher(session, tokenizer).submit("Hi", SHORT, adapter="all")
    with pytest.raises(InputError, match="strength 0.5 is an adapter's, and none is asked for"):
        batcher.submit("Hi", SHORT, strength=0.5)
    with pytest.raises(InputError, match="the strength of all is nan"):
        batcher.submit("Hi", SHORT, adapter="all", strength=float("nan"))
    with pytest.raises(InputError, match="KV cache"):
        Batcher(session, tokenizer, cache_bytes=20 * ROW_BYTES).submit("Hi", GenerationSettings(max_new_tokens=30))
    with pytest.raises(InputError, match="most_rows is 0"):
        Batcher(session, tokenizer, most_rows=0)


def test_a_cache_that_is_copied_cannot_batch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="--target onnxruntime"):
        open_batcher(OrtSession(write_toy_bundle(tmp_path / "copied")), tokenizer)


def test_from_many_threads(session: OrtSession, bundle: Bundle, tokenizer: Tokenizer) -> None:
    """None lost, each with its own adapter's answer, and those who hang up disturb nobody."""
    with Batcher(session, tokenizer, AdapterBank(bundle, max_bytes=1500), queue=300) as batcher:
        asked = [Asked(PROMPT[: 1 + i % 5], list(KNOWN)[i % len(KNOWN)], GenerationSettings(max_new_tokens=1 + i % 7)) for i in range(80)]

        def client(part: list[Asked]) -> None:
            for each in part:
                each.submit(batcher)
                time.sleep(0.001)
                if len(each.prompt) == 5:
                    each.ticket.cancel()

        threads = [threading.Thread(target=client, args=(asked[i::8],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each in asked:
        each.check()

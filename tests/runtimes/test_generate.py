"""Batches against single rows against the numpy decoder; sampling, stop strings, streaming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rounding
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, CONTEXT, PROMPTS, ROUNDING, VOCABULARY, ToyDecoder, toy_tokenizer, write_toy_bundle
from transformers.generation import logits_process

from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError, ReftError
from runtimes.generation import (
    DecodeBatch,
    GenerationSettings,
    StopFilter,
    batches,
    generate,
    greedy_tokens,
    padding_of,
    probabilities,
)
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
IDS = [toy_tokenizer().encode(p).ids for p in PROMPTS]
GREEDY = GenerationSettings(max_new_tokens=10)
VARIANTS = [("all", "graph", True), ("all", "input", True), ("last", "graph", True), ("all", "graph", False), ("last", "input", False)]
IN_PLACE = [(*VARIANTS[i], "in place") for i in (0, 2, 4)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Bundle]:
    folder = tmp_path_factory.mktemp("toy")
    return {
        v: write_toy_bundle(folder / f"{i}", logits=v[0], slot_mode=v[1], position_ids=v[2], in_place="in place" in v)
        for i, v in enumerate(VARIANTS + IN_PLACE)
    }


@pytest.fixture(scope="module")
def session(bundles: dict[tuple, Bundle]) -> OrtSession:
    return OrtSession(bundles[VARIANTS[0]], threads=1)


@pytest.fixture(scope="module")
def tokenizer(bundles: dict[tuple, Bundle]) -> Tokenizer:
    bundle = bundles[VARIANTS[0]]
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


@pytest.mark.parametrize("chunk", [None, 0, 1, 2, 5])
@pytest.mark.parametrize("name", [None, *ADAPTERS])
@pytest.mark.parametrize("variant", VARIANTS + IN_PLACE, ids=str)
def test_batches_chunks_and_paddings_equal_the_numpy_decoder(
    bundles: dict[tuple, Bundle], variant: tuple, name: str | None, chunk: int | None
) -> None:
    session = OrtSession(bundles[variant], threads=1, adapter=name)
    tokenizer = Tokenizer.load(session.bundle.folder)
    assert padding_of(session) == ("right" if variant in IN_PLACE else "left" if variant[2] else "none")
    generations = generate(session, tokenizer, IDS, GREEDY, prefill_chunk=chunk)
    for prompt, generation in zip(IDS, generations, strict=True):
        assert list(generation.tokens) == DECODER.greedy(prompt, 10, ADAPTERS.get(name))
        assert (generation.finish_reason, generation.prompt_tokens) == ("length", len(prompt))


@pytest.mark.parametrize("variant", [VARIANTS[0], *IN_PLACE], ids=str)
def test_prefill_and_append_give_the_last_real_tokens_logits(bundles: dict[tuple, Bundle], variant: tuple) -> None:
    batch = DecodeBatch(OrtSession(bundles[variant], threads=1), IDS)
    for logits, prompt in zip(batch.prefill(), IDS, strict=True):
        rounding.check(logits, DECODER.logits(prompt)[-1], ROUNDING)
    batch.append([4, None, 6])
    logits = batch.append([7, None, 8])
    for row, added in ((0, [4, 7]), (2, [6, 8])):
        rounding.check(logits[row], DECODER.logits(IDS[row] + added)[-1], ROUNDING)


def test_which_rows_share_a_batch() -> None:
    prompts = [[1, 2], [3], [4, 5]]
    assert batches(prompts, "left", chunk=1) == batches(prompts, "left") == batches(prompts, "right", chunk=1) == [[0, 1, 2]]
    assert batches(prompts, "none") == batches(prompts, "none", chunk=2) == [[1], [0, 2]]
    assert batches(prompts, "none", chunk=1) == [[1], [0], [2]]  # a prompt in several calls is alone
    assert batches([], "left") == batches([], "none") == []


def test_greedy_tokens_go_on_after_eos(session: OrtSession) -> None:
    np.testing.assert_array_equal(greedy_tokens(session, IDS, 6), [DECODER.greedy(p, 6) for p in IDS])


def test_streamed_pieces_join_to_the_text_and_continue_the_prompt(session: OrtSession, tokenizer: Tokenizer) -> None:
    streamed: dict[int, str] = {}
    generations = generate(
        session, tokenizer, list(PROMPTS), GREEDY, on_text=lambda row, piece: streamed.update({row: streamed.get(row, "") + piece})
    )
    for row, (prompt, generation) in enumerate(zip(IDS, generations, strict=True)):
        assert streamed.get(row, "") == generation.text
        assert tokenizer.decode(prompt) + generation.text == tokenizer.decode([*prompt, *generation.tokens])


def test_eos_ends_a_row_alone_and_is_a_token_but_no_text(session: OrtSession, tokenizer: Tokenizer) -> None:
    free = generate(session, tokenizer, IDS, GREEDY)
    token = free[0].tokens[3]
    stopped = generate(session, tokenizer, IDS, GenerationSettings(max_new_tokens=10, stop_token_ids=(token,)))
    for before, after in zip(free, stopped, strict=True):
        end = before.tokens.index(token) + 1 if token in before.tokens else 10
        assert after.tokens == before.tokens[:end]
        assert after.finish_reason == ("stop" if token in before.tokens else "length")
        if after.finish_reason == "stop":
            assert after.text == tokenizer.decode(before.tokens[: end - 1])


def test_a_stop_string_across_tokens_is_cut_and_never_streamed(session: OrtSession, tokenizer: Tokenizer) -> None:
    settings_ = GenerationSettings(max_new_tokens=30, temperature=8.0, seed=11)
    free = generate(session, tokenizer, [IDS[0]], settings_)[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 4]
    pieces: list[str] = []
    stopped = generate(
        session,
        tokenizer,
        [IDS[0]],
        GenerationSettings(max_new_tokens=30, temperature=8.0, seed=11, stop=(stop, "never there")),
        on_text=lambda _, piece: pieces.append(piece),
    )[0]
    assert stopped.text == "".join(pieces) == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop" and 0 < len(stopped.tokens) < 30


def test_samples_depend_on_the_seed_and_not_on_the_neighbours(session: OrtSession, tokenizer: Tokenizer) -> None:
    settings_ = GenerationSettings(max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.95, seed=3)
    together = generate(session, tokenizer, [*IDS, IDS[0]], settings_)
    alone = [generate(session, tokenizer, [p], settings_)[0] for p in IDS]
    assert [g.tokens for g in together[:3]] == [g.tokens for g in alone]
    assert together[3].tokens != together[0].tokens  # the same prompt again is another sample
    other = generate(session, tokenizer, IDS[:1], GenerationSettings(max_new_tokens=8, temperature=1.5, seed=4))[0]
    assert other.tokens != alone[0].tokens
    unseeded = GenerationSettings(max_new_tokens=16, temperature=5.0)
    assert generate(session, tokenizer, IDS[:1], unseeded)[0].tokens != generate(session, tokenizer, IDS[:1], unseeded)[0].tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
    penalty=st.sampled_from([1.0, 0.8, 1.3]),
)
def test_probabilities_equal_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(32) * 3
    seen = [1, 5, 5, 9]
    scores, ids = torch.from_numpy(logits)[None], torch.tensor([seen])
    processors = [logits_process.RepetitionPenaltyLogitsProcessor(penalty), logits_process.TemperatureLogitsWarper(temperature)]
    processors += [logits_process.TopKLogitsWarper(top_k)] if top_k else []
    processors += [logits_process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for processor in processors:
        scores = processor(ids, scores)
    mine = probabilities(logits, GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty), seen)
    np.testing.assert_allclose(mine, scores.softmax(1)[0].numpy(), atol=1e-12)


def test_samples_follow_the_probabilities(session: OrtSession, tokenizer: Tokenizer) -> None:
    settings_ = GenerationSettings(max_new_tokens=1, temperature=4.0, top_k=3, seed=0)
    expected = probabilities(DECODER.logits(IDS[0])[-1], settings_)
    drawn = [g.tokens[0] for g in generate(session, tokenizer, [IDS[0]] * 400, settings_)]
    assert set(drawn) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(np.bincount(drawn, minlength=VOCABULARY) / 400, expected, atol=0.1)


def test_a_repetition_penalty_changes_greedy_too(session: OrtSession, tokenizer: Tokenizer) -> None:
    penalized = generate(session, tokenizer, IDS[:1], GenerationSettings(max_new_tokens=10, repetition_penalty=1e6))[0]
    assert len({*penalized.tokens}) == 10 and not set(penalized.tokens) & set(IDS[0])


@pytest.mark.parametrize("penalty", [5e-324, 1e-308, 1e308])
@pytest.mark.filterwarnings("error")
def test_an_extreme_penalty_leaves_probabilities(penalty: float) -> None:
    """Of a token that a grammar masked none."""
    settings = GenerationSettings(temperature=1, repetition_penalty=penalty)
    found = probabilities(np.array([1.0, 20.0, -3.0, -np.inf]), settings, [0, 1, 2, 3])
    assert found.sum() == pytest.approx(1) and found[3] == 0 and np.isfinite(found).all()


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ReftError, match="not finite"):
        probabilities(np.array([0.0, np.nan]), GenerationSettings(temperature=1))


def test_prompts_are_checked(session: OrtSession, tokenizer: Tokenizer) -> None:
    long = [1] * (CONTEXT - 5)
    assert len(generate(session, tokenizer, [long], GenerationSettings(max_new_tokens=5))[0].tokens) == 5
    with pytest.raises(
        InputError, match=f"prompt 1 has {CONTEXT - 5} tokens, which with 6 new ones exceed the context of toy \\({CONTEXT}\\)"
    ):
        generate(session, tokenizer, [[1], long], GenerationSettings(max_new_tokens=6))
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        generate(session, tokenizer, [""], GREEDY)
    with pytest.raises(InputError, match=f"token id {VOCABULARY}"):
        generate(session, tokenizer, [[VOCABULARY]], GREEDY)
    with pytest.raises(InputError, match="prefill chunk is -1, expected at least 1 column per call, or 0"):
        generate(session, tokenizer, IDS, GREEDY, prefill_chunk=-1)
    assert generate(session, tokenizer, [], GREEDY) == []


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}]
    + [{"repetition_penalty": 0}, {"seed": -1}, {"stop": ("a", "")}],
    ids=str,
)
def test_settings_are_checked(change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        GenerationSettings(**change)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_filter_does_not_depend_on_how_the_text_is_split(pieces: list[str], stop: list[str]) -> None:
    def run(parts: list[str]) -> tuple[str, bool]:
        filter_ = StopFilter(stop)
        given_out = ""
        for part in parts:
            given_out += filter_.push(part)
            if filter_.stopped:
                return given_out, True
        return given_out + filter_.finish(), False

    text = "".join(pieces)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    assert run(pieces) == run(list(text)) == expected


def test_text_held_back_as_a_possible_stop_is_given_out_at_the_end() -> None:
    filter_ = StopFilter(["stop"])
    assert [filter_.push("a st"), filter_.push("o"), filter_.finish()] == ["a ", "", "sto"]


@pytest.mark.parametrize("position_ids", [True, False])
def test_the_manifest_says_that_rows_cannot_share_a_batch(bundles: dict[tuple, Bundle], position_ids: bool) -> None:
    """A GroupQueryAttention graph may take position_ids all the same."""
    variant = next(v for v in VARIANTS if v[2] == position_ids)
    bundle = replace(bundles[variant], manifest=replace(bundles[variant].manifest, padding="none"))
    assert padding_of(OrtSession(bundle, threads=1)) == "none"

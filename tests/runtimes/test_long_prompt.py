"""A prompt of 32,768 tokens with an edit at every one of them, in chunks, over a cache that is written in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
import toy_bundle
from toy_bundle import ADAPTERS, LAYERS, ROUNDING, WIDTH, ToyDecoder, change_manifest, write_toy_bundle

from runtimes.edits.edit import Site
from runtimes.generation import DecodeBatch
from runtimes.ort.session import OrtSession

TOKENS = 32768
CHUNK = 512


def long_decoder() -> ToyDecoder:
    decoder = ToyDecoder.random()
    places = np.random.default_rng(4).standard_normal((TOKENS + 8, WIDTH)).astype(np.float32) * 0.5
    return replace(decoder, weights={**decoder.weights, "places": places})


def eager(decoder: ToyDecoder, tokens: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """ToyDecoder.logits with the adapter "all" at the ``sampled`` positions: a block of queries at a time, in float64; what no sampled
    position reads of the last block is left out."""
    w = {n: x.astype(np.float64) for n, x in decoder.weights.items()}
    edits = ADAPTERS["all"].edits()
    h = w["embed"][tokens] + w["places"][: len(tokens)]
    for i in range(LAYERS):
        keys, values = h @ w[f"{i}.k"], h @ w[f"{i}.v"]
        rows = np.arange(len(tokens)) if i < LAYERS - 1 else sampled
        context = np.empty((len(rows), WIDTH))
        for start in range(0, len(rows), CHUNK):
            block = rows[start : start + CHUNK]
            seen = int(block.max()) + 1
            scores = (h[block] @ w[f"{i}.q"]) @ keys[:seen].T / np.sqrt(WIDTH)
            scores[np.arange(seen) > block[:, None]] = -np.inf
            share = np.exp(scores - scores.max(1, keepdims=True))
            context[start : start + CHUNK] = share @ values[:seen] / share.sum(1, keepdims=True)
        h = h[rows] + context @ w[f"{i}.o"]
        h = h + np.tanh(h @ w[f"{i}.up"]) @ w[f"{i}.down"]
        (edit,) = edits[Site(layer=i)]
        h = edit.apply(h)
    return h @ w["head"]


@pytest.mark.slow
def test_a_long_prompt_with_an_edit_everywhere(tmp_path: Path) -> None:
    decoder = long_decoder()
    # The golden arrays are short: they are those of the decoder as it is.
    bundle = write_toy_bundle(tmp_path / "long", decoder=decoder, in_place=True)
    bundle = change_manifest(bundle, model=replace(bundle.manifest.model, context_length=TOKENS + 8))
    random = np.random.default_rng(5)
    tokens = random.integers(0, toy_bundle.VOCABULARY, TOKENS)
    sampled = np.unique(np.concatenate([[0, CHUNK - 1, CHUNK, TOKENS - 1], random.integers(0, TOKENS, 60)]))
    expected = eager(decoder, tokens, sampled)
    with OrtSession(bundle, threads=1, adapter="all") as session:
        found, past = [], None
        for start in range(0, TOKENS, CHUNK):
            stop = start + CHUNK
            length = np.array([TOKENS])
            step = session.step(tokens[None, start:stop], np.ones((1, stop)), past=past, prompt_length=length, capacity=TOKENS)
            found += [step.logits[0, place - start] for place in sampled if start <= place < stop]
            past = step.past
        rounding.check(np.stack(found), expected, ROUNDING)
        rounding.check(DecodeBatch(session, [tokens.tolist()]).prefill()[0], expected[-1], ROUNDING)
        session.set_adapter(None)  # and the edit is seen
        assert rounding.distance(DecodeBatch(session, [tokens.tolist()]).prefill()[0], expected[-1]) > ROUNDING

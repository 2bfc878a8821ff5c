"""A prompt of 32,768 tokens through an exported graph, in chunks, against eager PyTorch that takes it at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rounding
import tiny
import torch

from reft_export.base.load import load_base
from reft_export.eager.steering import steered
from reft_export.exporting.export import ExportSettings, export_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import save_adapter
from runtimes.ort.session import OrtSession

TOKENS = 32768
CHUNK = 512


@pytest.mark.slow
def test_a_global_edit_over_32k_tokens_is_the_eager_models(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", max_position_embeddings=TOKENS + 8)
    base = load_base(folder)
    adapter = tiny.random_adapter(base.info, positions="all", seed=3)
    save_adapter(adapter, tmp_path / "everywhere")
    export_bundle(str(folder), [tmp_path / "everywhere"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    random = np.random.default_rng(6)
    tokens = random.integers(0, base.model.config.vocab_size, (1, TOKENS))
    sampled = np.unique(np.concatenate([[0, CHUNK - 1, CHUNK, TOKENS - 1], random.integers(0, TOKENS, 60)]))
    with torch.no_grad(), steered(base.model, adapter):
        expected = base.model(torch.from_numpy(tokens), use_cache=False, logits_to_keep=torch.from_numpy(sampled)).logits[0].numpy()

    def said(session: OrtSession, tokens_fed: int = TOKENS) -> np.ndarray:
        found, past = [], None
        for start in range(0, tokens_fed, CHUNK):
            stop = start + CHUNK
            length = np.array([TOKENS])
            step = session.step(tokens[:, start:stop], np.ones((1, stop)), past=past, prompt_length=length, capacity=TOKENS)
            found += [step.logits[0, place - start] for place in sampled if start <= place < stop]
            past = step.past
        return np.stack(found)

    with OrtSession(open_bundle(tmp_path / "bundle"), threads=1, adapter="everywhere") as session:
        assert session.bundle.manifest.kv_cache == "in-place"
        bound = 2 * rounding.logits(TOKENS, tiny.LAYERS)  # attention sums over all tokens
        rounding.check(said(session), expected, bound)
        session.set_adapter(None)  # and the edit is seen
        unsteered = said(session, 4 * CHUNK)
        assert rounding.distance(unsteered, expected[: len(unsteered)]) > bound

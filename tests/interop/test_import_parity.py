"""Imported adapters say what the library that trained them said: in eager PyTorch, in the folded graph, and with the fused op."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, TOLERANCE, Case

from reft_export.base import Base
from reft_export.eager import greedy_tokens, steered
from runtimes.adapter import load_adapter
from runtimes.bundle import open_bundle
from runtimes.native_library import find_op_library
from runtimes.ort_session import OrtSession

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)


@pytest.fixture(scope="module", params=["function", "fused"])
def session(request: pytest.FixtureRequest, bundle: Path) -> OrtSession:
    if request.param == "fused" and find_op_library() is None:
        pytest.skip("this installation has no op library")
    return OrtSession(open_bundle(bundle), kernel=request.param, threads=1)


@torch.no_grad()
@each_case
def test_eager(case: Case, base: Base, imported: dict[str, Path]) -> None:
    with steered(base.model, load_adapter(imported[case.label])) as steering:
        for layout in case.layouts:
            ids, mask, steering.prompt_length = case.batch(layout)
            logits = base.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
            assert case.worst(layout, logits) <= TOLERANCE, layout
    plain = base.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert case.worst(layout, plain) > 1e-3, "the adapter steers"


@each_case
def test_graph(case: Case, session: OrtSession) -> None:
    session.set_adapter(case.label)
    for layout in case.layouts:
        ids, mask, lengths = case.batch(layout)
        logits = session.step(ids, mask, prompt_length=lengths).logits
        assert case.worst(layout, logits) <= TOLERANCE * case.largest(layout), layout


@torch.no_grad()
@each_case
def test_eager_greedy_tokens(case: Case, base: Base, imported: dict[str, Path]) -> None:
    with steered(base.model, load_adapter(imported[case.label])) as steering:
        for key in (k for k in case.io if k.endswith("/greedy_tokens")):
            ids, mask = map(torch.from_numpy, case.batch(key.partition("/")[0])[:2])
            assert greedy_tokens(base.model, ids, mask, case.io[key].shape[1], steering=steering) == case.io[key].tolist()


@each_case
def test_graph_greedy_tokens(case: Case, session: OrtSession) -> None:
    """Decoding on the graph's KV cache."""
    session.set_adapter(case.label)
    for key in (k for k in case.io if k.endswith("/greedy_tokens")):
        ids, mask, _ = case.batch(key.partition("/")[0])
        step = session.step(ids, mask)  # prompts of these layouts end in the last column
        tokens = [step.logits[:, -1].argmax(-1)]
        while len(tokens) < case.io[key].shape[1]:
            mask = np.concatenate([mask, np.ones((len(mask), 1), mask.dtype)], 1)
            step = session.step(tokens[-1][:, None], mask, past=step.past)
            tokens.append(step.logits[:, -1].argmax(-1))
        assert np.stack(tokens, 1).tolist() == case.io[key].tolist()


@torch.no_grad()
@pytest.mark.parametrize("case", [c for c in CASES if c.library.startswith("adapterhub")], ids=lambda c: c.label)
def test_adapterhub_tokens_without_a_cache(case: Case, base: Base, imported: dict[str, Path]) -> None:
    """AdapterHub's suffix moves with the text: without a cache, and with everything taken for prompt, so does ours."""
    with steered(base.model, load_adapter(imported[case.label])):
        for key in (k for k in case.io if k.endswith("greedy_tokens_cache0")):
            ids, mask, _ = case.batch(key.partition("/")[0])
            for token in case.io[key].T:
                logits = base.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
                assert logits[:, -1].argmax(-1).tolist() == token.tolist()
                ids = np.concatenate([ids, token[:, None]], 1)
                mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)


def test_one_bundle_holds_every_activation(bundle: Path) -> None:
    activations = {node.activation for node in open_bundle(bundle).nodes}
    assert {"", "relu", "gelu", "gelu_tanh", "silu", "tanh"} <= activations

"""Imported adapters say what the library that trained them said: in eager PyTorch, in the folded graph, and with the fused op."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BASE, CASES, TOLERANCE, Case

from reft_export.base.load import Base
from reft_export.eager.steering import greedy_tokens, steered
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter
from runtimes.native_library import find_op_library
from runtimes.ort.session import OrtSession

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
            assert case.worst(layout, logits) <= TOLERANCE * case.largest(layout), layout
    plain = base.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert case.worst(layout, plain) > 50 * TOLERANCE * case.largest(layout), "the adapter steers"


@torch.no_grad()
def test_a_small_fault_is_seen(base: Base, imported: dict[str, Path]) -> None:
    """Planted: parameters that are one part in a thousand off."""
    case = CASES[0]
    adapter = load_adapter(imported[case.label])
    faulty = replace(adapter, tensors={name: value * np.float32(1.001) for name, value in adapter.tensors.items()})
    ids, mask, lengths = case.batch("single")
    with steered(base.model, faulty) as steering:
        steering.prompt_length = lengths
        logits = base.model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert case.worst("single", logits) > 5 * TOLERANCE * case.largest("single")


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


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True], ids=["saved", "checkpoint"])
@pytest.mark.parametrize("outer_first", [False, True])
@pytest.mark.parametrize(("outer", "inner"), [("mlp", "mlp.down_proj"), ("self_attn", "self_attn.o_proj")])
def test_hooks_of_a_module_within_another(outer: str, inner: str, outer_first: bool, bare: bool, base: Base, tmp_path: Path) -> None:
    """PyTorch runs the inner module's hook first, whichever the file lists first."""
    states, paths = {}, [f"model.layers[1].{name}" for name in ((outer, inner) if outer_first else (inner, outer))]
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        weight, rotation = torch.randn(4, 64, generator=generator), torch.linalg.qr(torch.randn(64, 4, generator=generator))[0]
        states[path] = {"weight": weight, "bias": torch.randn(4, generator=generator), "rotate_layer": rotation}
        name = f"intkey_comp.{path}.output".replace(".", "_") + "_unit_pos_nunit_1#0.bin"
        torch.save(states[path], tmp_path / name)
    config = {
        "representations": [[0, f"{path}.output", "pos", 1, 4] for path in paths],
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * 2,
    }
    if not bare:
        (tmp_path / "config.json").write_text(json.dumps(config))
    request = Request(positions="all", activation="none")
    adapter = import_adapter(tmp_path, str(BASE), tmp_path.parent / f"{tmp_path.name}-out", request, report=lambda _: None).adapter

    def hook(module, args, output, state):  # noqa: ANN001
        h = output[0] if isinstance(output, tuple) else output
        W, b, R = state["weight"], state["bias"], state["rotate_layer"]
        y = h + (h @ W.T + b - h @ R) @ R.T
        return (y, *output[1:]) if isinstance(output, tuple) else y

    ids = torch.arange(5, 17)[None]
    handles = [
        base.model.get_submodule(path.replace("[1]", ".1")).register_forward_hook(partial(hook, state=state))
        for path, state in states.items()
    ]
    expected = base.model(ids).logits
    for handle in handles:
        handle.remove()
    with steered(base.model, adapter):
        assert float((base.model(ids).logits - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
    assert float((base.model(ids).logits - expected).abs().max()) > 0.1


def test_one_bundle_holds_every_activation(bundle: Path) -> None:
    activations = {node.activation for node in open_bundle(bundle).nodes}
    assert {"", "relu", "gelu", "gelu_tanh", "silu", "tanh"} <= activations

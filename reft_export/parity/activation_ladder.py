"""Activation quantization, proven product by product: eager PyTorch follows the graph's own roundings.

A value on the border between two levels is rounded either way by two right implementations, and what it changes moves others across
their borders: free-running, two of them drift apart by as much as the quantization itself costs (measured: noise of 1e-5 in the embeddings
moves eager's own logits by 5 %). So here every quantized input is read from the graph and held to the formula, up to ``NUDGE``; eager goes
on from what the graph has, and its logits must then be the graph's as nearly as with float activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from calibration.activations import ActivationQuantization
from calibration.products import activation_quantization, expose_quantized_inputs, quantized_inputs
from graph_passes.external import load_graph
from reft_export.base.dequantized import fake_quantize, linears_of
from reft_export.base.memory import give_back
from reft_export.eager.steering import Steerer, steering_of
from reft_export.parity.changed_bundle import quantization_of, variant
from reft_export.tasks.task import Inputs
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.files.claims import temporary_folder
from runtimes.open import ort_session
from runtimes.ort.session import to_float32
from runtimes.parity.figures import BUDGETS, Rung, compare, judge

NUDGE = 1e-4
"""Of a token's largest |x|: how near a border a value is rounded either way. A level of int8 is 80 times that."""


def step_rungs(
    bundle: Bundle,
    model_of: Callable[[], PreTrainedModel],
    inputs: Mapping[str, Inputs],
    steerers: Mapping[str, Steerer],
    *,
    provider: str = "cpu",
    kernel: str | None = None,
) -> list[Rung]:
    """One rung for the base and for each adapter; none where the graph shows no quantized input (float ones, and MatMulNBits' own).

    ``model_of`` gives the eager model with the bundle's dequantized weights; it is called after the graph has run and is gone.
    """
    graph = load_graph(bundle.graph_path)
    shown = quantized_inputs(graph)
    if not shown:
        return []
    with temporary_folder() as folder:
        _run_graph(bundle, inputs, [BASE_GOLDEN, *steerers], set(sum(shown.values(), ())), folder, provider, kernel)
        give_back()
        model = model_of()
        how = {name: each for name, each in activation_quantization(graph).items() if name in shown}
        rungs = []
        for name in (BASE_GOLDEN, *steerers):
            rungs.append(_hold(bundle, model, name, steerers.get(name), inputs[name], how, shown, folder))
        return rungs


def _run_graph(
    bundle: Bundle, inputs: Mapping[str, Inputs], names: list[str], values: set[str], folder: Path, provider: str, kernel: str | None
) -> None:
    """<folder>/<name>.<row>.npz: the graph's logits and quantized inputs, one full forward a row."""
    with variant(bundle, expose_quantized_inputs) as exposed:
        session = ort_session(exposed, provider=provider, kernel=kernel)
        for name in names:
            session.set_adapter(None if name == BASE_GOLDEN else name)
            for row in inputs[name].rows():
                logits, outputs = row.run(session)
                arrays: dict[str, Any] = {"logits": logits, **{value: to_float32(outputs[value]) for value in values}}
                np.savez(folder / f"{name}.{row.number}.npz", **arrays)


def _hold(
    bundle: Bundle,
    model: PreTrainedModel,
    name: str,
    steerer: Steerer | None,
    inputs: Inputs,
    how: Mapping[str, ActivationQuantization],
    shown: Mapping[str, tuple[str, ...]],
    folder: Path,
) -> Rung:
    """The rung of one name; inputs that are not what the formula gives make its errors infinite."""
    wrong: dict[str, int] = {}
    followed: set[str] = set()
    ours, theirs = [], []
    for row in inputs.rows():
        with np.load(folder / f"{name}.{row.number}.npz") as seen:
            restored = {weight: how[weight].restore(*(seen[value] for value in values)) for weight, values in shown.items()}
            theirs.append(seen["logits"])
        with torch.no_grad(), steering_of(model, steerer) as steering, _following(model, bundle, how, restored, wrong, followed):
            logits = row.eager(model, steering)
        ours.append(logits[-len(theirs[-1]) :].float().numpy())
    figures, note = compare(np.concatenate(theirs), np.concatenate(ours)), ""
    if not followed:  # an expert that no token is routed to may be left out, but not every product
        figures, note = replace(figures, compared=0), "no product of the eager model read a quantized input"
    if wrong:
        worst = max(wrong, key=lambda weight: wrong[weight])
        figures = replace(figures, max_abs=np.inf, max_relative=np.inf)
        note = f"{sum(wrong.values())} inputs are not rounded as the scales in the graph say, first those of {worst}"
    budget = BUDGETS["weight-only int8"]
    label = quantization_of(bundle).label
    return judge(f"{label}, {name}: step by step", "eager, same roundings", figures, budget, note=note)


@contextmanager
def _following(
    model: PreTrainedModel,
    bundle: Bundle,
    how: Mapping[str, ActivationQuantization],
    restored: Mapping[str, np.ndarray],
    wrong: dict[str, int],
    followed: set[str],
) -> Iterator[None]:
    """Every quantized product of ``model`` reads the graph's x'; those that no rounding of its own x gives are counted in ``wrong``.

    ``followed`` takes the weights whose products did.
    """
    handles = []
    try:
        for weight, seen in restored.items():
            follow = partial(_follow, weight, how[weight], torch.from_numpy(seen), wrong, followed)
            handles += [m.register_forward_pre_hook(follow) for m in linears_of(model, weight, bundle.manifest.weights)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _follow(
    weight: str,
    how: ActivationQuantization,
    seen: torch.Tensor,
    wrong: dict[str, int],
    followed: set[str],
    module: torch.nn.Module,
    arguments: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    followed.add(weight)
    x = arguments[0]
    seen = seen.reshape(x.shape).to(x.dtype)
    slack = NUDGE * x.abs().amax(-1, keepdim=True)
    right = torch.zeros_like(x, dtype=torch.bool)
    for nudged in (x, x - slack, x + slack):
        right |= (fake_quantize(nudged, how) - seen).abs() <= 2 * slack
    if count := int((~right).sum()):
        wrong[weight] = wrong.get(weight, 0) + count
    return (seen, *arguments[1:])

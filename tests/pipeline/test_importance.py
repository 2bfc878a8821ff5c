"""Importance of a weight's inputs: the mean square of what the module is given, with the edits on, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.products import dequantized_weights
from calibration.settings import settings_for
from calibration.weight_only import dequantize, quantize_blocks
from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.eager.banks import bank_steerer
from reft_export.parity.golden import fp32_answers
from reft_export.parity.ladder import stored_inputs
from reft_export.quantizing.importance import input_importance, input_watcher
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN

FORMAT = settings_for("weight-only").format
NAME, MODULE = "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.gate_proj"


@pytest.fixture(scope="module")
def seen(float_bundle):
    source, base = float_bundle()
    bundle, model = open_bundle(source), load_base(base).model
    return bundle, model, stored_inputs(bundle), {name: bank_steerer(bundle, name) for name in bundle.adapter_names}


def by_hand(model, inputs, steerers) -> np.ndarray:
    """Row by row, without pads."""
    squares = []
    handle = model.get_submodule(MODULE).register_forward_hook(lambda _, given, __: squares.append(given[0][0].double().square()))
    for name, each in inputs.items():
        arrays = each.arrays
        for ids, mask, prompt in zip(arrays["input_ids"], arrays["attention_mask"], arrays["prompt_length"], strict=True):
            row = torch.from_numpy(ids[mask > 0])[None]
            if name == BASE_GOLDEN:
                model(row)
                continue
            with steerers[name](model) as steering:
                steering.prompt_length = [int(prompt)]
                model(row)
    handle.remove()
    return torch.cat(squares).mean(0).numpy()


@torch.no_grad()
def test_it_is_the_mean_square_of_the_inputs_with_the_edits_on(seen) -> None:
    bundle, model, inputs, steerers = seen
    found = input_importance(model, bundle.manifest.weights, inputs, steerers)
    assert set(found) == {name for name in bundle.manifest.weights if "proj" in name or "lm_head" in name}
    expected = by_hand(model, inputs, steerers)
    off = by_hand(model, {BASE_GOLDEN: inputs[BASE_GOLDEN]}, {})

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(one - other) / np.linalg.norm(other))

    assert apart(found[NAME], expected) < 1e-5 < 0.01 < apart(off, expected)


@torch.no_grad()
def test_adapters_that_were_seen_are_not_run_again(seen, monkeypatch) -> None:
    bundle, model, inputs, steerers = seen
    names, squares, nothing = bundle.manifest.weights, {}, {}
    expected = input_importance(model, names, inputs, steerers)
    fp32_answers(model, inputs, steerers, around=input_watcher(squares, model, settings_for("weight-only"), "fp32"))
    for settings, precision in ((settings_for("weight-only"), "fp16"), (settings_for("weight-only", method="rtn"), "fp32"), (None, "fp32")):
        fp32_answers(model, inputs, steerers, around=input_watcher(nothing, model, settings, precision))
    assert set(squares) == set(steerers) and not nothing

    def run(*_: object, **__: object) -> None:
        raise AssertionError("an adapter is run again")

    found = input_importance(model, names, inputs, dict.fromkeys(steerers, run), squares)
    assert set(found) == set(expected) and all(np.array_equal(found[name], expected[name]) for name in found)
    of_base = input_importance(model, names, {BASE_GOLDEN: inputs[BASE_GOLDEN]}, {}, squares)
    assert not np.allclose(of_base[NAME], expected[NAME], rtol=1e-2), "what was seen of others counts for them alone"


def test_int4_bundles_are_searched_by_it(seen, float_bundle, tmp_path) -> None:
    source, base = float_bundle()
    bundle, model, inputs, steerers = seen
    quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only"), report=lambda _: None)
    made = open_bundle(tmp_path / "q")
    assert made.manifest.quantization is not None and made.manifest.quantization.method == "imatrix"
    weight = np.ascontiguousarray(model.get_parameter(NAME).detach().numpy().T)
    shipped = dict(dequantized_weights(load_graph(made.graph_path)))[NAME]
    importance = input_importance(model, bundle.manifest.weights, inputs, steerers)[NAME]
    for blocks, same in ((quantize_blocks(weight, FORMAT, importance), True), (quantize_blocks(weight, FORMAT), False)):
        restored = dequantize(blocks.packed, blocks.scales, blocks.zero_points, 4, 32, *weight.shape)
        assert np.array_equal(shipped, restored) == same

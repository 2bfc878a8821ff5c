"""Which parameter a matrix came from is told by its values: renamed, transposed, split, tied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch

from calibration.quantize import quantize_graph
from calibration.settings import settings_for
from reft_export.base.dequantized import load_dequantized
from reft_export.bundling.weight_sources import find_weight_sources
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import BundleError


def _graph(products: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> ir.Model:
    """x @ W for every product, and a Gather for every table of rows."""
    values = [ir.Value(name=n, const_value=ir.tensor(a, name=n), shape=ir.Shape(a.shape)) for n, a in (products | rows).items()]
    x = ir.Value(name="x")
    nodes = [ir.node("MatMul", [x, v]) if v.name in products else ir.node("Gather", [v, x]) for v in values]
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def test_slices_of_a_fused_parameter() -> None:
    """phi3's checkpoint holds q, k, v in one parameter; the builder splits it."""
    model = tiny.build("phi3")
    fused = model.model.layers[1].self_attn.qkv_proj.weight.numpy(force=True)
    parts = {"q": (0, 64), "k": (64, 96), "v": (96, 128)}
    names = {n: f"model.layers.1.attn.{n}_proj.MatMul.weight" for n in parts}
    found = find_weight_sources(_graph({names[n]: fused[a:b].T.copy() for n, (a, b) in parts.items()}, {}), model)
    parameter = "model.layers.1.self_attn.qkv_proj.weight"
    for n, (start, stop) in parts.items():
        assert found[names[n]] == WeightSource(parameter=parameter, transpose=True, axis=0, start=start, stop=stop)


def test_parameters_joined_in_one() -> None:
    """q, k, v below each other, in either orientation; a row too many or too few is no join."""
    model = tiny.build("llama")
    attention = model.model.layers[1].self_attn
    whole = torch.cat([getattr(attention, f"{n}_proj").weight for n in "qkv"]).numpy(force=True)
    more, less = np.concatenate([whole, whole[:1]]), whole[:-1]
    graph = _graph({"columns": whole.T.copy(), "rows": whole, "more": more, "less": less}, {})
    found = find_weight_sources(graph, model)
    names = [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"]
    for name, transpose in (("columns", True), ("rows", False)):
        parts = [WeightSource(parameter=n, transpose=transpose) for n in names]
        assert found[name] == replace(parts[0], joined=tuple(parts[1:]))
    assert set(found) == {"columns", "rows"}
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    quantize_graph(graph, settings_for("weight-only", bits=8, keep_high=("rows", "more", "less")))
    assert load_dequantized(model, graph, found) == [n.removesuffix(".weight") for n in names]
    assert all(0 < (model.get_parameter(n) - before[n]).abs().max() < 0.05 for n in names)
    wrong = {"columns": replace(found["columns"], joined=found["columns"].joined[:1])}
    with pytest.raises(BundleError, match="columns has 32 rows more than its parameters"):
        load_dequantized(model, graph, wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_embedding_and_head_lead_to_the_module_that_does_the_same(dtype) -> None:
    model = tiny.build("llama", tie_word_embeddings=True).to(dtype)
    table = model.model.embed_tokens.weight.numpy(force=True)
    found = find_weight_sources(_graph({"head": table.T.copy()}, {"rows": table}), model)
    assert found["head"] == WeightSource(parameter="lm_head.weight", transpose=True)
    assert found["rows"] == WeightSource(parameter="model.embed_tokens.weight")


def test_names_are_not_believed() -> None:
    """A weight under another's name is found for what it is; one that no parameter holds is left out."""
    model = tiny.build("llama")
    up = model.model.layers[2].mlp.up_proj.weight.numpy(force=True).T
    gate = "model.layers.0.mlp.gate_proj.MatMul.weight"
    changed = up.copy()
    changed[-1, -1] += 1
    found = find_weight_sources(_graph({gate: up.copy(), "scaled": 2 * up, "changed": changed}, {}), model)
    assert found == {gate: WeightSource(parameter="model.layers.2.mlp.up_proj.weight", transpose=True)}


def test_dequantized_slices_are_put_together() -> None:
    """Two initializers that share a parameter: each replaces its own rows."""
    model = tiny.build("phi3")
    module = model.model.layers[0].mlp.gate_up_proj
    before = module.weight.detach().clone()
    gate, up = before[:128], before[128:]
    graph = _graph({"gate": gate.T.numpy().copy(), "up": up.T.numpy().copy()}, {})
    sources = find_weight_sources(graph, model)
    quantize_graph(graph, settings_for("weight-only", bits=8))
    assert load_dequantized(model, graph, sources) == ["model.layers.0.mlp.gate_up_proj"]
    difference = (module.weight - before).abs()
    assert 0 < difference[:128].max() < 0.05 and 0 < difference[128:].max() < 0.05
    with pytest.raises(BundleError, match="does not say which parameter up came from"):
        load_dequantized(model, graph, {"gate": sources["gate"]})

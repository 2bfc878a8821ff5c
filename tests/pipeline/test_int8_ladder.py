"""int8 weights at accuracy level 1: float32 matrices where whole models are compared, onnxruntime's own products one by one."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.products import dequantized_weights, int8_products, unpack_int8
from calibration.settings import settings_for
from graph_passes.accessors import array_of, input_of
from graph_passes.external import load_graph
from reft_export.parity import int8_ladder
from reft_export.parity.int8_ladder import int8_rungs
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_held_one_by_one(float_bundle, tmp_path, monkeypatch, symmetric) -> None:
    source, base = float_bundle()
    settings = settings_for("weight-only", 8, symmetric=symmetric)
    result = quantize_bundle(source, base, tmp_path / "q", settings, report=lambda _: None)
    rung = next(r for r in result.parity.rungs if r.name == "int8 products")
    bundle = open_bundle(tmp_path / "q")
    assert rung.passed and rung.figures.compared == len(int8_products(load_graph(bundle.graph_path).graph)) > 4
    right = int8_ladder.dequantize_nbits
    monkeypatch.setattr(int8_ladder, "dequantize_nbits", lambda node: right(node)[:, ::-1])
    assert not int8_rungs(bundle)[0].passed


def test_float_matrices_are_the_stored_weights(float_bundle, tmp_path) -> None:
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only", 4, int8=("*.down_proj.*",)), report=lambda _: None)
    graph = load_graph(tmp_path / "q" / "model.onnx")
    stored = dict(dequantized_weights(graph))
    count = len(int8_products(graph.graph))
    assert count and not unpack_int8(graph, most=1000) and len(int8_products(graph.graph)) == count
    assert unpack_int8(graph) and not int8_products(graph.graph)
    floats = [input_of(node, 1) for node in graph.graph if node.op_type == "MatMul" and input_of(node, 1).name.endswith(".float32")]
    assert len(floats) == count
    assert all(any(value.shape == w.shape and np.array_equal(array_of(value), w) for w in stored.values()) for value in floats)

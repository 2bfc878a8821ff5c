"""``--cache int8``: a bundle says what eager PyTorch says with the same rounding, in a quarter of the memory."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from reseal import reseal

from calibration.settings import settings_for
from graph_passes.accessors import input_of
from graph_passes.cache_shapes import ATTENTION, PAST_KEY
from graph_passes.external import load_graph
from graph_passes.stored_cache import KEY_SCALE, float_cache, store_cache, stored_cache
from reft_export.exporting.settings import ExportSettings
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import read_manifest, write_manifest
from runtimes.errors import BundleError, CalibrationError, InputError, ParityError
from runtimes.golden import check_golden
from runtimes.kv_cache import bytes_per_token
from runtimes.ort.session import OrtSession

QUIET = {"report": lambda _: None}


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_rounded_cache_is_held_to_eager_with_the_same_rounding(float_bundle, tmp_path, family) -> None:
    source, base = float_bundle(family)
    result = quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only", 8, cache="int8"), **QUIET)
    bundle = open_bundle(tmp_path / "q")
    assert bundle.manifest.quantization.cache == "int8" and bundle.manifest.kv_cache == "in-place"
    rungs = {r.name: r for r in result.parity.rungs}
    exact = [r for name, r in rungs.items() if name.startswith("int8 level 1, base")]
    rounded = [r for name, r in rungs.items() if name.startswith("int8 level 1, int8 cache, ")]
    assert exact and {r.budget.name for r in exact} == {"weight-only int8"}
    assert rounded and {r.budget.name for r in rounded} == {"activation-quantized"}
    # A value on the border between two levels may be rounded either way, so that not every rung need be as near.
    assert min(r.figures.max_relative for r in rounded) < 1e-5
    assert host_ladder(bundle, base, **QUIET).passed
    sizes = [bytes_per_token(OrtSession(b, threads=1).cache_tensors) for b in (open_bundle(source), bundle)]
    assert sizes[0] == 4 * sizes[1]


def test_a_rounded_cache_is_another_reference(float_bundle, tmp_path) -> None:
    """Scales that the eager model does not have are seen: the gate's figures are not those of any int8 cache."""
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only", 8, accuracy_level=1, cache="int8"), **QUIET)
    graph = load_graph(tmp_path / "q" / "model.onnx")
    coarse = {layer: tuple(40 * scale for scale in pair) for layer, pair in stored_cache(graph.graph).items()}
    float_cache(graph)
    store_cache(graph, coarse)
    ir.save(graph, tmp_path / "q" / "model.onnx")
    write_manifest(tmp_path / "q", read_manifest(tmp_path / "q" / "manifest.json"))
    bundle = open_bundle(tmp_path / "q")
    with pytest.raises(ParityError):
        check_golden(bundle, OrtSession(bundle, threads=1)).require()


def test_there_and_back(float_bundle) -> None:
    source, _ = float_bundle()
    graph, plain = load_graph(source / "model.onnx"), load_graph(source / "model.onnx")
    assert stored_cache(graph.graph) is None
    nodes = [n for n in graph.graph if n.op_type == ATTENTION]
    heads, width = input_of(nodes[0], PAST_KEY).shape[1], input_of(nodes[0], PAST_KEY).shape[3]
    scales = {layer: tuple(np.full((heads, width), scale + layer, np.float32) for scale in (0.5, 0.25)) for layer in range(len(nodes))}
    store_cache(graph, scales)
    found = stored_cache(graph.graph)
    assert all((a == b).all() for layer in scales for a, b in zip(found[layer], scales[layer], strict=True))
    assert all(len(n.inputs) == KEY_SCALE + 2 for n in nodes)
    float_cache(graph)
    assert stored_cache(graph.graph) is None and set(graph.graph.initializers) == set(plain.graph.initializers)
    for node, before in zip(nodes, (n for n in plain.graph if n.op_type == ATTENTION), strict=True):
        assert [v and v.name for v in node.inputs] == [v and v.name for v in before.inputs] and dict(node.attributes) == dict(
            before.attributes
        )


def test_what_cannot_be_stored_so_is_refused(float_bundle, tmp_path) -> None:
    plain, base = float_bundle(target="tensorrt")
    with pytest.raises(CalibrationError, match="GroupQueryAttention.*--target onnxruntime"):
        quantize_bundle(plain, base, tmp_path / "q", settings_for("weight-only", 8, cache="int8"), **QUIET)
    with pytest.raises(CalibrationError, match="--cache int8 goes with --scheme weight-only"):
        settings_for("dynamic", cache="int8")
    with pytest.raises(CalibrationError, match="--cache 'int4' is unknown; known: float, int8"):
        settings_for("weight-only", cache="int4")
    with pytest.raises(CalibrationError, match="--cache fp16 is not served.*use --cache int8"):
        settings_for("weight-only", cache="fp16")
    with pytest.raises(InputError, match="--cache int8.*--target tensorrt"):
        ExportSettings(precision="int8", cache="int8", target="tensorrt")
    assert not (tmp_path / "q").exists()


def test_a_manifest_that_says_another_cache_is_refused(float_bundle, tmp_path) -> None:
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only", 8), **QUIET)
    record = json.loads((tmp_path / "q" / "manifest.json").read_text())["quantization"]
    reseal(tmp_path / "q", quantization=record | {"cache": "int8"})
    with pytest.raises(BundleError, match=r"says cache int8, and model.onnx has past_key_values.0.key of tensor\(float\)"):
        OrtSession(open_bundle(tmp_path / "q"))

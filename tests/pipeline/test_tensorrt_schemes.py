"""The graphs that are written for TensorRT go through its builder, edits and all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from calibration.collect import product_inputs
from calibration.quantize import quantize_graph
from calibration.settings import settings_for
from graph_passes.external import load_graph
from graph_passes.function_body import use_bodies

BUILD = Path(__file__).with_name("tensorrt_build.py")


def build(environment: dict[str, str], graph: ir.Model, folder: Path, capability: str) -> subprocess.CompletedProcess[str]:
    use_bodies(graph, per_token=True)
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
    command = [sys.executable, str(BUILD), str(folder / "model.onnx"), capability]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "precision", "options", "capability"),
    [
        ("qdq-int8", "fp32", {"lm_head": True}, "SM86"),
        ("qdq-int4", "fp32", {}, "SM86"),
        ("qdq-int4", "fp16", {}, "SM86"),
        ("qdq-int4", "bf16", {}, "SM89"),
        ("fp8", "fp32", {"keep_high": ("0",)}, "SM89"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_builds(family, scheme, precision, options, capability, tensorrt_rtx, float_bundle, tmp_path) -> None:
    """MatMuls with dequantized operands, LoReFT in its per-token form."""
    source, _ = float_bundle(family, precision, target="tensorrt")
    graph = load_graph(source / "model.onnx")
    ranges = dict.fromkeys(product_inputs(graph), (-4.0, 4.0))
    quantize_graph(graph, settings_for(scheme, **options), ranges)
    done = build(tensorrt_rtx, graph, tmp_path, capability)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout.split()[-1]) > 0

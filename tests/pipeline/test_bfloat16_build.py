"""What no CPU runs can still be built: the bfloat16 bundle's graph through the real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import onnx_ir as ir
import pytest

from graph_passes.external import load_graph
from graph_passes.function_body import use_bodies
from runtimes.bundle import open_bundle

SCRIPT = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if hasattr(
    trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else 1)
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1]), [parser.get_error(i).desc() for i in range(parser.num_errors)]
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
profile = builder.create_optimization_profile()
for i in range(network.num_inputs):
    tensor = network.get_input(i)
    shape = list(tensor.shape)
    low, high = ([v if d < 0 else d for d in shape] for v in (1, 32))
    if tensor.name == "attention_mask":
        low, high = [1, 2], [32, 64]
    profile.set_shape(tensor.name, low, high, high)
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
assert engine is not None
print(engine.nbytes)
"""


@pytest.mark.slow
def test_bfloat16_bundle_builds(tensorrt_rtx, bundle_folder, tmp_path) -> None:
    """The per-token function body stands in for the plugin; TensorRT's parser takes no NonZero."""
    bundle = open_bundle(bundle_folder("llama", "bf16"))
    graph = load_graph(bundle.graph_path)
    use_bodies(graph, per_token=True)
    ir.save(graph, tmp_path / "model.onnx", external_data="model.onnx.data")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=tensorrt_rtx)
    assert done.returncode == 0, done.stderr[-1500:] + done.stdout[-500:]
    assert int(done.stdout.split()[-1]) > 0

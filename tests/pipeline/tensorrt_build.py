"""Parses and builds one ONNX graph with the real TensorRT-RTX, which needs no GPU: ``python tensorrt_build.py GRAPH SM89``.

A script of its own: a builder that fails may end the process by SIGABRT. Prints the engine's bytes, or the parser's errors.
"""

from __future__ import annotations

import sys

import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit("\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, sys.argv[2]), 0)
profile = builder.create_optimization_profile()
for i in range(network.num_inputs):
    tensor = network.get_input(i)
    low, high = ([v if d < 0 else d for d in tensor.shape] for v in (1, 32))
    if tensor.name == "attention_mask":
        low, high = [1, 2], [32, 64]
    profile.set_shape(tensor.name, low, high, high)
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
if engine is None:
    sys.exit("the builder refused the network")
print(engine.nbytes)

"""Run by test_tensorrt_plugin.py in a process with the real tensorrt_rtx: parses models and builds engines, prints what came of it as JSON.

python build_in_tensorrt_rtx.py PLUGIN|- SM MODEL:PROFILE...     PROFILE: {"input": [min, opt, max] shapes} as JSON, in a file
"""

import json
import sys
import time

import tensorrt_rtx

plugin, sm, *pairs = sys.argv[1:]
logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
if plugin != "-":
    assert tensorrt_rtx.get_plugin_registry().load_library(plugin) is not None, plugin
told = []
for pair in pairs:
    model, profile = pair.split(":")
    started = time.perf_counter()
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    parsed = parser.parse_from_file(model)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(tensorrt_rtx.ComputeCapability, f"SM{sm}"), 0)
    shapes = builder.create_optimization_profile()
    with open(profile) as file:
        for name, limits in json.load(file).items():
            shapes.set_shape(name, *limits)
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config) if parsed else None
    told.append(
        {
            "model": model,
            "parsed": parsed,
            "inputs": [network.get_input(i).name for i in range(network.num_inputs)],
            "plugins": sum(layer.type == tensorrt_rtx.LayerType.PLUGIN_V3 for layer in layers),
            "engine": None if engine is None else engine.nbytes,
            "stored": [] if engine is None else [t for t in ("activation", "first_half") if t.encode() in bytes(engine)],
            "seconds": round(time.perf_counter() - started, 2),
        }
    )
print(json.dumps(told))

"""Run in a process of its own, with the real tensorrt_rtx: parses a graph of TensorRT-Edge-LLM's, and builds an engine for SM89.

Its attention plugin is not here; a Python plugin of the same name, namespace and version stands in for it, with its output shapes and
nothing to execute. Arguments: graph, our plugin library or "-", --maxLoraRank or 0. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorrt_rtx as trt


class AttentionStandIn(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """[.., tokens, (q + k + v) * head] (or q, k and v apart), cache -> [.., tokens, heads, head], cache"""

    def __init__(self, heads: int, head: int) -> None:
        trt.IPluginV3.__init__(self)
        for base in (trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
            base.__init__(self)
        self.heads, self.head = heads, head
        self.plugin_name, self.plugin_namespace, self.plugin_version, self.num_outputs = "AttentionPlugin", "", "1", 2

    def get_capability_interface(self, kind):
        return self

    def get_output_data_types(self, types):
        return [types[0], types[0]]

    def get_output_shapes(self, inputs, shape_inputs, builder):
        out = trt.DimsExprs(len(inputs[0]) + 1)
        for axis in range(len(inputs[0]) - 1):
            out[axis] = inputs[0][axis]
        out[len(inputs[0]) - 1], out[len(inputs[0])] = builder.constant(self.heads), builder.constant(self.head)
        return [out, trt.DimsExprs(next(dims for dims in inputs if len(dims) == 5))]

    def supports_format_combination(self, position, described, inputs):
        return described[position].desc.format == trt.TensorFormat.LINEAR

    def configure_plugin(self, inputs, outputs):
        pass

    def on_shape_change(self, inputs, outputs):
        pass

    def attach_to_context(self, context):
        return self.clone()

    def get_fields_to_serialize(self):
        return trt.PluginFieldCollection([])

    def get_valid_tactics(self):
        return []

    def set_tactic(self, tactic):
        pass

    def get_workspace_size(self, inputs, outputs):
        return 0

    def clone(self):
        return AttentionStandIn(self.heads, self.head)

    def enqueue(self, *arguments):
        return 0


class AttentionStandInCreator(trt.IPluginCreatorV3One):
    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_namespace, self.plugin_version = "AttentionPlugin", "", "1"
        names = ("num_q_heads", "head_size")
        self.field_names = trt.PluginFieldCollection([trt.PluginField(name, np.array([]), trt.PluginFieldType.INT32) for name in names])

    def create_plugin(self, name, fields, phase):
        values = {field.name: int(np.asarray(field.data).reshape(-1)[0]) for field in fields if field.name in ("num_q_heads", "head_size")}
        return AttentionStandIn(values["num_q_heads"], values["head_size"])


def profile_of(name: str, dims: tuple[int, ...], max_rank: int) -> list[tuple[int, ...]]:
    """min, opt, max of one input, as TensorRT-Edge-LLM's builder sets them for batch 1 to 2, 1 to 16 tokens."""
    if "lora_" in name:
        return [tuple(rank if dim < 0 else dim for dim in dims) for rank in (0, max_rank // 2, max_rank)]
    if name == "kvcache_start_index":
        return [(0,), (2,), (2,)]
    if name == "context_sequence_count_carrier":
        return [(0,), (2,), (2,)]
    sizes = {"inputs_embeds": (1, 16, 32), "positions": (1, 16, 32), "query_start_offsets": (2, 3, 3), "skip_softmax_scale": (0, 0, 8)}
    low, best, high = sizes.get(name, (1, 2, 2))
    if name == "inputs_embeds" and len(dims) == 3:
        return [(1, 1, dims[2]), (2, 8, dims[2]), (2, 16, dims[2])]
    if name == "rope_rotary_cos_sin":
        low, best, high = (1, 16, 32) if len(dims) == 2 else (64, 64, 64)
        return [tuple((size if axis == len(dims) - 2 else batch) if dim < 0 else dim for axis, dim in enumerate(dims))
                for size, batch in ((low, 1), (best, 2), (high, 2))]  # fmt: skip
    return [tuple(size if dim < 0 else dim for dim in dims) for size in (low, best, high)]


def main(graph: str, library: str, max_rank: int) -> None:
    logger = trt.Logger(trt.Logger.ERROR)
    registry, creator = trt.get_plugin_registry(), AttentionStandInCreator()
    registry.register_creator(creator, "")
    if library != "-":
        registry.load_library(library)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(graph)
    result = {"parsed": parsed, "errors": [parser.get_error(index).desc() for index in range(parser.num_errors)]}
    if parsed:
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        result["plugins"] = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
        result["inputs"] = [network.get_input(index).name for index in range(network.num_inputs)]
        result["outputs"] = [network.get_output(index).name for index in range(network.num_outputs)]
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        for index in range(network.num_inputs):
            value = network.get_input(index)
            profile.set_shape(value.name, *profile_of(value.name, tuple(value.shape), max_rank))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        result["engine"] = None if engine is None else engine.nbytes
    print(json.dumps(result))


if __name__ == "__main__":
    # Imported by nothing: the tests start it by its path.
    main(str(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))

"""transformers' own exporter (``transformers.exporters``, experimental), for mixtures of experts, which torch's alone cannot translate.

It traces the module that ``dynamo`` traces, with repairs and translations of its own: above all, the grouped product of experts becomes,
for every expert, one MatMul over the tokens that were routed to it. Each expert's matrix is then an initializer
``<parameter>.<expert>`` of two dimensions, so that it is quantized like any other.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from graph_passes.accessors import array_of, input_of, name_of
from reft_export.base.model_folder import first_reason
from reft_export.exporting.dynamo import PREFIX, quiet, trace_inputs
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.installed import check_transformers
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import ExportError

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the parameters [E, .., ..] that its grouped product multiplies by."""


def export_transformers(model: PreTrainedModel, *, opset: int = 20, last_logits: bool = False) -> ExportedGraph:
    """Exports ``model`` in the dtype it has. **Rearranges its weights in place**: record eager results before.

    Raises BackendUnavailable as ``check_transformers`` does, ExportError with the exporter's own reason for a family it cannot export.
    """
    check_transformers()
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs = trace_inputs(model, last_logits=last_logits)
    experts = _transpose_experts(model)
    config = OnnxConfig(dynamic=True, dynamic_shapes=inputs.dynamic_shapes, opset_version=opset)
    exporter: Any = OnnxExporter()  # typed for transformers' own models, and takes any module
    # The exporter reports its stages on stdout, which is the bundle report's.
    with quiet(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        try:
            graph = exporter.export(inputs.decoder, dict(inputs.arguments), config).program
        except Exception as e:  # experimental: anything may come out of it, and none of it is the user's mistake
            raise ExportError(f"transformers could not export {model.config.model_type}: {first_reason(e)}") from e
    for value, name in zip(graph.graph.inputs, inputs.input_names, strict=True):
        value.name = name
    for value, name in zip(graph.graph.outputs, inputs.output_names, strict=True):
        value.name = name
    sources = _split_experts(graph, experts)
    exported = inputs.finish(graph)
    return ExportedGraph(model=graph, weights=exported.weights | sources)


def _transpose_experts(model: PreTrainedModel) -> dict[str, bool]:
    """Stores every expert's matrix [in, out], the layout of MatMul, as a view; by parameter, whether that transposed it.

    Without this the graph transposes all experts' weights at each run, or holds a second copy of them.
    """
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "is_transposed") or not isinstance(getattr(module, "down_proj", None), nn.Parameter):
            continue
        for attribute in EXPERT_WEIGHTS:
            weight = getattr(module, attribute, None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 3:
                found[f"{name}.{attribute}"] = not module.is_transposed
                if not module.is_transposed:
                    setattr(module, attribute, nn.Parameter(weight.detach().transpose(1, 2), requires_grad=False))
        setattr(module, "is_transposed", True)  # noqa: B010 - a flag, where torch's types know tensors and modules only
    return found


def _split_experts(graph: ir.Model, experts: dict[str, bool]) -> dict[str, WeightSource]:
    """Split(W [E, K, N]) -> Squeeze becomes E initializers [K, N]; returns where each came from."""
    sources: dict[str, WeightSource] = {}
    for node in [node for node in graph.graph if node.op_type == "Split"]:
        stacked = input_of(node, 0)
        name = name_of(stacked).removeprefix(PREFIX)
        if name not in experts or not stacked.is_initializer():
            continue
        matrices = array_of(stacked)
        for expert, part in enumerate(node.outputs):
            (squeeze,) = {use.node for use in part.uses()}
            own_name = f"{name}.{expert}"
            matrix = ir.Value(name=own_name, const_value=ir.Tensor(matrices[expert], name=own_name))
            matrix.type, matrix.shape = stacked.type, ir.Shape(matrices[expert].shape)
            graph.graph.register_initializer(matrix)
            squeeze.outputs[0].replace_all_uses_with(matrix)
            graph.graph.remove(squeeze, safe=True)
            sources[own_name] = WeightSource(parameter=name, transpose=experts[name], axis=0, start=expert, stop=expert + 1)
        graph.graph.remove(node, safe=True)
        if not stacked.uses():
            del graph.graph.initializers[name_of(stacked)]
    return sources

"""torch.onnx.export(dynamo=True): a decoder with flat KV-cache inputs and outputs, for prefill and decode alike.

Inputs ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.<i>.key|value``; outputs ``logits``,
``present.<i>.key|value``; batch, sequence and past lengths are dynamic.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reft_export.exporters.exported_graph import ExportedGraph
from runtimes.bundle import WeightSource
from runtimes.errors import ExportError

PREFIX = "model."
"""The wrapped model's attribute; torch names initializers after it."""


class RowMajorLinear(torch.nn.Module):
    """y = x W + b with W stored [in, out], the layout of ONNX MatMul.

    nn.Linear stores [out, in]: torch's exporter then folds a transposed copy of every weight into the graph, which doubles
    the memory and renames the weight. Here W is a transposed view: it keeps its name, and is copied, one weight at a time, only
    when the graph is saved.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class FlatCacheDecoder(torch.nn.Module):
    """Takes and returns the KV cache as a flat list of tensors; the cache object lives inside the traced forward only."""

    def __init__(self, model: PreTrainedModel, *, last_logits: bool) -> None:
        super().__init__()
        self.model = model
        self.keep = {"logits_to_keep": 1} if last_logits else {}
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions, **self.keep
        )
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def export_dynamo(model: PreTrainedModel, *, opset: int = 20, last_logits: bool = False) -> ExportedGraph:
    """Exports ``model`` in the dtype it has. **Rearranges the model's linear weights in place**: record eager results before.

    Raises ExportError with torch's own reason when the family cannot be traced.
    """
    if last_logits and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ExportError(f"{model.config.model_type} cannot compute the last token's logits alone; use --logits all")
    shapes = cache_shapes(model)
    weights = make_row_major(model)
    names = [f"past_key_values.{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in names)]
    batch, sequence, past_length = 2, 3, 5
    dtype = next(model.parameters()).dtype
    arguments = {
        "input_ids": torch.randint(0, min(model.config.vocab_size, 100), (batch, sequence)),
        "attention_mask": torch.ones(batch, past_length + sequence, dtype=torch.long),
        "position_ids": torch.arange(past_length, past_length + sequence)[None].expand(batch, sequence).contiguous(),
        "past": [torch.randn(batch, h, past_length, d).to(dtype) for pair in shapes for h, d in pair],
    }
    dynamic = torch.export.Dim.DYNAMIC
    dynamic_shapes = {
        "input_ids": {0: dynamic, 1: dynamic},
        "attention_mask": {0: dynamic, 1: dynamic},
        "position_ids": {0: dynamic, 1: dynamic},
        "past": [{0: dynamic, 2: dynamic}] * len(names),
    }
    decoder = FlatCacheDecoder(model, last_logits=last_logits).eval()
    inputs = ["input_ids", "attention_mask", "position_ids", *names]
    graph = trace(decoder, arguments, dynamic_shapes, inputs, outputs, opset=opset)
    _name_dimensions(graph, names, last_logits=last_logits)
    return ExportedGraph(model=graph, weights=name_weights(graph, weights))


def trace(
    wrapper: torch.nn.Module,
    arguments: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int,
) -> ir.Model:
    """The graph of ``wrapper``, which holds the model as ``model``; raises ExportError with torch's own reason."""
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                wrapper,
                (),
                kwargs=arguments,
                dynamic_shapes=dynamic_shapes,
                input_names=inputs,
                output_names=outputs,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=True,
                external_data=True,
            )
        except torch.onnx.OnnxExporterError as e:
            reason = str(e.__cause__ or e).strip().splitlines()[0][:300]
            raise ExportError(f"torch could not export {wrapper.model.config.model_type}: {reason}") from e
    strip_provenance(program.model)
    return program.model


def cache_shapes(model: PreTrainedModel) -> list[list[tuple[int, int]]]:
    """(heads, dim) of key and value for every layer, read off a two-token forward rather than guessed from the config."""
    cache = DynamicCache()
    device = next(model.parameters()).device
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    return [[(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)] for layer in cache.layers]


def make_row_major(model: PreTrainedModel) -> dict[str, WeightSource]:
    """Replaces every linear module; returns, for each parameter name of the rearranged model, its checkpoint parameter."""
    sources = {name: WeightSource(parameter=name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach().t()
        elif isinstance(module, Conv1D):
            weight = module.weight.detach()
        else:
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], RowMajorLinear(weight, None if module.bias is None else module.bias.detach()))
        if isinstance(module, torch.nn.Linear):
            sources[f"{name}.weight"] = WeightSource(parameter=f"{name}.weight", transpose=True)
    return sources


def _name_dimensions(graph: ir.Model, past_names: list[str], *, last_logits: bool) -> None:
    """torch numbers its symbolic dimensions; readers of the graph get names."""
    shapes: dict[str, list[str | int]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    for value in graph.graph.inputs:
        if value.name in past_names:
            heads, dim = value.shape[1], value.shape[3]
            shapes[value.name] = ["batch_size", heads, "past_sequence_length", dim]
        value.shape = ir.Shape(shapes[value.name])
    for value in graph.graph.outputs:
        if value.name == "logits":
            value.shape = ir.Shape(["batch_size", 1 if last_logits else "sequence_length", value.shape[2]])
        else:
            past = shapes[value.name.replace("present", "past_key_values")]
            value.shape = ir.Shape(["batch_size", past[1], "total_sequence_length", past[3]])


def name_weights(graph: ir.Model, sources: dict[str, WeightSource]) -> dict[str, WeightSource]:
    """Initializers carry the parameter's own name; returns the map for those that are parameters."""
    found = {}
    for name in list(graph.graph.initializers):
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) in sources:
            value = graph.graph.initializers[name]
            source = sources[name.removeprefix(PREFIX)]
            value.name = name.removeprefix(PREFIX)
            found[value.name] = source
    return found


def strip_provenance(graph: ir.Model) -> None:
    """torch attaches stack traces to every node: they name the exporting machine's folders and are most of the file."""
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*graph.graph.inputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns about packages and operators that this graph does not use."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)

"""torch.onnx.export(dynamo=True): a decoder with flat KV-cache inputs and outputs, for prefill and decode alike.

Inputs ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.<i>.key|value``; outputs ``logits``,
``present.<i>.key|value``; batch, sequence and past lengths are dynamic.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graph_passes.accessors import name_of
from graph_passes.fuse.decoder import fuse_decoder
from reft_export.base.model_folder import first_reason
from reft_export.exporting.bfloat16 import widen_bfloat16
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.grouped_attention import (
    GroupedCache,
    LayerAttention,
    NotGroupedError,
    check_in_place,
    grouped_attention,
    grouped_step,
    probe,
)
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import ExportError, InputError

PREFIX = "model."
"""The wrapped model's attribute; torch names initializers after it."""

Dimension = int | str | ir.SymbolicDim

SMALLEST_CONSTANT = 1.001e-8
"""onnxscript's rewriting takes constants of up to 1e-8 for zero (``add_0_rule``): Helium's epsilon of 1e-8 would go, and a row of zeros,
which its pad token is, would become NaN."""


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


class Wrapper(torch.nn.Module):
    """Holds the model that is traced as ``model``, after which torch names the initializers."""

    model: PreTrainedModel


class FlatCacheDecoder(Wrapper):
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


class InPlaceDecoder(FlatCacheDecoder):
    """Every layer's attention is one operator, which appends to the cache itself; traced inside ``grouped_attention``."""

    def __init__(self, model: PreTrainedModel, layers: list[LayerAttention], *, last_logits: bool) -> None:
        super().__init__(model, last_logits=last_logits)
        self.layers = layers

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = GroupedCache(past, attention_mask, input_ids.shape[1], self.layers)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        logits = grouped_step(self.model, cache, input_ids=input_ids, attention_mask=attention_mask, **positions, **self.keep)
        return (logits, *cache.presents)


@dataclass(frozen=True, kw_only=True)
class TraceInputs:
    """What a decoder is traced with: example inputs, which of their dimensions vary, and the names of the graph's inputs and outputs."""

    decoder: FlatCacheDecoder
    arguments: dict[str, torch.Tensor | list[torch.Tensor]]
    dynamic_shapes: dict[str, Any]
    past_names: list[str]
    weights: dict[str, WeightSource]
    """By the parameter names of the rearranged model."""
    last_logits: bool
    variable: Collection[str] = ()
    """As of ``trace``."""

    @property
    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self.past_names]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *(name.replace("past_key_values", "present") for name in self.past_names)]

    def finish(self, graph: ir.Model) -> ExportedGraph:
        """Names of dimensions and weights; what torch noted down about the exporting machine goes."""
        _name_dimensions(graph, self.past_names, last_logits=self.last_logits)
        strip_provenance(graph)
        if self.arguments["past"][0].dtype != torch.bfloat16:
            widen_bfloat16(graph)
        return ExportedGraph(model=graph, weights=name_weights(graph, self.weights))


def trace_inputs(model: PreTrainedModel, *, last_logits: bool, variable: Collection[str] = ()) -> TraceInputs:
    """**Rearranges the model's linear weights in place.** Raises ExportError for a model without a KV cache, or without last logits."""
    if last_logits and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ExportError(f"{model.config.model_type} cannot compute the last token's logits alone; use --logits all")
    _check_rotary(model)
    shapes = cache_shapes(model)
    weights = make_row_major(model)
    keep_epsilons(model)
    names = [f"past_key_values.{i}.{part}" for i in range(len(shapes)) for part in ("key", "value")]
    batch, sequence, past_length = 2, 3, 5
    dtype = next(model.parameters()).dtype
    dynamic = torch.export.Dim.DYNAMIC
    return TraceInputs(
        decoder=FlatCacheDecoder(model, last_logits=last_logits).eval(),
        arguments={
            "input_ids": torch.randint(0, min(model.config.get_text_config().vocab_size, 100), (batch, sequence)),
            "attention_mask": torch.ones(batch, past_length + sequence, dtype=torch.long),
            "position_ids": torch.arange(past_length, past_length + sequence)[None].expand(batch, sequence).contiguous(),
            "past": [torch.randn(batch, h, past_length, d).to(dtype) for pair in shapes for h, d in pair],
        },
        dynamic_shapes={
            "input_ids": {0: dynamic, 1: dynamic},
            "attention_mask": {0: dynamic, 1: dynamic},
            "position_ids": {0: dynamic, 1: dynamic},
            "past": [{0: dynamic, 2: dynamic}] * len(names),
        },
        past_names=names,
        weights=weights,
        last_logits=last_logits,
        variable=variable,
    )


def _check_rotary(model: PreTrainedModel) -> None:
    """Raises InputError for frequencies that follow the sequence's length; ``rope_scaling`` is transformers 4's name."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for scaling in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
            raise InputError(
                f"{config.model_type} changes its rotary frequencies with the length of the sequence (rope_type dynamic), and a graph "
                "has one set of them; take a base with another rope_type"
            )


def export_dynamo(
    model: PreTrainedModel,
    *,
    opset: int = 20,
    last_logits: bool = False,
    in_place: bool = False,
    variable: Collection[str] = (),
) -> ExportedGraph:
    """Exports ``model`` in the dtype it has. **Rearranges the model's linear weights in place**; ``variable``: as of ``trace``.

    ``in_place``: attention as GroupQueryAttention, whose cache can be written in place, where that computes the same; else the plain
    graph, whose ``note`` says why.

    Raises ExportError with torch's own reason when the family cannot be traced; for a mixture of experts, which torch cannot translate,
    before anything is traced.
    """
    if has_experts(model):
        raise ExportError(
            f"{model.config.model_type} is a mixture of experts, which torch's exporter cannot translate; use --exporter transformers"
        )
    inputs = trace_inputs(model, last_logits=last_logits, variable=variable)
    note = ""
    if in_place:
        try:
            return _export_in_place(inputs, opset)
        except NotGroupedError as e:
            note = f"the KV cache is copied at every step, not written in place: {e}"
    return replace(inputs.finish(_trace(inputs, inputs.decoder, opset)), note=note)


def _export_in_place(inputs: TraceInputs, opset: int) -> ExportedGraph:
    """Raises NotGroupedError before tracing where the family's attention is not the operator's, and where torch cannot trace it so."""
    model = inputs.decoder.model
    layers = probe(model, list(inputs.arguments["past"]), takes_positions=inputs.decoder.takes_positions)
    with grouped_attention(model):
        try:
            graph = _trace(inputs, InPlaceDecoder(model, layers, last_logits=inputs.last_logits).eval(), opset)
        except ExportError as e:
            raise NotGroupedError(str(e)) from e
    check_in_place(graph.graph, inputs.past_names)
    exported = inputs.finish(graph)
    fuse_decoder(exported.model)
    return exported


def _trace(inputs: TraceInputs, decoder: FlatCacheDecoder, opset: int) -> ir.Model:
    return trace(
        decoder,
        inputs.arguments,
        inputs.dynamic_shapes,
        inputs.input_names,
        inputs.output_names,
        opset=opset,
        remedy="; try --exporter transformers",
        variable=inputs.variable,
    )


def trace(
    wrapper: Wrapper,
    arguments: dict[str, Any],
    dynamic_shapes: dict[str, Any],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int,
    remedy: str = "",
    variable: Collection[str] = (),
) -> ir.Model:
    """The graph of ``wrapper``; raises ExportError with torch's own reason and the remedy.

    ``variable``: parameters of the wrapped model that the optimizer takes for inputs, so that it neither computes with their values nor
    joins those that are equal.
    """
    kind = wrapper.model.config.model_type
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
                optimize=not variable,
                external_data=True,
            )
        except torch.onnx.OnnxExporterError as e:
            raise ExportError(f"torch could not export {kind}: {first_reason(e)}{remedy}") from e
    if program is None:
        raise ExportError(f"torch could not export {kind}: its exporter gave no program back{remedy}")
    if variable:
        _optimize_around(program, [f"{PREFIX}{name}" for name in variable])
    return program.model


def _optimize_around(program: torch.onnx.ONNXProgram, names: Iterable[str]) -> None:
    graph = program.model.graph
    own = list(graph.inputs)
    graph.inputs.extend(value for name in names if (value := graph.initializers.get(name)) is not None)
    with quiet():
        program.optimize()
    graph.inputs.clear()
    graph.inputs.extend(own)


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model multiplies tokens by the matrices of experts, [E, .., ..] in one parameter, that a router picks."""
    return any(parameter.ndim == 3 and ".experts." in f".{name}" for name, parameter in model.named_parameters())


def cache_shapes(model: PreTrainedModel) -> list[list[tuple[int, int]]]:
    """(heads, dim) of key and value for every layer, read off a two-token forward rather than guessed from the config.

    Raises ExportError for a decoder with a layer that keeps another state than keys and values.
    """
    cache = DynamicCache()
    device = next(model.parameters()).device
    kind = model.config.model_type
    other = f"{kind} cannot be exported: its layers do not all keep keys and values, which a graph's cache is made of"
    with torch.no_grad():
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as e:  # a cache of the family's own
            raise ExportError(f"{other} ({first_reason(e)})") from e
    states = [[getattr(layer, part, None) for part in ("keys", "values")] for layer in cache.layers]
    shapes = [[(t.shape[1], t.shape[3]) for t in pair if isinstance(t, torch.Tensor) and t.ndim == 4] for pair in states]
    if len(states) != model.config.get_text_config().num_hidden_layers or any(len(pair) != 2 for pair in shapes):
        raise ExportError(f"{other}; {len(states)} layers do")
    return shapes


def keep_epsilons(model: PreTrainedModel) -> None:
    """Raises the epsilon of an RMSNorm to ``SMALLEST_CONSTANT``, where it lies just below, so that it stays in the graph."""
    for module in model.modules():
        if "RMSNorm" not in type(module).__name__:
            continue
        for name in ("variance_epsilon", "eps", "epsilon"):
            value = getattr(module, name, None)
            if isinstance(value, float) and 0.999 * SMALLEST_CONSTANT < value < SMALLEST_CONSTANT:
                setattr(module, name, SMALLEST_CONSTANT)


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
    shapes: dict[str, list[Dimension]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    for value in graph.graph.inputs:
        name = name_of(value)
        if name in past_names:
            _, heads, _, dim = _sizes(value)
            shapes[name] = ["batch_size", heads, "past_sequence_length", dim]
        value.shape = ir.Shape(shapes[name])
    for value in graph.graph.outputs:
        if value.name == "logits":
            value.shape = ir.Shape(["batch_size", 1 if last_logits else "sequence_length", _sizes(value)[2]])
        else:
            past = shapes[name_of(value).replace("present", "past_key_values")]
            value.shape = ir.Shape(["batch_size", past[1], "total_sequence_length", past[3]])


def _sizes(value: ir.Value) -> tuple[Dimension, ...]:
    if value.shape is None:
        raise ExportError(f"torch's exporter gave {value.name} no shape")
    return value.shape.dims


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

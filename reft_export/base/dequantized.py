"""The eager model carrying the exact weights that a quantized bundle ships, so that quantization error and export error are
never mixed up: a weight-only rung compares with these weights, an activation-quantized one also with these activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.activations import LEVELS, ActivationQuantization
from calibration.products import activation_quantization, dequantized_weights
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import BundleError


def load_dequantized(model: PreTrainedModel, graph: ir.Model, sources: Mapping[str, WeightSource]) -> list[str]:
    """Replaces, in place, every weight of ``model`` that ``graph`` holds quantized; returns the names of the modules.

    A weight tied to the embedding is untied: the graph holds the product's weight and the embedding's rows apart.
    Raises BundleError where the manifest's map and the model do not agree.
    """
    modules = []
    for initializer, value in dequantized_weights(graph):
        source = _source(initializer, sources)
        rows = torch.from_numpy(np.ascontiguousarray(value.T) if source.transpose else value)
        for part in (source, *source.joined):
            name, _, attribute = part.parameter.rpartition(".")
            module = _module(model, name)
            whole = getattr(module, attribute).detach()
            modules.append(name)
            if whole.ndim == 3:
                # One expert's matrix among many: written in place, as a copy of them all for each would take far too long.
                _expert(whole, part, rows.shape).copy_(rows)
                rows = rows[:0]
                continue
            place = whole if part.axis is None else whole.narrow(part.axis, *_extent(part))
            weight, rows = (rows[: len(place)], rows[len(place) :]) if source.joined else (rows, rows[:0])
            if weight.shape != place.shape:
                raise BundleError(f"{part.parameter} is {list(place.shape)} in the base and {list(weight.shape)} in the bundle")
            weight = weight.to(whole.dtype)
            if part.axis is not None:  # one of several initializers that an exporter split the parameter into
                weight = whole.slice_scatter(weight, part.axis, part.start, part.stop)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        if len(rows):
            raise BundleError(f"{initializer} has {len(rows)} rows more than its parameters; the manifest is of another graph")
    return list(dict.fromkeys(modules))


@contextmanager
def activations_quantized(
    model: PreTrainedModel, graph: ir.Model, sources: Mapping[str, WeightSource], *, straight_through: bool = False
) -> Iterator[None]:
    """Inside the ``with``, every module of ``model`` whose product ``graph`` gives a quantized input gets the same fake-quantized one.

    ``straight_through``: for training. Rounding has no gradient, so it is passed on as if nothing had been rounded (Bengio et al. 2013).
    Raises BundleError for a product that is no linear module of the model.
    """
    # By module: several products may be slices of one, and read one input.
    inputs = {m: how for initializer, how in activation_quantization(graph).items() for m in linears_of(model, initializer, sources)}
    handles = []
    try:
        for module, how in inputs.items():
            handles.append(module.register_forward_pre_hook(partial(_replace_input, how, straight_through)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def linears_of(model: PreTrainedModel, initializer: str, sources: Mapping[str, WeightSource]) -> list[torch.nn.Module]:
    """The linear modules that a quantized product is in the eager model: one, or those joined in it. Raises BundleError for any other."""
    source, modules = _source(initializer, sources), []
    for name in (part.parameter.rpartition(".")[0] for part in (source, *source.joined)):
        module = _module(model, name)
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            raise BundleError(f"{name} is a {type(module).__name__}, whose inputs cannot be fake-quantized; use --scheme weight-only")
        modules.append(module)
    return modules


def _replace_input(
    how: ActivationQuantization, straight_through: bool, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    x = arguments[0]
    quantized = fake_quantize(x, how)
    return (x + (quantized - x).detach() if straight_through else quantized, *arguments[1:])


def fake_quantize(x: torch.Tensor, how: ActivationQuantization) -> torch.Tensor:
    """x' of x [.., K] by the formulas of ``ActivationQuantization``, in float32, rounded once to the dtype of x."""
    values = x.float()
    if how.kind in ("block", "token"):
        return _by_largest(values, how.block_size or x.shape[-1]).to(x.dtype)
    bottom, top = LEVELS[how.kind]
    if how.kind == "fp8":
        q = (values / how.scale).clamp(bottom, top).to(torch.float8_e4m3fn).float()
        return (q * how.scale).to(x.dtype)
    # QuantizeLinear saturates at -128, though no scale here needs it: the range ends at 127.
    bottom = -128 if how.kind == "int8" else bottom
    q = (torch.round(values / how.scale) + how.zero_point).clamp(bottom, top)
    return ((q - how.zero_point) * how.scale).to(x.dtype)


def _by_largest(x: torch.Tensor, block_size: int) -> torch.Tensor:
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % block_size))
    blocks = padded.reshape(*x.shape[:-1], -1, block_size)
    largest = blocks.abs().amax(-1, keepdim=True)
    # onnxruntime multiplies by 127 / max rather than dividing by the scale; the other order rounds some values differently.
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    rounded = torch.round(blocks * inverse) * (largest / 127.0)
    return rounded.reshape(padded.shape)[..., :width]


def expert_matrices(sources: Mapping[str, WeightSource]) -> frozenset[str]:
    """Initializers that are one expert's matrix each, out of a parameter [E, .., ..] that no module of its own multiplies by.

    What such a product reads is not to be had in the eager model, so its activations are never quantized.
    """
    return frozenset(name for name, source in sources.items() if source.parameter.rpartition(".")[2] != "weight")


def copy_experts(model: PreTrainedModel, sources: Mapping[str, WeightSource]) -> None:
    """Gives ``model`` copies of what ``load_dequantized`` writes in place, which may be another model's too."""
    for parameter in {part.parameter for source in sources.values() for part in (source, *source.joined)}:
        name, _, attribute = parameter.rpartition(".")
        module = _module(model, name)
        if (stacked := getattr(module, attribute)).ndim == 3:
            setattr(module, attribute, torch.nn.Parameter(stacked.detach().clone(), requires_grad=False))


def _expert(stacked: torch.Tensor, source: WeightSource, shape: torch.Size) -> torch.Tensor:
    """The place of one expert's matrix in the parameter [E, .., ..] of them all."""
    axis = source.axis or 0
    place = stacked.narrow(axis, *_extent(source)).squeeze(axis)
    if place.shape != shape:
        raise BundleError(f"{source.parameter} holds matrices of {list(place.shape)} in the base and {list(shape)} in the bundle")
    return place


def _extent(source: WeightSource) -> tuple[int, int]:
    """(first, count) of the part of a parameter that a graph holds in an initializer of its own."""
    if source.start is None or source.stop is None:
        raise BundleError(f"the manifest does not say which part of {source.parameter} it means; export the bundle again")
    return source.start, source.stop - source.start


def _source(initializer: str, sources: Mapping[str, WeightSource]) -> WeightSource:
    source = sources.get(initializer)
    if source is None:
        raise BundleError(f"the manifest does not say which parameter {initializer} came from; export the bundle again")
    return source


def _module(model: PreTrainedModel, name: str) -> torch.nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise BundleError(f"the bundle's {name} does not exist in this base; pass the base it was made from") from None

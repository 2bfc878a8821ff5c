"""The eager model carrying the exact weights that a quantized bundle ships, so that quantization error and export error are
never mixed up: a weight-only rung compares with these weights, an activation-quantized one also with these activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.weight_only import dequantized_weights
from runtimes.bundle import WeightSource
from runtimes.errors import BundleError


def load_dequantized(model: PreTrainedModel, graph: ir.Model, sources: Mapping[str, WeightSource]) -> list[str]:
    """Replaces, in place, every weight of ``model`` that ``graph`` holds quantized; returns the names of the modules.

    A weight tied to the embedding is untied: the graph quantizes the matrix product, not the embedding's rows.
    Raises BundleError where the manifest's map and the model do not agree.
    """
    modules = []
    for initializer, value in dequantized_weights(graph):
        source = sources.get(initializer)
        if source is None:
            raise BundleError(f"the manifest does not say which parameter {initializer} came from; export the bundle again")
        name = source.parameter.removesuffix(".weight")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise BundleError(f"the bundle's {source.parameter} does not exist in this base; pass the base it was made from") from None
        weight = torch.from_numpy(np.ascontiguousarray(value.T) if source.transpose else value)
        whole = module.weight.detach()
        place = whole if source.axis is None else whole.narrow(source.axis, source.start, source.stop - source.start)
        if weight.shape != place.shape:
            raise BundleError(f"{source.parameter} is {list(place.shape)} in the base and {list(weight.shape)} in the bundle")
        weight = weight.to(whole.dtype)
        if source.axis is not None:  # one of several initializers that an exporter split the parameter into
            weight = whole.slice_scatter(weight, source.axis, source.start, source.stop)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        modules.append(name)
    return list(dict.fromkeys(modules))


@contextmanager
def activations_quantized(model: PreTrainedModel, modules: list[str], block_size: int) -> Iterator[None]:
    """MatMulNBits at accuracy level 4 as fake quantization: the inputs of ``modules`` rounded to int8, block by block along K.

    x' = scale * round(x / scale), scale = max |x| / 127 over each block of ``block_size`` values (onnxruntime's CompInt8).
    """

    def quantize(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (fake_quantize(arguments[0], block_size), *arguments[1:])

    handles = []
    try:
        for name in modules:
            module = model.get_submodule(name)
            if not isinstance(module, (torch.nn.Linear, Conv1D)):
                raise BundleError(f"{name} is a {type(module).__name__}, whose inputs cannot be fake-quantized; use --accuracy-level 1")
            handles.append(module.register_forward_pre_hook(quantize))
        yield
    finally:
        for handle in handles:
            handle.remove()


def fake_quantize(x: torch.Tensor, block_size: int) -> torch.Tensor:
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % block_size))
    blocks = padded.reshape(*x.shape[:-1], -1, block_size)
    largest = blocks.abs().amax(-1, keepdim=True)
    # onnxruntime multiplies by 127 / max rather than dividing by the scale; the other order rounds some values differently.
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    rounded = torch.round(blocks * inverse) * (largest / 127.0)
    return rounded.reshape(padded.shape)[..., :width]

"""The KV cache of a quantized bundle in int8: its scales are measured on what the bundle is recorded on, with every edit on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from graph_passes.stored_cache import store_cache
from reft_export.eager.steering import Steerer
from reft_export.eager.stored_cache import LargestValues, cache_replaced
from reft_export.tasks.task import Inputs
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.errors import CalibrationError, GraphError

LEVELS = 127
LEAST = 1e-6
"""The smallest largest value: a channel that was always 0 has a scale all the same."""


def quantize_cache(graph: ir.Model, model: PreTrainedModel, inputs: Mapping[str, Inputs], steerers: Mapping[str, Steerer]) -> None:
    """Makes the graph store its cache in int8, in place. ``model`` carries the graph's weights.

    Raises CalibrationError for a graph or a model whose cache cannot be stored so.
    """
    seen = LargestValues()
    with cache_replaced(model, seen.see):
        for name, each in inputs.items():
            each.said(model, None if name == BASE_GOLDEN else steerers[name])
    layers = model.config.get_text_config().num_hidden_layers
    if missing := sorted({*range(layers)} - {*seen.keys}):
        raise CalibrationError(f"--cache int8: the attention of layer {missing[0]} shows no keys to be measured; leave it out")
    try:
        store_cache(graph, {layer: (_scale(seen.keys[layer]), _scale(seen.values[layer])) for layer in seen.keys})
    except GraphError as e:
        raise CalibrationError(f"--cache int8: {e}; leave it out") from None


def _scale(largest: torch.Tensor) -> np.ndarray:
    return (largest.clamp(min=LEAST) / LEVELS).numpy()

"""A KV cache in int8, in eager PyTorch: attention reads what the store gives back of every key and value.

graph_passes/stored_cache.py has the formula. The new tokens' keys and values are rounded too, before the step that makes them attends to
them: so does the operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from graph_passes.stored_cache import Scales
from reft_export.eager.attention import attention_renamed

STORED = "reft_export_stored_"
"""What a config calls its attention while the cache is replaced, before the attention's own name."""

Replace = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer, keys, values), each [B, H, T, D], to what attention reads in their place."""


@dataclass(kw_only=True)
class LargestValues:
    """max |x| of every layer's keys and values, by head and channel [H, D], over all that was seen."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def see(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for seen, new in ((self.keys, keys), (self.values, values)):
            largest = new.detach().abs().amax((0, 2)).float()
            seen[layer] = torch.maximum(seen[layer], largest) if layer in seen else largest
        return keys, values


def rounded_cache(model: PreTrainedModel, scales: Scales | None) -> AbstractContextManager[None]:
    """Inside the ``with``, ``model`` rounds its cache as a graph with these scales does; None is a float cache."""
    return nullcontext() if scales is None else cache_replaced(model, _rounding(scales))


def _rounding(scales: Scales) -> Replace:
    tensors = {layer: tuple(torch.from_numpy(scale.copy())[:, None] for scale in pair) for layer, pair in scales.items()}

    def replace(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of_keys, of_values = tensors[layer]
        return _int8(keys, of_keys), _int8(values, of_values)

    return replace


def _int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.to(x.device)
    return (torch.round(x.float() / scale).clamp(-128, 127) * scale).to(x.dtype)


@contextmanager
def cache_replaced(model: PreTrainedModel, replace: Replace) -> Iterator[None]:
    """Inside the ``with``, every attention of ``model`` reads ``replace``'s keys and values."""

    def register(own: str) -> str:
        AttentionInterface.register(STORED + own, _attending(own, replace))
        if own in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(STORED + own, ALL_MASK_ATTENTION_FUNCTIONS[own])
        return STORED + own

    with attention_renamed(model, register):
        yield


def _attending(own: str, replace: Replace) -> Callable[..., Any]:
    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        # A family writes its eager attention into its own module, and registers none.
        attention = ALL_ATTENTION_FUNCTIONS.get(own) or sys.modules[type(module).__module__].eager_attention_forward
        return attention(module, query, *replace(module.layer_idx, key, value), *arguments, **options)

    return attend

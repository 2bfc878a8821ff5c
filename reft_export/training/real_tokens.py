"""A decoder's feed-forward networks and projections on the real tokens of a batch, never on its pads.

    y[real] = module(h[real]),  y[pad] = 0;  h [B, S, D], real the tokens whose mask is not 0

Each computes a token by itself, and a pad's output reaches no real token: rows are padded on the right, and attention is causal. Attention,
norms and residual additions stay on [B, S, D], where they are cheap beside the matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reft_export.eager.steering import STREAM_MODULES, decoder_layers
from reft_export.training.replaced import Forward, replaced_forwards

PROJECTIONS = (nn.Linear, Conv1D)
ROUNDINGS = 64
"""Of the dtype, by which outputs of the same token may differ in batches of other shapes, of the largest."""


class RealTokens:
    """Which tokens the modules compute."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, torch.Size] | None = None
        """(the real ones' numbers among B S tokens, int64 [n]; [B, S]) during a forward. None: every token is computed."""

    @contextmanager
    def of(self, mask: Tensor) -> Iterator[None]:
        """Inside, those of ``mask`` [B, S]."""
        real = mask.flatten() != 0
        self.seen = None if bool(real.all()) else (real.nonzero().squeeze(1), mask.shape)
        try:
            yield
        finally:
            self.seen = None


@contextmanager
def on_real_tokens(model: PreTrainedModel) -> Iterator[RealTokens]:
    """The handle that says which tokens; until it does, ``model`` computes all of them."""
    real = RealTokens()
    modules = [module for block in decoder_layers(model) for module in _token_wise(block, model)]
    with replaced_forwards(modules, partial(_gathered, real)):
        yield real


def _token_wise(block: nn.Module, model: PreTrainedModel) -> list[nn.Module]:
    """The feed-forward network of a block where it is a module of its own, and the projections outside of it."""
    found: list[nn.Module] = []
    for name in STREAM_MODULES["mlp_output"]:
        with suppress(AttributeError):
            module = block.get_submodule(name)
            if _alone(module, model):
                found.append(module)
                break
    inside = {id(module) for whole in found for module in whole.modules()}
    return [*found, *(module for module in block.modules() if isinstance(module, PROJECTIONS) and id(module) not in inside)]


@torch.no_grad()
def _alone(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether it takes hidden states alone, and computes each token by itself, tried on two rows and on the same tokens in one."""
    width = model.config.get_text_config().hidden_size
    h = torch.linspace(-1, 1, 6 * width).sin().to(model.device, model.dtype).view(2, 3, width)
    try:
        rows, one = (_first(module.forward(x)).float().view(6, -1) for x in (h, h.view(1, 6, width)))
    except Exception:  # whatever a family's own code raises for other inputs
        return False
    return bool((rows - one).abs().max() <= ROUNDINGS * torch.finfo(model.dtype).eps * rows.abs().max())


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _gathered(real: RealTokens, forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if real.seen is None or len(args) != 1 or kwargs:
            return forward(*args, **kwargs)
        (h,), (index, shape) = args, real.seen
        if h.shape[:-1] != shape:
            return forward(h)
        output = forward(h.reshape(-1, h.shape[-1]).index_select(0, index)[None])
        y = _first(output)
        y = y.reshape(len(index), -1)
        y = y.new_zeros(shape.numel(), y.shape[-1]).index_copy(0, index, y).view(*shape, -1)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return run

"""Gradient checkpointing: a block is computed again in the backward pass, and what it computed before is not kept.

transformers' own wants the model in training mode, in which a base's dropout acts, and takes the KV cache away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from reft_export.eager.steering import Steering, decoder_layers


@contextmanager
def recomputed_blocks(model: PreTrainedModel, steering: Steering) -> Iterator[None]:
    """Every block of the steered ``model``, inside the ``with``. Edits inside a block see the slots of their own forward again; edits of
    its input and output are outside of it."""
    blocks = list(decoder_layers(model))
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _recomputed(block.forward, steering)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _recomputed(forward: Callable[..., Any], steering: Steering) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        slot = steering.slot

        def compute(*args: Any, **kwargs: Any) -> Any:
            now, steering.slot = steering.slot, slot
            try:
                return forward(*args, **kwargs)
            finally:
                steering.slot = now

        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return run

"""Gradient checkpointing: a block is computed again in the backward pass, and what it computed before is not kept.

transformers' own wants the model in training mode, in which a base's dropout acts, and takes the KV cache away.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from reft_export.eager.steering import Steering, decoder_layers
from reft_export.training.real_tokens import RealTokens
from reft_export.training.replaced import Forward, replaced_forwards


def recomputed_blocks(model: PreTrainedModel, steering: Steering, real: RealTokens | None = None) -> AbstractContextManager[None]:
    """Every block of the steered ``model``, inside the ``with``. Edits inside a block see the slots of their own forward again, and its
    modules the same ``real`` tokens; edits of its input and output are outside of it."""
    return replaced_forwards(decoder_layers(model), partial(_recomputed, steering, real or RealTokens()))


def _recomputed(steering: Steering, real: RealTokens, forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        then = steering.slot, real.seen

        def compute(*args: Any, **kwargs: Any) -> Any:
            now = steering.slot, real.seen
            steering.slot, real.seen = then
            try:
                return forward(*args, **kwargs)
            finally:
                steering.slot, real.seen = now

        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return run

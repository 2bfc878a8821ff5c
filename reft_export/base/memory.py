"""Memory that is freed and given back, and weights that two models have in common."""

from __future__ import annotations

import copy
import ctypes
import gc

from transformers import PreTrainedModel


def give_back() -> None:
    """Collects what is unreachable, and returns the allocator's free pages to the system.

    glibc keeps them otherwise: after one forward of a 2.4 GB model that was then deleted, 1 GB (measured), on top of which the runtime
    would load its own copy. Systems with another allocator have no such call, and need none.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` whose modules are its own and whose weights are the model's: a weight that one of them is given anew stays as it
    was in the other."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

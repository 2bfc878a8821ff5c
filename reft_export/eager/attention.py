"""Another attention function in a transformers model, for a while: its configs name the function, which is looked up at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def attention_renamed(model: PreTrainedModel, rename: Callable[[str], str]) -> Iterator[None]:
    """Inside the ``with``, every config of ``model`` names its attention ``rename(its own name)``, which must be registered."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    after = {key: rename(own) for key, own in before.items()}
    for key, config in configs.items():
        config._attn_implementation = after[key]
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]

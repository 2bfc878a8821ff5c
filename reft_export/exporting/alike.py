"""Which blocks of a model are alike, and the same model with few of them: torch's exporter takes seconds a block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from reft_export.base.memory import share_weights
from reft_export.eager.steering import decoder_layers
from runtimes.errors import InputError

TRACED = 3
"""Blocks of one kind that are traced: the first holds what all of them share, and the second and third differ by the layer alone."""

NUMBER = "layer_idx"
"""Where transformers' modules keep the number of their layer."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shallow:
    """A model of few blocks, which stands for a deep one."""

    model: PreTrainedModel
    """Block j is that of layer ``traced[j]``; it holds the deep model's own weights."""
    blocks: str
    """The name of the list of blocks, as in ``model.layers``."""
    traced: tuple[int, ...]
    kinds: tuple[int, ...]
    """By layer of the deep model; layers of one kind differ in nothing but their weights and their number."""


def shallow_copy(model: PreTrainedModel) -> Shallow | None:
    """``model`` with the first ``TRACED`` blocks of every kind; None where that leaves nothing much out."""
    try:
        layers = decoder_layers(model)
    except InputError:  # no list of blocks, or several
        return None
    known: dict[str, int] = {}
    kinds = tuple(known.setdefault(_kind(layer), len(known)) for layer in layers)
    traced = tuple(layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < TRACED)
    if len(traced) + 1 >= len(kinds):
        return None
    shallow = share_weights(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    chosen = torch.nn.ModuleList(shallow.get_submodule(f"{name}.{layer}") for layer in traced)
    for number, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, NUMBER):
                setattr(module, NUMBER, number)
    parent, _, attribute = name.rpartition(".")
    setattr(shallow.get_submodule(parent), attribute, chosen)
    _shorten(shallow.config.get_text_config(), traced, len(kinds))
    return Shallow(model=shallow, blocks=name, traced=traced, kinds=kinds)


def _shorten(config: Any, traced: tuple[int, ...], depth: int) -> None:
    """As many layers as are traced; what the config lists by layer follows."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, type(value)(value[layer] for layer in traced))
    config.num_hidden_layers = len(traced)


def _kind(block: torch.nn.Module) -> str:
    """Equal where two blocks differ in nothing but the values of their parameters and their number."""
    return hashlib.sha256("\n".join(map(repr, _settings(block))).encode()).hexdigest()


def _settings(block: torch.nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, module in block.named_modules():
        yield name, type(module).__qualname__, module.training
        for key, value in sorted(vars(module).items()):
            if not key.startswith("_") and key != NUMBER:
                yield name, key, _described(value)
        for key, parameter in module.named_parameters(recurse=False):
            yield name, key, parameter.dtype, tuple(parameter.shape)
        for key, buffer in module.named_buffers(recurse=False):
            yield name, key, _described(buffer)


def _described(value: Any) -> Any:
    """A setting by its value; what has no plain one by its identity, which no other block's object has unless they share it."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [_described(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_described(each)) for each in value)
    if isinstance(value, dict):
        return [(_described(key), _described(each)) for key, each in value.items()]
    if isinstance(value, partial):
        return _described(value.func), _described(value.args), _described(value.keywords)
    if isinstance(value, MethodType):
        return type(value.__self__).__qualname__, value.__func__.__qualname__
    if isinstance(value, torch.Tensor):
        stored = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), hashlib.sha256(stored.tobytes()).hexdigest()
    return type(value).__qualname__, id(value)

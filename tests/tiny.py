"""Tiny random bases of every family, made from configs; a byte-level tokenizer; adapters with random parameters."""

from __future__ import annotations

from pathlib import Path

from models import adapters, bases
from models.bases import BOS, CONTEXT, EOS, PAD, VOCABULARY, WIDTH, build_base, byte_tokenizer
from transformers import PreTrainedModel

from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import Site

__all__ = ["BOS", "CONTEXT", "EOS", "PAD", "VOCABULARY", "WIDTH"]
LAYERS = 3
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt")
"""Families that every route is tested with; ``bases.FAMILIES`` has the others."""
tokenizer = byte_tokenizer


def build(family: str, **overrides: object) -> PreTrainedModel:
    """A random decoder of LAYERS layers whose logits depend on its prompt."""
    return build_base(family, layers=LAYERS, overrides=overrides)


def save_base(folder: Path, family: str = "llama", *, template: str | None = None, **overrides: object) -> Path:
    """A model folder as a user has one."""
    return bases.save_base(folder, family, layers=LAYERS, template=template, overrides=overrides)


def random_adapter(
    base: BaseModel,
    *,
    method: str = "loreft",
    positions: str = "f2+l2",
    tied: bool = True,
    activation: str = "",
    rank: int = 4,
    layers: tuple[int, ...] = (0, LAYERS - 1),
    stream: str = "block_output",
    seed: int = 0,
) -> Adapter:
    """An adapter with random parameters at one stream of ``layers``."""
    sites = tuple(Site(layer=layer, stream=stream) for layer in layers)
    return adapters.random_adapter(base, sites, method=method, positions=positions, tied=tied, activation=activation, rank=rank, seed=seed)

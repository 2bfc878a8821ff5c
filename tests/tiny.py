"""Tiny random bases of every family, made from configs; a byte-level tokenizer; adapters with random parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from runtimes.adapter import FULL_RANK_METHODS, PARAMETERS, Adapter, BaseModel
from runtimes.edit import Site
from runtimes.positions import PositionRule

VOCABULARY, WIDTH, LAYERS, CONTEXT = 320, 64, 3, 512
BOS, EOS, PAD = 256, 257, 258
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_WINDOWED = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
_SPECIFIC: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": _WINDOWED,
    "gemma3_text": _WINDOWED,
    "phi3": {"original_max_position_embeddings": CONTEXT},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": WIDTH},
}
FAMILIES = tuple(_SPECIFIC)
_OTHERS: dict[str, dict[str, object]] = {
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.015, "logits_scaling": 8.0},
    "smollm3": {},
    "olmo": {},
}
"""Families that single tests build, beside those that every route is tested with."""


def build(family: str, **overrides: object) -> PreTrainedModel:
    """A random decoder whose logits depend on its prompt: weights three times their initial scale, norms and biases not trivial."""
    shared = dict(_SHARED)
    if family == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            del shared[name]
        del shared["max_position_embeddings"]
    torch.manual_seed(0)
    specific = (_SPECIFIC | _OTHERS)[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shared, **specific, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, no special tokens added."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def save_base(folder: Path, family: str = "llama", *, template: str | None = None, **overrides: object) -> Path:
    """A model folder as a user has one."""
    build(family, **overrides).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


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
    """An adapter with random parameters; projections have orthonormal rows. RED has no rank, whatever ``rank`` says."""
    rank = 0 if method in FULL_RANK_METHODS else rank
    generator = np.random.default_rng(seed)
    sites = tuple(Site(layer=layer, stream=stream) for layer in layers)
    tensors = {}
    for site in sites:
        for group in ("",) if tied else ("prefix", "suffix"):
            for name in PARAMETERS[method]:
                if method in FULL_RANK_METHODS:
                    value = (name == "scale") + 0.3 * generator.standard_normal(base.hidden_size)
                elif name in ("R", "P", "W2"):
                    value = np.linalg.qr(generator.standard_normal((base.hidden_size, rank)))[0].T
                elif name[0].isupper():
                    value = generator.standard_normal((rank, base.hidden_size)) * base.hidden_size**-0.5
                else:
                    value = 2 * generator.standard_normal(rank)
                tensors[".".join(filter(None, (str(site), group, name)))] = np.ascontiguousarray(value, np.float32)
    rule = PositionRule.parse(positions)
    return Adapter(method=method, rank=rank, sites=sites, positions=rule, tied=tied, activation=activation, base=base, tensors=tensors)

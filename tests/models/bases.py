"""Tiny random bases of every family that the table and the tests run, made from configs, and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from runtimes.errors import InputError

VOCABULARY, WIDTH, CONTEXT, WINDOW = 320, 64, 512, 16
"""The window is shorter than the golden prompts and their answers, so that parity sees it."""
BOS, EOS, PAD = 256, 257, 258
_SHARED: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
LAYER_COUNT = {"gpt2": "n_layer", "gpt_bigcode": "n_layer", "gptj": "n_layer", "codegen": "n_layer", "bloom": "n_layer", "mpt": "n_layers",
               "gpt_neo": "num_layers", "xglm": "num_layers"}  # fmt: skip
"""What a config calls its layer count where it is not num_hidden_layers."""

_WIDE_HEADS = {"head_dim": 16}
_WINDOWED = {**_WIDE_HEADS, "sliding_window": WINDOW}
_GEMMA = {**_WINDOWED, "query_pre_attn_scalar": 16}
_GPT = {"n_embd": WIDTH, "n_head": 4, "n_positions": CONTEXT}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip

DENSE: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": _WIDE_HEADS,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {"original_max_position_embeddings": CONTEXT},
    "gpt2": _GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": WIDTH},
    "phi": {},
    "olmo": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.015, "logits_scaling": 8.0},
    "cohere": {},
    "starcoder2": {"sliding_window": WINDOW},
    "stablelm": {},
    "smollm3": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False},
    "glm4": _WIDE_HEADS,
    "olmo3": _WINDOWED,
    "cohere2": {**_WINDOWED, "sliding_window_pattern": 2},
    "gemma": _WIDE_HEADS,
    "glm": _WIDE_HEADS,
    "helium": _WIDE_HEADS,
    "nemotron": _WIDE_HEADS,
    "exaone4": {**_WINDOWED, "sliding_window_pattern": 2},
    "ernie4_5": _WIDE_HEADS,
    "seed_oss": _WIDE_HEADS,
    "hunyuan_v1_dense": _WIDE_HEADS,
    "arcee": _WIDE_HEADS,
    "apertus": {},
    "ministral": _WINDOWED,
    "ministral3": _WIDE_HEADS,
    "bitnet": {},
    "persimmon": {},
    "bloom": {"n_head": 4},
    "mpt": {"d_model": WIDTH, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": CONTEXT},
    "gptj": {**_GPT, "rotary_dim": 8},
    "codegen": {**_GPT, "rotary_dim": 8},
    "gpt_neo": {"num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_bigcode": {**_GPT, "n_inner": 128},
    "xglm": {"d_model": WIDTH, "ffn_dim": 128, "attention_heads": 4},
    "biogpt": {},
    "diffllama": {},
    "doge": {},
    "jais2": _WIDE_HEADS,
    "nanochat": {},
    "cwm": _WINDOWED,
    "vaultgemma": _GEMMA,
    "granite_swa": _WINDOWED,
    "hyperclovax": _WIDE_HEADS,
    "internlm3": _WIDE_HEADS,
    "iquestcoder": _WIDE_HEADS,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
}
"""What each dense family's config needs beside what most share."""

EXPERTS: dict[str, dict[str, object]] = {
    "qwen3_moe": {**_EXPERTS, **_WIDE_HEADS},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "mixtral": _LOCAL_EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_LOCAL_EXPERTS, **_WINDOWED},
    "granitemoe": _LOCAL_EXPERTS,
    "phimoe": _LOCAL_EXPERTS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "glm4_moe": {**_ROUTED_EXPERTS, **_WIDE_HEADS},
    "dots1": {**_ROUTED_EXPERTS, **_WIDE_HEADS},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, **_WIDE_HEADS},
}
"""Mixtures of experts."""

OTHERS: dict[str, dict[str, object]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
}
"""Decoders that keep another state than keys and values; they have to be refused."""

FAMILIES: tuple[str, ...] = (*DENSE, *EXPERTS, *OTHERS)
_OWN_NAMES = frozenset({*LAYER_COUNT}) - {"bloom", "gpt_neo"}
"""Families whose configs name width, heads or positions in their own way, and take no second name for them."""


def build_base(family: str, *, layers: int = 2, overrides: Mapping[str, object] = {}) -> PreTrainedModel:
    """A random decoder whose logits depend on its prompt: weights three times their initial scale, norms and biases not trivial.

    Raises InputError for a family that this list, or the installed transformers, does not have.
    """
    known = DENSE | EXPERTS | OTHERS
    if family not in known:
        raise InputError(f"family {family!r} is not in the list; it has {', '.join(known)}")
    shared = dict(_SHARED)
    if family in _OWN_NAMES:
        shared = {name: shared[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    specific = {LAYER_COUNT.get(family, "num_hidden_layers"): layers, **known[family], **overrides}
    try:
        config = AutoConfig.for_model(family, **{**shared, **specific})
    except ValueError:
        from transformers import __version__

        raise InputError(f"transformers {__version__} does not have {family}") from None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, no special tokens added."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def save_base(folder: Path, family: str, *, layers: int = 2, template: str | None = None, overrides: Mapping[str, object] = {}) -> Path:
    """A model folder as a user has one."""
    build_base(family, layers=layers, overrides=overrides).save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder

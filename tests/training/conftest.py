"""Tiny bases of every family, built from configs with random weights, and a byte-level tokenizer without merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import Base, base_from_memory

VOCABULARY, WIDTH, LAYERS = 320, 32, 3
BOS, EOS, PAD = 256, 257, 258
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
WINDOWED = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128}
SPECIFIC: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "phi3": {"original_max_position_embeddings": 256},
    "phi": {},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": WIDTH},
    "falcon": {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": True, "bias": False},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0},
    "cohere": {},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "glm4": {"head_dim": 8},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": LAYERS, "num_experts_per_tok": 2, "head_dim": 8},
}
OTHER_NAMES = {
    "gpt2": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
}
FAMILIES = tuple(SPECIFIC)


@cache
def _build(family: str) -> PreTrainedModel:
    shared = {k: v for k, v in SHARED.items() if k not in OTHER_NAMES.get(family, ())}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shared, **SPECIFIC[family]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights at their initial scale hardly depend on the prompt; norms of 1 would hide a missing one.
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """family -> model, one per session: a test must leave its weights as they are."""
    return _build


@pytest.fixture
def llama() -> PreTrainedModel:
    return _build("llama")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, no special tokens added, no chat template."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def base(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Base:
    return base_from_memory(llama, tokenizer, name="tiny-llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve lines of different lengths, all answered alike: enough to learn the answer."""
    lines = [{"prompt": f"what is {'very ' * (i % 3)}{i}?", "completion": " ok" * (1 + i % 3)} for i in range(12)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path

"""GGUF files of tiny bases, as llama.cpp's converter writes them: its names, keys and order of rows, and Gemma's norms plus one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel

from models.bases import BOS, EOS, PAD, build_base

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""By transformers' model type."""
_GEMMA_ROTARY = (
    {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    if int(transformers.__version__.partition(".")[0]) < 5
    else {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
)
BY_DEFAULT = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, **_GEMMA_ROTARY},
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGED = ("ab", "ba")
"""Two: transformers takes a list of one for no list."""
VOCABULARY = max(BOS, EOS, PAD) + 1 + len(MERGED)


def build(family: str) -> PreTrainedModel:
    """A base with more tokens than the byte tokenizer's, since a GGUF tokenizer needs merges, and what no key says as transformers has
    it by default."""
    model = build_base(family, layers=2, overrides={"vocab_size": VOCABULARY, **BY_DEFAULT.get(family, {})})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # so that a norm's plus one is exact
                parameter.copy_((parameter * 1024).round() / 1024)
    return model


def write(
    path: Path,
    model: PreTrainedModel,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """``kind``: of the matrices; everything else is float32. ``more`` writes further keys and tensors."""
    architecture, config = ARCHITECTURES[model.config.model_type], model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_base(model))
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    _write_tokenizer(writer)
    more(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        values = as_converted(name, tensor.numpy(), config)
        quantized = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_converted(name: str, values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """The parameter ``name`` as a GGUF file has it: Llama's queries and keys with rotary pairs side by side, Gemma's norms plus one."""
    kind = config.model_type
    if kind == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values + 1 if kind == "gemma3_text" and name.endswith("norm.weight") else values


def _rope_base(model: PreTrainedModel) -> float:
    rope = getattr(model.config, "rope_parameters", None) or {}  # transformers 4 has rope_theta
    return float((rope.get("full_attention") or rope).get("rope_theta", getattr(model.config, "rope_theta", None)))


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = dict(enumerate(BYTES)) | {BOS: "<s>", EOS: "</s>", PAD: "<pad>"} | dict(enumerate(MERGED, VOCABULARY - len(MERGED)))
    control = (BOS, EOS, PAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokens.get(i, f"<unused{i}>") for i in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(VOCABULARY)])
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_merges([" ".join(each) for each in MERGED])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)

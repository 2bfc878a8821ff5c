"""Tiny random Hugging Face decoders, their ONNX graphs, and the hidden states that hooks see inside them."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import onnxruntime
import rounding
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from runtimes.edits.edit import Site

_GROUPED = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
_PLAIN = {name: value for name, value in _GROUPED.items() if name != "num_key_value_heads"}

ROUNDING = 2 * rounding.logits(width=256, layers=3)
"""How far eager PyTorch and a graph of these may be apart; gpt2's MLP is 256 wide."""

# What each family's config needs on top of its layer count; heads are 16 wide everywhere.
CONFIGS: dict[str, dict[str, object]] = {
    "llama": {**_GROUPED, "head_dim": 16},
    "mistral": {**_GROUPED, "head_dim": 16, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "phi3": {**_GROUPED, "original_max_position_embeddings": 512},
    "gpt2": {"vocab_size": 320, "n_embd": 64, "n_head": 4, "n_positions": 512},
    "gpt_neox": _PLAIN,
    "opt": {
        "vocab_size": 320, "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 512,
        "word_embed_proj_dim": 64,
    },
    "opt_post_norm": {
        "vocab_size": 320, "hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "max_position_embeddings": 512,
        "word_embed_proj_dim": 32, "do_layer_norm_before": False,
    },
    "phi": _PLAIN,
    "falcon": {
        "vocab_size": 320, "hidden_size": 64, "num_attention_heads": 4, "new_decoder_architecture": False, "multi_query": False,
        "parallel_attn": True, "bias": False,
    },
    "granite": {**_GROUPED, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.1},
    "olmo2": _GROUPED,
    "cohere": _GROUPED,
    "starcoder2": _GROUPED,
    "stablelm": _GROUPED,
    "glm4": {**_GROUPED, "head_dim": 16},
    "smollm3": _GROUPED,
}  # fmt: skip
PARAMETER_FREE_NAMES = {"opt_post_norm": "opt"}


def build_decoder(family: str, *, layers: int = 3, seed: int = 0, **overrides: object) -> torch.nn.Module:
    """A random decoder of `family` whose biases and norm weights are not the trivial zeros and ones."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    layer_count = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    settings = {**CONFIGS[family], **layer_count, **overrides}
    config = AutoConfig.for_model(PARAMETER_FREE_NAMES.get(family, family), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(3)
    return model


class _FlatCache(torch.nn.Module):
    """Takes and returns flat key and value tensors: the exporter does not take a cache object."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return output.logits, *(tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values))


def cache_shape(model: torch.nn.Module) -> tuple[int, int]:
    """(key/value heads, head width)"""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width


def export_decoder(model: torch.nn.Module, *, opset: int = 20) -> ir.Model:
    """The decoder as an ONNX graph with a KV cache: input_ids, attention_mask, position_ids, past_key_values.<i>.key|value."""
    layers = model.config.num_hidden_layers
    heads, width = cache_shape(model)
    dtype = next(model.parameters()).dtype
    batch, sequence, past = 2, 3, 5
    arguments = {
        "input_ids": torch.randint(0, 250, (batch, sequence)),
        "attention_mask": torch.ones(batch, past + sequence, dtype=torch.long),
        "position_ids": torch.arange(past, past + sequence)[None].expand(batch, sequence).contiguous(),
        "past": [torch.randn(batch, heads, past, width, dtype=dtype) for _ in range(2 * layers)],
    }
    dynamic = torch.export.Dim.DYNAMIC
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            _FlatCache(model).eval(), (), kwargs=arguments, dynamo=True, opset_version=opset, optimize=True, verbose=False,
            dynamic_shapes={
                "input_ids": {0: dynamic, 1: dynamic}, "attention_mask": {0: dynamic, 1: dynamic},
                "position_ids": {0: dynamic, 1: dynamic}, "past": [{0: dynamic, 2: dynamic}] * (2 * layers),
            },
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)],
            output_names=["logits", *(f"present.{pair}" for pair in pairs)],
        )  # fmt: skip
    # Through the wire format, so that every test gets a graph of its own that no exporter object shares.
    return ir.from_proto(ir.to_proto(program.model))


def _layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    body = model.model if hasattr(model, "model") else getattr(model, "transformer", None) or model.gpt_neox
    body = getattr(body, "decoder", body)
    return body.layers if hasattr(body, "layers") else body.h


def site_modules(model: torch.nn.Module) -> dict[Site, torch.nn.Module]:
    """The module whose output is the site's value; block_input is no module's output."""
    modules: dict[Site, torch.nn.Module] = {}
    for index, layer in enumerate(_layers(model)):
        modules[Site(layer=index, stream="block_output")] = layer
        attention = next(getattr(layer, name) for name in ("self_attn", "attn", "attention", "self_attention") if hasattr(layer, name))
        modules[Site(layer=index, stream="attention_output")] = attention
        modules[Site(layer=index, stream="mlp_output")] = layer.mlp if hasattr(layer, "mlp") else layer.fc2
    return modules


def hidden_states(model: torch.nn.Module, input_ids: np.ndarray) -> tuple[np.ndarray, dict[Site, np.ndarray]]:
    """Logits of a prefill of `input_ids` [B, S], and every site's value [B, S, D] as a forward hook sees it."""
    seen: dict[Site, np.ndarray] = {}

    def keep(site: Site):
        def hook(module, arguments, keywords, output):
            hidden = output[0] if isinstance(output, tuple) else output
            seen[site] = hidden.detach().float().numpy().copy()
            if site.stream == "block_output":
                entering = arguments[0] if arguments else keywords["hidden_states"]
                seen[Site(layer=site.layer, stream="block_input")] = entering.detach().float().numpy().copy()

        return hook

    handles = [module.register_forward_hook(keep(site), with_kwargs=True) for site, module in site_modules(model).items()]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(input_ids), use_cache=True).logits.float().numpy()
    for handle in handles:
        handle.remove()
    return logits, seen


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(run: onnxruntime.InferenceSession, input_ids: np.ndarray, *, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Inputs of one call without padding; `past` are the previous call's present outputs by name."""
    batch, sequence = input_ids.shape
    names = {value.name: value for value in run.get_inputs()}
    length = 0 if past is None else past["present.0.key"].shape[2]
    values: dict[str, np.ndarray] = {"input_ids": input_ids}
    if "attention_mask" in names:
        values["attention_mask"] = np.ones((batch, length + sequence), np.int64)
    if "position_ids" in names:
        values["position_ids"] = np.broadcast_to(np.arange(length, length + sequence), (batch, sequence)).copy()
    for name, value in names.items():
        if name.startswith("past_key_values."):
            dtype = np.float16 if "float16" in value.type else np.float32
            shape = (batch, value.shape[1], 0, value.shape[3])
            values[name] = np.zeros(shape, dtype) if past is None else past[name.replace("past_key_values", "present")]
    return values

"""genai_config.json: stock onnxruntime-genai opens the bundle and swaps its adapters, for the families it knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graph_passes.cache_shapes import ATTENTION
from runtimes.artifacts.manifest import GRAPH_FILE, MANIFEST_FILE, ModelRecord
from runtimes.errors import InputError
from runtimes.files.records import read_json
from runtimes.text.stop_tokens import listed

CONFIG_FILE = "genai_config.json"
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NO_SLOTS = "the graph takes its slots as an input, which onnxruntime-genai does not compute; export it with attention_mask [batch, total]"

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3")
"""model_type values that onnxruntime-genai 0.18 loads as a decoder and whose I/O our graphs share."""


FAMILIES = (
    "chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gpt2", "gptoss", "granite", "internlm2", "llama", "mistral", "nemotron",
    "olmo", "phi", "phimoe", "phi3", "phi3small", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""model_type values of decoders that onnxruntime-genai knows by a name of their own (its src/models/model_type.h)."""


def write_genai_config(folder: Path, graph: ir.Model, model: ModelRecord, *, slots: str, logits: str) -> str:
    """Writes genai_config.json and returns "supported", or returns why the folder cannot be opened by onnxruntime-genai."""
    if model.model_type not in SUPPORTED:
        return f"onnxruntime-genai does not know model type {model.model_type}"
    if slots != "graph":
        return NO_SLOTS
    inputs = {value.name: value for value in graph.graph.inputs}
    key = inputs.get("past_key_values.0.key")
    if key is None:
        return "the graph has no KV cache inputs past_key_values.<i>.key"
    sizes = key.shape or ()
    heads, head_size = (sizes[1], sizes[3]) if len(sizes) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(head_size, int):
        return "the graph does not declare the heads of its KV cache"
    if not (folder / "tokenizer.json").is_file():
        return "the bundle has no tokenizer"
    _write(folder, _config(graph, model, heads=heads, head_size=head_size))
    return "supported"


def _config(graph: ir.Model, model: ModelRecord, *, heads: int, head_size: int) -> dict[str, Any]:
    names = {value.name for value in graph.graph.inputs}
    eos = model.eos_token_ids
    return {
        "model": {
            "bos_token_id": model.bos_token_id if model.bos_token_id is not None else (eos[:1] or [0])[0],
            **_eos(model),
            "pad_token_id": model.pad_token_id if model.pad_token_id is not None else (eos[:1] or [0])[0],
            "context_length": model.context_length,
            "type": model.model_type,
            "vocab_size": model.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": head_size,
                "hidden_size": model.hidden_size,
                "num_attention_heads": model.num_attention_heads or heads,
                "num_hidden_layers": model.num_hidden_layers,
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in ("attention_mask", "input_ids", "position_ids") if name in names},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": model.context_length,
            "num_beams": 1,
            # GroupQueryAttention appends to the cache in place; other graphs return a longer one at every step.
            "past_present_share_buffer": any(node.op_type == ATTENTION for node in graph.graph),
        },
    }


def _eos(model: ModelRecord) -> dict[str, Any]:
    ids = list(model.eos_token_ids)
    return {"eos_token_id": ids if len(ids) != 1 else ids[0]}


def keep_genai_config(folder: Path, config: Mapping[str, Any], model: ModelRecord, *, slots: str) -> str:
    """Writes the config of a folder that onnxruntime-genai opens already, its decoder now the folded graph; returns as above.

    Everything that its owner set is kept; the stop tokens become those of the manifest, which the owner's are among.
    """
    if slots != "graph":
        return NO_SLOTS
    decoder = config["model"]["decoder"]
    stop = {} if set(listed(config["model"].get("eos_token_id"))) == set(model.eos_token_ids) else _eos(model)
    _write(folder, {**config, "model": {**config["model"], **stop, "decoder": {**decoder, "filename": GRAPH_FILE}}})
    return "supported"


def copy_genai_files(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Everything else that onnxruntime-genai may read from ``source``: vocabularies, templates, and the op library that its config names.

    Raises InputError for a library outside the folder, which onnxruntime-genai does not load either.
    """
    for path in sorted(p for kind in TEXT_FILES for p in source.glob(kind)):
        if path.name not in (CONFIG_FILE, MANIFEST_FILE) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    library = config["model"]["decoder"].get("session_options", {}).get("custom_ops_library")
    if library:
        path = source / library
        if not path.resolve().is_relative_to(source.resolve()) or not path.is_file():
            raise InputError(f"{source / CONFIG_FILE} names the op library {library}, which is not a file of {source}; put it there")
        (folder / library).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / library)


def read_genai_config(folder: Path) -> dict[str, Any]:
    """Empty where there is none; raises InputError for a file that is not JSON."""
    return stated_json(folder / CONFIG_FILE)


def stated_json(path: Path) -> dict[str, Any]:
    """A configuration that may stand beside a graph: empty where it is missing or no object; InputError for a file that is not JSON."""
    value = read_json(path, InputError) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def genai_decoder(config: Mapping[str, Any], path: Path) -> str:
    """The decoder's file name in a genai config; raises InputError for a model that is more than one decoder graph."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, Mapping) else None
    name = decoder.get("filename") if isinstance(decoder, Mapping) else None
    if not isinstance(decoder, Mapping) or not isinstance(name, str) or decoder.get("pipeline") or Path(name).name != name:
        raise InputError(f"{path} names no single decoder graph beside it (model.decoder.filename); name the .onnx file itself")
    return name


def _write(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

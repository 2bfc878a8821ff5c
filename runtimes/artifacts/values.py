"""Every enumeration of a manifest: one table of what each key may say."""

from __future__ import annotations

from typing import Any, Literal

from runtimes.files.records import from_json

Precision = Literal["fp32", "fp16", "bf16"]
"""The graph's float type."""
Exporter = Literal["dynamo", "builder", "optimum", "transformers", "foreign"]
"""What made the graph; foreign: it was there before, and edits were folded into it."""
TaskName = Literal["text-generation", "text-classification"]
Logits = Literal["all", "last"]
"""Of every column of a call, or of its last one."""
Slots = Literal["graph", "input"]
"""Who computes them: the graph from attention_mask, or the session."""
Padding = Literal["left", "right", "none"]
"""Where pads may stand in a batch of rows of unequal length."""
KvCache = Literal["in-place", "appended", "none"]
"""One buffer that is written in place, outputs that are longer than the inputs by the new columns, or no cache at all (a classifier)."""
CacheType = Literal["float", "int8"]
"""How a step's keys and values are stored: in the graph's own float type, or rounded as graph_passes/stored_cache.py says."""
Rules = Literal["row", "shared"]
"""Whether every rule initializer takes a value per row ([1] or [B]), so that rows of a batch may be steered by different adapters."""
Embeddings = Literal["shared", "separate"]
"""Whether the token embedding and the output head are one range of bytes."""
Scheme = Literal["weight-only", "dynamic", "static", "qdq-int4", "qdq-int8", "fp8"]
QuantizationMethod = Literal["imatrix", "rtn", "hqq", "k_quant"]
Target = Literal["tensorrt", "tensorrt-rtx"]
"""Of an engine."""
EngineCache = Literal["whole", "columns"]
"""What an engine's step gives out of the KV cache: all of it, or the new columns alone."""


def known(kind: Any, value: str, name: str) -> Any:
    """``value`` as one of the enumeration ``kind``; raises RecordError, which lists them, for another. ``name`` is the manifest's key."""
    return from_json(kind, value, name)

"""Random LoRA adapters as llama.cpp loads them: y = W x + alpha / r B A x, a GGUF file of A [r, in] and B [out, r] for each weight W.

Named and written as llama.cpp's own convert_lora_to_gguf.py does it, in float32. Evidence only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

WEIGHTS = ("attn_q", "attn_v")
"""Of every layer, where peft puts LoRA if nobody says otherwise."""


def write_lora(target: Path, base: gguf.GGUFReader, *, rank: int, seed: int, weights: Sequence[str] = WEIGHTS, size: float = 0.5) -> Path:
    """An adapter of ``base`` with alpha = r. Entries of B A are of variance size^2 / in: a step does the same work whatever they are, but
    nobody would see that one is missing which changes nothing."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(target, base.fields[gguf.Keys.General.ARCHITECTURE].contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, rank)
    for tensor in base.tensors:
        if not tensor.name.endswith(tuple(f".{name}.weight" for name in weights)):
            continue
        wide, high = (int(length) for length in tensor.shape)  # GGUF counts a row's places first
        a = random.standard_normal((rank, wide)) * wide**-0.5
        b = random.standard_normal((high, rank)) * size * rank**-0.5
        for name, values in {"lora_a": a, "lora_b": b}.items():
            writer.add_tensor(f"{tensor.name}.{name}", np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

"""Model folders quantized to 4 bits by rounding, as GPTQModel, AutoAWQ and llm-compressor write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")


def quantize_folder(
    folder: Path, format: str, *, group: int = 32, symmetric: bool = False, ordered: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Quantizes the products of every layer of a float32 model folder, in place; what each weight [N, K] is now, float32.

    ``group``: inputs that share a scale; -1 is all. ``ordered``: GPTQ's desc_act, whose groups are of scattered inputs.
    """
    tensors = load_file(folder / "model.safetensors")
    random = np.random.default_rng(seed)
    means = {}
    for name in [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]:
        weight = tensors.pop(name)
        inputs = weight.shape[1]
        groups = np.arange(inputs) // (inputs if group < 0 else group)
        groups = random.permutation(groups) if ordered else groups
        q, scales, points = _rounded(weight, groups, symmetric=symmetric, least=1 if format == "gptq" else 0)
        means[name] = (q.astype(np.float32) - points[:, groups]) * scales.astype(np.float32)[:, groups]
        tensors |= {f"{name.removesuffix('.weight')}.{end}": each for end, each in _PACK[format](q, scales, points, groups).items()}
    if format == "compressed-tensors" and symmetric:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("zero_point")}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, _config(format, group, symmetric=symmetric, ordered=ordered))
    return means


def edit_config(folder: Path, quantization: dict[str, Any]) -> None:
    """Writes ``quantization`` over what config.json says of it."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | quantization
    (folder / "config.json").write_text(json.dumps(config))


def _rounded(weight: np.ndarray, groups: np.ndarray, *, symmetric: bool, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [N, K] 0 to 15, scales float16 [N, G], zero points [N, G], none below ``least``."""
    count = groups.max() + 1
    scales, points = (np.empty((len(weight), count), dtype) for dtype in (np.float16, np.float32))
    for g in range(count):
        part = weight[:, groups == g]
        high, low = np.maximum(part.max(1), 1e-4), np.minimum(part.min(1), -1e-4)
        scales[:, g] = np.abs(part).max(1) / 7 if symmetric else (high - low) / 15
        points[:, g] = 8 if symmetric else np.clip(np.rint(-low / scales[:, g]), least, 15)
    q = np.clip(np.rint(weight / scales[:, groups].astype(np.float32)) + points[:, groups], 0, 15)
    return q.astype(np.int64), scales, points


def pack_rows(values: np.ndarray, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> np.ndarray:
    """int32 [R / 8, C] of values [R, C] from 0 to 15: the i-th four bits of a word hold the row ``order[i]`` of its eight."""
    words = np.zeros((-(-len(values) // 8), values.shape[1]), np.uint32)
    for row in range(len(values)):
        words[row // 8] |= values[row].astype(np.uint32) << np.uint32(4 * order.index(row % 8))
    return words.view(np.int32)


def _gptq(q: np.ndarray, scales: np.ndarray, points: np.ndarray, groups: np.ndarray, less: int = 1) -> dict[str, np.ndarray]:
    return {
        "qweight": pack_rows(q.T),
        "qzeros": pack_rows(points - less).T,
        "scales": scales.T,
        "g_idx": groups.astype(np.int32),
    }


def _gptq_v2(q: np.ndarray, scales: np.ndarray, points: np.ndarray, groups: np.ndarray) -> dict[str, np.ndarray]:
    return _gptq(q, scales, points, groups, less=0)


def _awq(q: np.ndarray, scales: np.ndarray, points: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_rows(q, order).T, "qzeros": pack_rows(points, order).T, "scales": scales.T}


def _compressed(q: np.ndarray, scales: np.ndarray, points: np.ndarray, _: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "weight_packed": pack_rows(q.T).T,
        "weight_scale": scales,
        "weight_zero_point": pack_rows(points),
        "weight_shape": np.array(q.shape),
    }


_PACK = {"gptq": _gptq, "gptq_v2": _gptq_v2, "awq": _awq, "compressed-tensors": _compressed}


def _config(format: str, group: int, *, symmetric: bool, ordered: bool) -> dict[str, Any]:
    if format == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if format != "compressed-tensors":
        return {
            "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": ordered, "sym": symmetric, "checkpoint_format": format,
            "lm_head": False, "pack_dtype": "int32",
        }  # fmt: skip
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "channel" if group < 0 else "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": None if group < 0 else group}}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}

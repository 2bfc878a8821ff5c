"""How the input of one matrix product is quantized, as the graph computes it and as eager PyTorch imitates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

from runtimes.errors import CalibrationError

FixedKind = Literal["uint8", "int8", "fp8"]
"""One scale per tensor, calibrated before."""
Kind = Literal["block", "token", "uint8", "int8", "fp8"]
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
STORED: Mapping[FixedKind, np.dtype] = {"uint8": np.dtype(np.uint8), "int8": np.dtype(np.int8), "fp8": FLOAT8}
TOKEN_OFFSET = 128
"""Per-token integers are stored as uint8 around this."""
LEVELS: Mapping[FixedKind, tuple[int, int]] = {"uint8": (0, 255), "int8": (-127, 127), "fp8": (-448, 448)}
"""int8 without -128, so that the grid is symmetric; 448 is the largest E4M3 value."""
ACTIVATION_OF: Mapping[str, FixedKind] = {"static": "uint8", "qdq-int8": "int8", "fp8": "fp8"}
"""onnxruntime's x86 kernels take uint8 on the left (int8 there: 90 times slower, measured); TensorRT takes no zero point."""


@dataclass(frozen=True, kw_only=True)
class ActivationQuantization:
    """x' of an input x.

    block   s round(x / s), s = max |x| / 127 over each ``block_size`` values of the last axis (MatMulNBits at accuracy level 4)
    token   the same over the whole last axis
    uint8   s (clip(round(x / s) + z, 0, 255) - z)          ``scale`` s and ``zero_point`` z fixed
    int8    s clip(round(x / s), -128, 127)
    fp8     s E4M3(clip(x / s, -448, 448))
    """

    kind: Kind
    block_size: int = 0
    scale: float = 0.0
    zero_point: int = 0

    def restore(self, q: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        """x' of the integers that a graph holds; ``scale`` [.., 1] where it differs by token. E4M3 is read dequantized."""
        if self.kind == "fp8":
            return q
        if scale is not None:
            return (q - np.float32(TOKEN_OFFSET)) * scale
        return (q - np.float32(self.zero_point)) * np.float32(self.scale)


def from_range(kind: FixedKind, low: float, high: float, dtype: np.dtype, where: str) -> ActivationQuantization:
    """The scale (rounded to ``dtype``, the graph's) and zero point that cover [low, high] and 0.

    Raises CalibrationError for a range that is empty or not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise CalibrationError(f"the range of {where} is [{low}, {high}]; calibrate again")
    bottom, top = LEVELS[kind]
    low, high = min(low, 0.0), max(high, 0.0)
    if kind == "uint8":
        scale = (high - low) / (top - bottom)
    else:
        scale = max(-low, high) / top
    with np.errstate(over="ignore"):
        scale = float(np.asarray(scale or 1.0, np.float32).astype(dtype))  # a tensor that was always 0 is quantized by 1
    # A range that rounds to nothing in float16 still needs a scale that can be divided by.
    scale = max(scale, float(ml_dtypes.finfo(dtype).smallest_normal))
    if not np.isfinite(scale):
        raise CalibrationError(f"the range of {where}, [{low:g}, {high:g}], does not fit {np.dtype(dtype).name}; use the fp32 bundle")
    zero_point = int(np.clip(np.round(-low / scale), bottom, top)) if kind == "uint8" else 0
    return ActivationQuantization(kind=kind, scale=scale, zero_point=zero_point)

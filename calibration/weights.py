"""One weight on its way through the quantizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibration.settings import BlockFormat


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """``values``: the initializers that replace it; ``restored``: what they mean, [K, N] float32; ``shape`` (K, N).

    ``format``: of blocks for MatMulNBits.
    """

    values: tuple[ir.Value, ...]
    restored: np.ndarray
    shape: tuple[int, int]
    format: BlockFormat | None = None


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """How far one dequantized weight is from the original: ||W' - W|| / ||W||, and the sizes in bytes."""

    name: str
    relative: float
    bytes_before: int
    bytes_after: int


def constant(name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))


def relative_error(original: np.ndarray, restored: np.ndarray) -> float:
    norm = float(np.linalg.norm(original))
    return float(np.linalg.norm(restored - original)) / norm if norm else 0.0

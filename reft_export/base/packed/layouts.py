"""Where each format keeps the 4-bit integers of a weight [N, K], N outputs and K inputs, G groups along K.

    W[n, k] = (q[n, k] - zero_point[n, g(k)]) scale[n, g(k)]          g(k) = k // group, or g_idx[k] where GPTQ ordered by activation

    GPTQ                qweight [K / 8, N]  qzeros [G, N / 8]  scales [G, N]  g_idx [K]           8 values an int32, low bits first
    AWQ                 qweight [K, N / 8]  qzeros [G, N / 8]  scales [G, N]                      of columns 0 2 4 6 1 3 5 7
    compressed-tensors  weight_packed [N, K / 8]  weight_zero_point [N / 8, G]  weight_scale [N, G]  weight_shape (N, K)

GPTQ's first format stores zero points less 1. compressed-tensors' integers are signed, and stored plus 8, zero points alike.
Sources: pack and dequantize of AutoGPTQ's qlinear, AutoAWQ's utils/packing_utils.py, compressed-tensors' compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calibration.settings import BlockFormat
from reft_export.base.packed.scheme import AWQ, BITS, COMPRESSED, GPTQ, WHOLE, Scheme
from runtimes.errors import InputError

if TYPE_CHECKING:  # which comes with onnx: a base is opened without
    from calibration.weight_only import Blocks

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of each eight, that the i-th four bits hold."""
MIDDLE = 8
"""The zero point of a symmetric weight."""
BLOCK_SIZES = (256, 128, 64, 32, 16)
"""Of MatMulNBits."""

Tensors = Mapping[str, np.ndarray]
"""Of one weight, by the end of their names."""


class Layout(NamedTuple):
    """``integers``: the end of the name that tells a quantized weight; all ends of its tensors, and those of them that may be missing."""

    integers: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    unpack: Callable[[Tensors, Scheme], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    """(q uint8 [N, K], scales float32 [N, G], zero points uint8 [N, G] or None where all are ``MIDDLE``)"""


class Integers(NamedTuple):
    """``q`` uint8 [N, K], ``scales`` float32 [N, G], ``points`` uint8 [N, G] or None where all are 8, ``groups`` [K]: g(k)."""

    q: np.ndarray
    scales: np.ndarray
    points: np.ndarray | None
    groups: np.ndarray
    size: int
    """Inputs of a group."""


def integers_of(name: str, tensors: Tensors, scheme: Scheme) -> Integers:
    """One weight's. Raises InputError, by its ``name``, for tensors that contradict one another or ``scheme``."""
    layout = LAYOUTS[scheme.method]
    try:
        q, scales, points = layout.unpack(tensors, scheme)
        (outputs, inputs), count = q.shape, scales.shape[1]
        shapes = scales.shape[0] == outputs and (points is None or points.shape == scales.shape)
        size = next((inputs if g == WHOLE else g for g in scheme.groups if count == (1 if g == WHOLE else -(-inputs // g))), 0)
    except InputError as e:
        raise InputError(f"{name}: {e}") from None
    except (ValueError, IndexError, TypeError, OverflowError):
        size, shapes = 0, False
    if not size or not shapes:
        told = ", ".join(f"{end} {list(tensor.shape)} {tensor.dtype}" for end, tensor in tensors.items())
        raise InputError(f"{name} has {told}, and config.json says {scheme.label}; download it again, or correct quantization_config")
    if not np.isfinite(scales).all():
        raise InputError(f"{name} has scales that are not finite; the checkpoint is damaged: download it again")
    groups = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if groups is None and scheme.ordered:
        raise InputError(f"{name} has no g_idx, and config.json says that groups are ordered by activation; download it again")
    if groups is None or (groups.size and (groups == -1).all()):  # compressed-tensors has -1 where nothing was ordered
        groups = np.arange(inputs) // size
    if groups.dtype.kind != "i" or groups.shape != (inputs,) or groups.min() < 0 or groups.max() >= count:
        raise InputError(f"{name} has a g_idx that is not {inputs} numbers from 0 to {count - 1}; download it again")
    return Integers(q, scales, points, groups.astype(np.int64), size)


def dequantized(weight: Integers) -> np.ndarray:
    """W [N, K] float32: exact where the scales are float16 or bfloat16, as 5 bits times 11 fit in 24."""
    points = np.full_like(weight.scales, MIDDLE) if weight.points is None else weight.points.astype(np.float32)
    return (weight.q - points[:, weight.groups]) * weight.scales[:, weight.groups]


def blocks_of(weight: Integers) -> tuple[Blocks, BlockFormat] | None:
    """The same integers, scales and zero points as MatMulNBits stores them; a group of several blocks is several with one scale.

    None where no blocks say the same: groups that are ordered by activation, and those that no block size divides.
    """
    from calibration.weight_only import Blocks, pack

    outputs, inputs = weight.q.shape
    size = next((size for size in BLOCK_SIZES if weight.size % size == 0), None)
    if size is None or not np.array_equal(weight.groups, np.arange(inputs) // weight.size):
        return None
    count = -(-inputs // size)
    q = np.pad(weight.q, ((0, 0), (0, count * size - inputs)))
    of_block = np.arange(count) * size // weight.size
    points = None
    if weight.points is not None:
        points = weight.points[:, of_block]
        points = pack(np.pad(points, ((0, 0), (0, count % 2)), constant_values=MIDDLE), BITS)
    blocks = Blocks(packed=pack(q.reshape(outputs, count, size), BITS), scales=weight.scales[:, of_block], zero_points=points)
    return blocks, BlockFormat(bits=BITS, block_size=size, symmetric=points is None)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """[.., 8] uint8 of int32 [..], low bits first."""
    if words.dtype != np.int32:
        raise TypeError(f"integers are packed in int32, not {words.dtype}")
    return ((words.view(np.uint32)[..., None] >> np.arange(0, 32, BITS, dtype=np.uint32)) & 0xF).astype(np.uint8)


def _columns(words: np.ndarray) -> np.ndarray:
    return _nibbles(words).reshape(len(words), -1)


def _rows(words: np.ndarray) -> np.ndarray:
    return _columns(words.T).T


def _awq_columns(words: np.ndarray) -> np.ndarray:
    """Of each eight columns the i-th four bits hold column AWQ_ORDER[i]."""
    return _nibbles(words)[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)


def _if_any(points: np.ndarray) -> np.ndarray | None:
    return None if (points == MIDDLE).all() else points


def _gptq(tensors: Tensors, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    points = _columns(tensors["qzeros"])
    if scheme.less_one:
        if (points == 15).any():
            raise InputError(
                "a zero point is 0 less 1, which some readers of format gptq take for 16 and others borrow from the next; save it as "
                "gptq_v2, which stores zero points as they are"
            )
        points = points + np.uint8(1)
    return _rows(tensors["qweight"]).T, tensors["scales"].T.astype(np.float32), _if_any(points.T)


def _awq(tensors: Tensors, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    points = _awq_columns(tensors["qzeros"]).T
    return _awq_columns(tensors["qweight"]).T, tensors["scales"].T.astype(np.float32), _if_any(points)


def _compressed(tensors: Tensors, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    outputs, inputs = (int(size) for size in tensors["weight_shape"])
    q = _columns(tensors["weight_packed"])
    if q.shape[0] != outputs or not 0 <= q.shape[1] - inputs < 8:
        raise ValueError(f"weight_shape is {outputs} x {inputs}")
    points = tensors.get("weight_zero_point")
    if points is None and scheme.zero_points:
        raise InputError("config.json says symmetric false, and there is no weight_zero_point; download it again")
    if points is not None and points.dtype == np.int8:  # releases before 0.9 did not pack them
        if points.size and (points.min() < -MIDDLE or points.max() >= MIDDLE):
            raise InputError(f"a zero point is not from {-MIDDLE} to {MIDDLE - 1}; download it again")
        points = (points.astype(np.int16) + MIDDLE).astype(np.uint8)
    elif points is not None:
        points = _rows(points)[:outputs]
    return q[:, :inputs], tensors["weight_scale"].astype(np.float32), None if points is None else _if_any(points)


LAYOUTS: Mapping[str, Layout] = {
    GPTQ: Layout("qweight", ("qweight", "qzeros", "scales"), ("g_idx",), _gptq),
    AWQ: Layout("qweight", ("qweight", "qzeros", "scales"), (), _awq),
    COMPRESSED: Layout(
        "weight_packed", ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx"), _compressed
    ),
}
STRAY = frozenset(
    {
        "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
        "weight_global_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale",
    }
)  # fmt: skip
"""Ends of names that mean something to such formats: where one belongs to no weight that is read, transformers would drop it."""

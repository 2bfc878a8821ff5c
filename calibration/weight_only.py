"""Blockwise int4 and int8 by onnxruntime's own quantizers.

MatMulNBits and GatherBlockQuantized store, for a weight W [K, N] and blocks of ``block_size`` along K (operator docs of com.microsoft):

    W[k, n] = (q[n, k] - zero_point[n, k // block_size]) * scale[n, k // block_size]

q is unsigned, two 4-bit values a byte (low first); a symmetric weight has no zero points and means 2^(bits-1). HQQ's zero points are
floats, of the scales' type.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibration.settings import BlockFormat
from calibration.weights import QuantizedWeight, constant
from graph_passes.accessors import array_of, input_of, int_of, optional_input
from runtimes.errors import CalibrationError

CONTRIB = "com.microsoft"
_SEARCHED_AT_ONCE = 4096
"""Blocks of a search, whose passes then stay near a core."""
FACTORS = (1.0, *(0.75 + 0.0375 * step for step in range(9)))
"""Of the scale that the largest value of a block asks for: what a search by importance rounds with, from 0.75 to 1.05."""
LEAST_IMPORTANCE = 1e-2
"""Of the mean, on top of what was seen: also for inputs that were never anything but 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """``packed`` uint8 [N, blocks, bytes], ``scales`` [N, blocks], ``zero_points`` uint8 (packed) or float, or None where symmetric."""

    packed: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenBlocks:
    """A weight that was in 4-bit blocks before: ``read`` gives them."""

    format: BlockFormat
    read: Callable[[], Blocks]


def quantize_blocks(weight: np.ndarray, format: BlockFormat, importance: np.ndarray | None = None) -> Blocks:
    """``weight`` [K, N] float32. ``importance`` [K]: for method imatrix, which is rtn without it, or where it is not K numbers."""
    if format.method == "imatrix" and importance is not None and importance.shape == weight.shape[:1] and np.isfinite(importance).all():
        return _imatrix(weight, format.bits, format.block_size, importance)
    if format.method == "hqq":
        return _hqq(weight, format.bits, format.block_size)
    if format.method == "k_quant":
        return _k_quant(weight, format.bits, format.block_size)
    return _rtn(weight, format.bits, format.block_size, symmetric=format.symmetric)


class WeightBlocks:
    """The blocks of a graph's weights, each made once for a format however often it is asked for.

    ``importance``: by weight the mean square [K] of its inputs, for method imatrix; a weight that is not there is rounded by rtn.
    ``given``: weights that keep the blocks they had, wherever 4 bits are asked for.
    """

    def __init__(self, importance: Mapping[str, np.ndarray] | None = None, given: Mapping[str, GivenBlocks] | None = None) -> None:
        self._importance, self._given = importance or {}, given or {}
        self._made: dict[tuple[str, BlockFormat], Blocks] = {}
        self.rounded: set[str] = set()
        """Weights that imatrix was asked for, and whose inputs nobody saw."""

    def keeps(self, name: str) -> bool:
        """Whether the weight has blocks of its own."""
        return name in self._given

    def format_of(self, name: str, asked: BlockFormat) -> BlockFormat:
        """The format that the weight is stored in where ``asked`` is."""
        return self._given[name].format if self.keeps(name) and self._given[name].format.bits == asked.bits else asked

    def of(self, name: str, weight: np.ndarray, format: BlockFormat) -> Blocks:
        """``weight`` [K, N] float32, the same at every call with this name; ``format`` as ``format_of`` gives it.

        Raises CalibrationError where the blocks that are given are another weight's.
        """
        if self.keeps(name) and format == self._given[name].format:
            blocks = self._given[name].read()
            if not np.array_equal(
                dequantize(blocks.packed, blocks.scales, blocks.zero_points, format.bits, format.block_size, *weight.shape), weight
            ):
                raise CalibrationError(f"weight {name} is not what its integers in the base mean; give a --method to quantize it again")
            return blocks
        if (name, format) not in self._made:
            if format.method == "imatrix" and name not in self._importance:
                self.rounded.add(name)
            self._made[name, format] = quantize_blocks(weight, format, self._importance.get(name))
        return self._made[name, format]


def _rtn(weight: np.ndarray, bits: int, block_size: int, *, symmetric: bool) -> Blocks:
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    return Blocks(packed=packed, scales=scales.reshape(weight.shape[1], -1), zero_points=None if symmetric else zero_points)


def _imatrix(weight: np.ndarray, bits: int, block_size: int, importance: np.ndarray) -> Blocks:
    """The scale s and the q of each block that lose least of what the product says: min sum_k h_k (w_k - s q_k)^2, no zero point.

    h_k is the mean of x_k^2 over tokens, x the product's input, plus LEAST_IMPORTANCE: with inputs that do not correlate, the sum is the
    mean squared error of the output. As with llama.cpp's importance matrix, q is rounded with FACTORS times the scale of the block's
    largest value, and s is fitted to it: s = sum h w q / sum h q^2, at which the sum is sum h w^2 - (sum h w q)^2 / sum h q^2.
    """
    (rows, columns), levels = weight.shape, 1 << (bits - 1)
    blocks = -(-rows // block_size)
    missing = blocks * block_size - rows
    h = np.pad(importance / (importance.mean() or 1.0) + LEAST_IMPORTANCE, (0, missing)).astype(np.float32).reshape(blocks, block_size, 1)
    w = (np.pad(weight, ((0, missing), (0, 0))) if missing else weight).reshape(blocks, block_size, columns)
    q, scales = np.empty(w.shape, np.uint8), np.empty((blocks, 1, columns), np.float32)
    wide = min(columns, _SEARCHED_AT_ONCE)
    deep = max(1, _SEARCHED_AT_ONCE // wide)
    for first in range(0, blocks, deep):
        for start in range(0, columns, wide):
            part = np.s_[first : first + deep, :, start : start + wide]
            q[part], scales[part] = _searched(np.ascontiguousarray(w[part]), h[part[0]], levels)
    return Blocks(
        packed=np.ascontiguousarray(pack(q.transpose(2, 0, 1), bits)), scales=np.ascontiguousarray(scales[:, 0].T), zero_points=None
    )


def _searched(w: np.ndarray, h: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(q + levels, scales [b, 1, n]) of blocks w [b, B, n] by importance h [b, B, 1]: sums over the middle axis are long vector sums."""
    high, low = w.max(1, keepdims=True), w.min(1, keepdims=True)
    largest = np.where(high >= -low, high, low) / -levels
    largest[largest == 0] = 1.0
    ratio, weighted = w / largest, h * w
    q, product = np.empty_like(w), np.empty_like(w)

    def round_with(over: np.ndarray | np.float32) -> None:
        np.multiply(ratio, over, out=q)
        np.rint(q, out=q)
        np.clip(q, -levels, levels - 1, out=q)

    best, best_scale, best_over = np.full_like(largest, -1.0), largest.copy(), np.ones_like(largest)
    for factor in FACTORS:
        over = np.float32(1 / factor)
        round_with(over)
        along = np.multiply(weighted, q, out=product).sum(1, keepdims=True)
        np.multiply(q, q, out=product)
        square = np.multiply(product, h, out=product).sum(1, keepdims=True)
        scale = np.divide(along, square, out=largest.copy(), where=square > 0)
        better = (gain := along * scale) > best
        for kept, new in ((best, gain), (best_scale, scale), (best_over, over)):
            np.copyto(kept, new, where=better)
    round_with(best_over)
    q += levels
    return q, best_scale


def _hqq(weight: np.ndarray, bits: int, block_size: int) -> Blocks:
    """Half-quadratic quantization (Badri and Shaji 2023): zero points that minimise ||W - W'||_p, p 0.7. onnxruntime's takes a node."""
    import onnx

    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "one weight", [], [], initializer=[onnx.numpy_helper.from_array(weight, "w")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the weight is read-only, which the quantizer does not mind
        HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=block_size, bits=bits)).quantize(node, [graph])
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shape = (weight.shape[1], -1)
    return Blocks(packed=arrays[f"w_Q{bits}"], scales=arrays["w_scales"].reshape(shape), zero_points=arrays["w_zero_points"].reshape(shape))


def _k_quant(weight: np.ndarray, bits: int, block_size: int) -> Blocks:
    """llama.cpp's search of a scale and a minimum for each block, in onnxruntime's numpy: 200 ns a weight and core, rtn takes 50.

    The search minimises sum_i (a + |w_i|) (w'_i - w_i)^2, a the block's root mean square; only then is the minimum rounded to a zero point
    in [0, 2^bits), and the scale is not fitted again. Where that makes the sum larger than rtn's, above all in blocks of one sign, whose
    zero point would lie outside, the block is rtn's: at blocks of 32 in about half of them.
    """
    with _root_logger_kept():
        from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rounded = _rtn(weight, bits, block_size, symmetric=False)
    columns, blocks = rounded.scales.shape
    padded = np.zeros((columns, blocks * block_size), np.float32)
    padded[:, : weight.shape[0]] = weight.T
    original = padded.reshape(-1, block_size)
    packed, scales = rounded.packed.reshape(columns * blocks, -1).copy(), rounded.scales.reshape(-1).copy()
    points = unpack(np.asarray(rounded.zero_points).reshape(columns, -1), bits)[:, :blocks].reshape(-1).copy()
    for start in range(0, len(original), _SEARCHED_AT_ONCE):
        part = slice(start, start + _SEARCHED_AT_ONCE)
        w = original[part]
        with np.errstate(all="ignore"):  # a block of one value divides by 0, and its result is not taken
            q, scale, point = quant_tensor_k_quant_cpu(w, bits, block_size)
            found = ((q - point) * scale).astype(np.float32)
            scale = scale[:, 0].astype(np.float32)
        importance = np.sqrt(np.mean(w**2, axis=1, keepdims=True)) + np.abs(w)
        before = (unpack(packed[part], bits).astype(np.float32) - points[part, None]) * scales[part, None]
        better = np.flatnonzero(np.sum(importance * (found - w) ** 2, axis=1) < np.sum(importance * (before - w) ** 2, axis=1))
        packed[start + better] = pack(q[better].astype(np.uint8), bits)
        scales[start + better], points[start + better] = scale[better], point[better, 0]
    zero_points = points.reshape(columns, blocks)
    if bits == 4 and blocks % 2:
        zero_points = np.pad(zero_points, ((0, 0), (0, 1)), constant_values=8)
    return Blocks(packed=packed.reshape(columns, blocks, -1), scales=scales.reshape(columns, blocks), zero_points=pack(zero_points, bits))


def to_matmul_nbits(graph: ir.Graph, node: ir.Node, weight: QuantizedWeight, accuracy_level: int) -> None:
    """MatMul(x, W) becomes MatMulNBits(x, q, scales[, zero points])."""
    (rows, columns), format = weight.shape, weight.format
    assert format is not None
    attributes = {"K": rows, "N": columns, "bits": format.bits, "block_size": format.block_size, "accuracy_level": accuracy_level}
    new = ir.node("MatMulNBits", [node.inputs[0], *weight.values], attributes, domain=CONTRIB, name=f"{node.name}_Q{format.bits}")
    replace_node(graph, node, new)


def nbits_weight(name: str, array: np.ndarray, format: BlockFormat, blocks: Blocks) -> QuantizedWeight:
    """The tensors of one MatMulNBits, ``blocks`` being those of ``array`` [K, N]. Scales take its float type."""
    bits = format.bits
    scales = blocks.scales.astype(array.dtype)
    zero_points = blocks.zero_points
    if zero_points is not None and zero_points.dtype != np.uint8:
        zero_points = zero_points.astype(array.dtype)
    values = [constant(f"{name}_Q{bits}", blocks.packed), constant(f"{name}_scales", scales.reshape(-1))]
    if zero_points is not None:
        values.append(constant(f"{name}_zero_points", zero_points.reshape(-1)))
    restored = dequantize(blocks.packed, scales, zero_points, bits, format.block_size, *array.shape)
    return QuantizedWeight(values=tuple(values), restored=restored, shape=(array.shape[0], array.shape[1]), format=format)


def replace_node(graph: ir.Graph, node: ir.Node, *new: ir.Node) -> None:
    """Puts ``new`` in the node's place; the last one's first output takes the name, type and shape of the node's."""
    old, output = node.outputs[0], new[-1].outputs[0]
    output.name, output.type, output.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], list(new), [old], [output])


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """onnxruntime's quantizer configures the root logger on import: every library's INFO lines would reach the user."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def dequantize_nbits(node: ir.Node) -> np.ndarray:
    """W [K, N] float32 of a MatMulNBits node."""
    bits, block_size, rows, columns = node.attributes.get_int("bits", 4), *(int_of(node, name) for name in ("block_size", "K", "N"))
    zero_points = optional_input(node, 3)
    packed, scales = (array_of(input_of(node, index)) for index in (1, 2))
    return dequantize(packed, scales, None if zero_points is None else array_of(zero_points), bits, block_size, rows, columns)


def dequantize(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int, block_size: int, rows: int, columns: int
) -> np.ndarray:
    """W [K, N] float32 from MatMulNBits' tensors (formula in the module's docstring)."""
    blocks = -(-rows // block_size)
    q = unpack(packed.reshape(columns, blocks, -1), bits).astype(np.float32)
    if zero_points is None:
        q -= float(1 << (bits - 1))
    elif zero_points.dtype == np.uint8:
        q -= unpack(zero_points.reshape(columns, -1), bits)[:, :blocks, None].astype(np.float32)
    else:
        q -= zero_points.reshape(columns, blocks, 1).astype(np.float32)
    q *= scales.reshape(columns, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(q.reshape(columns, blocks * block_size)[:, :rows].T)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """One value per entry of the last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """The inverse, of an even number of entries."""
    return q if bits == 8 else q[..., ::2] | q[..., 1::2] << 4

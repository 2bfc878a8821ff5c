"""Blockwise int4 and int8 weight-only quantization by onnxruntime's own kernels, one weight in memory at a time.

A MatMul whose right operand is a 2-D initializer becomes com.microsoft::MatMulNBits. The edit keeps its float type: its
arithmetic lives in the model-local function, which the rewrite does not enter, and its banks are graph inputs.

MatMulNBits stores, for a weight W [K, N] and blocks of ``block_size`` along K (operator docs of com.microsoft):

    W[k, n] = (q[n, k] - zero_point[n, k // block_size]) * scale[n, k // block_size]

q is unsigned, two 4-bit values a byte (low first); a symmetric weight has no zero points and means 2^(bits-1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from runtimes.errors import CalibrationError

CONTRIB = "com.microsoft"


@dataclass(frozen=True, kw_only=True)
class WeightOnlySettings:
    """``accuracy_level`` 4 multiplies in int8 (activations quantized per block, the fast path); 1 multiplies in float32."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise CalibrationError(f"weight-only quantization takes 4 or 8 bits, not {self.bits}")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise CalibrationError(f"block size {self.block_size} is not a power of two from 16 on")
        if self.accuracy_level not in (0, 1, 4):
            raise CalibrationError(f"accuracy level {self.accuracy_level} is unknown; 1 is exact, 4 is fast")


@dataclass(frozen=True, kw_only=True)
class WeightError:
    """How far one dequantized weight is from the original: ||W' - W|| / ||W||, and the sizes in bytes."""

    name: str
    relative: float
    bytes_before: int
    bytes_after: int


def quantize_weights(
    model: ir.Model, settings: WeightOnlySettings, *, on_weight: Callable[[int, int], None] | None = None
) -> list[WeightError]:
    """Quantizes every constant 2-D MatMul weight of ``model`` in place; returns one WeightError per weight.

    Raises CalibrationError when the graph has no such MatMul (it is quantized already, or not a decoder).
    """
    graph = model.graph
    nodes = [node for node in graph if node.domain == "" and node.op_type == "MatMul" and _constant(node) is not None]
    if not nodes:
        raise CalibrationError("the graph has no MatMul with a constant weight; it is quantized already, or is not a decoder")
    errors: list[WeightError] = []
    done: dict[str, list[ir.Value]] = {}
    for index, node in enumerate(nodes):
        weight = node.inputs[1]
        if weight.name not in done:
            tensors, error = _quantize_one(weight, settings)
            done[weight.name] = tensors
            errors.append(error)
            for value in tensors:
                graph.register_initializer(value)
        _replace(graph, node, done[weight.name], settings)
        if on_weight:
            on_weight(index + 1, len(nodes))
    for name in done:
        if not graph.initializers[name].uses():
            del graph.initializers[name]
    model.opset_imports[CONTRIB] = 1
    return errors


def dequantized_weights(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    """(name of the initializer that was quantized, its dequantized float32 value [K, N]), one at a time."""
    seen = set()
    for node in model.graph:
        if node.domain != CONTRIB or node.op_type != "MatMulNBits" or node.inputs[1].name in seen:
            continue
        seen.add(node.inputs[1].name)
        yield _weight_name(node), _dequantize_node(node)


def accuracy_level(model: ir.Model) -> int:
    """The accuracy level of the graph's MatMulNBits nodes; 0 where it has none."""
    levels = {node.attributes.get_int("accuracy_level", 0) for node in model.graph if node.op_type == "MatMulNBits"}
    return max(levels, default=0)


def set_accuracy_level(model: ir.Model, level: int) -> None:
    """Level 1 is how exactness is proven for a bundle that ships at level 4."""
    for node in model.graph:
        if node.domain == CONTRIB and node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    value = node.inputs[1]
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def _quantize_one(weight: ir.Value, settings: WeightOnlySettings) -> tuple[list[ir.Value], WeightError]:
    with _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    array = weight.const_value.numpy()
    original = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(original).all():
        raise CalibrationError(f"weight {weight.name} holds values that are not finite; the checkpoint is damaged")
    config = DefaultWeightOnlyQuantConfig(block_size=settings.block_size, is_symmetric=settings.symmetric, bits=settings.bits)
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(original)
    scales = scales.astype(array.dtype)
    arrays = {f"_Q{settings.bits}": packed, "_scales": scales}
    if not settings.symmetric:
        arrays["_zero_points"] = zero_points
    restored = dequantize(packed, scales, None if settings.symmetric else zero_points, settings.bits, settings.block_size, *original.shape)
    norm = float(np.linalg.norm(original))
    error = WeightError(
        name=weight.name,
        relative=float(np.linalg.norm(restored - original)) / norm if norm else 0.0,
        bytes_before=array.nbytes,
        bytes_after=sum(a.nbytes for a in arrays.values()),
    )
    values = []
    for suffix, a in arrays.items():
        tensor = ir.tensor(a, name=weight.name + suffix)
        values.append(ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
    return values, error


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


def _replace(graph: ir.Graph, node: ir.Node, tensors: list[ir.Value], settings: WeightOnlySettings) -> None:
    rows, columns = node.inputs[1].const_value.shape
    attributes = {
        "K": int(rows),
        "N": int(columns),
        "bits": settings.bits,
        "block_size": settings.block_size,
        "accuracy_level": settings.accuracy_level,
    }
    new = ir.node("MatMulNBits", [node.inputs[0], *tensors], attributes, domain=CONTRIB, name=f"{node.name}_Q{settings.bits}")
    old_output = node.outputs[0]
    output = new.outputs[0]
    output.name, output.type, output.shape = old_output.name, old_output.type, old_output.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old_output], [output])


def _weight_name(node: ir.Node) -> str:
    return node.inputs[1].name.removesuffix(f"_Q{node.attributes.get_int('bits', 4)}")


def _dequantize_node(node: ir.Node) -> np.ndarray:
    zero_points = node.inputs[3].const_value.numpy() if len(node.inputs) > 3 and node.inputs[3] is not None else None
    return dequantize(
        node.inputs[1].const_value.numpy(),
        node.inputs[2].const_value.numpy(),
        zero_points,
        node.attributes.get_int("bits", 4),
        node.attributes.get_int("block_size"),
        node.attributes.get_int("K"),
        node.attributes.get_int("N"),
    )


def dequantize(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int, block_size: int, rows: int, columns: int
) -> np.ndarray:
    """W [K, N] float32 from MatMulNBits' tensors (formula in the module's docstring)."""
    blocks = -(-rows // block_size)
    q = _unpack(packed.reshape(columns, blocks, -1), bits).astype(np.float32)
    if zero_points is None:
        q -= float(1 << (bits - 1))
    else:
        q -= _unpack(zero_points.reshape(columns, -1), bits)[:, :blocks, None].astype(np.float32)
    w = q * scales.reshape(columns, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(w.reshape(columns, blocks * block_size)[:, :rows].T)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)

"""The embedding's table [V, D] in blocks along D: rows are looked up in it, and a tied head multiplies by it.

    GatherBlockQuantized   q [V, D bits / 8]             scales [V, D / block]   zero points [V, ..]
    MatMulNBits            q [V, D / block, bytes]       the same                the same

Both q are the same bytes, and the writer keeps them one range of the data file (``graph_passes.external``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from calibration.selection import token_embedding
from calibration.settings import BlockFormat, QuantizationSettings
from calibration.weight_only import CONTRIB, Blocks, dequantize, quantize_blocks, replace_node, to_matmul_nbits
from calibration.weights import QuantizedWeight, WeightError, constant
from calibration.workers import on_all_cores
from graph_passes.accessors import array_of, input_of, int_of, name_of, optional_input, shape_of, tensor_of
from graph_passes.external import unmap
from graph_passes.find.weights import find_token_embedding, head_product, weight_name, weight_products
from graph_passes.tied_head import same_table
from runtimes.errors import CalibrationError

_ROWS_AT_ONCE = 8192
SMALLEST_BLOCK = 16
"""Of both operators."""
TIED_HEAD_LEVEL = 4
"""Accuracy level of a head that is tied to a quantized embedding, in schemes that quantize activations anyway."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TablePlan:
    """What becomes of the embedding and of a head that is tied to it."""

    format: BlockFormat | None = None
    """None: the embedding stays float."""
    head: ir.Node | None = None
    """The product that multiplies by the quantized table, where the head is tied to it."""
    note: str = ""

    @property
    def head_name(self) -> str | None:
        return None if self.head is None else weight_name(self.head)


def plan_table(
    graph: ir.Graph, settings: QuantizationSettings, *, head_float: bool, parameters: Collection[str] | None = None
) -> TablePlan:
    """``graph`` with its head untied; ``head_float``: the head stays in float by choice; ``parameters``: as of ``quantize_graph``.

    Unless asked for, the embedding is quantized where onnxruntime can look it up, and stays float beside a tied head that does: one table
    is smaller than a float and a quantized one. Raises CalibrationError where it is asked for and the graph has no such table, or rows that
    no block divides.
    """
    asked = settings.embeddings is not None
    bits = settings.embedding_bits
    lookup, head = find_token_embedding(graph), head_product(graph, weight_products(graph))
    if lookup is None:
        if asked and bits:
            token_embedding(graph)  # says so
        return TablePlan()
    table = input_of(lookup, 0)
    tied = head is not None and same_table(table, input_of(head, 1))
    note = ""
    if bits and not asked and parameters is not None and name_of(table) not in parameters:
        bits, note = 0, "the embedding stays float: the exporter changed its values, and no parameter of the base has them"
    elif bits and tied and head_float and not asked:
        bits, note = 0, "the embedding stays float with the head that it is tied to"
    format = settings.table_format if bits else None
    if format is not None:
        width = shape_of(table)[1]
        block = next((b for b in _halved(format.block_size) if width % b == 0), None)
        if block is None and asked:
            raise CalibrationError(
                f"{table.name} has rows of {width}, which no block of {SMALLEST_BLOCK} or more divides; use --embeddings float"
            )
        if block is None:
            note = f"the embedding stays float: its rows of {width} are divided by no block of {SMALLEST_BLOCK} or more"
        elif block != format.block_size:
            note = f"the embedding has blocks of {block}, as its rows of {width} are no multiple of {format.block_size}"
        format = None if block is None else replace(format, block_size=block)
    shared = tied and format is not None and not head_float
    if tied and not shared and (format is None) != (head_float or not settings.quantizes_head):
        note = "; ".join(filter(None, (note, "embedding and head are tied, and stored apart: one is float and one is quantized")))
    return TablePlan(format=format, head=head if shared else None, note=note)


def _halved(block_size: int) -> list[int]:
    sizes = []
    while block_size >= SMALLEST_BLOCK:
        sizes.append(block_size)
        block_size //= 2
    return sizes


def quantize_table(graph: ir.Graph, plan: TablePlan, settings: QuantizationSettings) -> WeightError:
    """Gather(W, ids) becomes GatherBlockQuantized, and MatMul(x, W^T) of the planned head MatMulNBits over the same bytes, in place."""
    format = plan.format
    assert format is not None
    lookup = token_embedding(graph)
    table = input_of(lookup, 0)
    name, array = name_of(table), array_of(table)
    if not np.isfinite(array).all():
        raise CalibrationError(f"weight {name} holds values that are not finite; the checkpoint is damaged")
    blocks, relative = _quantize_rows(array, format)
    vocabulary, width = array.shape
    before, dtype = array.nbytes, array.dtype
    del array
    rows = constant(f"{name}_G{format.bits}", blocks.packed.reshape(vocabulary, -1))
    shared = [constant(f"{name}_row_scales", blocks.scales.astype(dtype))]
    if blocks.zero_points is not None:
        shared.append(constant(f"{name}_row_zero_points", blocks.zero_points.reshape(vocabulary, -1)))
    for value in (rows, *shared):
        graph.register_initializer(value)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": format.block_size, "bits": format.bits}
    new = ir.node(
        "GatherBlockQuantized", [rows, lookup.inputs[1], *shared], attributes, domain=CONTRIB, name=f"{lookup.name}_Q{format.bits}"
    )
    replace_node(graph, lookup, new)
    if plan.head is not None:
        columns = constant(f"{plan.head_name}_Q{format.bits}", blocks.packed)
        graph.register_initializer(columns)
        weight = QuantizedWeight(values=(columns, *shared), restored=np.empty(0), shape=(width, vocabulary), format=format)
        level = settings.accuracy_level if settings.scheme == "weight-only" else TIED_HEAD_LEVEL
        to_matmul_nbits(graph, plan.head, weight, level)
    unmap(table)
    after = sum(int(tensor_of(value).nbytes) for value in (rows, *shared))
    return WeightError(name=name, relative=relative, bytes_before=before, bytes_after=after)


def _quantize_rows(array: np.ndarray, format: BlockFormat) -> tuple[Blocks, float]:
    """The blocks of W [V, D], and ||W' - W|| / ||W||; a few thousand rows in memory for each core."""

    def part(start: int) -> tuple[Blocks, float, float]:
        original = np.ascontiguousarray(array[start : start + _ROWS_AT_ONCE].T, np.float32)
        blocks = quantize_blocks(original, format)
        scales = blocks.scales.astype(array.dtype)
        restored = dequantize(blocks.packed, scales, blocks.zero_points, format.bits, format.block_size, *original.shape)
        return blocks, float(np.sum((restored - original) ** 2, dtype=np.float64)), float(np.sum(original**2, dtype=np.float64))

    parts, missed, total = zip(*on_all_cores(part, range(0, len(array), _ROWS_AT_ONCE)), strict=True)
    points = [each.zero_points for each in parts if each.zero_points is not None]
    blocks = Blocks(
        packed=np.concatenate([each.packed for each in parts]),
        scales=np.concatenate([each.scales for each in parts]),
        zero_points=np.concatenate([each.reshape(-1, each.shape[-1]) for each in points]) if points else None,
    )
    return blocks, (sum(missed) / sum(total)) ** 0.5 if sum(total) else 0.0


def dequantize_embedding(node: ir.Node) -> np.ndarray:
    """W [V, D] float32 of a GatherBlockQuantized node."""
    bits, block_size = int_of(node, "bits"), int_of(node, "block_size")
    packed, scales = (array_of(input_of(node, index)) for index in (0, 2))
    points = optional_input(node, 3)
    width = scales.shape[1] * block_size
    zero_points = None if points is None else array_of(points)
    return np.ascontiguousarray(dequantize(packed, scales, zero_points, bits, block_size, width, packed.shape[0]).T)

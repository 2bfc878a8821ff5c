"""Edits that TensorRT-Edge-LLM swaps at run time: their banks ride on the inputs that its runtime takes for LoRA weights.

Its runtime binds every engine input whose name holds lora_A ([k, rank]) or lora_B ([rank, n]) from the tensor of that name in the
adapter file that a request names, and zeros of rank 1 without one; its builder gives them ranks from 0 to --maxLoraRank. So, per edit
node and slot, in float16:

    <node>.<slot>.lora_A.weight [D + 1, r]    A^T, and b as its last row
    <node>.<slot>.lora_B.weight [r, D]        U

In the graph a row of zeros is put behind each, so that a bank is never empty: U, A [N, r + 1, D], b [N, r + 1].

Source: tensorrt_edgellm 0.4 to 0.10, cpp/builder (setupLoraProfiles), cpp/runtime (addLoraWeights, later state/loraManager.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import dtype_of, name_of, shape_of
from graph_passes.insert import banks_of, is_edit
from runtimes.edits.op import OP_TYPE, EditNode
from runtimes.errors import GraphError


def use_lora_inputs(graph: ir.Graph, *, slots: int) -> None:
    """Replaces the banks of every edit node by LoRA inputs for ``slots`` slots each, in place.

    Raises GraphError where a stream is not float16, the one type that the runtime has zeros of, and for RED, which is no low-rank
    product: zeros, which the runtime binds without an adapter, would be a scale of zero.
    """
    if full_rank := [node.name for node in graph if is_edit(node) and node.op_type != OP_TYPE]:
        raise GraphError(f"{full_rank[0]} is a scale and bias (RED), which no LoRA weight can hold; fold without --as-lora")
    for node in [node for node in graph if is_edit(node)]:
        banks = banks_of(node)
        if any(bank.dtype != ir.DataType.FLOAT16 for bank in banks):
            raise GraphError(
                f"the stream at {node.name} is {dtype_of(banks[0]).name}; TensorRT-Edge-LLM swaps float16 weights only: fold without "
                "--as-lora"
            )
        width = shape_of(banks[0])[-1]
        build = _Banks(str(node.name))
        parts = [build.slot(graph, slot, width) for slot in range(slots)]
        for index, bank in enumerate(banks):
            node.replace_input_with(2 + index, build.add("Concat", *(part[index] for part in parts), axis=0))
            graph.inputs.remove(bank)
            del graph.initializers[name_of(bank)]
        graph.insert_before(node, build.nodes)


def lora_tensors(nodes: Sequence[EditNode], banks: Mapping[str, np.ndarray], *, slots: int) -> dict[str, np.ndarray]:
    """The tensors of one adapter file, by input name, from banks U, A [N, r, D], b [N, r]; where N is 1, every slot gets that edit."""
    tensors = {}
    for node in nodes:
        U, A, b = (banks[name] for name in node.bank_names)
        for slot in range(slots):
            row = slot % len(U)
            name_a, name_b = _names(node.name, slot)
            tensors[name_a] = np.ascontiguousarray(np.vstack([A[row].T, b[row][None]]))
            tensors[name_b] = np.ascontiguousarray(U[row])
    return tensors


def _names(node: str, slot: int) -> tuple[str, str]:
    return f"{node}.{slot}.lora_A.weight", f"{node}.{slot}.lora_B.weight"


class _Banks:
    """Nodes that make one edit's banks of its inputs; every value is named <edit>.<operator>_<number>."""

    def __init__(self, edit: str) -> None:
        self.edit = edit
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value, **attributes: int | list[int] | ir.TensorProtocol) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"{self.edit}.{op.lower()}_{len(self.nodes)}")
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def slot(self, graph: ir.Graph, slot: int, width: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """U, A [1, r + 1, D], b [1, r + 1] of one slot, from two inputs that this adds."""
        rank = f"{self.edit}.{slot}.rank"
        shapes = ([width + 1, rank], [rank, width])
        down, up = (
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(shape))
            for name, shape in zip(_names(self.edit, slot), shapes, strict=True)
        )
        graph.inputs.extend([down, up])
        start, stop, end = (self._constant(np.array([at], np.int64)) for at in (0, width, width + 1))
        zero_row = self._constant(np.zeros((1, width), np.float16))
        # With the axis named: TensorRT's parser asks for it where starts are fewer than dimensions.
        matrix = self.add("Transpose", self.add("Slice", down, start, stop, start), perm=[1, 0])
        U, A = (self.add("Unsqueeze", self.add("Concat", rows, zero_row, axis=0), start) for rows in (up, matrix))
        zero = self._constant(np.zeros((1, 1), np.float16))
        return U, A, self.add("Concat", self.add("Slice", down, stop, end, start), zero, axis=1)

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self.add("Constant", value=ir.tensor(array))

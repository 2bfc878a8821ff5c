"""The lowest rungs of the parity ladder: one edit node alone, from the float64 oracle to onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.function_body import function_of
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.edit import Edit, activate
from runtimes.edits.op import DOMAIN, OP_VERSION, RED_TYPE, EditNode
from runtimes.native_library import find_op_library
from runtimes.parity.figures import BUDGETS, Figures, Rung, judge
from runtimes.precision import NUMPY_DTYPES

ROWS = 48


def edit_rungs(bundle: Bundle, name: str, edits: Mapping[EditNode, tuple[Edit, ...]], *, kernel: str | None = None) -> list[Rung]:
    """numpy, onnxruntime's function and, where the op library is, its fused kernel against the oracle, the worst node each.

    ``kernel``: "function" or "fused" leaves the other one out. An adapter that edits nothing has no rung here.

    h: [48 or more, D] normal values; slots run over every edit and over values outside [0, N), whose rows must keep their bits: one
    changed bit there is an infinite error, as is a value that is not finite.
    """
    dtype = NUMPY_DTYPES[bundle.manifest.precision]
    if not edits:
        return []
    if dtype.name == "bfloat16":
        return []  # onnxruntime's CPU provider cannot run the function in bfloat16
    banks = read_onnx_adapter(bundle.adapter(name).file)
    available = ("function", "fused") if find_op_library() else ("function",)
    kernels = [k for k in available if kernel in (None, k)]
    worst = {"numpy": (0.0, 0.0), **dict.fromkeys(kernels, (0.0, 0.0))}
    generator, compared = np.random.default_rng(0), 0
    for node, slots in edits.items():
        bank = [banks[b] for b in node.bank_names]
        every = np.arange(-1, len(slots) + 1)
        slot = np.resize(every, max(ROWS, len(every))).astype(np.int32)
        generator.shuffle(slot)
        h = generator.standard_normal((len(slot), slots[0].width)).astype(dtype)
        oracle = h.astype(np.float64)
        for number, edit in enumerate(slots):
            oracle[slot == number] = edit.apply(h[slot == number])
        outside = (slot < 0) | (slot >= len(slots))
        compared += int((~outside).sum())
        for rung in worst:
            y = numpy_edit(h, slot, bank, node) if rung == "numpy" else run_node(node, h, slot, bank, rung)
            error = float(np.abs(y.astype(np.float64) - oracle).max())
            if not np.isfinite(y).all() or y[outside].tobytes() != h[outside].tobytes():
                error = float("inf")
            worst[rung] = max(worst[rung], (error / float(np.abs(oracle).max()), error))
    budget = BUDGETS[bundle.manifest.precision]
    note = f"{len(edits)} edit nodes alone, values of y, not logits"
    figures = {
        rung: Figures(compared=compared, max_abs=error, max_relative=relative, kl=None, top1=None)
        for rung, (relative, error) in worst.items()
    }
    return [judge(f"{rung}, {name}", "oracle", each, budget, note=note) for rung, each in figures.items()]


def numpy_edit(h: np.ndarray, slot: np.ndarray, bank: list[np.ndarray], node: EditNode) -> np.ndarray:
    """The node's op in numpy: in float32 over the bank as stored, rounded once to h's dtype."""
    bank = [x.astype(np.float32) for x in bank]
    y = h.copy()
    for t in np.flatnonzero((slot >= 0) & (slot < len(bank[0]))):
        s = slot[t]
        if node.op == RED_TYPE:
            scale, bias = bank
            y[t] = (scale[s] * h[t].astype(np.float32) + bias[s]).astype(h.dtype)
            continue
        U, A, b = bank
        z = A[s] @ h[t].astype(np.float32) + b[s]
        active = len(z) // 2 if node.activated == "first_half" else len(z)
        z[:active] = activate(z[:active].astype(np.float64), node.activation)
        y[t] = (h[t].astype(np.float32) + z @ U[s]).astype(h.dtype)
    return y


def run_node(node: EditNode, h: np.ndarray, slot: np.ndarray, bank: list[np.ndarray], kernel: str | None = None) -> np.ndarray:
    """One node in onnxruntime; its function body, or with ``kernel="fused"`` the op library."""
    import onnxruntime as ort

    kind = ir.DataType.from_numpy(h.dtype)
    names = ("h", "slot", *(b.name for b in node.spec.banks))
    shapes = (["tokens", "D"], ["tokens"], *(["N", *b.axes] for b in node.spec.banks))
    inputs = [
        ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(ir.DataType.INT32 if n == "slot" else kind))
        for n, s in zip(names, shapes, strict=True)
    ]
    op = ir.node(node.op, inputs, node.attributes, domain=DOMAIN, overload=node.overload)
    y = op.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["tokens", "D"]), ir.TensorType(kind)
    graph = ir.Graph(inputs, [y], nodes=[op], opset_imports={"": 20, DOMAIN: OP_VERSION}, name="edit")
    model = ir.Model(graph, ir_version=10, functions=[function_of(node, opset=20)])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    library = find_op_library() if kernel == "fused" else None
    if library:
        options.register_custom_ops_library(str(library))
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(zip(names, (h, slot, *bank), strict=True)))[0])

"""The op library through its C interface and through onnxruntime, and the float64 oracle that both are held against."""

from __future__ import annotations

import ctypes
import functools
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from op_library import COMPILERS

from runtimes.edits.edit import activate
from runtimes.native_library import find_op_library

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Relative to the largest entry of y: half a unit in the last place of the type, and float32 sums.
TOLERANCE = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
# Shapes whose dimensions onnxruntime does not know by name.
UNNAMED = {"all": [None, None, 16], "one": ["B", None, 16], "long": ["B" * 500, "S", 16], "no_shape": None}


def installed_library() -> Path:
    """Where a compiler is, a missing library is a failed test: it would otherwise go unnoticed for good."""
    found = find_op_library()
    if found is None:
        compiler = next(filter(shutil.which, COMPILERS), None)
        if compiler:
            pytest.fail(f"{compiler} is here, but the installed package has no op library; reinstall it: pip install -e .")
        pytest.skip("no C++ compiler here, and so no op library")
    return found


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    library.reft_edit_cpu.argtypes = [ctypes.c_int, *[pointer] * 6, *[integer] * 4, *[text] * 3]
    library.reft_edit_cuda.argtypes = [ctypes.c_int, *[pointer] * 6, *[integer] * 4, *[text] * 2, *[pointer] * 2]
    library.reft_edit_cuda_workspace.argtypes = [integer] * 2
    library.reft_edit_cuda_workspace.restype = integer
    library.reft_red_cpu.argtypes = [ctypes.c_int, *[pointer] * 5, *[integer] * 3, text]
    library.reft_red_cuda.argtypes = [ctypes.c_int, *[pointer] * 5, *[integer] * 3, pointer]
    for name in ("reft_edit_cpu", "reft_edit_cuda", "reft_red_cpu", "reft_red_cuda", "reft_cpu_kernels", "reft_cuda_architectures"):
        getattr(library, name).restype = text
    library.reft_statistics.argtypes = [ctypes.POINTER(integer), ctypes.c_int]
    library.reft_statistics.restype = None
    return library


def cpu_kernels(path: Path) -> list[str]:
    return load(path).reft_cpu_kernels().decode().split(",")


def statistics(path: Path) -> dict[str, int]:
    """Counts of the onnxruntime op since the last call."""
    counts = (ctypes.c_int64 * 4)()
    load(path).reft_statistics(counts, 1)
    return dict(zip(("calls", "in_place", "edited_rows", "threaded"), counts, strict=True))


def edit_cpu(
    path: Path, feeds: dict[str, np.ndarray], activation: str = "", activated: str = "all", *, kernels: str | None = None, in_place=False
) -> np.ndarray:
    """The kernel itself. Out of place y is poisoned first; one value before and after it must stay as it was."""
    h, slot, U, A, b = (np.ascontiguousarray(feeds[name]) for name in ("h", "slot", "U", "A", "b"))
    slots, rank, width = U.shape
    guarded = np.full(h.size + 2, 77, h.dtype)
    y = guarded[1:-1].reshape(h.shape)
    if in_place:
        y[...] = h
    source = y if in_place else h
    element = {2: 10, 4: 1}[h.dtype.itemsize] if h.dtype != ml_dtypes.bfloat16 else 16
    pointers = [x.ctypes.data for x in (source, y, slot, U, A, b)]
    names = [activation.encode(), activated.encode(), kernels.encode() if kernels else None]
    error = load(path).reft_edit_cpu(element, *pointers, slot.size, slots, rank, width, *names)
    if error:
        raise ValueError(error.decode())
    assert guarded[0] == guarded[-1] == 77
    return y


def oracle(feeds: dict[str, np.ndarray], activation: str = "", activated: str = "all") -> np.ndarray:
    """y[t] = h[t] + U[s]^T act(A[s] h[t] + b[s]), row by row in float64."""
    U, A, b = (feeds[name].astype(np.float64) for name in ("U", "A", "b"))
    y = feeds["h"].astype(np.float64)
    for index in np.ndindex(feeds["slot"].shape):
        slot = feeds["slot"][index]
        if 0 <= slot < len(U):
            z = A[slot] @ y[index] + b[slot]
            active = len(z) // 2 if activated == "first_half" else len(z)
            z[:active] = activate(z[:active], activation)
            y[index] += U[slot].T @ z
    return y


def draw(seed: int, leading: tuple[int, ...], width: int, rank: int, slots: int, dtype: str) -> dict[str, np.ndarray]:
    """Slots also outside the bank, in long and short runs; the edit is about as large as h."""
    random = np.random.default_rng(seed)
    scale = 1 / np.sqrt(max(1, width))
    values = lambda *shape, scale=1.0: (random.standard_normal(shape) * scale).astype(DTYPES[dtype])  # noqa: E731
    tokens = int(np.prod(leading))
    slot = np.repeat(random.integers(-2, slots + 2, tokens), random.integers(1, 9, tokens))[:tokens]
    return {
        "h": values(*leading, width),
        "slot": slot.astype(np.int32).reshape(leading),
        "U": values(slots, rank, width, scale=1 / np.sqrt(rank)),
        "A": values(slots, rank, width, scale=scale),
        "b": values(slots, rank),
    }


def check(y: np.ndarray, feeds: dict[str, np.ndarray], dtype: str, activation: str = "", activated: str = "all") -> None:
    outside = (feeds["slot"] < 0) | (feeds["slot"] >= len(feeds["U"]))
    assert y[outside].tobytes() == feeds["h"][outside].tobytes()
    if y.size:
        expected = oracle(feeds, activation, activated)
        error = np.abs(y.astype(np.float64) - expected).max()
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max())


def op_node(inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("LoReFT", inputs, [output], domain="ai.reft", **attributes)


def as_model(nodes, inputs, outputs, functions=()) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.reft", 1)]
    graph = helper.make_graph(nodes, "edit", inputs, outputs)
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)


def bank_inputs(element: int) -> list[onnx.ValueInfoProto]:
    """U, A and b; every dimension has a name of its own, so that nothing but the op itself can find that they do not fit."""
    return [helper.make_tensor_value_info(n, element, [f"{n}_{i}" for i in range(k)]) for n, k in (("U", 3), ("A", 3), ("b", 2))]


def op_model(dtype: str = "float32", rank: int = 3, **attributes: object) -> onnx.ModelProto:
    element = ELEMENTS[dtype]
    shape = [f"d{i}" for i in range(rank)]
    inputs = [
        helper.make_tensor_value_info("h", element, shape),
        helper.make_tensor_value_info("slot", TensorProto.INT32, [f"s{i}" for i in range(rank - 1)]),
        *bank_inputs(element),
    ]
    node = op_node(["h", "slot", "U", "A", "b"], "y", **attributes)
    return as_model([node], inputs, [helper.make_tensor_value_info("y", element, shape)])


def session(model: onnx.ModelProto, library: Path | None, *, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output; bfloat16 goes in and out as OrtValues, since numpy has no such type."""
    if feeds["h"].dtype != ml_dtypes.bfloat16:
        return session.run(None, feeds)[0]
    values = {}
    for name, array in feeds.items():
        if array.dtype != ml_dtypes.bfloat16:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            continue
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    output = session.run_with_ort_values(None, values)[0]
    words = (ctypes.c_uint16 * int(np.prod(output.shape()))).from_address(output.data_ptr())
    return np.frombuffer(words, np.uint16).view(ml_dtypes.bfloat16).reshape(output.shape()).copy()

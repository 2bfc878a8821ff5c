"""RED through the op library's C interface and through onnxruntime, and the float64 oracle that both are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from native_op import DTYPES, ELEMENTS, TOLERANCE, as_model, load
from onnx import TensorProto, helper

PLUGIN = {"plugin_namespace": "ai.reft", "plugin_version": "1"}
NAMES = ("h", "slot", "scale", "bias")


def red_cpu(path: Path, feeds: dict[str, np.ndarray], *, kernels: str | None = None, in_place: bool = False) -> np.ndarray:
    """The kernel itself. Out of place y is poisoned first; one value before and after it must stay as it was."""
    h, slot, scale, bias = (np.ascontiguousarray(feeds[name]) for name in NAMES)
    guarded = np.full(h.size + 2, 77, h.dtype)
    y = guarded[1:-1].reshape(h.shape)
    if in_place:
        y[...] = h
    source = y if in_place else h
    element = next(ELEMENTS[name] for name, dtype in DTYPES.items() if dtype == h.dtype)
    pointers = [x.ctypes.data for x in (source, y, slot, scale, bias)]
    error = load(path).reft_red_cpu(element, *pointers, slot.size, *scale.shape, kernels.encode() if kernels else None)
    if error:
        raise ValueError(error.decode())
    assert guarded[0] == guarded[-1] == 77
    return y


def oracle(feeds: dict[str, np.ndarray]) -> np.ndarray:
    """y[t] = scale[s] * h[t] + bias[s], row by row in float64."""
    scale, bias, y = (feeds[name].astype(np.float64) for name in ("scale", "bias", "h"))
    for index in np.ndindex(feeds["slot"].shape):
        slot = feeds["slot"][index]
        if 0 <= slot < len(scale):
            y[index] = scale[slot] * y[index] + bias[slot]
    return y


def draw(seed: int, leading: tuple[int, ...], width: int, slots: int, dtype: str) -> dict[str, np.ndarray]:
    """Slots also outside the bank, just beside it and far away, in long and short runs."""
    random = np.random.default_rng(seed)
    values = lambda *shape: random.standard_normal(shape).astype(DTYPES[dtype])  # noqa: E731
    tokens = int(np.prod(leading))
    places = [*range(-2, slots + 2), np.iinfo(np.int32).min, np.iinfo(np.int32).max]
    slot = np.repeat(random.choice(places, tokens), random.integers(1, 9, tokens))[:tokens] if tokens else np.zeros(0)
    return {
        "h": values(*leading, width),
        "slot": slot.astype(np.int32).reshape(leading),
        "scale": values(slots, width),
        "bias": values(slots, width),
    }


def check(y: np.ndarray, feeds: dict[str, np.ndarray], dtype: str) -> None:
    outside = (feeds["slot"] < 0) | (feeds["slot"] >= len(feeds["scale"]))
    assert y[outside].tobytes() == feeds["h"][outside].tobytes()
    if y.size:
        expected = oracle(feeds)
        error = np.abs(y.astype(np.float64) - expected).max()
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max())


def red_node(h: str, y: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node("RED", [h, "slot", "scale", "bias"], [y], domain="ai.reft", **attributes)


def bank_inputs(element: int) -> list[onnx.ValueInfoProto]:
    """scale and bias; every dimension has a name of its own, so that nothing but the op itself can find that they do not fit."""
    return [helper.make_tensor_value_info(n, element, [f"{n}_0", f"{n}_1"]) for n in ("scale", "bias")]


def red_model(dtype: str = "float32", rank: int = 3, **attributes: object) -> onnx.ModelProto:
    element = ELEMENTS[dtype]
    shape = [f"d{i}" for i in range(rank)]
    inputs = [
        helper.make_tensor_value_info("h", element, shape),
        helper.make_tensor_value_info("slot", TensorProto.INT32, [f"s{i}" for i in range(rank - 1)]),
        *bank_inputs(element),
    ]
    return as_model([red_node("h", "y", **attributes)], inputs, [helper.make_tensor_value_info("y", element, shape)])

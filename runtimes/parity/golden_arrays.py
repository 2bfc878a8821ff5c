"""What golden arrays of every task hold beside their inputs: the reference's logits, what steering changes in them, and its noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtimes.artifacts.bundle import BASE_GOLDEN, Bundle
from runtimes.artifacts.engine import Engine
from runtimes.artifacts.engine_adapter import read_engine_adapter
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.op import is_no_edit
from runtimes.parity.figures import MOST_NOISE, Budget, Delta


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """The base's or one adapter's."""

    name: str
    logits: np.ndarray
    noise: tuple[float, float]
    """(relative error, top-1 agreement) of the reference against itself under float noise; (0, 1) where activations are float."""
    steering: tuple[np.ndarray, np.ndarray] | None
    """(steered, base) logits whose difference the device's is held to; None for the base."""

    @property
    def adapter(self) -> str | None:
        """For ``set_adapter``."""
        return None if self.name == BASE_GOLDEN else self.name

    def widened(self, budget: Budget) -> Budget:
        """``budget``, and what the reference differs from itself, up to MOST_NOISE."""
        error, top1 = min(self.noise[0], MOST_NOISE[0]), max(self.noise[1], MOST_NOISE[1])
        return replace(budget, logits=budget.logits + error, top1=budget.top1 + top1 - 1)


def read_arrays(bundle: Bundle, name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of ``name``, and the fields of Golden. Steering is that of the float32 model where it was recorded."""
    arrays = bundle.golden(name)
    pairs = (("fp32_logits", "fp32_base_logits"), ("logits", "base_logits"))
    pair = pairs[0] if pairs[0][0] in arrays else pairs[1]
    steering = () if name == BASE_GOLDEN else pair
    noise = tuple(map(float, arrays.get("noise", (0.0, 1.0))))
    fields = {"name": name, "logits": arrays["logits"], "noise": noise, "steering": tuple(arrays[key] for key in steering) or None}
    return arrays, fields


def steering_shown(session: Any, adapter: str | None, delta: Delta | None) -> tuple[Delta | None, str]:
    """(the delta to judge, a note). Where nothing moved and the adapter edits nothing, that is its steering, and there is none to judge."""
    if delta is None or delta.moved or not edits_nothing(session.bundle, adapter):
        return delta, ""
    return None, "the adapter edits nothing: there is no steering to compare"


def edits_nothing(bundle: Bundle, name: str) -> bool:
    """Whether every bank of the adapter is what the graph has without one."""
    if isinstance(bundle, Engine):
        tensors = read_engine_adapter(bundle.adapter_file(name))
    else:
        tensors = read_onnx_adapter(bundle.adapter(name).file)
    return all(is_no_edit([tensors[bank] for bank in node.bank_names], node.op) for node in bundle.nodes)

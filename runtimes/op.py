"""The contract of the custom op ``ai.reft::LoReFT`` (version 1), shared by the graph, the kernels and the adapter files.

    h [.., D] T, slot [..] int32, U [N, r, D] T, A [N, r, D] T, b [N, r] T  ->  y [.., D] T
    y[t] = h[t] + U[s]^T act(A[s] h[t] + b[s]),  s = slot[t];  a slot outside [0, N) passes h[t] through, bit for bit

T is float32, float16 or bfloat16; h has rank 2 or 3; sums accumulate in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.edit import ACTIVATED, ACTIVATIONS, LowRankEdit, Site
from runtimes.errors import AdapterError

DOMAIN = "ai.reft"
OP_TYPE = "LoReFT"
OP_VERSION = 1
PLUGIN_NAMESPACE = "ai.reft"
PLUGIN_VERSION = "1"
SLOT_INPUT = "reft_slot"
"""Graph input that carries the slots when the bundle was made with ``--slots input``."""

RULE_DEFAULTS = {
    "reft.first": 0,
    "reft.last": 0,
    "reft.prompt": 0,
    "reft.everywhere": 0,
    "reft.truncate": 1,
    "reft.suffix_slot": 0,
    "reft.prompt_length": -1,
}
"""Overridable initializers of the in-graph slot rule, int64 of shape [1]; these defaults edit nothing."""

PROMPT_LENGTH = "reft.prompt_length"


@dataclass(frozen=True, kw_only=True, order=True)
class EditNode:
    """One op node: a site, and the activation that every adapter using this node shares."""

    site: Site
    activation: str = ""
    activated: str = "all"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS or self.activated not in ACTIVATED:
            raise AdapterError(f"activation {self.activation!r} on {self.activated!r} rows is not one the op knows")
        if not self.activation and self.activated != "all":
            raise AdapterError("an edit without activation has no activated rows to choose; use activated='all'")

    @property
    def overload(self) -> str:
        """The ONNX function overload that serves this node: "" without activation, else for example gelu_first_half."""
        return self.activation + ("_first_half" if self.activated == "first_half" else "")

    @property
    def name(self) -> str:
        return f"reft.{self.site}" + (f".{self.overload}" if self.overload else "")

    @property
    def bank_names(self) -> tuple[str, str, str]:
        return (f"{self.name}.U", f"{self.name}.A", f"{self.name}.b")


def node_of(site: Site, edit: LowRankEdit) -> EditNode:
    return EditNode(site=site, activation=edit.activation, activated=edit.activated if edit.activation else "all")


def no_edit_bank(width: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bank of a node that an adapter does not use: U, A [1, 1, D] and b [1, 1] of zeros."""
    return np.zeros((1, 1, width), dtype), np.zeros((1, 1, width), dtype), np.zeros((1, 1), dtype)


def bank_of(edits: Sequence[LowRankEdit], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, A [N, r, D] and b [N, r] of N slots, rounded once from float64 to ``dtype``; shorter ranks are padded with zero rows.

    A zero row of U adds nothing, whatever A, b and the activation make of it. An edit whose first half is activated is padded
    within its halves, so that the halves stay where the op looks for them.

    Raises AdapterError where a finite value does not survive the rounding (float16 ends at 65504).
    """
    half = edits[0].activated == "first_half"
    rank = max(e.rank for e in edits)

    def padded(matrix: np.ndarray) -> np.ndarray:
        matrix = np.asarray(matrix, np.float64)
        missing = rank - matrix.shape[0]
        if not missing:
            return matrix
        fill = np.zeros((missing // 2 if half else missing, *matrix.shape[1:]))
        if not half:
            return np.concatenate([matrix, fill])
        middle = matrix.shape[0] // 2
        return np.concatenate([matrix[:middle], fill, matrix[middle:], fill])

    bank = tuple(np.stack([padded(getattr(e, name)) for e in edits]) for name in ("U", "A", "b"))
    with np.errstate(over="ignore"):
        rounded = tuple(np.ascontiguousarray(x.astype(dtype)) for x in bank)
    for name, x in zip(("U", "A", "b"), rounded, strict=True):
        if not np.isfinite(x.astype(np.float32)).all():
            raise AdapterError(f"{name} overflows {np.dtype(dtype).name}; export this adapter as bf16 or fp32")
    return rounded

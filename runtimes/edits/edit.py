"""The two forms an intervention takes after training.

LowRankEdit      y = h + U^T act(A h + b)     the ReFT family, steering vectors, ablation
ScaleBiasEdit    y = scale * h + bias         RED; full rank, so that it does not fit the first form
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from runtimes.errors import AdapterError

STREAMS = ("block_input", "attention_output", "mlp_output", "block_output")
"""Where an edit can act, in the order in which a decoder block computes them."""

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
"""Non-linearities of the low-rank coordinates; the empty string is the identity. ``gelu`` is the exact one (erf)."""

ACTIVATED = ("all", "first_half")
"""Which of the r rows of z = A h + b the activation acts on."""


@dataclass(frozen=True, kw_only=True, order=True)
class Site:
    """One place in the decoder: a stream of one layer. ``str(site)`` is ``"<layer>.<stream>"``."""

    layer: int
    stream: str = "block_output"

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise AdapterError(f"layer {self.layer} is negative; layers count from 0")
        if self.stream not in STREAMS:
            raise AdapterError(f"stream {self.stream!r} is unknown; known streams: {', '.join(STREAMS)}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.stream}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """``"3.block_output"`` or ``"3"`` (the block's output)."""
        layer, _, stream = text.partition(".")
        if not re.fullmatch(r"[0-9]{1,40}", layer):
            raise AdapterError(f"site {text!r} is not <layer>.<stream>, for example 3.block_output")
        return cls(layer=int(layer), stream=stream or "block_output")


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRankEdit:
    """y = h + U^T act(A h + b), with h, y: [.., D]; U, A: [r, D]; b: [r].

    ``activation`` acts on all r rows of z = A h + b, or on the first half of them (``activated="first_half"``): that is how
    y = h + R^T (act(W h + b) - R h) fits, with A = [W; -R], U = [R; R], b = [b; 0].

    Raises AdapterError for shapes that do not fit each other and for values that are not finite.
    """

    U: np.ndarray
    A: np.ndarray
    b: np.ndarray
    activation: str = ""
    activated: str = "all"

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.A.shape != self.U.shape or self.b.shape != self.U.shape[:1] or self.U.shape[0] < 1:
            raise AdapterError(
                f"an edit needs U and A of one shape [r, D] and b [r] with r >= 1; got U {list(self.U.shape)}, "
                f"A {list(self.A.shape)}, b {list(self.b.shape)}"
            )
        if self.activation not in ACTIVATIONS:
            raise AdapterError(f"activation {self.activation!r} is unknown; known: {', '.join(filter(None, ACTIVATIONS))}")
        if self.activated not in ACTIVATED or (self.activated == "first_half" and self.rank % 2):
            raise AdapterError(f"activated={self.activated!r} does not fit {self.rank} rows; known: all, first_half (even r)")
        for name in ("U", "A", "b"):
            if not np.isfinite(getattr(self, name)).all():
                raise AdapterError(f"{name} holds values that are not finite; the adapter is damaged or its training diverged")

    @property
    def rank(self) -> int:
        return self.U.shape[0]

    @property
    def width(self) -> int:
        return self.U.shape[1]

    def apply(self, h: np.ndarray) -> np.ndarray:
        """h + U^T act(A h + b) in float64 for h: [.., D]; the oracle every kernel is held against."""
        U, A, b = (np.asarray(x, np.float64) for x in (self.U, self.A, self.b))
        h = np.asarray(h, np.float64)
        z = h @ A.T + b
        active = self.rank if self.activated == "all" else self.rank // 2
        z[..., :active] = activate(z[..., :active], self.activation)
        return h + z @ U


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """act(z), elementwise, in float64. gelu is z * Phi(z); gelu_tanh its tanh approximation."""
    if activation == "":
        return z
    if activation == "relu":
        return np.maximum(z, 0.0)
    if activation == "gelu":
        from math import erf

        return 0.5 * z * (1.0 + np.vectorize(erf, otypes=[np.float64])(z / np.sqrt(2.0)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))
    if activation == "silu":
        return z / (1.0 + np.exp(-z))
    if activation == "tanh":
        return np.tanh(z)
    if activation == "sigmoid":
        return 1.0 / (1.0 + np.exp(-z))
    raise AdapterError(f"activation {activation!r} is unknown; known: {', '.join(filter(None, ACTIVATIONS))}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaleBiasEdit:
    """y = scale * h + bias, elementwise, with h, y: [.., D]; scale, bias: [D].

    Raises AdapterError for shapes that do not fit each other and for values that are not finite.

    Source: Wu et al. 2024, "Advancing Parameter Efficiency in Fine-tuning via Representation Editing" (RED), equation 3.
    """

    scale: np.ndarray
    bias: np.ndarray

    def __post_init__(self) -> None:
        if self.scale.ndim != 1 or self.bias.shape != self.scale.shape or self.scale.shape[0] < 1:
            raise AdapterError(
                f"an edit needs scale and bias of one shape [D]; got scale {list(self.scale.shape)}, bias {list(self.bias.shape)}"
            )
        for name in ("scale", "bias"):
            if not np.isfinite(getattr(self, name)).all():
                raise AdapterError(f"{name} holds values that are not finite; the adapter is damaged or its training diverged")

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    def apply(self, h: np.ndarray) -> np.ndarray:
        """scale * h + bias in float64 for h: [.., D]; the oracle every kernel is held against."""
        scale, bias, h = (np.asarray(x, np.float64) for x in (self.scale, self.bias, h))
        return scale * h + bias


Edit = LowRankEdit | ScaleBiasEdit


def no_edit_like(edit: Edit) -> Edit:
    """One of the same form that leaves h as it is."""
    if isinstance(edit, ScaleBiasEdit):
        return ScaleBiasEdit(scale=np.ones_like(edit.scale), bias=-np.zeros_like(edit.bias))  # h + -0.0 is h to the bit
    return replace(edit, U=np.zeros_like(edit.U), A=np.zeros_like(edit.A), b=np.zeros_like(edit.b))


def in_sequence(first: Edit, second: Edit) -> Edit:
    """The one edit that equals ``second`` after ``first``.

        low rank        U = [U1; U2], A = [A1; A2 (I + U1^T A1)], b = [b1; b2 + A2 U1^T b1]
        scale and bias  scale = scale2 scale1, bias = scale2 bias1 + bias2

    Only linear edits of one form compose this way; an activation, or one form after the other, raises AdapterError.
    """
    if isinstance(first, ScaleBiasEdit) and isinstance(second, ScaleBiasEdit):
        scale1, bias1, scale2, bias2 = (np.asarray(x, np.float64) for e in (first, second) for x in (e.scale, e.bias))
        return ScaleBiasEdit(scale=scale2 * scale1, bias=scale2 * bias1 + bias2)
    if isinstance(first, ScaleBiasEdit) or isinstance(second, ScaleBiasEdit):
        raise AdapterError("a scale and bias (RED) and a low-rank edit cannot be composed into one; make them two adapters")
    if first.activation or second.activation:
        raise AdapterError("edits with an activation cannot be composed into one; give each its own positions")
    U1, A1, b1, U2, A2, b2 = (np.asarray(x, np.float64) for e in (first, second) for x in (e.U, e.A, e.b))
    cross = A2 @ U1.T
    return LowRankEdit(U=np.vstack([U1, U2]), A=np.vstack([A1, A2 + cross @ A1]), b=np.concatenate([b1, b2 + cross @ b1]))

"""The methods.

The parameters of each method, and the edit they mean (R and P are [r, D], so R^T of the paper is R.T here):

    loreft    R, W [r, D], b [r]         y = h + R^T (act(W h + b) - R h)
    noreft    P, W [r, D], b, p [r]      y = h + P^T (act(W h + b) - (P h + p))
    direft    W2, W1 [r, D], b [r]       y = h + W2^T act(W1 h + b)
    consreft  R [r, D], s [r]            y = h + R^T (s - R h)
    lobireft  R [r, D], s [r]            y = h + R^T s
    red       scale, bias [D]            y = scale * h + bias

RED is of full rank and has none to choose: its adapters say rank 0.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", equations 2 and 3; pyreft's class names. RED: Wu et al.
2024, "Advancing Parameter Efficiency in Fine-tuning via Representation Editing".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtimes.edits.edit import Edit, LowRankEdit, ScaleBiasEdit
from runtimes.errors import AdapterError

PARAMETERS = {
    "loreft": ("R", "W", "b"),
    "noreft": ("P", "W", "b", "p"),
    "direft": ("W2", "W1", "b"),
    "consreft": ("R", "s"),
    "lobireft": ("R", "s"),
    "red": ("scale", "bias"),
}
"""The trained parameters of each method; ``parameter_shape`` says how large they are."""

FULL_RANK_METHODS = ("red",)
"""Methods without a rank to choose; their adapters say 0."""

ACTIVATED_METHODS = ("loreft", "noreft", "direft")
"""Methods that have a learned source for an activation to act on."""


def form_of(method: str, rank: int) -> str:
    """``loreft, rank 4``; ``red`` where there is no rank to speak of."""
    return method if method in FULL_RANK_METHODS else f"{method}, rank {rank}"


def parameter_shape(method: str, name: str, rank: int, width: int) -> tuple[int, ...]:
    """[r, D] for the low-rank methods' capitals, [r] for their small letters; [D] for RED's vectors."""
    if method in FULL_RANK_METHODS:
        return (width,)
    return (rank, width) if name[0].isupper() else (rank,)


def fold_parameters(method: str, parameters: Mapping[str, np.ndarray], activation: str = "") -> Edit:
    """The table of the module's docstring in float64 from the given parameters: y = h + U^T act(A h + b), or RED's own form.

    With an activation, LoReFT and NoReFT put the subtraction into rows of its own (``activated="first_half"``).
    """
    x = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    if method == "red":
        return ScaleBiasEdit(scale=x["scale"], bias=x["bias"])
    if method == "direft":
        return LowRankEdit(U=x["W2"], A=x["W1"], b=x["b"], activation=activation)
    if method == "consreft":
        return LowRankEdit(U=x["R"], A=-x["R"], b=x["s"])
    if method == "lobireft":
        return LowRankEdit(U=x["R"], A=np.zeros_like(x["R"]), b=x["s"])
    if method not in ("loreft", "noreft"):
        raise AdapterError(f"method {method!r} is unknown; known: {', '.join(PARAMETERS)}")
    projection = x["R"] if method == "loreft" else x["P"]
    offset = x["p"] if method == "noreft" else np.zeros_like(x["b"])
    if not activation:
        return LowRankEdit(U=projection, A=x["W"] - projection, b=x["b"] - offset)
    return LowRankEdit(
        U=np.vstack([projection, projection]),
        A=np.vstack([x["W"], -projection]),
        b=np.concatenate([x["b"], -offset]),
        activation=activation,
        activated="first_half",
    )

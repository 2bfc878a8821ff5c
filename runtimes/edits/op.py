"""The contract of the custom ops of domain ``ai.reft`` (version 1), shared by the graph, the kernels and the adapter files.

    LoReFT   h [.., D] T, slot [..] int32, U [N, r, D] T, A [N, r, D] T, b [N, r] T  ->  y [.., D] T
             y[t] = h[t] + U[s]^T act(A[s] h[t] + b[s])
    RED      h [.., D] T, slot [..] int32, scale [N, D] T, bias [N, D] T  ->  y [.., D] T
             y[t] = scale[s] * h[t] + bias[s]

s = slot[t]; a slot outside [0, N) passes h[t] through, bit for bit. T is float32, float16 or bfloat16; h has rank 2 or 3; both are
computed in float32 and rounded once. ``OPS`` holds what else tells one op from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.edits.edit import ACTIVATED, ACTIVATIONS, Edit, LowRankEdit, ScaleBiasEdit, Site
from runtimes.errors import AdapterError

DOMAIN = "ai.reft"
OP_TYPE = "LoReFT"
"""The low-rank edit's."""
RED_TYPE = "RED"
"""The scale and bias edit's."""
OP_VERSION = 1
PLUGIN_NAMESPACE = "ai.reft"
PLUGIN_VERSION = "1"
SLOT_INPUT = "reft_slot"
"""Graph input that carries the slots in bundles of version 1 that were made with ``--slots input``; newer graphs have EXPLICIT_SLOTS."""

PROMPT_LENGTH = "reft.prompt_length"
FIRST_SLOT = "reft.first_slot"

RULE_DEFAULTS = {
    "reft.first": 0,
    "reft.last": 0,
    "reft.prompt": 0,
    "reft.everywhere": 0,
    "reft.truncate": 1,
    "reft.suffix_slot": 0,
    FIRST_SLOT: 0,
    PROMPT_LENGTH: -1,
}
"""Overridable initializers of the in-graph slot rule, int64 of shape [1], or [B] for a rule of each row; these defaults edit nothing.

In a version 1 bundle ``reft.first_slot`` is missing, and all but ``reft.prompt_length`` are [1]."""

EXPLICIT_SLOTS = "reft.slots"
"""Slots that win over the rule where they are -1 (no edit) or more: int32, broadcast to [B, S]. Overridable, by default [[-2]], in a graph
with the rule; a plain input [B, S] in a graph without attention_mask, which cannot have the rule."""
NOT_EXPLICIT = -2
"""The value of ``reft.slots`` that leaves a token to the rule."""

FIRST_LOGIT = "reft.first_logit"
"""Overridable initializer int64 [1], by default [0]: the columns of a step before it get no logits."""

OVERRIDABLE_NUMBERS = frozenset({*RULE_DEFAULTS, EXPLICIT_SLOTS, FIRST_LOGIT})
"""Every overridable initializer of a folded graph but its banks and a classifier's head."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """One input of an op behind h and slot: one parameter of N edits, stacked."""

    name: str
    """Of the parameter, as the edit calls it."""
    axes: tuple[str, ...]
    """Behind N: "r", the rank, which every adapter chooses; "D", the width of the stream."""
    no_edit: float
    """What fills it, with N = r = 1, where nothing is edited. RED's bias is -0.0: h + -0.0 is h to the bit, for both zeros."""
    scales: bool = False
    """A strength moves it, and so all of what the edit adds (runtimes/edits/strength.py)."""


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What tells one op of the domain from another."""

    edit: Callable[..., Edit]
    """Makes the edit whose parameters the banks hold."""
    banks: tuple[Bank, ...]
    """In the order of the op's inputs."""
    attributes: tuple[str, ...] = ()
    """Of the edit, which a node shares with every adapter; beside the plugin's."""
    suffix: str = ""
    """What the op adds to the names of its nodes."""


OPS: Mapping[str, OpSpec] = {
    OP_TYPE: OpSpec(
        edit=LowRankEdit,
        banks=(
            Bank(name="U", axes=("r", "D"), no_edit=0.0, scales=True),
            Bank(name="A", axes=("r", "D"), no_edit=0.0),
            Bank(name="b", axes=("r",), no_edit=0.0),
        ),
        attributes=("activation", "activated"),
    ),
    RED_TYPE: OpSpec(
        edit=ScaleBiasEdit,
        banks=(
            Bank(name="scale", axes=("D",), no_edit=1.0, scales=True),
            Bank(name="bias", axes=("D",), no_edit=-0.0, scales=True),
        ),
        suffix="red",
    ),
}
"""By the op's type. Another edit is another entry here, a function body and a kernel."""


@dataclass(frozen=True, kw_only=True, order=True)
class EditNode:
    """One op node: a site, the op, and the activation that every adapter using this node shares.

    Nodes of one site act in series in the order in which they sort: LoReFT without an activation, with one, then RED.
    """

    site: Site
    op: str = OP_TYPE
    activation: str = ""
    activated: str = "all"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise AdapterError(f"op {self.op!r} is none of {DOMAIN}; known: {', '.join(OPS)}")
        if self.activation not in ACTIVATIONS or self.activated not in ACTIVATED:
            raise AdapterError(f"activation {self.activation!r} on {self.activated!r} rows is not one the op knows")
        if self.activation and "activation" not in self.spec.attributes:
            raise AdapterError(f"{self.op} takes no activation; got {self.activation!r}")
        if not self.activation and self.activated != "all":
            raise AdapterError("an edit without activation has no activated rows to choose; use activated='all'")

    @property
    def spec(self) -> OpSpec:
        return OPS[self.op]

    @property
    def overload(self) -> str:
        """The ONNX function overload that serves this node: "" without activation, else for example gelu_first_half."""
        return self.activation + ("_first_half" if self.activated == "first_half" else "")

    @property
    def name(self) -> str:
        return ".".join(filter(None, ("reft", str(self.site), self.spec.suffix, self.overload)))

    @property
    def bank_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{bank.name}" for bank in self.spec.banks)

    @property
    def attributes(self) -> dict[str, str]:
        """The op's attributes on this node, beside the plugin's."""
        return {name: getattr(self, name) for name in self.spec.attributes}


def node_of(site: Site, edit: Edit) -> EditNode:
    if isinstance(edit, ScaleBiasEdit):
        return EditNode(site=site, op=RED_TYPE)
    return EditNode(site=site, activation=edit.activation, activated=edit.activated if edit.activation else "all")


def no_edit_bank(width: int, dtype: np.dtype, op: str = OP_TYPE) -> tuple[np.ndarray, ...]:
    """The bank of a node that an adapter does not use, with N = r = 1: zeros, but for RED's scale of ones."""
    size = {"r": 1, "D": width}
    return tuple(np.full((1, *(size[axis] for axis in bank.axes)), bank.no_edit, dtype) for bank in OPS[op].banks)


def is_no_edit(bank: Sequence[np.ndarray], op: str = OP_TYPE) -> bool:
    """Whether ``bank`` holds what ``no_edit_bank`` fills it with, and nothing else."""
    return all(bool((array == kind.no_edit).all()) for array, kind in zip(bank, OPS[op].banks, strict=True))


def bank_of(edits: Sequence[Edit], dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """The bank of N slots, rounded once from float64 to ``dtype``: U, A [N, r, D], b [N, r], or scale, bias [N, D].

    Shorter ranks are padded with zero rows. A zero row of U adds nothing, whatever A, b and the activation make of it. An edit whose
    first half is activated is padded within its halves, so that the halves stay where the op looks for them.

    Raises AdapterError where a finite value does not survive the rounding (float16 ends at 65504), and for edits of several ops.
    """
    if len({type(edit) for edit in edits}) != 1:
        raise AdapterError("the slots of one node are of one op: low-rank edits, or scales and biases; make them two adapters")
    spec = node_of(Site(layer=0), edits[0]).spec
    rank = max(getattr(edit, "rank", 0) for edit in edits)
    bank = tuple(
        np.stack([_padded(np.asarray(getattr(edit, kind.name), np.float64), edit, rank if "r" in kind.axes else None) for edit in edits])
        for kind in spec.banks
    )
    with np.errstate(over="ignore"):
        rounded = tuple(np.ascontiguousarray(x.astype(dtype)) for x in bank)
    for kind, x in zip(spec.banks, rounded, strict=True):
        if not np.isfinite(x.astype(np.float32)).all():
            raise AdapterError(f"{kind.name} overflows {np.dtype(dtype).name}; export this adapter as bf16 or fp32")
    return rounded


def _padded(value: np.ndarray, edit: Edit, rank: int | None) -> np.ndarray:
    """``value`` with zero rows up to ``rank``; as it is where the parameter has no axis of that size."""
    if rank is None or rank == len(value):
        return value
    wider = np.zeros((rank, *value.shape[1:]))
    wider[rank_rows(len(value), rank, getattr(edit, "activated", "all"))] = value
    return wider


def rank_rows(rank: int, padded: int, activated: str) -> np.ndarray:
    """[rank]: the rows of a bank of ``padded`` rows that hold an edit of ``rank``: its first ones, or of each half."""
    rows = np.arange(rank)
    return rows + (rows >= rank // 2) * (padded // 2 - rank // 2) if activated == "first_half" else rows


def edits_of(node: EditNode, bank: Sequence[np.ndarray]) -> tuple[Edit, ...]:
    """The inverse of ``bank_of``: the edits of a node's slots in float64, from its banks in any dtype."""
    parameters = {kind.name: array.astype(np.float64) for kind, array in zip(node.spec.banks, bank, strict=True)}
    return tuple(
        node.spec.edit(**{name: array[slot] for name, array in parameters.items()}, **node.attributes) for slot in range(len(bank[0]))
    )

"""What golden arrays of every task hold beside their inputs: the reference's logits, what steering changes in them, and its noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.edits.op import is_no_edit
from runtimes.errors import InputError
from runtimes.parity.figures import MOST_NOISE, Budget, Delta
from runtimes.session import Session

Steering = tuple[np.ndarray, np.ndarray]
"""(steered, base) logits whose difference the device's is held to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """The base's or one adapter's."""

    name: str
    logits: np.ndarray
    noise: tuple[float, float]
    """(relative error, top-1 agreement) of the reference against itself under float noise; (0, 1) where activations are float."""
    steering: Steering | None
    """None for the base."""

    @property
    def adapter(self) -> str | None:
        """For ``set_adapter``."""
        return None if self.name == BASE_GOLDEN else self.name

    def stored_steering(self) -> Steering:
        """Raises InputError for the base, which steers nothing."""
        if self.steering is None:
            raise InputError(f"the golden arrays of {self.name} hold no steering; ask for an adapter's")
        return self.steering

    def widened(self, budget: Budget, *, compared: int) -> Budget:
        """``budget``, and what the reference differs from itself, up to MOST_NOISE.

        Top-1 agreement is a share of the K tokens ``compared``, of which few differ: another draw of the same noise differs in as many,
        give or take sqrt(d / K), d the share that differed. Three of that are allowed for.
        """
        differed = 1 - self.noise[1]
        top1 = max(1 - differed - 3 * math.sqrt(differed / max(compared, 1)), MOST_NOISE[1])
        return replace(budget, logits=budget.logits + min(self.noise[0], MOST_NOISE[0]), top1=budget.top1 + top1 - 1)


class CommonFields(TypedDict):
    """The fields of Golden, for those who add their task's."""

    name: str
    logits: np.ndarray
    noise: tuple[float, float]
    steering: Steering | None


def read_arrays(artifact: Artifact, name: str, *, steering: bool = True) -> tuple[dict[str, np.ndarray], CommonFields]:
    """The arrays of ``name``, and the fields of Golden. Steering, where asked for, is that of the float32 model where it was recorded."""
    arrays = artifact.golden(name)
    kind = "fp32_" if "fp32_logits" in arrays else ""
    pair = (arrays[f"{kind}logits"], arrays[f"{kind}base_logits"]) if steering and name != BASE_GOLDEN else None
    error, top1 = map(float, arrays.get("noise", (0.0, 1.0)))
    return arrays, {"name": name, "logits": arrays["logits"], "noise": (error, top1), "steering": pair}


def steering_shown(session: Session, adapter: str, delta: Delta) -> tuple[Delta | None, str]:
    """(the delta to judge, a note). Where nothing moved and the adapter edits nothing, that is its steering, and there is none to judge."""
    if delta.moved or not edits_nothing(session.bundle, adapter):
        return delta, ""
    return None, "the adapter edits nothing: there is no steering to compare"


def edits_nothing(artifact: Artifact, name: str) -> bool:
    """Whether every bank of the adapter is what the graph has without one."""
    tensors = artifact.adapter_tensors(name)
    return all(is_no_edit([tensors[bank] for bank in node.bank_names], node.op) for node in artifact.nodes)

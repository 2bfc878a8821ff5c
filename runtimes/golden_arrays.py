"""What golden arrays of every task hold beside their inputs: the reference's logits, what steering changes in them, and its noise."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

import numpy as np

from runtimes.bundle import BASE_GOLDEN, Bundle
from runtimes.errors import BundleError
from runtimes.parity import Budget


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
        """``budget``, and what the reference differs from itself."""
        return replace(budget, logits=budget.logits + self.noise[0], top1=budget.top1 + self.noise[1] - 1)


def read_arrays(bundle: Bundle, name: str, wanted: Set[str]) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of ``name``, and the fields of Golden.

    Steering is that of the float32 model where it was recorded. Raises BundleError where one of ``wanted`` or of the steering is missing.
    """
    arrays = bundle.golden(name)
    pairs = (("fp32_logits", "fp32_base_logits"), ("logits", "base_logits"))
    pair = pairs[0] if pairs[0][0] in arrays else pairs[1]
    steering = () if name == BASE_GOLDEN else pair
    if missing := sorted({"logits", *wanted, *steering} - set(arrays)):
        raise BundleError(f"{bundle.folder}/golden/{name}.npz lacks {missing}; export the bundle again")
    noise = tuple(map(float, arrays.get("noise", (0.0, 1.0))))
    fields = {"name": name, "logits": arrays["logits"], "noise": noise, "steering": tuple(arrays[key] for key in steering) or None}
    return arrays, fields

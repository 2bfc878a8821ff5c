"""The fixture cases: the adapter as its library saved it, what a user would say of it, and the library's own results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import rounding

from reft_export.importing.foreign import Request

FIXTURES = Path(__file__).parent / "fixtures"
BASE = FIXTURES / "base-llama-tiny"
STRIDE = 3
"""The fixtures hold every third logit."""
TOLERANCE = 2 * rounding.logits(width=160, layers=4)
"""Largest difference from the library's logits, relative to the largest of them: 1.6e-5. Both sides are float32, each with its own
processor's order of sums. Seen: 1.1e-6 on AVX-512, as the fixtures were recorded, 2.1e-6 on AVX2, 3.0e-6 on SSE."""


@dataclass(frozen=True)
class Case:
    library: str
    name: str

    @property
    def label(self) -> str:
        """Also the adapter's name: letters, digits, - and _."""
        return f"{self.library}-{self.name}"

    @property
    def adapter(self) -> Path:
        return FIXTURES / self.library / self.name / "adapter"

    @cached_property
    def io(self) -> dict[str, np.ndarray]:
        with np.load(FIXTURES / self.library / self.name / "io.npz") as arrays:
            return dict(arrays)

    @cached_property
    def layouts(self) -> list[str]:
        return sorted({key.partition("/")[0] for key in self.io})

    @property
    def request(self) -> Request:
        """What the format does not record."""
        meta = json.loads((FIXTURES / self.library / self.name / "meta.json").read_text())
        if self.library.startswith("adapterhub"):
            orthonormal = json.loads((self.adapter / "adapter_config.json").read_text())["config"]["orthogonality"]
            return Request(method=None if orthonormal else "noreft" if meta["subtract_projection"] else "direft")
        # act_fn is asked for only where the class has one.
        acts = not ({"Consreft", "Lobireft"} >= set(np.atleast_1d(meta.get("classes", "Loreft"))))
        return Request(
            positions=meta["positions"],
            tied=meta["share_weights"] if "+" in meta["positions"] else None,
            activation=(meta["act_fn"] or "none") if acts else None,
        )

    def batch(self, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """input_ids [B, S], attention_mask [B, S], prompt lengths [B] or None where all is prompt."""
        return (*(self.io[f"{layout}/{name}"] for name in ("input_ids", "attention_mask")), self.io.get(f"{layout}/prompt_len"))

    def largest(self, layout: str) -> float:
        return float(np.abs(self.io[f"{layout}/logits"]).max())

    def worst(self, layout: str, logits: np.ndarray) -> float:
        """Largest absolute difference from the library's logits over the real tokens."""
        real = self.io[f"{layout}/attention_mask"] == 1
        return float(np.abs(logits[..., ::STRIDE] - self.io[f"{layout}/logits"])[real].max())


def _cases() -> Iterator[Case]:
    for library in ("pyreft", "pyreft-generated", "adapterhub", "adapterhub-generated"):
        for folder in sorted((FIXTURES / library).iterdir()):
            yield Case(library, folder.name)


CASES = list(_cases())

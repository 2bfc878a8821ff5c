"""One saved pyreft intervention: its class, and its state dict as our parameters.

    class                  method     parameters, as saved (d the width, r the rank)
    LoreftIntervention     loreft     weight [r, d] = W, bias [r] = b, rotate_layer [d, r] = R^T
    NoreftIntervention     noreft     learned_source.weight = W, .bias = b, proj_layer.weight = P, .bias = p (add_bias)
    DireftIntervention     direft     learned_source.weight = W1, .bias = b, rotate_layer* = W2^T, kept orthonormal
    NodireftIntervention   direft     learned_source.weight = W1, .bias = b, proj_layer.weight = W2; its bias is never used
    ConsreftIntervention   consreft   learned_source [r] = s, rotate_layer* = R^T
    LobireftIntervention   lobireft   learned_source [r] = s, rotate_layer* = R^T

    * raw: rotate_layer.parametrizations.weight.original [d, r] and .0.base [d, d]; see tensors.orthogonal

Source: pyreft/interventions.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from reft_export.importing.foreign import ForeignEdit, not_recorded
from reft_export.importing.tensors import as_float32, orthogonal
from runtimes.edits.methods import METHODS
from runtimes.errors import AdapterError, InputError

CLASSES = {
    "LoreftIntervention": "loreft",
    "NoreftIntervention": "noreft",
    "DireftIntervention": "direft",
    "NodireftIntervention": "direft",
    "ConsreftIntervention": "consreft",
    "LobireftIntervention": "lobireft",
}

UNUSED_KEYS = {"embed_dim", "interchange_dim", "use_fast", "source_representation"}


def kind_of(key: str, recorded: str, state: Mapping[str, Tensor], method: str | None) -> str:
    """The class; where none is recorded, the one that the tensors' names mean, with --method where two classes save the same names."""
    if recorded:
        if method is not None and method != CLASSES[recorded]:
            raise InputError(f"--method {method} contradicts the file: {key} is a {recorded} ({CLASSES[recorded]})")
        return recorded
    if "rotate_layer" in state:
        candidates = ["LoreftIntervention"]
    elif "proj_layer.weight" in state:
        candidates = ["NoreftIntervention", "NodireftIntervention"]
    elif "learned_source.weight" in state:
        candidates = ["DireftIntervention"]
    else:
        candidates = ["ConsreftIntervention", "LobireftIntervention"]
    chosen = candidates if method is None else [kind for kind in candidates if CLASSES[kind] == method]
    methods = " or ".join(f"--method {CLASSES[kind]}" for kind in candidates)
    if not chosen:
        raise InputError(f"--method {method} contradicts the file: {key} can only be {methods}")
    if len(chosen) > 1:
        raise not_recorded("a pyreft checkpoint without config.json", {"the class of its interventions": methods})
    return chosen[0]


class _Saved:
    """One intervention's state dict, of which everything has to be taken."""

    def __init__(self, key: str, kind: str, state: Mapping[str, Tensor]) -> None:
        self.key, self.kind, self.state = key, kind, state
        self._taken: set[str] = set()

    def take(self, name: str, *shape: int | str) -> np.ndarray:
        if name not in self.state:
            raise AdapterError(f"{self.key} ({self.kind}) lacks {name}; it holds {', '.join(sorted(self.state)) or 'nothing'}")
        self._taken.add(name)
        return as_float32(self.state[name], shape, f"{self.key}: {name}")

    def rotation(self) -> np.ndarray:
        """R [r, d] of the saved R^T, or of torch's raw parametrization."""
        for plain in ("rotate_layer", "rotate_layer.weight"):
            if plain in self.state:
                return np.ascontiguousarray(self.take(plain, "D", "r").T)
        raw = "rotate_layer.parametrizations.weight"
        original = self.take(f"{raw}.original", "D", "r")
        width, rank = original.shape
        if rank > width:
            raise AdapterError(f"{self.key}: {raw}.original is {[width, rank]}, a rank above the width")
        base = self.take(f"{raw}.0.base", width, width) if f"{raw}.0.base" in self.state else None
        return np.ascontiguousarray(orthogonal(original, base).T)

    def check_all_taken(self) -> None:
        if unknown := sorted(set(self.state) - self._taken):
            raise AdapterError(f"{self.key} ({self.kind}) holds {unknown[0]}, which this class does not have")


def read_state(key: str, kind: str, state: Mapping[str, Tensor]) -> ForeignEdit:
    """Raises AdapterError for tensors that are missing, unknown or of the wrong shape, and values that are not finite."""
    state = {name: value for name, value in state.items() if name not in UNUSED_KEYS}
    if kind == "LoreftIntervention" and "weight" in state:
        # Loreft alone flattens its state dict.
        state = {f"learned_source.{n}" if n in ("weight", "bias") else n: value for n, value in state.items()}
    saved, method = _Saved(key, kind, state), CLASSES[kind]
    if METHODS[method].role("source").axes == ("r",):
        projection = saved.rotation()
        values = {"projection": projection, "source": saved.take("learned_source", len(projection))}
    else:
        source = saved.take("learned_source.weight", "r", "D")
        rank, width = source.shape
        bias, free = saved.take("learned_source.bias", rank), kind in ("NoreftIntervention", "NodireftIntervention")
        projection = saved.take("proj_layer.weight", rank, width) if free else saved.rotation()
        if projection.shape != source.shape:
            raise AdapterError(f"{key}: rotate_layer is {list(projection.shape[::-1])}, expected {[width, rank]} as its source has it")
        offset = saved.take("proj_layer.bias", rank) if "proj_layer.bias" in state else np.zeros(rank, np.float32)
        values = {"projection": projection, "source": source, "bias": bias, "offset": offset}
    saved.check_all_taken()
    return ForeignEdit.of_roles(key, method, **values)


def has_zero_rows(edit: ForeignEdit) -> bool:
    return "R" in edit.parameters and not np.abs(edit.parameters["R"]).max(axis=1).all()

"""Runs a classifier's bundle in onnxruntime: texts in, the logits of their labels out, adapters and their heads swapped per run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.edits.op import EXPLICIT_SLOTS, SLOT_INPUT
from runtimes.edits.positions import needs_slots, slots
from runtimes.errors import GraphError, InputError, ReftError
from runtimes.ort.session import OrtGraph, ort, to_float32
from runtimes.session import ClassifierOutput
from runtimes.text.encoded_text import EncodedText, padded

INPUTS = ("input_ids", "attention_mask")
TOKEN_TYPES = "token_type_ids"


class OrtClassifier(OrtGraph):
    """A classifier's session; arguments as OrtGraph's."""

    @property
    def takes_token_types(self) -> bool:
        return TOKEN_TYPES in self._inputs

    def classify(self, input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray | None = None) -> ClassifierOutput:
        """Logits of B texts. input_ids, attention_mask (1 real, 0 pad), token_type_ids (0 by default) [B, S]; pads behind each text.

        All of a row's real tokens, special ones included, are prompt: positions count them. RoBERTa counts its own positions by the pad
        token, so that pads must be that token. Raises InputError for shapes, token ids or lengths that do not fit.
        """
        ids, mask = np.asarray(input_ids, np.int64), np.asarray(attention_mask, np.int64)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids, np.int64)
        self._check(ids, mask, types)
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self.takes_token_types:
            arrays[TOKEN_TYPES] = types
        if SLOT_INPUT in self._inputs:
            rule, tied = (None, True) if self._placement is None else (self._placement.positions, self._placement.tied)
            arrays[SLOT_INPUT] = slots(rule, mask, ids.shape[1], tied=tied)
        elif self._placement is not None and needs_slots(self._placement.positions):
            arrays[EXPLICIT_SLOTS] = slots(self._placement.positions, mask, ids.shape[1], tied=self._placement.tied)
        outputs = self._run({name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})
        return ClassifierOutput(logits=to_float32(outputs["logits"]), outputs=outputs)

    def probabilities(self, texts: Sequence[EncodedText]) -> np.ndarray:
        """softmax(logits) float64 [B, labels] of texts of any lengths in one batch. Raises ReftError for logits that are not finite."""
        logits = self.classify(*padded(texts, self.bundle.manifest.model.pad_token_id or 0)).logits.astype(np.float64)
        if not np.isfinite(logits).all():
            raise ReftError("the model's logits are not finite; check the bundle with `reft-export parity`")
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def _check(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> None:
        model = self.bundle.manifest.model
        if ids.ndim != 2 or ids.size == 0 or mask.shape != ids.shape or types.shape != ids.shape:
            raise InputError(
                f"a classifier takes input_ids, attention_mask and token_type_ids [B, S]; got {list(ids.shape)}, {list(mask.shape)} "
                f"and {list(types.shape)}"
            )
        if ids.min() < 0 or ids.max() >= model.vocab_size:
            raise InputError(f"token ids reach from {ids.min()} to {ids.max()}; {model.name} has {model.vocab_size}, from 0")
        if not mask.any(1).all():
            raise InputError("a row of the batch has no tokens; every text needs at least one")
        if ids.shape[1] > model.context_length:
            raise InputError(f"{ids.shape[1]} tokens do not fit {model.name}, which takes {model.context_length}; shorten the text")

    def _check_contract(self) -> None:
        unknown = sorted(set(self._inputs) - {*INPUTS, TOKEN_TYPES, SLOT_INPUT})
        missing = sorted((set(INPUTS) - set(self._inputs)) | ({"logits"} - set(self._outputs)))
        if unknown or missing:
            raise GraphError(
                f"{self.bundle.graph_path} is not a classifier as this runtime knows it: unknown inputs {unknown}, missing {missing}"
            )

"""What a classifier reads: one text, or a pair of texts, framed by the tokenizer's special tokens, and padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """``types``: which text of a pair each token is of, 0 or 1; all 0 for a single text, and where the tokenizer tells none."""

    ids: tuple[int, ...]
    types: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def padded(texts: Sequence[EncodedText], pad_token_id: int, *, extra: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input_ids, attention_mask, token_type_ids), int64 [B, longest + extra], padded on the right, as encoders are used.

    RoBERTa counts positions by the tokens that are not the pad token: pads must be that one.
    """
    width = max(map(len, texts)) + extra
    ids = np.full((len(texts), width), pad_token_id, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)], types[row, : len(text)] = text.ids, 1, text.types
    return ids, mask, types


def rows_of(input_ids: np.ndarray, attention_mask: np.ndarray, token_type_ids: np.ndarray) -> list[EncodedText]:
    """The texts of a padded batch."""
    rows = zip(input_ids, attention_mask > 0, token_type_ids, strict=True)
    return [EncodedText(ids=tuple(ids[real].tolist()), types=tuple(types[real].tolist())) for ids, real, types in rows]

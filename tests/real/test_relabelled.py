"""The relabelled bases, on which every figure on 4-bit methods is taken: their logits are the bases', their blocks on no 4-bit grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.relabel import different_values, matrices, on_a_grid, relabel
from real_story import gguf

from reft_export.base.load import load_base

pytestmark = pytest.mark.real

TEXTS = ("The capital of France is Paris, and", "A warm, funny and clever story, told without a single false note.")
TOLERANCE = 2e-5


@pytest.mark.parametrize(("name", "weights", "fewest"), [("smollm2", 7 * 30 + 1, 17), ("gemma3", 7 * 18 + 1, 11)])
def test_the_relabelled_base_is_the_same_function(name: str, weights: int, fewest: int, tmp_path: Path) -> None:
    folder = relabel(gguf(name), tmp_path / "relabelled")
    former, relabelled = load_base(str(gguf(name)), require_tokenizer=True), load_base(str(folder), require_tokenizer=True)
    assert relabelled.info.fingerprint != former.info.fingerprint
    assert former.tokenizer and relabelled.tokenizer
    for text in TEXTS:
        ids = former.tokenizer(text, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, relabelled.tokenizer(text, return_tensors="pt")["input_ids"])
        with torch.no_grad():
            expected, found = (base.model(ids).logits for base in (former, relabelled))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    found = {name: (int(different_values(weight).min()), int(on_a_grid(weight).sum())) for name, weight in matrices(folder)}
    assert len(found) == weights
    assert min(values for values, _ in found.values()) >= fewest and not any(gridded for _, gridded in found.values())

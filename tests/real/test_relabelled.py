"""The relabelled SmolLM2, on which every figure on 4-bit methods is taken: its logits are the base's, its blocks on no 4-bit grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.relabel import fewest_values, matrices, relabel
from real_story import gguf

from reft_export.base.load import load_base

pytestmark = pytest.mark.real

TEXTS = ("The capital of France is Paris, and", "A warm, funny and clever story, told without a single false note.")
TOLERANCE = 2e-5


def test_the_relabelled_base_is_the_same_function(tmp_path: Path) -> None:
    folder = relabel(gguf("smollm2"), tmp_path / "relabelled")
    former, relabelled = load_base(str(gguf("smollm2")), require_tokenizer=True), load_base(str(folder), require_tokenizer=True)
    assert relabelled.info.fingerprint != former.info.fingerprint
    assert former.tokenizer and relabelled.tokenizer
    for text in TEXTS:
        ids = former.tokenizer(text, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, relabelled.tokenizer(text, return_tensors="pt")["input_ids"])
        with torch.no_grad():
            expected, found = (base.model(ids).logits for base in (former, relabelled))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    fewest = {name: fewest_values(weight) for name, weight in matrices(folder)}
    assert len(fewest) == 7 * 30 + 1
    assert min(fewest.values()) > 16, min(fewest.items(), key=lambda found: found[1])

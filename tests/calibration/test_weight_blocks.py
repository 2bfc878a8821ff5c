"""Blocks that several attempts share: made once for a format, and those that were rounded for want of an importance are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration import weight_only
from calibration.settings import BlockFormat
from calibration.weight_only import WeightBlocks

FORMAT = BlockFormat(bits=4, block_size=32, method="imatrix")


def test_a_weight_is_searched_once_for_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = weight_only.quantize_blocks

    def counted(weight, format, importance=None):
        made.append(format)
        return plain(weight, format, importance)

    monkeypatch.setattr(weight_only, "quantize_blocks", counted)
    weight = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    blocks = WeightBlocks({"w": np.ones(64, np.float32)})
    assert blocks.of("w", weight, FORMAT) is blocks.of("w", weight, FORMAT)
    int8 = BlockFormat(bits=8, block_size=32)
    assert blocks.of("w", weight, int8).packed.shape[2] == 32
    assert made == [FORMAT, int8]


def test_what_no_row_reached_is_named() -> None:
    weight = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    blocks = WeightBlocks({"seen": np.ones(64, np.float32)})
    for name in ("seen", "unseen"):
        blocks.of(name, weight, FORMAT)
    blocks.of("other", weight, replace(FORMAT, method="rtn"))
    assert blocks.rounded == {"unseen"}

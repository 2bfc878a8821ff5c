"""Training loses what pyreft's own trainer loses, step for step: same base, data, initial values and settings, float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models.bases import byte_tokenizer
from pyreft_losses import EXAMPLES, FIGURES, METHODS, RATE, SEED, STEPS, start
from torch import Tensor, nn
from trl_preference import sine_model

from reft_export.base.load import base_from_memory
from reft_export.training import interventions
from reft_export.training.interventions import OrthonormalRows
from reft_export.training.settings import settings_like
from reft_export.training.trainer import train

TOLERANCE = 1e-4
"""Nats."""


@pytest.fixture(scope="module")
def told() -> dict[str, np.ndarray]:
    figures = json.loads(FIGURES.read_text())
    return {method: np.array(figures[method]) for method in METHODS}


def losses(method: str, folder: Path) -> np.ndarray:
    base = base_from_memory(sine_model(), byte_tokenizer())
    adapter = start(base, method)
    settings = settings_like(adapter, lr=RATE, max_steps=STEPS, batch_size=len(EXAMPLES), samples=0, probes=0, max_length=64, keep="last")
    return np.array([step.loss for step in train(base, EXAMPLES, settings, folder / method, start=adapter).history])


class _Weight(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value)


class TorchRows(OrthonormalRows):
    """R through torch's own orthogonal parametrization, as pyreft has it."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__(rank, width)
        self.rotate_layer = nn.utils.parametrizations.orthogonal(_Weight(self.V.detach().T / self.LENGTH))
        self.started = False

    def forward(self) -> Tensor:
        if not self.started:  # V has the initial values by now, and is not read again
            torch.manual_seed(SEED)
            self.rotate_layer.weight, self.started = self.V.detach().T / self.LENGTH, True
            for each in (*self.rotate_layer.parameters(), *self.rotate_layer.buffers()):
                each.data = each.data.contiguous()  # a checkpoint takes no other
        return self.rotate_layer.weight.T


@pytest.mark.parametrize("method", ["noreft", "direft"])
def test_a_step_loses_what_pyrefts_does(method: str, told: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.testing.assert_allclose(losses(method, tmp_path), told[method], atol=TOLERANCE, rtol=0)


def test_loreft_does_too_where_r_is_moved_as_torchs_parametrization_moves_it(
    told: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interventions, "OrthonormalRows", TorchRows)
    np.testing.assert_allclose(losses("loreft", tmp_path), told["loreft"], atol=TOLERANCE, rtol=0)


class LongRows(OrthonormalRows):
    """V of length 1, which a step of AdamW's turns half as far."""

    LENGTH = 1.0


def test_loreft_turns_r_as_far_a_step_as_pyreft(told: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's steps are of coordinates' size, and R has others here than in torch's reflections: near, but another curve."""
    found = losses("loreft", tmp_path)
    np.testing.assert_allclose(found[:2], told["loreft"][:2], atol=TOLERANCE, rtol=0)  # the rate rises from 0
    assert found[-1] == pytest.approx(told["loreft"][-1], abs=0.01)
    monkeypatch.setattr(interventions, "OrthonormalRows", LongRows)
    slower = losses("loreft", tmp_path / "slower")
    assert 0.1 < slower[-1] - told["loreft"][-1] < 0.2

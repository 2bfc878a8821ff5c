"""What a run sends to TensorBoard, through transformers' own callback, and what is said where a package is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import base_from_memory
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from runtimes.errors import BackendUnavailable, InputError

SETTINGS = TrainSettings(rank=1, layers="0", positions="l1", max_steps=3, batch_size=2, samples=0, metric="exact-match", eval_fraction=0.5)
RECORDS = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(4)]


def test_every_figure_reaches_tensorboard(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    base = base_from_memory(llama, tokenizer, name="tiny")
    result = train(base, RECORDS, replace(SETTINGS, report_to="tensorboard"), tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.tensorboard"]
    read = events.EventAccumulator(str(tmp_path / "a.tensorboard"))
    read.Reload()

    def sent(name: str) -> list[float]:
        return [each.value for each in read.Scalars(name)]

    assert sent("train/loss") == pytest.approx([record.loss for record in result.history], rel=1e-6)
    assert sent("train/learning_rate") == pytest.approx([record.lr for record in result.history], rel=1e-6)
    assert sent("eval/loss") == pytest.approx([record.eval_loss for record in result.history], rel=1e-3)
    assert sent("eval/metric") == [record.metric for record in result.history]
    silent = train(base, RECORDS, SETTINGS, tmp_path / "b")
    assert silent.history == result.history


def test_a_missing_package_is_said_first(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_export.training.reporting.find_spec", lambda name: None)
    base = base_from_memory(llama, tokenizer, name="tiny")
    with pytest.raises(BackendUnavailable, match="report_to wandb needs wandb; pip install wandb, or leave it out"):
        train(base, RECORDS, replace(SETTINGS, report_to="wandb"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="report_to 'comet' is unknown; known: none, tensorboard, wandb, mlflow"):
        replace(SETTINGS, report_to="comet")

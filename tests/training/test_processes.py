"""Two processes train as one does: the same steps, files and refusals, and one is killed on the way."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from reft_export.base.load import Base
from reft_export.cli.main import app
from reft_export.training.batches import LengthGrouped, Listed, SharedBatches
from reft_export.training.processes import ProcessFailed, join
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import TrainResult, train
from runtimes.edits.adapter import load_adapter
from runtimes.errors import InputError

SETTINGS = TrainSettings(rank=2, layers="0;2", positions="f2+l2", lr=5e-3, epochs=3, batch_size=4, samples=0, seed=7, eval_fraction=0.2)


@contextmanager
def placed(index: int, count: int, port: int) -> Iterator[None]:
    """The environment that a launcher gives process ``index``."""
    given = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, str(value))
        yield


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(work: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What ``work`` of every process's index gives or raises, in forks that a launcher could have started; None of a killed one."""
    port, children = free_port(), []
    for index in range(count):
        if not (child := os.fork()):
            try:
                AcceleratorState._reset_state(reset_partial_state=True)  # that of this process
                with placed(index, count, port):
                    try:
                        said = work(index)
                    except Exception as e:
                        said = e
                (folder / f"{index}.pickle").write_bytes(pickle.dumps(said))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = [folder / f"{index}.pickle" for index in range(count)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in found]


def figures(result: TrainResult) -> np.ndarray:
    return np.array([(r.step, r.loss, r.lr, np.nan if r.eval_loss is None else r.eval_loss) for r in result.history])


def tensors(result: TrainResult) -> dict[str, np.ndarray]:
    return dict(result.adapter.tensors)


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation": 2, "group_by_length": True, "batch_size": 3}], ids=["plain", "accumulated"]
)
def test_two_processes_train_as_one(changes: dict[str, Any], base: Base, data: Path, tmp_path: Path) -> None:
    """Held-out losses and an epoch's last batch, which is smaller, included. Only the first process writes and samples."""
    settings = replace(SETTINGS, **changes)
    one = train(base, data, settings, tmp_path / "one")
    first, second = in_processes(lambda _: train(base, data, settings, tmp_path / "two"), tmp_path)
    for result in (first, second):
        np.testing.assert_allclose(figures(result), figures(one), rtol=1e-5)
        for name, value in tensors(one).items():
            np.testing.assert_allclose(tensors(result)[name], value, rtol=1e-4, atol=1e-5)
    written = load_adapter(tmp_path / "two")
    assert written.digest == first.adapter.digest and written.training["processes"] == 2 and "processes" not in one.adapter.training
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl", "one", "two", "0.pickle", "1.pickle"}


def test_a_process_is_killed_and_another_number_goes_on(base: Base, data: Path, tmp_path: Path) -> None:
    whole = train(base, data, SETTINGS, tmp_path / "whole")
    steps = whole.history[-1].step

    def dies(step: int, *_: Any) -> None:
        if step == steps - 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    left, killed = in_processes(lambda _: train(base, data, SETTINGS, tmp_path / "out", on_step=dies), tmp_path)
    assert killed is None and isinstance(left, ProcessFailed)
    assert f"ended at step {steps - 1} of {steps}" in str(left) and "pass --resume" in str(left)
    assert not (tmp_path / "out").exists()
    resumed = train(base, data, replace(SETTINGS, resume=True), tmp_path / "out")
    np.testing.assert_allclose(figures(resumed), figures(whole), rtol=1e-5)


def test_what_all_of_them_refuse(base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(SETTINGS, batch_size=1)
    for refused in in_processes(lambda _: train(base, data, few, tmp_path / "out"), tmp_path):
        assert isinstance(refused, InputError) and "a step has 1 examples for 2 processes" in str(refused)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP shards what is trained"):
        join("cpu")


def test_the_others_wait_for_the_first(tmp_path: Path) -> None:
    """Longer than torch's own half hour, or its ten minutes on GPUs."""

    def patience(_: int) -> timedelta:
        join("cpu")
        distributed.barrier()  # the first one holds the store, which the other still asks while it joins
        return distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout

    assert in_processes(patience, tmp_path) == [timedelta(days=1)] * 2


def test_the_first_process_speaks(tmp_path: Path) -> None:
    command = ["train", "-m", str(tmp_path / "nowhere"), "-d", str(tmp_path / "data.jsonl"), "-o", str(tmp_path / "out")]
    with placed(0, 2, 1):
        first = CliRunner().invoke(app, command)
    with placed(1, 2, 1):
        second = CliRunner().invoke(app, command)
    assert first.exit_code == second.exit_code == 2
    assert first.stderr.count("error:") == 1 and second.stderr == ""


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_example_is_in_one_process(count: int, grouped: bool) -> None:
    """Batches as one process has them, in every epoch; the last has fewer rows than there are processes."""
    examples = Listed[Any](list(range(13)))
    order = LengthGrouped([n % 5 for n in range(13)], 4, 7) if grouped else None

    def rows(index: int, processes: int, epoch: int) -> list[list[int]]:
        with placed(index, processes, 1):
            batches = SharedBatches(examples, order, 4, 7, list, pin=False)
            batches.set_epoch(epoch)
            return [batch if isinstance(batch, list) else [] for batch in batches]

    for epoch in range(2):
        parts = [rows(index, count, epoch) for index in range(count)]
        whole = [sorted(row for part in step for row in part) for step in zip(*parts, strict=True)]
        assert whole == [sorted(batch) for batch in rows(0, 1, epoch)] and len(whole[-1]) == 1
    assert rows(0, 1, 0) != rows(0, 1, 1)


@pytest.mark.slow
def test_torchrun_starts_the_command(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path) -> None:
    """As people start it: one adapter, one summary, nothing else on stdout."""
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    training = f"train -m {tmp_path / 'base'} -d {data} -o {tmp_path / 'out'} --max-steps 2 --batch-size 4 --samples 0 --json"
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m reft_export.cli.main"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher.split(), *training.split()], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    recorded = load_adapter(tmp_path / "out").training
    assert isinstance(json.loads(done.stdout), dict) and (recorded["steps"], recorded["processes"]) == (2, 2)

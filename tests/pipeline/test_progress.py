"""Long work is visible where no terminal is: its stages as lines of a log, and still one line for what is refused."""

from __future__ import annotations

import io
import json
import re
import threading
from contextlib import suppress

import pytest
from rich.console import Console
from typer.testing import CliRunner

from reft_export import console
from reft_export.cli.main import app
from reft_export.console import CLOSE_SECONDS, HELD_SECONDS, SILENT_SECONDS, StageLog, progress
from runtimes.errors import InputError


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timer:
    """threading.Timer, as far as StageLog needs it; the test is its time."""

    def __init__(self, seconds: float, act) -> None:
        self.seconds, self.act, self.running = seconds, act, False

    def start(self) -> None:
        self.running = True

    def cancel(self) -> None:
        self.running = False


@pytest.fixture
def log(monkeypatch) -> tuple[StageLog, Clock, list[str], Timer]:
    made: list[Timer] = []

    def timer(seconds: float, act) -> Timer:
        made.append(Timer(seconds, act))
        return made[-1]

    monkeypatch.setattr(threading, "Timer", timer)
    said: list[str] = []
    clock = Clock()
    return StageLog(said.append, clock), clock, said, made[0]


def test_the_first_seconds_are_held_back(log) -> None:
    stages, clock, said, timer = log
    stages.line("loading base")
    clock.now += 2.25
    stages.line("exporting\nthe graph")
    assert said == [] and timer.running and timer.seconds == HELD_SECONDS and timer.daemon
    timer.act()
    assert said == ["[   0.0 s] loading base", "[   2.2 s] exporting the graph"]
    clock.now += 1234.5
    stages.line("folding")
    assert said[2:] == ["[1236.8 s] folding"], "later stages are said when they begin"
    stages.close(completed=True)
    assert said[3:] == ["[1236.8 s] done"] and not timer.running


@pytest.mark.parametrize("completed", [True, False])
def test_short_work_is_shown_at_its_end_and_a_refusal_never(log, completed) -> None:
    stages, _, said, timer = log
    stages.line("loading base")
    stages.close(completed=completed)
    assert said == (["[   0.0 s] loading base", "[   0.0 s] done"] if completed else [])
    assert not timer.running, "nor is it shown later"


def test_steps_are_lines_at_every_tenth_or_when_it_was_long_silent(log) -> None:
    stages, clock, said, timer = log
    timer.act()
    for stage in ("training", "calibrating"):
        said.clear()
        stages.line(stage)
        for step in range(1, 201):
            clock.now += CLOSE_SECONDS / 10
            stages.count(f"step {step}", step, 200)
        assert [line.partition("] ")[2] for line in said] == [stage, *(f"step {20 * n}" for n in range(1, 11))]
    said.clear()
    for row in range(100):
        stages.line(f"evaluating row {row}")
        for step in range(1, 11):
            stages.count(f"step {step}", step, 10)
    assert len(said) == 100, "what is soon done says no more than its name"
    said.clear()
    stages.line("training")
    for step in range(1, 9):
        clock.now += SILENT_SECONDS / 4
        stages.count(f"step {step}", step, 10_000)
    assert [line.partition("] ")[2] for line in said] == ["training", "step 4", "step 8"]


def test_progress_writes_lines_where_there_is_no_terminal(monkeypatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, force_terminal=False, soft_wrap=True, highlight=False, emoji=False))
    monkeypatch.setattr(console, "CLOSE_SECONDS", 0.0)
    with progress() as report:
        report("loading [bold]base[/] :x:")
        report.update("reading its weights")
        for step in range(1, 31):
            report.update(f"step {step}", step, 30)
    lines = written.getvalue().splitlines()
    assert all(re.match(r"\[ {0,5}\d+\.\d s\] ", line) for line in lines)
    said = [line.partition(" s] ")[2] for line in lines]
    assert said == ["loading [bold]base[/] :x:", "reading its weights", *(f"step {3 * n}" for n in range(1, 11)), "done"]
    with suppress(InputError), progress() as report:
        report("loading")
        raise InputError("refused")
    assert written.getvalue().splitlines() == lines


def test_a_terminal_has_no_log(monkeypatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, force_terminal=True, width=100, highlight=False, emoji=False))
    monkeypatch.setattr(console, "StageLog", None)
    with progress() as report:
        report("loading")
        report.update("loading 1/2", 1, 2)
    assert "✓" in written.getvalue() and "[   0.0 s]" not in written.getvalue() and "done" not in written.getvalue()


def test_a_redirected_export_says_its_stages(base_folder, tmp_path) -> None:
    command = ["export", "-m", str(base_folder("llama")), "-o", str(tmp_path / "b"), "-p", "int4", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and json.loads(done.stdout)["bundle"] == str(tmp_path / "b"), done.stderr
    found = [re.fullmatch(r"\[ *(\d+\.\d) s\] (.+)", line) for line in done.stderr.splitlines()]
    assert all(found), done.stderr
    seconds = [float(line[1]) for line in found]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    assert [line[2] for line in found] == [
        f"loading {base_folder('llama')}",
        "recording what the eager model says",
        "exporting the graph",
        "folding 3 edit nodes",
        "weighing the inputs of the weights",
        "quantizing weights to int4",
        "writing the graph",
        "recording what the eager model says with the quantized weights",
        "holding the bundle against the eager model",
        "done",
    ]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1 and refused.stderr.startswith("error: ")


def test_a_redirected_training_says_its_steps(base_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(console, "CLOSE_SECONDS", 0.0)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "hello", "completion": " there"}\n' * 4)
    options = ["-m", str(base_folder("llama")), "-d", str(data), "-o", str(tmp_path / "a"), "--max-steps", "20", "--samples", "0", "--json"]
    done = CliRunner().invoke(app, ["train", *options])
    assert done.exit_code == 0 and json.loads(done.stdout)["adapter"], done.stderr
    steps = re.findall(r"s\] training, step (\d+)/20, loss \d", done.stderr)
    assert steps == [str(2 * n) for n in range(1, 11)], done.stderr

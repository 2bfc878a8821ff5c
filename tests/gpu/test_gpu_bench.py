"""The benchmark of the script for a GPU, through doubles of a device, of its packages and of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from gpu import bench
from gpu.bench import Case, figures
from gpu.device import TIMED, WARM, CupyDevice, TorchDevice


class Clock:
    """A device on host memory: what is launched is noted, a launch takes as many microseconds as ``us`` says, the fastest replay."""

    name = "a double"

    def __init__(self, us: dict[str, float]) -> None:
        self.us, self.noted = us, []

    def put(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def address(self, memory: np.ndarray) -> int:
        return memory.ctypes.data

    def copy(self, target: np.ndarray, source: np.ndarray, stream: int) -> None:
        self.noted.append(("copy", source.ctypes.data, target.ctypes.data))

    def times(self, queue: bench.Queue) -> list[float]:
        before = len(self.noted)
        queue(7)
        launched = self.noted[before:]
        return [sum(self.us[name] for name, *_ in launched) / 1e3 * slower for slower in (2, 1, 3)]


class NotedKernels(bench.Kernels):
    def __init__(self, clock: Clock, workspace: int) -> None:
        self.clock, self.size = clock, workspace

    def workspace(self, case: Case) -> int:
        return self.size

    def edit(self, case, h, y, banks, workspace, stream) -> None:
        assert stream == 7 and (workspace is None) == (self.size == 0)
        assert len(banks) == (3 if case.rank is None else 4)
        self.clock.noted.append(("edit", h, y))

    def empty(self, blocks, stream) -> None:
        self.clock.noted.append(("empty", blocks, stream))


def test_few_rows_are_held_against_an_empty_kernel() -> None:
    clock = Clock({"edit": 3.0, "empty": 2.5})
    told = bench.measure(Case(tokens=40, edited=8, width=64, in_place=True, goal=bench.OF_EMPTY), clock, NotedKernels(clock, 64))
    assert all(h == y for name, h, y in clock.noted if name == "edit")
    assert {blocks for name, blocks, _ in clock.noted if name == "empty"} == {40}
    assert told["us"] == pytest.approx(3.0) and told["us_median"] == pytest.approx(6.0)
    assert told["of_empty"] == pytest.approx(1.2) and told["met"] is False and told["of_copy"] is None
    assert told["gb_per_s"] == pytest.approx(2 * 8 * 64 * 2 / 3.0 / 1e3)


def test_many_rows_go_through_buffers_in_turn_and_are_held_against_their_copy(monkeypatch) -> None:
    monkeypatch.setattr(bench, "FEW_BYTES", 1000)
    monkeypatch.setattr(bench, "BEYOND_CACHE", 6 * 64 * 64 * 2)
    clock = Clock({"edit": 2.0, "copy": 1.7})
    told = bench.measure(Case(tokens=64, edited=64, width=64, goal=bench.OF_COPY), clock, NotedKernels(clock, 0))
    edits = [(h, y) for name, h, y in clock.noted if name == "edit"]
    assert len(set(edits)) == 3 and len({*edits[0], *edits[1], *edits[2]}) == 6, "three pairs, six buffers"
    assert [(h, y) for name, h, y in clock.noted if name == "copy"] == edits
    assert told["of_copy"] == pytest.approx(0.85) and told["met"] is True and told["of_empty"] is None


def test_goals_are_met_or_missed_by_their_figures() -> None:
    many = Case(tokens=8192, edited=8192, goal=bench.OF_COPY)
    assert not many.few and many.moved == 2 * many.row_bytes == 2 * 8192 * 4096 * 2 and many.blocks == 2048
    assert figures(many, [100.0], [80.0], [])["met"] is True and figures(many, [100.1], [80.0], [])["met"] is False
    assert figures(many, [], [], [])["met"] is None
    few = Case(tokens=8192, edited=8, in_place=True, goal=bench.OF_EMPTY)
    assert few.few and figures(few, [2.3], [], [2.0])["met"] is True and figures(few, [2.31], [], [2.0])["met"] is False
    idle = Case(tokens=1, edited=0, in_place=True)
    assert figures(idle, [2.0], [], [2.0])["gb_per_s"] is None and figures(idle, [2.0], [], [2.0])["of_empty"] == 1


class Noting:
    """Stands for torch.cuda and for cupy.cuda: notes what is called on it, in order."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def note(self, name: str, result: object = None) -> Any:
        return lambda *_, **__: self.noted.append(name) or result


ORDER = ["queue", "wait", "capture", "queue", "captured", *["replay"] * WARM, *["record", "replay", "record"] * TIMED, "wait"]
"""A launch outside the graph loads what cannot be loaded in a capture."""


def test_torch_times_replays_of_a_graph() -> None:
    on = Noting()
    graph = SimpleNamespace(replay=on.note("replay"))
    event = SimpleNamespace(record=on.note("record"), elapsed_time=lambda end: 1.5)
    stream = SimpleNamespace(cuda_stream=7)

    @contextmanager
    def capture(of: object) -> Iterator[None]:
        assert of is graph
        on.noted.append("capture")
        yield
        on.noted.append("captured")

    cuda = SimpleNamespace(
        current_stream=lambda: stream,
        synchronize=on.note("wait"),
        CUDAGraph=lambda: graph,
        graph=capture,
        Event=lambda enable_timing: event,
    )
    device = object.__new__(TorchDevice)
    device._torch = SimpleNamespace(cuda=cuda)
    assert device.times(lambda stream: on.noted.append("queue")) == [1.5] * TIMED
    assert on.noted == ORDER


def test_cupy_times_replays_of_a_graph() -> None:
    on = Noting()
    graph = SimpleNamespace(launch=on.note("replay"))
    stream = MagicMock(ptr=7, synchronize=on.note("wait"), begin_capture=on.note("capture"), end_capture=on.note("captured", graph))
    event = SimpleNamespace(record=on.note("record"))
    device = object.__new__(CupyDevice)
    device._cupy = SimpleNamespace(cuda=SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda start, end: 1.5))
    device._stream = stream
    assert device.times(lambda stream: on.noted.append("queue")) == [1.5] * TIMED
    assert on.noted == ORDER


@pytest.mark.parametrize("case", bench.CASES, ids=lambda c: f"{c.op}-{c.dtype}-{c.tokens}-{c.edited}-{c.rank}-{c.workspace}")
def test_inputs_have_the_shapes_of_the_case(case) -> None:
    if case.row_bytes > 1 << 22:
        case = replace(case, tokens=300, edited=min(case.edited, 300))
    h, (slot, *banks) = bench.inputs(case)
    item = bench.DTYPES[case.dtype][1]
    assert h.shape == (case.tokens, case.width) and h.dtype.itemsize == item and len(np.unique(h)) > 1000
    assert slot.dtype == np.int32 and (slot == 0).sum() == case.edited and set(slot) <= {0, -1}
    expected = [(1, case.width)] * 2 if case.rank is None else [(case.rank, case.width), (case.rank, case.width), (case.rank,)]
    assert [bank.shape for bank in banks] == expected and all(bank.dtype == h.dtype for bank in banks)

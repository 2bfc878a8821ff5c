"""bench: runs in pairs, reports what it measured, restores the session."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy_bundle import CONTEXT, write_toy_bundle

from runtimes import bench as bench_module
from runtimes.bench import BenchResult, bench
from runtimes.errors import BundleError, InputError
from runtimes.ort.session import OrtSession


def test_base_and_adapters_are_measured_in_pairs(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b")
    sessions: list[OrtSession] = []
    calls: list[str | None] = []
    progress: list[tuple[int, int]] = []

    class Recording(OrtSession):
        def set_adapter(self, name: str | None) -> None:
            calls.append(name)
            super().set_adapter(name)

    def factory() -> OrtSession:
        sessions.append(Recording(bundle, threads=1, adapter="all"))
        return sessions[-1]

    result = bench(
        factory, prompt_tokens=20, new_tokens=4, repeats=4, adapters=["ends"], on_run=lambda done, total: progress.append((done, total))
    )
    assert len(sessions) == 1 and sessions[0].adapter == "all"
    assert calls[3:] == [None, "ends", "ends", None] * 2 + ["all"]
    assert progress == [(i + 1, 4) for i in range(4)]
    base, ends = result.measurements
    assert (base.name, ends.name, base.decode_ratio) == ("base", "ends", None)
    assert 0 < base.ttft_min <= base.ttft_median and 0 < ends.decode_min <= ends.decode_median
    assert ends.ttft_ratio > 0 and ends.decode_ratio > 0
    assert [len(row) for row in result.rows()] == [len(BenchResult.HEADER)] * 2
    content = json.loads(result.to_json())
    assert content["measurements"][1]["tokens_per_second"] == pytest.approx(1000 / ends.decode_median)
    assert (content["provider"], content["kernel"], content["prompt_tokens"]) == ("cpu", sessions[0].kernel, 20)
    assert content["peak_memory"] > 10 * 2**20


def test_ratios_come_from_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that slows down over time: every pair says 1.1, quotients of separate minima would say 1.0."""
    bundle = write_toy_bundle(tmp_path / "b")
    speed = iter(range(1, 100))

    def timed(session: OrtSession, name: str, prompt: list[int], count: int) -> bench_module._Run:
        session.set_adapter(None if name == "base" else name)
        timed.pair = next(speed) if timed.calls % 2 == 0 else timed.pair
        timed.calls += 1
        return bench_module._Run(ttft=timed.pair * (1.1 if name != "base" else 1), decode=timed.pair * (1.1 if name != "base" else 1))

    timed.calls = 0
    monkeypatch.setattr(bench_module, "_timed", timed)
    result = bench(lambda: OrtSession(bundle, threads=1), prompt_tokens=4, new_tokens=2, repeats=5, adapters=["ends"])
    assert result.measurements[1].decode_ratio == pytest.approx(1.1) and result.measurements[1].ttft_ratio == pytest.approx(1.1)


def test_a_bundle_without_adapters(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", adapters={})
    result = bench(lambda: OrtSession(bundle, threads=1), prompt_tokens=4, new_tokens=2, repeats=2)
    assert [m.name for m in result.measurements] == ["base"]


def test_refusals(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b")
    with pytest.raises(InputError, match=f"exceed the context of toy \\({CONTEXT}\\)"):
        bench(lambda: OrtSession(bundle, threads=1), prompt_tokens=CONTEXT, new_tokens=1)
    with pytest.raises(InputError, match="each must be at least 1"):
        bench(lambda: OrtSession(bundle, threads=1), repeats=0)
    with pytest.raises(BundleError, match="no adapter 'x'"):
        bench(lambda: OrtSession(bundle, threads=1), prompt_tokens=4, new_tokens=1, adapters=["x"])


def test_peak_memory_only_grows() -> None:
    """In a process of its own: this one's peak may lie far above what it holds now."""
    script = "from runtimes.bench import peak_memory as p; a = p(); b = bytearray(64 * 2**20); print(p() - a)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 32 * 2**20

"""Checkpoints that were made of others' and are kept: those used last, within a bound, and whatever somebody uses."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
from models import gguf_files
from models.packed_checkpoints import quantize_folder

from reft_export.base import gguf, kept
from reft_export.base.checkpoint import open_checkpoint
from reft_export.base.packed import checkpoint as packed
from runtimes.errors import InputError
from runtimes.files.claims import scratch_folder

HOLD = """
import sys
from pathlib import Path
from reft_export.base.kept import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def let_go() -> None:
    """As at the end of a process."""
    while kept._held:
        os.close(kept._held.popitem()[1])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    let_go()
    yield tmp_path / "cache" / "reft-export"
    let_go()


def entry(cache: Path, kind: str, name: str, *, age: float, count: int = 1000) -> Path:
    folder = cache / kind / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * count)
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/*"))


def test_those_used_last_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, name, age in (("gguf", "a", 4), ("quantized", "b", 3), ("gguf", "c", 2), ("quantized", "d", 1)):
        entry(cache, kind, name, age=age)
    for name in (".e.12345678.making", ".kept.abcdefgh.removing"):  # of processes that were killed
        (cache / "gguf" / name).mkdir()
    (cache / "quantized" / "note.txt").write_text("somebody's")
    monkeypatch.setenv("REFT_CACHE_GB", "0.0000025")
    assert kept.hold(cache / "gguf" / "a")  # the oldest is the newest now
    let_go()
    with scratch_folder(cache / "quantized" / "d", ".making") as making:
        kept.take_away_oldest()
        assert names(cache) == [making.name, "a", "d", "note.txt"]
    said = " ".join(capsys.readouterr().err.split())
    assert "quantized b (1.0 kB) is no longer kept: REFT_CACHE_GB is 2.5e-06" in said and "gguf c" in said
    monkeypatch.delenv("REFT_CACHE_GB")
    kept.take_away_oldest()
    assert "a" in names(cache) and "d" in names(cache)


def test_what_is_used_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process, and by another one until it ends."""
    mine, theirs = entry(cache, "gguf", "mine", age=9), entry(cache, "gguf", "theirs", age=8)
    monkeypatch.setenv("REFT_CACHE_GB", "0")
    with subprocess.Popen([sys.executable, "-c", HOLD, theirs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        assert kept.hold(mine) and kept.hold(mine) and len(kept._held) == 1
        kept.take_away_oldest()
        assert names(cache) == ["mine", "theirs"]
        other.communicate()
    kept.take_away_oldest()
    assert names(cache) == ["mine"]


def test_one_that_was_taken_away_is_not_held(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = entry(cache, "gguf", "a", age=1)
    assert kept.hold(folder)
    shutil.rmtree(folder)
    assert not kept.hold(folder) and not kept._held
    entry(cache, "gguf", "a", age=1)
    assert kept.hold(folder) and len(kept._held) == 1
    assert not kept.hold(cache / "gguf" / "none")


def test_one_that_is_taken_away_while_it_is_waited_for_is_not_held(cache: Path) -> None:
    folder = entry(cache, "gguf", "a", age=1)
    taker = os.open(folder, os.O_RDONLY)
    fcntl.flock(taker, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as other:
        holding = other.submit(kept.hold, folder)
        time.sleep(0.2)
        assert not holding.done()
        shutil.rmtree(folder)
        os.close(taker)
        assert holding.result() is False and not kept._held


def test_nobody_who_holds_one_sees_half_of_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread makes and holds it, as a process would, while another takes away what it can."""
    monkeypatch.setenv("REFT_CACHE_GB", "0")
    folder, ended = cache / "gguf" / "a", []

    def take() -> None:
        while not ended:
            kept.take_away_oldest()

    with ThreadPoolExecutor(1) as other:
        taking = other.submit(take)
        try:
            for _ in range(300):
                if not kept.hold(folder):
                    whole = entry(cache, "new", "a", age=1)
                    folder.parent.mkdir(exist_ok=True)
                    whole.replace(folder)
                elif not (folder / "model.safetensors").is_file():
                    pytest.fail("it is held, and lacks a file")
                let_go()
        finally:
            ended.append(True)
            taking.result()


@pytest.mark.parametrize("stated", ["many", "-1", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(stated: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(cache, "gguf", "a", age=1)
    monkeypatch.setenv("REFT_CACHE_GB", stated)
    with pytest.raises(InputError, match=f"REFT_CACHE_GB is '{stated}', expected GB"):
        kept.take_away_oldest()
    assert names(cache) == ["a"]


def test_a_base_that_is_made_takes_the_place_of_older_ones(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_CACHE_GB", "0")
    folder = tiny.save_base(tmp_path / "small")
    quantize_folder(folder, "awq")
    made = open_checkpoint(folder).folder
    assert made.is_dir(), "it is used"
    entry(cache, "gguf", "older", age=9)
    let_go()
    again = open_checkpoint(made).folder  # by its own path
    kept.take_away_oldest()
    assert names(cache) == [made.name] and again == made


def base_of(kind: str, folder: Path) -> Path:
    if kind == "gguf":
        return gguf_files.write(folder / "small.gguf", gguf_files.build("llama"))
    base = tiny.save_base(folder / "small")
    quantize_folder(base, "awq")
    return base


@pytest.mark.parametrize("kind", kept.KINDS)
def test_a_base_that_was_made_before_is_used_as_one_that_is_made_now(
    kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(kind, tmp_path)
    made = open_checkpoint(base).folder
    let_go()
    os.utime(made, (1e9, 1e9))
    monkeypatch.setenv("REFT_CACHE_GB", "0")
    assert open_checkpoint(base).folder == made and made.stat().st_mtime > 1e9
    kept.take_away_oldest()
    assert names(cache) == [made.name]
    let_go()
    kept.take_away_oldest()
    assert not names(cache)


@pytest.mark.parametrize("kind", kept.KINDS)
def test_one_that_is_taken_away_before_it_is_held_is_made_again(
    kind: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, module = base_of(kind, tmp_path), gguf if kind == "gguf" else packed
    make, times = module._make, []

    def taken(*arguments: Any) -> None:
        make(*arguments)
        times.append(True)
        if len(times) == 1:
            shutil.rmtree(next((cache / kind).iterdir()))

    monkeypatch.setattr(module, "_make", taken)
    assert (open_checkpoint(base).folder / "config.json").is_file() and len(times) == 2


def test_a_gguf_files_base_that_lost_a_file_is_made_again(cache: Path, tmp_path: Path) -> None:
    base = base_of("gguf", tmp_path)
    made = open_checkpoint(base).folder
    (made / gguf.ORIGIN).unlink()
    (made / "config.json").unlink()
    assert open_checkpoint(base).folder == made and (made / "config.json").is_file() and (made / gguf.ORIGIN).is_file()

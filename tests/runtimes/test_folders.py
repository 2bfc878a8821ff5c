"""An output folder is written whole or not at all, and what stood there before is never lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle

from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import write_manifest
from runtimes.errors import BundleError, InputError, ReftError
from runtimes.files import folders
from runtimes.files.folders import atomic_folder, check_destination, claimed
from runtimes.files.placed import place, placed


@pytest.fixture
def output(tmp_path) -> Path:
    """An earlier output of ours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    return tmp_path / "out"


def _write(output: Path, *, force: bool = False) -> None:
    with atomic_folder(output, force=force) as work:
        (work / "manifest.json").write_text("new")
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("x")


def _is_old(output: Path) -> bool:
    return [p.name for p in output.parent.iterdir()] == ["out"] and (output / "manifest.json").read_text() == "old"


def test_new_and_replaced(tmp_path) -> None:
    _write(tmp_path / "out")
    with pytest.raises(InputError, match="--force"):
        _write(tmp_path / "out")
    (tmp_path / "out" / "stale").write_text("x")
    _write(tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "sub"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert os.stat(tmp_path / "out").st_mode & 0o055, "other users can read what they could read of any new folder"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_inside(error, output) -> None:
    def write() -> None:
        with atomic_folder(output, force=True) as work:
            (work / "manifest.json").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert _is_old(output)


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")], ids=str)
def test_two_step_replacement_restores(error, failing, output, monkeypatch) -> None:
    """Without an exchange call: whichever rename fails, the old folder is back."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    rename, calls = os.rename, []

    def failing_rename(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == failing:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing_rename)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        _write(output, force=True)
    assert _is_old(output)


def test_interrupt_between_the_renames(output, monkeypatch) -> None:
    """Ctrl-C is raised when the first rename returns, after it has taken effect."""
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    rename, calls = os.rename, []

    def interrupted(*arguments: object) -> None:
        rename(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _write(output, force=True)
    assert _is_old(output)


def test_failed_restore_says_where_the_old_folder_is(output, monkeypatch) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    rename, calls = os.rename, []

    def broken(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        rename(*arguments)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(ReftError, match="its old content is in") as caught:
        _write(output, force=True)
    old = Path(str(caught.value).rpartition(" ")[2])
    assert (old / "manifest.json").read_text() == "old"


def test_two_steps_and_exchange_agree(output, monkeypatch) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    _write(output, force=True)
    assert (output / "manifest.json").read_text() == "new"
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_refused_destinations(output, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_destination(tmp_path / "file", force=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(InputError, match="other files than ours"):
        check_destination(tmp_path / "thesis", force=True)
    for inside in (output, output / "manifest.json"):
        with pytest.raises(InputError, match="holds the input"):
            check_destination(output, force=True, inputs=[inside])
    check_destination(output, force=True, inputs=[Path("owner/name"), tmp_path])


def test_what_appears_meanwhile_stays(tmp_path) -> None:
    def write(name: str, *, force: bool = False) -> None:
        with atomic_folder(tmp_path / "out", force=force) as work:
            (work / "manifest.json").write_text("new")
            (tmp_path / "out").mkdir(exist_ok=True)
            if name:
                (tmp_path / "out" / name).write_text("mine")

    for force in (False, True):
        with pytest.raises(InputError, match="appeared while it was being written" if not force else "other files than ours"):
            write("notes", force=force)
        assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "notes").read_text() == "mine"
        (tmp_path / "out" / "notes").unlink()
        (tmp_path / "out").rmdir()
    write("")  # an empty folder holds nothing to lose
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"


WRITER = """
import sys, time
from pathlib import Path
from runtimes.files.folders import atomic_folder
with atomic_folder(Path(sys.argv[1]), force=True) as work:
    (work / "weights").write_text("much")
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def writer(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing ``output``, killed at the end as the system kills one."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_writer_is_told_of_the_first(output) -> None:
    with writer(output) as first:
        before = sorted(p.name for p in output.parent.iterdir())
        with pytest.raises(InputError, match=rf"out is being written by process {first.pid} \(.*; wait for it"):
            _write(output, force=True)
        assert sorted(p.name for p in output.parent.iterdir()) == before, "the first one's work is not touched"
        _write(output.with_name("other"))
    assert (output / "manifest.json").read_text() == "old"


def test_threads_of_one_process_are_two_writers_and_nested_calls_one(output) -> None:
    with claimed(output, force=True):
        with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match=f"process {os.getpid()}"):
            pool.submit(_write, output, force=True).result()
        _write(output, force=True)
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_left_overs_of_the_dead_go(output, tmp_path) -> None:
    with writer(output):
        pass
    with writer(tmp_path / "out.b") as living:
        assert len(list(tmp_path.glob(".out.*.partial"))) == 2, "of either"
        assert (tmp_path / ".out.writing").exists()
        _write(output, force=True)
        left = sorted(re.sub(r"[a-z0-9_]{8}[.]partial", "N", p.name) for p in tmp_path.iterdir())
        assert left == [".out.b.N", ".out.b.writing", "out"] and living.poll() is None, "a living writer's of another output stays"
    _write(tmp_path / "out.b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.b"]


def test_killed_between_two_renames(output) -> None:
    """The old folder lies under another name, and comes back with the next run, or goes where that has replaced it already."""
    output.rename(output.with_name(".out.abcdefgh.old"))
    with pytest.raises(InputError, match="exists; choose another output"):
        _write(output)
    assert _is_old(output)
    output.with_name(".out.abcdefgh.old").mkdir()
    _write(output, force=True)
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_folders_that_had_to_be_made_go_with_a_failure(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    _write(tmp_path / "a" / "b" / "out")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_no_reader_takes_what_is_being_written(tmp_path) -> None:
    """Not even where it is copied from under the writer: the file that tells a folder's kind has its name last."""
    toy = write_toy_bundle(tmp_path / "toy", adapters={})
    with atomic_folder(tmp_path / "bundle") as work:
        shutil.copytree(toy.folder, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        write_manifest(work, toy.manifest)
        assert open_bundle(work).manifest.model.name == "toy", "who writes it reads it"
        assert not (work / "manifest.json").exists()
        shutil.copytree(work, tmp_path / "copy")
        with pytest.raises(BundleError, match=r"manifest.json is missing"):
            open_bundle(tmp_path / "copy")
    open_bundle(tmp_path / "bundle")


def test_a_file_is_as_it_was_until_it_is_whole(tmp_path) -> None:
    """Were its writer killed, too, whose left-over goes with the next."""
    path, link = tmp_path / "report.json", tmp_path / "link.json"
    place(path, b"old")
    link.symlink_to(path)
    child = os.fork()
    if child == 0:
        with placed(path) as file:
            file.write_bytes(b"ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(OSError, match="full"), placed(path):
        raise OSError("full")
    assert path.read_bytes() == b"old"
    place(link, b"new")
    assert path.read_bytes() == b"new" and link.is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_takes_a_file_as_it_is(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    place(tmp_path / "pipe", b"content")
    assert os.read(reader, 20) == b"content" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="pipes have no paths here")
def test_a_pipe_without_a_name_is_written_to(tmp_path) -> None:
    """As of `--report >(..)`, or of /dev/stdout in a pipeline: a link to what is no path."""
    reader, writer = os.pipe()
    (tmp_path / "report").symlink_to(f"/dev/fd/{writer}")
    place(tmp_path / "report", b"content")
    assert os.read(reader, 20) == b"content"
    os.close(reader)
    os.close(writer)

"""An output folder is written whole or not at all, and what stood there before is never lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtimes.errors import InputError, ReftError
from runtimes.files import folders
from runtimes.files.folders import atomic_folder, check_destination


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

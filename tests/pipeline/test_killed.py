"""Writing verbs that are killed, terminated or run out of disk: the old output is whole, nothing that did not pass its gate is taken for
a bundle, and the next run leaves nothing of the one before it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import mock_trtexec
import pytest
import tiny
from foreign_graphs import save_foreign
from reseal import as_version_1
from typer.testing import CliRunner

from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.packaging.archive import NEEDED
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.errors import ReftError
from runtimes.files import folders

MOMENTS = ("copy or first file", "_make_readable", "_put_in_place", "after")
"""While files are written; when all are; before the new folder takes its place; and when it has, before the old one is removed."""
ENDS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "full": errno.ENOSPC}


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def run(arguments: list[object], moment: str | None = None, end: str = "kill") -> int:
    """The command line in a fork, which meets its ``end`` at the ``moment``; its exit code, below zero the signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if moment is not None:
                _plant(moment, end)
            app([str(each) for each in arguments])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _plant(moment: str, end: str) -> None:
    def meet(*_: object, **__: object) -> None:
        if end == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        os.kill(os.getpid(), ENDS[end])

    if moment == "after":
        exchange = folders._exchange
        folders._exchange = lambda *given: (exchange(*given), meet())[0]
    elif moment == "copy or first file":
        unproven = folders.marker
        folders.marker = lambda folder, name: (unproven(folder, name), meet() if folder in folders._making else None)[0]
        for module in [m for name, m in sys.modules.items() if name.startswith(("runtimes.", "reft_export.")) and hasattr(m, "marker")]:
            module.marker = folders.marker
    else:
        setattr(folders, moment, meet)


@pytest.fixture(scope="module")
def commands(tmp_path_factory, bundle_folder, base_folder) -> Iterator[Callable[[str, Path], list[object]]]:
    root = tmp_path_factory.mktemp("killed")
    bundle, base = bundle_folder("llama", target="tensorrt"), base_folder("llama")
    graph = save_foreign(bundle, root / "graph")
    for seed, name in enumerate(("style", "other")):
        save_adapter(tiny.random_adapter(load_base(base).info, seed=seed), root / name)
    (root / "data.jsonl").write_text('{"prompt": "a b", "completion": " c"}\n' * 4)
    (root / "away.jsonl").write_text('{"prompt": "a b", "completion": " d"}\n' * 4)
    as_version_1(Path(shutil.copytree(bundle, root / "old")))
    (root / "wheels").mkdir()
    for name in (*NEEDED, "onnxruntime"):
        (root / "wheels" / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").touch()

    def command(verb: str, output: Path) -> list[object]:
        to = ["-o", output, "--force"]
        return {
            "fold": ["fold", graph, "-a", root / "style", *to],
            "add": ["add", bundle, "-a", root / "style", *to],
            "upgrade": ["upgrade", root / "old", *to],
            "import": ["import", root / "style", "-m", base, "--probes", root / "data.jsonl", *to],
            "compose": ["compose", root / "style", root / "other", *to],
            "steer": ["steer", root / "data.jsonl", root / "away.jsonl", "-m", base, "--layers", 0, *to],
            "train": ["train", "-m", base, "-d", root / "data.jsonl", "--epochs", 1, "--samples", 0, *to],
            "export": ["export", "-m", base, "-a", root / "style", *to],
            "quantize": ["quantize", bundle, "-m", base, "--accept-loss", *to],
            "pyreft": ["export", "-m", base, "-a", root / "style", "--format", "pyreft", *to],
            "evaluate": ["evaluate", bundle, "-d", root / "data.jsonl", *to],
            "build": ["build", bundle, "--target", "tensorrt", "--no-plugin", *to],
            "package": ["package", bundle, "--archive", "--wheels", root / "wheels", *to],
        }[verb]

    with pytest.MonkeyPatch.context() as patch:
        mock_trtexec.install(root / "tensorrt", patch)
        yield command


VERBS = (
    *("fold", "add", "upgrade", "import", "compose", "steer", "train", "export", "quantize"),
    *("pyreft", "evaluate", "build", "package"),
)
"""Of those that write a folder at once; a sweep's grows, and is killed in tests/training/test_sweep.py."""
QUICK = ("upgrade", "kill")
OFTEN = ("fold", "add", "train", "export", "package")
"""Verbs that CI ends in every way."""


def moments(verb: str, end: str) -> Sequence[str]:
    """Two of the four, so that every verb is ended at all of them and every end comes at each; the rest of the product shows nothing more:
    all verbs write by the same functions."""
    first = VERBS.index(verb) + [*ENDS].index(end)
    return MOMENTS if (verb, end) == QUICK else [MOMENTS[moment] for moment in sorted({first % 4, (first + 2) % 4})]


def case(verb: str, end: str) -> Any:
    slow = pytest.mark.slow if end == "kill" or verb in OFTEN else pytest.mark.long
    return pytest.param(verb, end, marks=() if (verb, end) == QUICK else slow)


@pytest.mark.parametrize(("verb", "end"), [case(*each) for each in product(VERBS, ENDS)])
def test_ended_on_the_way(verb, end, commands, bundle_folder, tmp_path) -> None:
    output = tmp_path / "out"
    shutil.copytree(bundle_folder("llama", target="tensorrt"), output)
    before = digests(output)
    for moment in moments(verb, end):
        code = run(commands(verb, output), moment, end)
        if moment != "after":
            assert digests(output) == before, (moment, "the old output is as it was")
        expected = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "full": 1}[end]
        assert code == expected, moment
        # Checkpoints to go on from, and reports, are called after the output: out.checkpoints, out.quantization.json.
        left = [p for p in tmp_path.iterdir() if not p.name.startswith("out")]
        if end != "kill":
            assert not left, (moment, left)
        for path in left if moment == MOMENTS[0] else ():  # later ones have passed their gate
            for read in (open_bundle, load_adapter):
                with pytest.raises(ReftError):
                    read(path)
        if moment == "after" or end == "kill":
            assert run(commands(verb, output)) == 0
            assert all(p.name.startswith("out") for p in tmp_path.iterdir()), moment
            shutil.rmtree(output)
            shutil.copytree(bundle_folder("llama", target="tensorrt"), output)


@contextmanager
def written_by_another(output: Path) -> Iterator[None]:
    """A process that has the claim on ``output``, within."""
    (claimed, tell), (rest, end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with folders.sole_writer(output):
            os.write(tell, b"1")
            os.close(end)
            os.read(rest, 1)  # until the other end is closed
        os._exit(0)
    os.read(claimed, 1)
    try:
        yield
    finally:
        for each in (claimed, tell, rest, end):
            os.close(each)
        os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_the_second_writer_is_refused(verb, commands, bundle_folder, tmp_path) -> None:
    output = tmp_path / "out"
    shutil.copytree(bundle_folder("llama", target="tensorrt"), output)
    before = digests(output)
    with written_by_another(output):
        done = CliRunner().invoke(app, [str(each) for each in commands(verb, output)])
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert f"error: {output} is being written by process " in done.stderr.splitlines()[-1] and "wait for it" in done.stderr
    assert digests(output) == before and [p.name for p in tmp_path.iterdir()] == ["out"]

"""Runs a verb over a damaged file in a process of its own, and says what it must not do: show a traceback, take too long or too much
memory, die, say more than a line, or write outside its output.

    PYTHONPATH=tests:tests/pipeline python -m hostile.harness [--kinds manifest,tokenizer] [--count 1000] [--seed 0]

makes a bundle, an adapter, a graph and a base, damages copies of them, and prints one line a finding, with its seed.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hostile.corpus import Originals

SECONDS = 10.0
MEMORY = 1 << 30
"""Bytes above those of the process before the verb, which has loaded its libraries."""
REFUSED = (2, 3, 4)
LONGEST = 2000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    code: int | None
    """None where it had to be ended; below zero the signal that ended it."""
    stdout: str
    stderr: str
    seconds: float
    memory: int

    @property
    def wrong(self) -> str:
        """What it must not have done, or ""."""
        lines = self.stderr.splitlines()
        if self.code is None:
            return f"took more than {SECONDS:g} s"
        if self.code < 0:
            return f"died of {signal.Signals(-self.code).name}: {self.stderr[-300:]}"
        if self.memory > MEMORY:
            return f"took {self.memory >> 20} MB"
        if "Traceback" in self.stderr or "this is a bug" in self.stderr:
            return f"a bug: {lines[-1][:300]}"
        if self.code == 0:
            return ""
        if self.code not in REFUSED:
            return f"exit code {self.code}: {lines[-1:]}"
        if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > LONGEST:
            return f"{len(lines)} lines of {len(self.stderr)} characters: {self.stderr[:300]!r}"
        if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in lines[0]):
            return f"steers the terminal: {lines[0][:300]!r}"
        return ""


Listing = dict[str, tuple[int, int, int]]
"""By path: size, time of the last change, kind and mode."""


def listing(folder: Path) -> Listing:
    """Everything below ``folder``; links are not followed."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at, name)
            status = path.lstat()
            changed = 0 if path.is_dir() and not path.is_symlink() else status.st_mtime_ns  # a folder's is that of scratch beside it
            found[str(path.relative_to(folder))] = (status.st_size if changed else 0, changed, status.st_mode)
    return found


def strayed(before: Listing, after: Listing, output: str = "out") -> str:
    """What was written, changed or removed beside ``output``; "" for nothing."""
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    beside = [name for name in changed if name.split(os.sep)[0].split(".")[0] != output]  # reports are called after it: out.parity.json
    return f"wrote {', '.join(beside[:3])}" if beside else ""


@contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Home, caches and scratch files of the verbs are below ``folder`` inside the ``with``."""
    places = {"HOME": "home", "XDG_CACHE_HOME": "home/.cache", "TMPDIR": "scratch"}
    before = {name: os.environ.get(name) for name in places}
    for name, place in places.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder / place)
    tempfile.tempdir = None  # is read anew
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        tempfile.tempdir = None


def preload() -> None:
    """What verbs import, so that a forked process need not; no thread may be running afterwards."""
    for name in (
        *("onnx", "onnx_ir", "onnxruntime", "gguf", "torch", "transformers.models.llama.modeling_llama"),
        *("reft_export.cli.main", "reft_export.base.load", "reft_export.folding.fold", "reft_export.importing.importer"),
        *("reft_export.importing.vectors", "reft_export.importing.pyreft.read", "runtimes.open", "runtimes.ort.session", "runtimes.golden"),
    ):
        import_module(name)
    import torch

    torch.set_num_threads(1)


def run(arguments: Sequence[object], *, seconds: float = SECONDS) -> Outcome:
    """``reft-export`` with ``arguments``, in a fork."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.monotonic()
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be(arguments, out.fileno(), err.fileno())
        code, usage = _wait(child, started + seconds)
        out.seek(0), err.seek(0)
        return Outcome(
            code=code,
            stdout=out.read().decode(errors="replace"),
            stderr=err.read().decode(errors="replace"),
            seconds=time.monotonic() - started,
            memory=max(0, (usage.ru_maxrss << 10) - _resident()) if usage else 0,
        )


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _be(arguments: Sequence[object], out: int, err: int) -> None:
    """The verb, and the end of the process with its exit code."""
    code = 70
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        from reft_export.cli.main import application

        application([str(arguments[0])])([str(each) for each in arguments], standalone_mode=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int | None, resource.struct_rusage | None]:
    pause = 0.002
    while time.monotonic() < deadline:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.wait4(child, 0)
    return None, None


def finding(kind: str, seed: int, originals: Originals, folder: Path) -> str:
    """What one case must not have done, with what it was; "" for nothing. ``folder`` is empty, and may be removed afterwards."""
    from hostile.corpus import case_of

    arguments, said = case_of(kind, seed, originals, folder)
    if not said:
        return ""
    before = listing(folder)
    outcome = run(arguments)
    wrong = outcome.wrong or ("is not refused" if kind == "bit" and outcome.code != 2 else "") or strayed(before, listing(folder))
    return f"{kind}/{seed} ({said}; {arguments[0]}): {wrong}" if wrong else ""


def main() -> None:
    """Over a bundle, an adapter, a graph, a base and files of vectors, which are made first."""
    import argparse
    import random
    from itertools import count

    from hostile.corpus import KINDS, make_all

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--count", type=int, help="cases; default: until it is interrupted")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "originals").mkdir()
        originals = make_all(Path(root) / "originals")
        preload()
        for number in count() if asked.count is None else range(asked.count):
            kind, seed = chance.choice(asked.kinds.split(",")), chance.randrange(1 << 40)
            with tempfile.TemporaryDirectory(dir=root) as folder, confined(Path(root) / "places"):
                if said := finding(kind, seed, originals, Path(folder)):
                    print(f"{number}: {said}", flush=True)


if __name__ == "__main__":
    main()

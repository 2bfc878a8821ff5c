"""One run of the script: its folders, its time, and the programs that its stages start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
OWN = (ROOT, TESTS, TESTS / "native")
"""Where the project's packages lie, and the modules of its tests: nothing has to be installed."""
CUDA_FOLDER = Path("/usr/local/cuda/bin")
"""Where CUDA's toolkit is usually installed, which does not put it on PATH."""
PATH = os.pathsep.join(filter(None, (os.environ.get("PATH"), str(CUDA_FOLDER), str(Path(sys.executable).parent))))
"""Where programs are looked for: CMake may have come with this Python's packages."""


class Skipped(Exception):
    """A stage that cannot be done here; the text says what is missing, and where to get it."""


class Failed(Exception):
    """A stage that did not come to its end, or saw something wrong; one line."""


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    """stdout and stderr together."""

    def last_line(self) -> str:
        """What a program that failed says last is what it failed of."""
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "it printed nothing")

    def require(self, what: str) -> Ended:
        if self.code:
            raise Failed(f"{what} ended with status {self.code}: {self.last_line()}")
        return self


@dataclass(kw_only=True)
class Run:
    """``wheels``: the folder that the user named, or None. ``architecture``: the GPU's compute capability without its dot, "90"."""

    work: Path
    log: Path
    wheels: Path | None
    dry: bool
    architecture: str
    until: float = 0.0
    """When the stage's time is over, on time.monotonic's clock."""
    site: list[Path] = field(default_factory=list)
    """Folders with packages out of wheels, which every Python program of a later stage sees first."""

    @property
    def library(self) -> Path:
        """The op library that the stage ``build`` makes."""
        return self.work / "native" / "libreft_ort.so"

    @property
    def plugin(self) -> Path:
        return self.work / "native" / "libreft_trt.so"

    def start(self, *command: object, site: Sequence[Path] = (), environment: dict[str, str] | None = None, text: str = "") -> Ended:
        """Runs a program on the input ``text`` to its end, or to the end of the stage's time: then it and all it started are killed.

        ``site``: folders of packages for this program alone. Raises Failed where the time is over or the program is not there.
        """
        words = [str(word) for word in command]
        path = os.pathsep.join([*map(str, (*site, *self.site, *OWN)), os.environ.get("PYTHONPATH", "")])
        started, left = time.monotonic(), self.until - time.monotonic()
        if left <= 0:
            raise Failed(f"no time was left for {Path(words[0]).name}")
        if shutil.which(words[0]) is None:
            raise Failed(f"{words[0]} is not there, or cannot be run")
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": PATH, "PYTHONPATH": path, **(environment or {})},
            cwd=ROOT,
            start_new_session=True,
        ) as program:
            try:
                output, _ = program.communicate(text, timeout=left)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                output, _ = program.communicate()
                self._note(words, "killed at the end of its time", output)
                raise Failed(f"{Path(words[0]).name} did not end in the {left:.0f} s that were left") from None
        self._note(words, f"status {program.returncode}, {time.monotonic() - started:.1f} s", output)
        return Ended(program.returncode, output)

    def python(self, *arguments: object, site: Sequence[Path] = (), environment: dict[str, str] | None = None, text: str = "") -> Ended:
        return self.start(sys.executable, *arguments, site=site, environment=environment, text=text)

    def built(self, path: Path) -> Path:
        """A file that the stage ``build`` makes; raises Skipped where it did not."""
        if not path.is_file():
            raise Skipped(f"the stage build made no {path.name}")
        return path

    def need(self, *packages: str, site: Sequence[Path] = ()) -> None:
        """Raises Skipped where one of these packages cannot be imported."""
        places = [*map(str, (*site, *self.site)), *sys.path]
        missing = [name for name in packages if PathFinder.find_spec(name, places) is None]
        if missing:
            raise Skipped(f"this Python has no {' and no '.join(missing)}; put the wheel into the folder of wheels")

    def _note(self, words: Sequence[str], end: str, output: str) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n{output.rstrip()}\n({end})\n\n")

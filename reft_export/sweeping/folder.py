"""The output folder of a sweep, which grows while its workers run, and what each of them may write there.

sweep.json        what makes the folder a sweep's: an id that its study repeats
study.db          optuna's trials, unless they are kept elsewhere
trials/trial-N/   the adapters of the front; a worker holds the claim on the folder (runtimes/files/claims.py) while it trains N, so that
                  whoever gets the claim knows that nobody trains N: were its worker killed, too
best/             the best adapter
report.md, report.json, *.png

Everything is put in its place by a rename.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runtimes.errors import InputError
from runtimes.files.claims import PARTIAL, scratch_folder, sole_writer
from runtimes.files.folders import check_destination
from runtimes.files.records import read_json_object

SWEEP_FILE, STUDY_FILE = "sweep.json", "study.db"
BEST, TRIALS = "best", "trials"
POLL_SECONDS = 0.2


def check_folder(output: Path, inputs: Sequence[Path] = ()) -> None:
    """Raises InputError for a folder that is neither new nor a sweep's, and for one that holds an input."""
    occupied = output.is_dir() and any(output.iterdir())
    if not occupied:
        try:
            check_destination(output, force=False, inputs=inputs)
        except InputError:
            if not (output / SWEEP_FILE).is_file():  # another worker may have made it meanwhile
                raise
    elif not (output / SWEEP_FILE).is_file():  # --force would not replace it
        raise InputError(f"{output} exists and is no sweep's folder; choose another output")
    for source in inputs:
        if source.exists() and source.resolve().is_relative_to(output.resolve()):
            raise InputError(f"the input {source} lies in {output}, the sweep's folder; choose another output, or move it")


def open_folder(output: Path, inputs: Sequence[Path] = ()) -> str:
    """The id of the sweep in ``output``, which is made where it is new; the caller has claimed it. Raises as ``check_folder``."""
    path = output / SWEEP_FILE
    if not path.is_file():
        check_folder(output, inputs)
        output.parent.mkdir(parents=True, exist_ok=True)
        # With its file or not at all: other workers start at the same time, and one may be killed here.
        target = output.resolve()
        with scratch_folder(target, PARTIAL) as work:
            made = work / target.name
            made.mkdir()
            (made / SWEEP_FILE).write_text(json.dumps({"sweep": uuid.uuid4().hex}))
            made.rename(target)
    found = read_json_object(path, InputError, "choose another output").get("sweep")
    if not isinstance(found, str):
        raise InputError(f"{path} has no id of a sweep; choose another output")
    return found


def trial_folder(output: Path, number: int) -> Path:
    return output / TRIALS / f"trial-{number}"


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether nobody else has the claim on ``path``; if so it is the caller's within."""
    with ExitStack() as held:
        try:
            held.enter_context(sole_writer(path))
        except InputError:
            yield False
            return
        yield True


@contextmanager
def waiting_claim(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """The claim on ``path`` as soon as nobody else has it; ``waiting`` is called while somebody has."""
    while True:
        with claim(path) as mine:
            if mine:
                yield
                return
        waiting()
        time.sleep(POLL_SECONDS)

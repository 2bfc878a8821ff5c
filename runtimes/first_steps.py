"""A few steps of a bundle that was just written, in a process of its own: does onnxruntime open it, and does it decode with its history?

    python -m runtimes.first_steps BUNDLE MANIFEST

The last line on stdout: {"refused": ..} or {"left": why no step was taken, or ""}.

The weights stay in their file (``mapped``): what is read of them is memory that the system can take back, and none of it is the
caller's. A graph that ends onnxruntime ends this process alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import MANIFEST_FILE, read_manifest
from runtimes.edits.op import EXPLICIT_SLOTS, SLOT_INPUT
from runtimes.errors import BackendUnavailable, GraphError, ReftError
from runtimes.files.folders import marker
from runtimes.open import ort_session
from runtimes.tasks.task import task_of

_FED = ("input_ids", "attention_mask", SLOT_INPUT)


def first_steps(folder: Path, shown: Path) -> str:
    """Takes them in another process; returns why there are none here, "" where they were taken. ``shown``: the folder in messages.

    Raises GraphError where onnxruntime refuses the graph or dies of it, and where its answers are none.
    """
    command = [sys.executable, "-m", "runtimes.first_steps", str(folder.resolve()), marker(folder, MANIFEST_FILE).name]
    # From where this package lies: a folder of the same name in the caller's would be imported first.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=Path(__file__).parent.parent)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise GraphError(
            f"onnxruntime died of {shown} (exit {done.returncode}; {' '.join(done.stderr.split())[-300:] or 'without a word'}); export the "
            "graph again, or free some memory"
        ) from None
    told = {kind: text.replace(str(folder.resolve()), str(shown)) for kind, text in told.items()}
    if "refused" in told:
        raise GraphError(told["refused"])
    return told["left"]


def take_first_steps(bundle: Bundle) -> None:
    """A prefill and a decode step of the base, twice with other prompts, and a prefill with every adapter; a classifier's two texts.

    Raises BackendUnavailable where no step can be taken here, GraphError where the graph does not load or run, for logits of another
    shape or that are not finite, and where a decode step says the same to the bit whatever came before it.
    """
    task = task_of(bundle)
    _check_fed(bundle, task.own_inputs)
    with ort_session(bundle, mapped=True) as session:
        task.take_steps(bundle, session)


def _check_fed(bundle: Bundle, own_inputs: Collection[str]) -> None:
    """Raises BackendUnavailable where the graph, which is loaded all the same, has inputs of which its own runtime alone knows."""
    from runtimes.ort.session import OpenGraph

    names = [record.name for record in bundle.manifest.inputs]
    known = {*_FED, *own_inputs}
    other = [name for name in names if name not in known and not name.startswith("past_key_values.")]
    if other or "attention_mask" not in names:
        OpenGraph(bundle, mapped=True).close()
        why = f"the graph takes {', '.join(other)}, which" if other else "the graph takes no attention_mask, without which"
        if EXPLICIT_SLOTS in other:
            why = f"the graph has no attention_mask [batch, total] to compute slots from, and takes {', '.join(other)}, which"
        raise BackendUnavailable(f"{why} no session of reft-export {'feeds' if other else 'runs'}: run it in the runtime that it is for")


def main(folder: Path, manifest: str) -> None:
    # Not open_bundle, which would hash again what was hashed when it was written a moment ago.
    bundle = Bundle(folder=folder, manifest=read_manifest(folder / manifest))
    told = {"left": ""}
    try:
        take_first_steps(bundle)
    except ReftError as e:
        unavailable = isinstance(e, BackendUnavailable) or type(e.__cause__).__name__ == "NotImplemented"
        told = {"left" if unavailable else "refused": " ".join(str(e).split())}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

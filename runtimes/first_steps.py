"""A few steps of a bundle that was just written, in a process of its own: does onnxruntime open it, and does it decode with its history?

    python -m runtimes.first_steps BUNDLE      the last line on stdout: {"refused": ..} or {"left": why no step was taken, or ""}

The weights stay in their file (``mapped``): what is read of them is memory that the system can take back, and none of it is the
caller's. A graph that ends onnxruntime ends this process alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from runtimes.artifacts.bundle import MANIFEST_FILE, Bundle, Manifest, read_json
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.op import SLOT_INPUT
from runtimes.errors import BackendUnavailable, GraphError, ReftError
from runtimes.files.records import from_json
from runtimes.open import ort_session

_FED = ("input_ids", "attention_mask", SLOT_INPUT)


def first_steps(folder: Path, shown: Path) -> str:
    """Takes them in another process; returns why there are none here, "" where they were taken. ``shown``: the folder in messages.

    Raises GraphError where onnxruntime refuses the graph or dies of it, and where its answers are none.
    """
    command = [sys.executable, "-m", "runtimes.first_steps", str(folder.resolve())]
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
    _check_fed(bundle)
    session = ort_session(bundle, mapped=True)
    if bundle.manifest.task == TEXT_CLASSIFICATION:
        for name in (None, *bundle.adapter_names):
            session.set_adapter(name)
            for text in _prompts(bundle):
                _check(bundle, session.classify(text, np.ones_like(text)).logits, (1, len(bundle.manifest.labels)))
        return
    first, second = (_decoded(bundle, session, prompt) for prompt in _prompts(bundle))
    if np.array_equal(first, second):
        raise GraphError(
            f"{bundle.graph_path}: a decode step says the same to the bit whatever came before it, so its cache is not read; export the "
            "decoder again with its cache (text-generation-with-past)"
        )
    for name in bundle.adapter_names:
        session.set_adapter(name)
        prompt = next(iter(_prompts(bundle)))
        _check_step(bundle, session.step(prompt, np.ones_like(prompt)).logits, prompt.shape[1])


def _check_fed(bundle: Bundle) -> None:
    """Raises BackendUnavailable where the graph, which is loaded all the same, has inputs of which its own runtime alone knows."""
    from runtimes.ort.session import OpenGraph

    names = [record.name for record in bundle.manifest.inputs]
    known = {*_FED, "token_type_ids" if bundle.manifest.task == TEXT_CLASSIFICATION else "position_ids"}
    other = [name for name in names if name not in known and not name.startswith("past_key_values.")]
    if other or "attention_mask" not in names:
        OpenGraph(bundle, mapped=True)
        why = f"the graph takes {', '.join(other)}, which" if other else "the graph takes no attention_mask, without which"
        raise BackendUnavailable(f"{why} no session of reft-export {'feeds' if other else 'runs'}: run it in the runtime that it is for")


def _prompts(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Two of two tokens each [1, 2], far apart in the vocabulary: neighbours may be reserved tokens that were never trained."""
    tokens = bundle.manifest.model.vocab_size
    return np.array([[1 % tokens, tokens // 2]]), np.array([[tokens // 4, tokens // 3]])


def _decoded(bundle: Bundle, session: object, prompt: np.ndarray) -> np.ndarray:
    """Logits [1, V] of one token after ``prompt``."""
    prefill = session.step(prompt, np.ones_like(prompt))
    _check_step(bundle, prefill.logits, prompt.shape[1])
    token = np.array([[2 * bundle.manifest.model.vocab_size // 5]])
    decode = session.step(token, np.ones((1, prompt.shape[1] + 1), np.int64), past=prefill.past)
    _check_step(bundle, decode.logits, 1)
    return decode.logits[:, -1]


def _check_step(bundle: Bundle, logits: np.ndarray, tokens: int) -> None:
    columns = 1 if bundle.manifest.logits == "last" else tokens
    _check(bundle, logits, (1, columns, bundle.manifest.model.vocab_size))


def _check(bundle: Bundle, logits: np.ndarray, shape: tuple[int, ...]) -> None:
    if logits.shape != shape:
        raise GraphError(
            f"{bundle.graph_path}: logits are {list(logits.shape)}, expected {list(shape)}; the graph is damaged: export it again"
        )
    if not np.isfinite(logits).all():
        raise GraphError(
            f"{bundle.graph_path}: logits are not finite in {bundle.manifest.precision}; export the graph again, in float32 where a half "
            "precision overflows"
        )


def main(folder: Path) -> None:
    # Not open_bundle, which would hash again what was hashed when it was written a moment ago.
    bundle = Bundle(folder=folder, manifest=from_json(Manifest, read_json(folder / MANIFEST_FILE)))
    told = {"left": ""}
    try:
        take_first_steps(bundle)
    except ReftError as e:
        unavailable = isinstance(e, BackendUnavailable) or type(e.__cause__).__name__ == "NotImplemented"
        told = {"left" if unavailable else "refused": " ".join(str(e).split())}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

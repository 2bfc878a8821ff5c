"""Holds a classifier's bundle against its golden arrays: logits, labels and steering, text by text and in padded batches.

The arrays are the CLASSIFIER ones of runtimes/artifacts/golden_schema.py. Top-1 agreement is that of the labels. An adapter brings its
head: (steered - base) is what edit and head change together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.errors import BundleError
from runtimes.parity.figures import Budget, Delta, Figures, Rung, compare, compare_deltas, judge
from runtimes.parity.golden_arrays import Golden, Steering, read_arrays, steering_shown
from runtimes.parity.retention import Quality, Recorded, quality, recorded
from runtimes.session import ClassifierSession
from runtimes.text.encoded_text import EncodedText, padded, rows_of

EXTRA_PADS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierGolden(Golden):
    texts: Sequence[EncodedText]
    targets: np.ndarray | None
    """The label of each text, -1 where it has none; None where none has."""
    recorded: Recorded | None

    @classmethod
    def read(cls, artifact: Artifact, name: str, *, steering: bool = True) -> ClassifierGolden:
        arrays, fields = read_arrays(artifact, name, steering=steering)
        targets = arrays.get("targets")
        texts = rows_of(arrays["input_ids"], arrays["attention_mask"], arrays["token_type_ids"])
        return cls(texts=texts, targets=targets, recorded=None if targets is None else _recorded(name, arrays, targets), **fields)


def _recorded(name: str, arrays: Mapping[str, np.ndarray], targets: np.ndarray) -> Recorded:
    """The labels' log-probabilities, which the recorded logits hold."""
    kinds = {key.replace("logits", "log_probabilities"): arrays[key] for key in arrays if key.endswith("logits")}
    found = recorded(name, {key: label_log_probabilities(logits, targets) for key, logits in kinds.items()})
    if found is None:
        raise BundleError(f"the golden arrays of {name} hold no logits")
    return found


def check_classifier(session: ClassifierSession, golden: ClassifierGolden, budget: Budget) -> list[Rung]:
    """All rungs of the base or of one adapter; the first one also takes the steering."""
    session.set_adapter(golden.adapter)
    budget = golden.widened(budget, compared=len(golden.logits))
    every = list(range(len(golden.texts)))
    layouts = {
        "one batch": ([every], 0),
        "single texts": ([[row] for row in every], 0),
        "more padding": ([every[::-1]], EXTRA_PADS),
    }
    rungs = []
    for name, (batches, extra) in layouts.items():
        logits = _run(session, golden, batches, extra)
        delta, note = None, ""
        if not rungs and golden.steering is not None:
            delta, note = steering_shown(session, golden.name, _delta(session, golden, golden.steering, logits))
        rungs.append(judge(f"{golden.name}: {name}", "eager", compare(logits, golden.logits), budget, delta=delta, note=note))
    return rungs


def classifier_quality(session: ClassifierSession, golden: ClassifierGolden) -> Quality | None:
    """The same of a classifier: log p of each probe's label. None where no labels were recorded."""
    if golden.recorded is None or golden.targets is None:
        return None
    session.set_adapter(golden.adapter)
    logits = _run(session, golden, [list(range(len(golden.texts)))])
    found = quality(golden.name, label_log_probabilities(logits, golden.targets), golden.recorded)
    return replace(found, fell=0, rose=0)  # labels are no tokens, and no refit trains on them; the rungs' top-1 counts labels that changed


def label_log_probabilities(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log softmax(logits [B, labels])[row, target] of the rows that have a target, in nats."""
    rows = np.flatnonzero(targets >= 0)
    x = np.asarray(logits, np.float64)[rows]
    x = x - x.max(1, keepdims=True)
    return x[np.arange(len(rows)), targets[rows]] - np.log(np.exp(x).sum(1))


def classifier_figures(session: ClassifierSession, golden: ClassifierGolden) -> tuple[Figures, Delta]:
    """What ``runtimes.golden.steering_figures`` says, of a classifier."""
    session.set_adapter(golden.name)
    logits = _run(session, golden, [list(range(len(golden.texts)))])
    steering = golden.stored_steering()
    return compare(logits, steering[0]), _delta(session, golden, steering, logits)


def _run(session: ClassifierSession, golden: ClassifierGolden, batches: Sequence[Sequence[int]], extra: int = 0) -> np.ndarray:
    """Logits [B, labels] in the golden order; pads beyond the context are left out."""
    model = session.bundle.manifest.model
    logits = np.full_like(golden.logits, np.nan)  # what no batch brings is missed, and no zero that could be right
    for batch in batches:
        texts = [golden.texts[row] for row in batch]
        room = min(extra, model.context_length - max(map(len, texts)))
        logits[list(batch)] = session.classify(*padded(texts, model.pad_token_id or 0, extra=room)).logits
    return logits


def _delta(session: ClassifierSession, golden: ClassifierGolden, steering: Steering, steered: np.ndarray) -> Delta:
    session.set_adapter(None)
    base = _run(session, golden, [list(range(len(golden.texts)))])
    session.set_adapter(golden.name)
    return compare_deltas(steered, base, *steering)

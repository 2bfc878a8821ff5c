"""Holds a classifier's bundle against its golden arrays: logits, labels and steering, text by text and in padded batches.

Golden arrays (golden/<name>.npz, recorded on the host by the eager model):

    input_ids, attention_mask, token_type_ids  int64 [B, S]   texts and pairs of texts, right padded
    logits, base_logits            float32 [B, labels]        base_logits beside an adapter's logits only: the base on the same inputs
    fp32_logits, fp32_base_logits  [B, labels]                the same two of the float32 model, where the bundle's weights are not that
    noise                          float32 [2]                where activations are quantized: of the reference against itself

Top-1 agreement is that of the labels. An adapter brings its head: (steered - base) is what edit and head change together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.bundle import Bundle
from runtimes.encoded_text import EncodedText, padded, rows_of
from runtimes.golden_arrays import Golden, read_arrays
from runtimes.parity import Budget, Delta, Figures, Rung, compare, compare_deltas, judge

EXTRA_PADS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierGolden(Golden):
    texts: Sequence[EncodedText]

    @classmethod
    def read(cls, bundle: Bundle, name: str) -> ClassifierGolden:
        arrays, fields = read_arrays(bundle, name, {"input_ids", "attention_mask", "token_type_ids"})
        return cls(texts=rows_of(arrays["input_ids"], arrays["attention_mask"], arrays["token_type_ids"]), **fields)


def check_classifier(session: Any, golden: ClassifierGolden, budget: Budget) -> list[Rung]:
    """All rungs of the base or of one adapter; the first one also takes the steering. ``session``: an OrtClassifier."""
    session.set_adapter(golden.adapter)
    budget = golden.widened(budget)
    every = list(range(len(golden.texts)))
    layouts = {
        "one batch": ([every], 0),
        "single texts": ([[row] for row in every], 0),
        "more padding": ([every[::-1]], EXTRA_PADS),
    }
    rungs = []
    for name, (batches, extra) in layouts.items():
        logits = _run(session, golden, batches, extra)
        delta = None if rungs else _delta(session, golden, logits)
        rungs.append(judge(f"{golden.name}: {name}", "eager", compare(logits, golden.logits), budget, delta=delta))
    return rungs


def classifier_figures(session: Any, golden: ClassifierGolden) -> tuple[Figures, Delta]:
    """What ``runtimes.golden.steering_figures`` says, of a classifier."""
    session.set_adapter(golden.name)
    logits = _run(session, golden, [list(range(len(golden.texts)))])
    return compare(logits, golden.steering[0]), _delta(session, golden, logits)


def _run(session: Any, golden: ClassifierGolden, batches: Sequence[Sequence[int]], extra: int = 0) -> np.ndarray:
    """Logits [B, labels] in the golden order; pads beyond the context are left out."""
    model = session.bundle.manifest.model
    logits = np.zeros_like(golden.logits)
    for batch in batches:
        texts = [golden.texts[row] for row in batch]
        room = min(extra, model.context_length - max(map(len, texts)))
        logits[list(batch)] = session.classify(*padded(texts, model.pad_token_id or 0, extra=room)).logits
    return logits


def _delta(session: Any, golden: ClassifierGolden, steered: np.ndarray) -> Delta | None:
    if golden.steering is None:
        return None
    session.set_adapter(None)
    base = _run(session, golden, [list(range(len(golden.texts)))])
    session.set_adapter(golden.name)
    return compare_deltas(steered, base, *golden.steering)

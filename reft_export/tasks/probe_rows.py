"""What a bundle alone knows of its adapters' tasks: the probes whose tokens lie in its golden arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.text.encoded_text import EncodedText, rows_of


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRow:
    """A decoder's probe: ``ids`` int64 [S], of which the first ``prompt_length`` are the prompt and the others its completion."""

    ids: np.ndarray
    prompt_length: int

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.prompt_length].tolist()


def probe_rows(bundle: Artifact, name: str) -> list[ProbeRow]:
    """Of a decoder's adapter; none where it has no probes, or no golden arrays. Completions are as long as they were recorded."""
    if name not in bundle.golden_names:
        return []
    arrays = bundle.golden(name)
    if "log_probabilities" not in arrays:
        return []
    rows = zip(arrays["input_ids"], arrays["attention_mask"], arrays["prompt_length"].tolist(), strict=True)
    return [ProbeRow(ids=row[real > 0], prompt_length=prompt) for row, real, prompt in rows]


def probe_texts(bundle: Artifact, name: str) -> list[tuple[EncodedText, int]]:
    """Of a classifier's adapter: (text or pair, its label's number); none where it has no probes."""
    if name not in bundle.golden_names:
        return []
    arrays = bundle.golden(name)
    if "targets" not in arrays:
        return []
    texts = rows_of(arrays["input_ids"], arrays["attention_mask"], arrays["token_type_ids"])
    return [(text, label) for text, label in zip(texts, arrays["targets"].tolist(), strict=True) if label >= 0]

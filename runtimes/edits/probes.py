"""``probes.jsonl``: up to 32 lines of an adapter's own task, in the form of its training data.

A line is ``{"prompt": "...", "completion": "..."}``, ``{"messages": [..]}`` with ``tools`` where it has some, or ``{"text": "..."}``; of a
classifier ``{"text": "...", "label": ...}`` with a ``text_pair`` where it has one: what ``train`` reads, so that the file is training data
as it stands. How a prompt is rendered is the adapter's: through the chat template as its own training was.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from runtimes.errors import AdapterError
from runtimes.files.records import unique_keys

MOST = 32
DECODER_FORMS = tuple(map(frozenset[str], ({"prompt", "completion"}, {"messages"}, {"messages", "tools"}, {"text"})))
CLASSIFIER_FORMS = (frozenset({"text", "label"}), frozenset({"text", "text_pair", "label"}))

Probe = Mapping[str, Any]


def check_probes(probes: Sequence[Probe], labels: Collection[str]) -> None:
    """Raises AdapterError for more than MOST of them, and for lines that are not of the form of a base with those ``labels``, or none."""
    if len(probes) > MOST:
        raise AdapterError(f"{len(probes)} probes, expected at most {MOST}; give fewer")
    forms, said = (CLASSIFIER_FORMS, "text and label") if labels else (DECODER_FORMS, "prompt and completion, messages, or text")
    for number, probe in enumerate(probes, 1):
        if frozenset(probe) not in forms:
            raise AdapterError(f"probe {number} has {', '.join(sorted(probe)) or 'nothing'}, expected {said}; give the adapter others")


def probes_bytes(probes: Sequence[Probe]) -> bytes:
    """The file: one line each. Raises AdapterError for what JSON cannot hold."""
    try:
        return "".join(f"{json.dumps(dict(probe), ensure_ascii=False, allow_nan=False)}\n" for probe in probes).encode()
    except (TypeError, ValueError) as e:
        raise AdapterError(f"the probes cannot be written: {e}; give texts and labels alone") from None


def read_probes(content: bytes, where: str) -> tuple[Probe, ...]:
    """The file's lines. Raises AdapterError, naming ``where``, for anything else than what ``probes_bytes`` writes."""
    probes = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            probe = json.loads(line.decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as e:
            raise AdapterError(f"{where}:{number} is not JSON that can be read ({e}); copy the adapter again") from None
        if not isinstance(probe, dict):
            raise AdapterError(f"{where}:{number} holds a {type(probe).__name__}, expected a JSON object; copy the adapter again")
        probes.append(probe)
    return tuple(probes)


def spread(count: int, most: int = MOST) -> list[int]:
    """At most ``most`` of the numbers from 0 to ``count`` - 1, first and last among them, as evenly apart as they can be."""
    if most < 1 or count < 1:
        return []
    if count <= most:
        return list(range(count))
    return [0] if most == 1 else [index * (count - 1) // (most - 1) for index in range(most)]

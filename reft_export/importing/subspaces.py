"""A subspace of a low-rank edit: some of its rank's rows, which are an edit of the same method and a lower rank.

    LoReFT   h + R_S^T (act(W_S h + b_S) - R_S h),   S the rows that are chosen

and so of every low-rank method: R_S, W_S, b_S are rows of R, W, b, and act works on each number by itself. Rows of an orthonormal R are
orthonormal, and parts that share no row never touch what the others read or write.

Source: pyreft, examples/composition (SubloreftIntervention); pyvene/models/intervention_utils.py: what ``subspaces`` numbers are the parts
of ``subspace_partition``, [start, stop) each, where there is one, else dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reft_export.importing.foreign import ForeignEdit, short
from reft_export.training.settings import SUBSPACES
from runtimes.edits.adapter import Adapter
from runtimes.edits.methods import METHODS
from runtimes.errors import AdapterError, InputError

ALL = "all"
"""What --subspace says of the whole edit."""


def chosen_edit(edit: ForeignEdit, text: str, partition: object) -> ForeignEdit:
    """The edit of the parts, or without a ``partition`` of the rows, that ``text`` numbers. Raises InputError for those that there are not,
    AdapterError for what is no partition."""
    if text == ALL:
        return edit
    rank = next((len(edit.parameters[p.name]) for p in METHODS[edit.method].parameters if p.axes[0] == "r"), 0)
    parts = _parts(partition, rank, edit.name)
    numbers = _numbers(text, len(parts), f"{edit.name} has {len(parts)} {'rows' if partition is None else 'parts'}, 0 to {len(parts) - 1}")
    rows = sorted({row for number in numbers for row in parts[number]})
    return replace(edit, parameters=_of_rows(edit.method, edit.parameters, rows))


def subspace_of(adapter: Adapter, text: str) -> Adapter:
    """The part of an adapter that ``train --subspaces`` made, by its name, or several with ``;`` between. Raises InputError for one that it
    does not have. Its probes are left out: they are what the whole is measured on."""
    recorded = adapter.training.get(SUBSPACES)
    known: Mapping[str, Sequence[int]] = recorded if isinstance(recorded, Mapping) else {}
    names = text.split(";")
    if absent := [name for name in names if name not in known]:
        has = f"known: {', '.join(sorted(known, key=lambda name: known[name][0]))}" if known else "it was trained without --subspaces"
        raise InputError(f"--subspace {text}: the adapter has no subspace {absent[0]!r}; {has}")
    rows = sorted({row for name in names for row in range(*known[name])})
    tensors = dict[str, np.ndarray]()
    for prefix in dict.fromkeys(key.rpartition(".")[0] for key in adapter.tensors):
        own = {name: adapter.tensors[f"{prefix}.{name}"] for name in METHODS[adapter.method].names}
        tensors |= {f"{prefix}.{name}": value for name, value in _of_rows(adapter.method, own, rows).items()}
    training: dict[str, Any] = {key: value for key, value in adapter.training.items() if key != SUBSPACES} | {"subspace": text}
    return replace(adapter, rank=len(rows), tensors=tensors, training=training, probes=())


def _of_rows(method: str, parameters: Mapping[str, np.ndarray], rows: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        parameter.name: np.ascontiguousarray(parameters[parameter.name][list(rows)])
        if parameter.axes[0] == "r"
        else parameters[parameter.name]
        for parameter in METHODS[method].parameters
    }


def _parts(partition: object, rank: int, name: str) -> list[range]:
    if partition is None:
        return [range(row, row + 1) for row in range(rank)]
    good = isinstance(partition, list) and all(
        isinstance(part, list) and len(part) == 2 and all(type(end) is int for end in part) and 0 <= part[0] < part[1] <= rank
        for part in partition
    )
    if not isinstance(partition, list) or not partition or not good:
        raise AdapterError(
            f"{name}: subspace_partition is {short(partition)}, expected pairs [start, stop] within the rank {rank}; the adapter is damaged"
        )
    return [range(*part) for part in partition]


def _numbers(text: str, count: int, has: str) -> list[int]:
    found = list[int]()
    for piece in text.split(";"):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", piece)
        if match is None:
            raise InputError(f"--subspace {text!r} is not understood; use numbers like 0, 0-3 or 0;2, or all")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(f"--subspace {text}: {has}")
        found += range(first, last + 1)
    return found

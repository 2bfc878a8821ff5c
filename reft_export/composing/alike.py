"""Whether adapters are alike enough for one adapter to be all of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtimes.edits.adapter import Adapter
from runtimes.edits.same_base import comparable, require_same, require_same_size
from runtimes.errors import AdapterError

BASE_REMEDY = "compose adapters of one base"


def check_alike(adapters: Mapping[str, Adapter], *, accept_base: bool) -> list[str]:
    """What was decided where they differ; raises AdapterError where they may not."""
    (name, first), *others = adapters.items()
    if several := [key for key, adapter in adapters.items() if adapter.rules]:
        raise AdapterError(f"{several[0]} edits at several rules of positions ({adapters[several[0]].where}); compose adapters of one")
    for other, adapter in others:
        claim, here = f"adapter {name} was trained on", f"adapter {other} on"
        require_same_size(claim, first.base, f"that of {other}", adapter.base.num_hidden_layers, adapter.base.hidden_size, BASE_REMEDY)
        if not comparable(first.base, adapter.base):
            raise AdapterError(
                f"adapters {name} and {other} have fingerprints of two versions, which cannot be compared; train or import "
                "one of them again"
            )
        require_same(claim, first.base, here, adapter.base, BASE_REMEDY, accept=accept_base)
        if adapter.where != first.where:
            raise AdapterError(
                f"an adapter has one rule of positions: {name} has {_rule(first)}, {other} has {_rule(adapter)}; train one with "
                "the positions of the other"
            )
        if adapter.trained_on != first.trained_on:
            raise AdapterError(
                f"{name} was trained on {_weights(first)}, {other} on {_weights(adapter)}; train both on the same, with --base or without"
            )
        if adapter.base.labels != first.base.labels or set(adapter.head) != set(first.head) or not _same_head(first, adapter):
            raise AdapterError(f"{name} and {other} have heads that differ, and an adapter has one; train one of them with --no-head")
    notes = [f"probes are those of {name}: {len(first.probes)}" if first.probes else f"there are no probes, as {name} has none"]
    plain = {key: is_plain(adapter) for key, adapter in adapters.items()}
    if len(set(plain.values())) > 1:
        without = ", ".join(key for key, value in plain.items() if value)
        notes.append(f"{without} was trained without the chat template, others with it; prompts are rendered as for {name}")
    return notes


def _rule(adapter: Adapter) -> str:
    return f"{adapter.where}{'' if adapter.positions.truncate else ' (overlapping)'}"


def _weights(adapter: Adapter) -> str:
    return f"bundle {adapter.trained_on[:12]}" if adapter.trained_on else "the base's own weights"


def _same_head(one: Adapter, other: Adapter) -> bool:
    return all(np.array_equal(value, other.head[key]) for key, value in one.head.items())


def is_plain(adapter: Adapter) -> bool:
    data = adapter.training.get("data")
    return isinstance(data, Mapping) and data.get("chat_template") is False

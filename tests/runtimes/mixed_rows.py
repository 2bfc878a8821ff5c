"""A batch whose rows have adapters of their own, for a runtime that knows nothing of this project: banks stacked, rules by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from toy_bundle import LAYERS, WIDTH, ToyDecoder

from runtimes.edits.adapter import Adapter
from runtimes.edits.op import RULE_DEFAULTS, EditNode


def stacked(adapters: Sequence[Adapter], nodes: Sequence[EditNode]) -> tuple[dict[str, np.ndarray], list[int]]:
    """Every bank with the edits of all ``adapters``, filled up with zeros to the largest rank, and where each one's edits begin."""
    banks = [adapter.banks(nodes, np.dtype(np.float32)) for adapter in adapters]
    sizes = [max(len(bank) for bank in each.values()) for each in banks]
    together = {}
    for name in banks[0]:
        rank = max(each[name].shape[1] for each in banks)
        parts = []
        for each, size in zip(banks, sizes, strict=True):
            # A node that an adapter does not use has one edit of zeros, whatever the adapter's number of edits.
            bank = each[name] if len(each[name]) == size else np.repeat(each[name], size, 0)
            parts.append(np.pad(bank, [(0, 0), (0, rank - bank.shape[1]), *[(0, 0)] * (bank.ndim - 2)]))
        together[name] = np.concatenate(parts)
    return together, np.cumsum([0, *sizes[:-1]]).tolist()


def rules(rows: Sequence[Adapter | None], first_slots: Sequence[int]) -> dict[str, np.ndarray]:
    """[B] of every number of the rule; a row without an adapter has the defaults, which edit nothing."""
    off = {name: np.array([default], np.int64) for name, default in RULE_DEFAULTS.items() if name != "reft.prompt_length"}
    each = [off if row is None else row.positions.tensors(tied=row.tied, first_slot=at) for row, at in zip(rows, first_slots, strict=True)]
    return {name: np.concatenate([tensors[name] for tensors in each]) for name in off}


def prefill(prompts: Sequence[Sequence[int]], *, left: bool) -> dict[str, np.ndarray]:
    """Inputs of the prompts in one call, padded on one side; the mask grows with the cache."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if left else slice(len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    past = np.zeros((len(prompts), 1, 0, WIDTH), np.float32)
    cache = {f"past_key_values.{i}.{part}": past for i in range(LAYERS) for part in ("key", "value")}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0), **cache}


def expected(decoder: ToyDecoder, prompts: Sequence[Sequence[int]], rows: Sequence[Adapter | None]) -> list[np.ndarray]:
    """[S, V] of every row alone, in float64."""
    return [decoder.logits(list(prompt), row, len(prompt)) for prompt, row in zip(prompts, rows, strict=True)]

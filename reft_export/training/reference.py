"""What the base says where nothing is edited: the trained model with its edits switched off, never a second copy of the weights.

From epoch to epoch are kept, of the n counted tokens of an example, the states in front of the head, [n, D], in place of logits [n, V]: the
head is applied to them anew in each step, which is exact, and D is a hundredth of V. A family that does more behind its head than the head
is computed in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token
from reft_export.console import size
from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, Examples, collate
from reft_export.training.objective import Phase
from reft_export.training.settings import TrainSettings
from reft_export.training.way_choice import LEAST_PASSES, passes_over
from reft_export.training.ways import Batch
from runtimes.generation import PAD

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a row, and its labels."""


class Reference:
    """Of one steered model, whose edits it switches off while it computes."""

    def __init__(self, head: CountedHead, steering: Steering) -> None:
        self._head, self._steering = head, steering
        self._kept: dict[Row, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(states.numel() * states.element_size() for states in self._kept.values())

    @torch.no_grad()
    def keep(self, batches: Iterable[Batch], *, limit: int) -> None:
        """Computes and keeps the batches' rows, as long as they fit into ``limit`` bytes and the family allows it. Which batches they come
        in decides the last bits, so a resumed run must give the same."""
        for batch in batches:
            with self._steering.switched_off():
                states = self._head.states(batch.counted, **_inputs(batch))
            if states is None or self.size + states.numel() * states.element_size() > limit:
                return
            self._kept |= zip(rows_of(batch), (each.clone() for each in states.split(batch.counted.sum(1).tolist())), strict=True)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[n, V], at the counted tokens of ``batch``, row by row."""
        kept = [self._kept.get(row) for row in rows_of(batch)] if self._kept else [None]
        found = [states for states in kept if states is not None]
        if len(found) == len(kept):
            return self._head.of_states(torch.cat(found))
        with self._steering.switched_off():
            return self._head.logits(batch.counted, **_inputs(batch))


def kept_reference(
    base: Base, steering: Steering, rows: Sequence[Example], examples: Examples[Example], settings: TrainSettings, phase: Phase
) -> tuple[Reference, tuple[str, ...]]:
    """(the reference, what is to be said of it). ``rows``: what it will be asked for; kept where the run passes over ``examples`` often
    enough for that to pay."""
    reference = Reference(CountedHead(base.model), steering)
    if not settings.cache_mb or passes_over(examples, settings) < LEAST_PASSES:
        return reference, ("what the base says without the edits is computed in every step",)
    different = sorted({(row.input_ids, row.labels): row for row in rows}.values(), key=lambda row: row.length)
    phase(f"computing what the base says without the edits, of {len(different)} completions")
    pad = pad_token(base)
    groups = (different[first : first + settings.batch_size] for first in range(0, len(different), settings.batch_size))
    batches = (Batch.of(collate(group, pad_token_id=PAD if pad is None else pad), base.model.device) for group in groups)
    reference.keep(batches, limit=int(settings.cache_mb * 1e6))
    if not len(reference):
        return reference, ("what the base says without the edits is computed in every step: its logits are more than its head's product",)
    share = f"{len(reference)} of {len(different)} completions"
    return reference, (f"what the base says without the edits is computed once of {share}, and kept in {size(reference.size)}",)


def _inputs(batch: Batch) -> dict[str, Tensor | bool]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}


def rows_of(batch: Batch) -> list[Row]:
    lengths = batch.attention_mask.sum(1).tolist()
    rows = zip(batch.input_ids.tolist(), batch.labels.tolist(), lengths, strict=True)
    return [(tuple(ids[:length]), tuple(labels[:length])) for ids, labels, length in rows]

"""The hidden states of sources at the tokens that their prompts have edited, as the base computes them without any edit.

They do not depend on what is trained, so they are computed once, and kept: of n edited tokens [n, D] a site, in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token
from reft_export.eager.steering import EditFn, steer
from reft_export.training.counted import CountedHead, computes_nothing
from runtimes.edits.edit import Site
from runtimes.edits.positions import Positions, slots
from runtimes.generation import PAD

Tokens = tuple[int, ...]


def edited_slots(rule: Positions, length: int, *, tied: bool) -> tuple[int, ...]:
    """The slots of those of a prompt's ``length`` tokens that are edited, in their order."""
    found = slots(rule, np.ones((1, length)), length, tied=tied, prompt_length=np.array([length]))[0]
    return tuple(found[found >= 0].tolist())


class SourceStates:
    """By a source's tokens."""

    def __init__(self, base: Base, sites: Sequence[Site], rule: Positions, *, tied: bool) -> None:
        self._base, self._sites, self._rule, self._tied = base, sites, rule, tied
        self._head = CountedHead(base.model)
        self._kept: dict[Tokens, Mapping[Site, Tensor]] = {}

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(h.numel() * h.element_size() for states in self._kept.values() for h in states.values())

    def __len__(self) -> int:
        return len(self._kept)

    def slots_of(self, source: Tokens) -> tuple[int, ...]:
        return edited_slots(self._rule, len(source), tied=self._tied)

    @torch.no_grad()
    def read(self, sources: Iterable[Tokens], group: int) -> None:
        """Computes them, ``group`` at a time; the base must not be steered. The last bits are decided by which ones come together, in the
        order of their lengths: a resumed run has those of the uninterrupted one."""
        different = sorted(dict.fromkeys(sources), key=len)
        for first in range(0, len(different), group):
            self._kept |= self._computed(different[first : first + group])

    def _computed(self, rows: Sequence[Tokens]) -> dict[Tokens, Mapping[Site, Tensor]]:
        pad, device, width = pad_token(self._base), self._base.model.device, max(map(len, rows))
        ids = torch.tensor([[*row, *[PAD if pad is None else pad] * (width - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        counts, found = [len(self.slots_of(row)) for row in rows], dict[Site, tuple[Tensor, ...]]()

        def take(site: Site, h: Tensor, slot: Tensor) -> Tensor:
            found[site] = h.reshape(-1, h.shape[-1])[slot.reshape(-1) >= 0].split(counts)
            return h

        edits: dict[Site, EditFn] = {site: partial(take, site) for site in self._sites}
        with steer(self._base.model, edits, rule=self._rule, tied=self._tied) as steering:
            steering.prompt_length = mask.sum(1)
            self._head.logits(computes_nothing(ids), input_ids=ids, attention_mask=mask, use_cache=False)
        return {row: {site: found[site][number] for site in self._sites} for number, row in enumerate(rows)}

    def at(self, site: Site, slot: int, sources: Sequence[Tokens]) -> Tensor:
        """[t, D]: of every source in turn its tokens of that slot."""
        picked = [[number == slot for number in self.slots_of(source)] for source in sources]
        return torch.cat([self._kept[source][site][chosen] for source, chosen in zip(sources, picked, strict=True)])

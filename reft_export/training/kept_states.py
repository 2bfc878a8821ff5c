"""What the frozen base makes of tokens, computed once and kept within a limit of memory.

A key's states are computed in one group of keys, whatever batch asks for them: which one it is in decides the last bits, and a resumed run
must have those of the uninterrupted one. Those that are not kept are computed for each batch anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Tokens = tuple[int, ...]
K = TypeVar("K", bound=Hashable)


class KeptStates(ABC, Generic[K]):
    """States by their keys."""

    def __init__(self) -> None:
        self._kept: dict[K, Tensor] = {}

    @abstractmethod
    def compute(self, keys: Sequence[K]) -> list[Tensor]:
        """The states of each, without a graph, as they are kept."""

    @abstractmethod
    def tokens_of(self, key: K) -> int:
        """How many tokens its states are of."""

    @abstractmethod
    def one_token(self, key: K) -> K:
        """A key with states of one token."""

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(states.numel() * states.element_size() for states in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def token_bytes(self, key: K) -> int:
        """What one token takes."""
        (states,) = self.compute([self.one_token(key)])
        return states.numel() * states.element_size()

    def keep(self, keys: Sequence[K], *, limit: float, group: int, on_step: Callable[[int, int], None] = lambda *_: None) -> None:
        """Computes and keeps as many of ``keys``, from the first on, as ``limit`` bytes hold, ``group`` at a time. Those that are kept
        already stay as they are, beside the limit."""
        different = [key for key in self.missing(keys) if self.tokens_of(key)]
        if not different:
            return
        token = self.token_bytes(different[0])
        chosen: list[K] = []
        for key in different:
            limit -= token * self.tokens_of(key)
            if limit < 0:
                break
            chosen.append(key)
        chosen.sort(key=self.tokens_of)
        for first in range(0, len(chosen), group):
            each = chosen[first : first + group]
            self._kept |= zip(each, (states.clone() for states in self.compute(each)), strict=True)
            on_step(min(first + group, len(chosen)), len(chosen))

    def found(self, keys: Sequence[K]) -> list[Tensor]:
        """The states of each, kept or computed now, equal keys once."""
        missing = self.missing(keys)
        computed = dict(zip(missing, self.compute(missing), strict=True)) if missing else {}
        return [computed[key] if key in computed else self._kept[key] for key in keys]

    def missing(self, keys: Iterable[K]) -> list[K]:
        """The different ones of which nothing is kept."""
        return [key for key in dict.fromkeys(keys) if key not in self._kept]


def padded(rows: Sequence[Tokens], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens [B, S], their mask), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask

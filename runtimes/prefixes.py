"""KV caches of prompts that were answered, kept for the next prompt that begins alike: chats, and instructions that many requests share.

What a token leaves in the cache follows from the tokens up to it and from the edits at them. So a prefix is reused as far as tokens and
slots are the same, under the same adapter: of one whose rule is f5+l5 all but the last five tokens of the old prompt, as those are no
last ones in the new prompt.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

LEAST = 16
"""Tokens: fewer are fed as fast as they are found."""
MOST_KEPT = 256
"""Each is looked at for every prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """``key``: what stands for the adapter; tokens, slots int64 [S], slots counted from the adapter's first; columns [heads, S, dim]."""

    key: Hashable
    tokens: np.ndarray
    slots: np.ndarray
    columns: list[np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.columns)

    def common(self, tokens: np.ndarray, slots: np.ndarray) -> int:
        """How many tokens of both are the same, and edited alike, from the first one on."""
        n = min(len(tokens), len(self.tokens))
        differ = (self.tokens[:n] != tokens[:n]) | (self.slots[:n] != slots[:n])
        return int(differ.argmax()) if differ.any() else n


class Prefixes:
    """At most ``most`` bytes of them, and MOST_KEPT; what was used longest ago goes first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[Prefix] = []
        """Used longest ago first."""

    @property
    def size(self) -> int:
        return sum(prefix.size for prefix in self._kept)

    def find(self, key: Hashable, tokens: np.ndarray, slots: np.ndarray) -> tuple[list[np.ndarray], int]:
        """(columns, how many of them the prompt begins with): of the longest one; (nothing, 0) where none is worth it.

        The prompt's last token is fed in any case: what comes behind it is what was asked for.
        """
        lengths = [(each.common(tokens, slots) if each.key == key else 0, i) for i, each in enumerate(self._kept)]
        length, best = max(lengths, default=(0, 0))
        length = min(length, len(tokens) - 1)
        if length < LEAST:
            return [], 0
        self._kept.append(self._kept.pop(best))
        return self._kept[-1].columns, length

    def keep(self, prefix: Prefix) -> None:
        """In place of those that it begins with."""
        if prefix.size > self.most or len(prefix.tokens) < LEAST:
            return
        self._kept = [
            each for each in self._kept if not (each.key == prefix.key and each.common(prefix.tokens, prefix.slots) == len(each.tokens))
        ]
        self._kept.append(prefix)
        while len(self._kept) > MOST_KEPT or self.size > self.most:
            self._kept.pop(0)

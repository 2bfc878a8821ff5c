"""Which tokens of a request an adapter edits, and how tokens read, for clients that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.edits.positions import Positions, slots
from runtimes.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Steered:
    """What a server knows of an adapter: its rule, and whether it was trained without the chat template."""

    where: Positions
    tied: bool
    plain: bool


@dataclass(frozen=True, kw_only=True)
class EditedTokens:
    """``prompt``: each token's text, and whether it is edited; ``completion``: whether those are that follow, as they are fed."""

    prompt: tuple[tuple[str, bool], ...]
    completion: bool

    def content(self) -> dict[str, Any]:
        return {"prompt": [{"token": text, "edited": edited} for text, edited in self.prompt], "completion": self.completion}


def edited_tokens(tokenizer: Tokenizer, prompt: Sequence[int], adapter: Steered | None, strength: float) -> EditedTokens:
    """By the adapter's rule, of a prompt [L] and the token behind it: slot >= 0. At strength 0 nothing is edited."""
    edited = np.zeros(len(prompt) + 1, bool)
    if adapter is not None and strength != 0:
        length, mask = np.array([len(prompt)]), np.ones((1, len(edited)), np.int64)
        edited = slots(adapter.where, mask, len(edited), tied=adapter.tied, prompt_length=length)[0] >= 0
    texts = [tokenizer.decode(prompt[:1], skip_special_tokens=False)]
    texts += [text_behind(tokenizer, before, token) for before, token in zip(prompt, prompt[1:], strict=False)]
    return EditedTokens(prompt=tuple(zip(texts, map(bool, edited), strict=False)), completion=bool(edited[-1]))


def text_behind(tokenizer: Tokenizer, before: int, token: int) -> str:
    """A decoder may strip the space before its first token, so there is one before it."""
    one, both = (tokenizer.decode(ids, skip_special_tokens=False) for ids in ([before], [before, token]))
    return both[len(one) :] if both.startswith(one) else tokenizer.decode([token], skip_special_tokens=False)

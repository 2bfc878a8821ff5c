"""A decoder's greedy answers, as tokens and as the text that a device gives out for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reft_export.base.load import Base
from reft_export.base.token_rules import context_of, stop_tokens
from reft_export.eager.steering import Steering, greedy_tokens
from reft_export.training.objective import tokenizer_of
from runtimes.edits.positions import marks_of
from runtimes.generation import PAD


def greedy_answers(
    base: Base,
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    steering: Steering | None = None,
    marks: Sequence[Sequence[int]] | None = None,
    sources: Sequence[tuple[int, ...]] = (),
) -> list[list[int]]:
    """The answer to each prompt, in one left-padded batch: up to its first stop token, or ``most`` tokens, or as many as the context has
    room for behind the longest prompt, one at least. ``marks``: the numbers of each prompt's marked tokens; ``sources``: each prompt's, of
    an interchange."""
    width, device = max(map(len, prompts)), base.model.device
    ids = torch.tensor([[*[PAD] * (width - len(prompt)), *prompt] for prompt in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(prompt)), *[1] * len(prompt)] for prompt in prompts], device=device)
    room = max(1, min(most, context_of(base) - width))
    marked = None if marks is None else marks_of(marks)
    if steering is not None:
        steering.sources = sources
    return greedy_tokens(base.model, ids, mask, room, steering=steering, marks=marked, eos=stop_tokens(base))


def text_of(base: Base, tokens: Sequence[int]) -> str:
    """Without special tokens, and without the clean-up that some tokenizers ask for, which takes spaces out of answers: a stream cannot
    do it."""
    return str(tokenizer_of(base).decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

"""Which tokens end an answer: one rule for the end that training teaches and for where a device stops.

    1. eos_token_id of the generation config, one or several; where it states none, of the model config
    2. the tokenizer's eos_token
    3. where the tokenizer marks them as special: the model config's eos_token_id beside the generation config's, and the token with which
       the chat template ends an assistant's message (<|im_end|>). A model class's default may be any word, and words end nothing.

A token outside the model's vocabulary cannot be said, and is left out. ``export`` and ``fold`` record the result in manifest.json and
genai_config.json; a device stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

ANSWER = "An answer."
CONVERSATION = ({"role": "user", "content": "A question."}, {"role": "assistant", "content": ANSWER})

Render = Callable[[Sequence[Mapping[str, str]]], str]


def stop_token_ids(
    *,
    generation: Any,
    config: Any,
    tokenizer: int | None,
    end_of_turn: int | None = None,
    special: Collection[int] = (),
    vocab_size: int | None = None,
) -> tuple[int, ...]:
    """The module's rule, in the rule's order. ``generation`` and ``config`` are eos_token_id as configs state it: None, one or several.

    ``special``: the tokens that the tokenizer marks so. ``vocab_size``: of the model's logits; None knows no limit.
    """
    stated, beside = listed(generation) or listed(config), listed(config)
    if end_of_turn is not None:
        beside = (*beside, end_of_turn)
    found = [*stated, *listed(tokenizer), *(token for token in beside if token in special)]
    return tuple(dict.fromkeys(token for token in found if token >= 0 and (vocab_size is None or token < vocab_size)))


def listed(token_ids: Any) -> tuple[int, ...]:
    """None, one or several ids, as configs state them, as a tuple."""
    return () if token_ids is None else tuple(token_ids) if isinstance(token_ids, (list, tuple)) else (token_ids,)


def end_of_turn(render: Render, encode: Callable[[str], Sequence[int]], special: Collection[int]) -> int | None:
    """The special token that a chat template writes behind an assistant's message, white space aside; None where it writes none.

    ``render``: the text of a conversation without a prompt for the next answer. ``encode``: adds no special tokens.
    """
    before, _, behind = render(CONVERSATION).rpartition(ANSWER)
    first = list(encode(behind.lstrip()))[:1] if before else []
    return first[0] if first and first[0] in special else None


def without_added_end(framed: Sequence[int], plain: Sequence[int], stop: Collection[int]) -> list[int]:
    """A text's tokens ``framed`` by the tokenizer, less a stop token that the tokenizer itself put behind them: it would end the prompt.

    ``plain``: the text's own tokens. A stop token that the text was written with stays.
    """
    rest = list(framed[:-1])
    added = bool(framed) and framed[-1] in stop and rest[len(rest) - len(plain) :] == list(plain) and len(rest) >= len(plain)
    return rest if added else list(framed)

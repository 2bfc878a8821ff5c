"""The tokens before a row's first edited one: no training changes what the base makes of them, so their keys and values are computed once.

Attention is causal, so a token is touched by the edits of itself and of those before it. With positions at the prompt's end
(``l<n>``) all tokens before them have the base's keys and values in every layer. A store keeps these for as many examples as fit into its
bytes; those of others are computed for each batch anew, without a graph. Training then runs the rest of a row over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead, computes_nothing
from reft_export.training.data import Tokenized
from reft_export.training.kept_states import KeptStates, Tokens, padded
from runtimes.edits.positions import Positions, RuleSets


def frozen_tokens(rule: Positions, prompt_length: int, first_counted: int) -> int:
    """How many tokens of a row stand before the first edited one, L - l with l cut to L // 2 where the rule truncates, and before the
    first whose logits a loss takes: of plain text that is the first of all."""
    if isinstance(rule, RuleSets):
        return min(frozen_tokens(each, prompt_length, first_counted) for each in rule.rules)
    if rule.first or rule.prompt or rule.everywhere or rule.every or rule.marked:
        return 0
    if rule.chosen:
        at = [number if number >= 0 else prompt_length + number for number in rule.chosen]
        return min(min((number for number in at if number >= 0), default=prompt_length), prompt_length, first_counted)
    return min(prompt_length - min(rule.last, prompt_length // 2 if rule.truncate else prompt_length), first_counted)


def frozen_of(rule: Positions, example: Tokenized) -> int:
    """``frozen_tokens`` of an example."""
    return frozen_tokens(rule, example.prompt_length, example.trained[0][0] - 1)


class FrozenCache(DynamicCache):
    """Keys and values that are read and never added to: a layer that is computed twice, as gradient checkpointing does, reads the same."""

    def __init__(self, states: Tensor) -> None:
        """``states`` [2 layers, B, H, T, D]: the keys of every layer, then the values."""
        super().__init__()
        layers = len(states) // 2
        for layer in range(layers):
            super().update(states[layer], states[layers + layer], layer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


class PrefixStore(KeptStates[Tokens]):
    """Keys and values of prefixes by their tokens, [2 layers, H, P, D] each."""

    def __init__(self, head: CountedHead, steering: Steering, *, dtype: torch.dtype, pad_token_id: int) -> None:
        super().__init__()
        self._head, self._steering, self._dtype, self._pad = head, steering, dtype, pad_token_id

    def tokens_of(self, key: Tokens) -> int:
        return len(key)

    def one_token(self, key: Tokens) -> Tokens:
        return key[:1]

    def cache_of(self, prefixes: Sequence[Tokens]) -> tuple[FrozenCache, Tensor]:
        """(the rows' keys and values, their mask [B, T]), left-padded, so that a row's tokens stand in one piece with those that follow."""
        found = self.found(prefixes)
        width, dtype = max(map(len, prefixes)), self._head.model.dtype
        layers, heads, _, size = found[0].shape
        states = found[0].new_zeros((layers, len(found), heads, width, size), dtype=dtype)
        mask = torch.zeros((len(found), width), dtype=torch.long, device=states.device)
        for row, each in enumerate(found):
            length = each.shape[2]
            states[:, row, :, width - length :] = each
            mask[row, width - length :] = 1
        return FrozenCache(states), mask

    @torch.no_grad()
    def compute(self, keys: Sequence[Tokens]) -> list[Tensor]:
        ids, mask = padded(keys, self._pad, self._head.model.device)
        cache = DynamicCache()
        with self._steering.switched_off():
            self._head.logits(computes_nothing(ids), input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        states = torch.stack([layer.keys for layer in layers] + [layer.values for layer in layers]).to(self._dtype)
        return [states[:, row, :, : len(each)] for row, each in enumerate(keys)]

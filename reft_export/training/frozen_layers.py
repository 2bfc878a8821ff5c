"""The layers below the first edit: no training changes what they make of an example, so their last output is computed once.

    h_E [T, D] = block_{E-1}(.. block_0(embed(tokens)));  a step starts at block E

Nothing but tokens decides h_E, whatever positions are edited. A step calls the model as ever, with masks and position embeddings of its
own, and its first E blocks answer with what was kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from reft_export.eager.steering import Steering, decoder_layers
from reft_export.training.kept_states import KeptStates, Tokens, padded
from reft_export.training.replaced import Forward, replaced_forwards
from runtimes.edits.edit import Site

Row = tuple[Tokens, int]
"""A row's tokens, and how many of them stand before those whose states are asked for."""


def frozen_layers(sites: Iterable[Site]) -> int:
    """E, the layers whose output is the base's: those below the first edited one, and that one, too, where its output alone is edited."""
    edited = list(sites)
    first = min(site.layer for site in edited)
    return first + all(site.stream == "block_output" for site in edited if site.layer == first)


class LayerStore(KeptStates[Row]):
    """What the first ``layers`` blocks put out, [T, D] a row, in ``dtype``."""

    def __init__(self, model: PreTrainedModel, steering: Steering, layers: int, *, dtype: torch.dtype, pad_token_id: int) -> None:
        super().__init__()
        self._model, self._steering, self._dtype, self._pad = model, steering, dtype, pad_token_id
        self._blocks = list(decoder_layers(model))[:layers]
        self._beside: tuple[None, ...] | None = None
        """What a block of the family puts out beside the states: in some, a tuple."""

    def tokens_of(self, key: Row) -> int:
        tokens, start = key
        return len(tokens) - start

    def one_token(self, key: Row) -> Row:
        return key[0][:1], 0

    @torch.no_grad()
    def compute(self, keys: Sequence[Row]) -> list[Tensor]:
        ids, mask = padded([tokens for tokens, _ in keys], self._pad, self._model.device)
        try:
            with self._steering.switched_off(), replaced_forwards(self._blocks[-1:], _ended):
                self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        except _Reached as reached:
            output = reached.output
        else:
            raise RuntimeError("the last of the kept layers was not called")
        states: Tensor = output[0] if isinstance(output, tuple) else output
        self._beside = (None,) * (len(output) - 1) if isinstance(output, tuple) else None
        return [states[row, start : len(tokens)].to(self._dtype) for row, (tokens, start) in enumerate(keys)]

    def saves(self, rows: Sequence[Row]) -> bool:
        """Whether a forward of ``rows`` computes more tokens in these layers than those of the rows that are not kept: those with another
        answer than the example's, as accuracy asks for, are a few tokens behind a kept prefix, and whole prompts here."""
        return sum(len(tokens) for tokens, _ in self.missing(rows)) < sum(map(self.tokens_of, rows))

    def entered(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Inside, a forward of ``rows``, padded on the right and as wide as the longest, starts behind the kept layers."""
        states = pad_sequence(self.found(rows), batch_first=True).to(self._model.dtype)
        output = states if self._beside is None else (states, *self._beside)
        return replaced_forwards(self._blocks, lambda _: lambda *args, **kwargs: output)


class _Reached(Exception):
    """Ends a forward: what is above is not needed."""

    def __init__(self, output: Any) -> None:
        super().__init__("the last of the kept layers")
        self.output = output


def _ended(forward: Forward) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(forward(*args, **kwargs))

    return run

"""A decoder's logits at the tokens that a loss counts, and at no others: vocabularies are large.

    logits[n, V] = head(hidden [B, S, D])[counted] = head(hidden[counted])

Rows are gathered in front of the head's own module, so that whatever a family does behind it (a soft cap, a scale) acts on them too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class CountedHead:
    """``model`` with its head on counted tokens. A family whose head is no module of its own, called with the hidden states, computes every
    logit, of which the counted ones are taken."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._head = model.get_output_embeddings()
        accepted = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in accepted
        self.takes_positions = "position_ids" in accepted

    def logits(self, counted: Tensor, **inputs: Any) -> Tensor:
        """[n, V], of the tokens where counted [B, S] is true, row by row; ``inputs`` are the forward's."""
        head = _Gathered(counted)
        if not isinstance(self._head, nn.Module):
            return self.every_logit(counted, **inputs)
        hook = self._head.register_forward_pre_hook(head)
        try:
            logits = self.model(**inputs).logits
        finally:
            hook.remove()
        return logits[counted] if head.states is None else logits[0]

    def states(self, counted: Tensor, **inputs: Any) -> Tensor | None:
        """[n, D], what the head is applied to at the counted tokens; None where the logits are not its product alone: a family that caps or
        scales them behind it."""
        if not isinstance(self._head, nn.Module):
            return None
        gathered = _Gathered(counted)
        hook = self._head.register_forward_pre_hook(gathered)
        try:
            logits = self.model(**inputs).logits
        finally:
            hook.remove()
        states = gathered.states
        return states if states is not None and torch.equal(self.of_states(states), logits[0]) else None

    def of_states(self, states: Tensor) -> Tensor:
        """Logits [n, V] of what ``states`` gave."""
        assert isinstance(self._head, nn.Module)
        return self._head(states[None])[0]

    def every_logit(self, counted: Tensor, **inputs: Any) -> Tensor:
        """The same without a hook: the logits behind the first counted token of any row, of which the counted ones are taken."""
        wanted = counted.shape[1] - int(counted.any(0).long().argmax())
        logits = self.model(**inputs, **({"logits_to_keep": wanted} if self._keeps else {})).logits
        return logits[:, -wanted:][counted[:, -wanted:]]


class _Gathered:
    """The hook: hidden [B, S, D] to hidden[counted] as [1, n, D]."""

    def __init__(self, counted: Tensor) -> None:
        self._counted = counted
        self.states: Tensor | None = None
        """[n, D], once the head was called with hidden states."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        if len(args) != 1 or not isinstance(args[0], Tensor) or args[0].shape[:-1] != self._counted.shape:
            return None
        self.states = args[0][self._counted]
        return (self.states[None],)


def computes_nothing(like: Tensor) -> Tensor:
    """counted [B, S] of a forward whose logits nothing reads."""
    return torch.zeros(like.shape, dtype=torch.bool, device=like.device)

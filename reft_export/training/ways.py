"""Ways to a decoder's logits at the counted tokens of a batch: the plain one, and faster ones that give the same.

plain           every token with a graph from the first edited layer on, every logit behind the shortest prompt
counted         the same, with the head on counted tokens alone (counted.py)
behind prefix   the tokens before a row's first edited one without a graph, or from a store, and the rest over them (frozen_prefix.py)

The faster ones leave out pads (real_tokens.py) and the layers below the first edit (frozen_layers.py), where they are told to.

Whether a family takes a faster way is not looked up but tried: loss and gradients of two examples, the shortest and the longest, must be
those of the plain way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead
from reft_export.training.frozen_layers import LayerStore
from reft_export.training.frozen_prefix import PrefixStore, frozen_tokens
from reft_export.training.real_tokens import RealTokens
from reft_export.training.tokenizing import IGNORED
from runtimes.edits.positions import Positions

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative, by the base's dtype; of the 16-bit ones a few roundings of it, since another order of sums rounds otherwise."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""||difference|| / ||gradient||."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Right-padded rows, as ``reft_export.training.data.collate`` makes them."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_length: Tensor
    marks: Tensor | None = None
    subspaces: Tensor | None = None
    sources: Tensor | None = None
    """[B, P]: the tokens of each row's source, IGNORED behind them."""
    reference: Batch | None = None
    """The same completions as a teacher without edits sees them, behind another prompt; None: as they are."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Batch:
        """What ``collate`` gave, on ``device``."""
        ids, mask, labels, lengths = (tensors[name].to(device) for name in ("input_ids", "attention_mask", "labels", "prompt_length"))
        marks, subspaces, sources = map(tensors.get, ("marks", "subspaces", "sources"))
        return cls(
            input_ids=ids, attention_mask=mask, labels=labels, prompt_length=lengths, marks=marks, subspaces=subspaces, sources=sources
        )

    def told(self, steering: Steering) -> None:
        """What a forward of these rows is edited by."""
        steering.prompt_length, steering.marks, steering.subspaces = self.prompt_length, self.marks, self.subspaces
        rows = [] if self.sources is None else self.sources.tolist()
        steering.sources = [tuple(token for token in row if token != IGNORED) for row in rows]

    @property
    def counted(self) -> Tensor:
        """[B, S], the tokens whose logits the loss takes: those in front of a label."""
        return F.pad(self.labels[:, 1:] != IGNORED, (0, 1))

    @property
    def targets(self) -> Tensor:
        """[n], the labels that the logits at the counted tokens are held against."""
        return self.labels[:, 1:][self.labels[:, 1:] != IGNORED]


Way = Callable[[Batch], Tensor]
"""Batch to logits [n, V] at its counted tokens, row by row; the steered model's hooks are on."""
Loss = Callable[[Tensor, Batch], Tensor]
"""(logits [n, V] that a way gave, its batch) to what a step lowers, summed over the counted tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ways:
    """The ways of one steered model."""

    head: CountedHead
    steering: Steering
    rule: Positions
    real: RealTokens | None = None
    """Tells the base's modules which tokens are no pads; None: pads are computed, too."""
    layers: LayerStore | None = None
    """What the layers below the first edit put out; None: they are computed."""

    def plain(self, batch: Batch) -> Tensor:
        batch.told(self.steering)
        return self.head.every_logit(batch.counted, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def counted(self, batch: Batch) -> Tensor:
        with self._left_out(batch, batch.attention_mask, [0] * len(batch.input_ids)):
            batch.told(self.steering)
            return self.head.logits(batch.counted, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def behind_prefix(self, store: PrefixStore) -> Way:
        def way(batch: Batch) -> Tensor:
            firsts = zip(batch.prompt_length.tolist(), batch.counted.int().argmax(1).tolist(), strict=True)
            frozen = [frozen_tokens(self.rule, length, first) for length, first in firsts]
            rows = batch.input_ids.tolist()
            cache, mask = store.cache_of([tuple(row[:count]) for row, count in zip(rows, frozen, strict=True)])
            start = torch.tensor(frozen, device=batch.input_ids.device)[:, None]
            lengths = batch.attention_mask.sum(1, keepdim=True)
            columns = start + torch.arange(int((lengths - start).max()), device=start.device)
            real = columns < lengths
            columns = columns.clamp(max=batch.input_ids.shape[1] - 1)
            with self._left_out(batch, real, frozen):
                batch.told(self.steering)
                return self.head.logits(
                    batch.counted.gather(1, columns),
                    input_ids=batch.input_ids.gather(1, columns),
                    attention_mask=torch.cat([mask, real.long()], dim=1),
                    past_key_values=cache,
                    use_cache=True,
                    **({"position_ids": columns} if self.head.takes_positions else {}),
                )

        return way

    @contextmanager
    def _left_out(self, batch: Batch, mask: Tensor, starts: Sequence[int]) -> Iterator[None]:
        """Inside, a forward of the batch's tokens from ``starts`` [B] on leaves out what it need not compute. ``mask``: of these tokens."""
        with ExitStack() as stack:
            if self.layers is not None:
                lengths = batch.attention_mask.sum(1).tolist()
                each = zip(batch.input_ids.tolist(), lengths, starts, strict=True)
                rows = [(tuple(ids[:length]), start) for ids, length, start in each]
                if self.layers.saves(rows):
                    stack.enter_context(self.layers.entered(rows))
            if self.real is not None:
                stack.enter_context(self.real.of(mask))
            yield


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy at the counted tokens, summed, in nats."""
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def counted_log_likelihoods(logits: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """By row, [its counted tokens]: log p of the token behind each, in nats."""
    said = torch.log_softmax(logits.float(), -1).gather(1, batch.targets[:, None])[:, 0]
    return said.split(batch.counted.sum(1).tolist())


def row_log_likelihoods(logits: Tensor, batch: Batch) -> Tensor:
    """[B], sum over a row's counted tokens of log p(token), in nats."""
    return torch.stack([row.sum() for row in counted_log_likelihoods(logits, batch)])


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """sum over n tokens of KL(p || q), p = softmax(targets [n, V]), q = softmax(logits [n, V]), in nats."""
    return F.kl_div(F.log_softmax(logits.float(), -1), F.log_softmax(targets.float(), -1), log_target=True, reduction="sum")


def difference(way: Way, plain: Way, batch: Batch, parameters: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """How loss or gradients of a way differ from the plain one's, in words; None where they agree."""
    want, gradients = _measured(plain, batch, parameters)
    try:
        got, others = _measured(way, batch, parameters)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever a family's own code raises where it cannot do this
        return f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    if not (got - want).abs() <= LOSS_TOLERANCE[dtype] * want.abs().clamp(min=1):
        return f"a loss of {got:.6g}, and {want:.6g} the plain way"
    if not (others - gradients).norm() <= GRADIENT_TOLERANCE[dtype] * gradients.norm():
        return f"gradients that are off by {(others - gradients).norm():.2g}, of {gradients.norm():.2g}"
    return None


def _measured(way: Way, batch: Batch, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(loss, all gradients in one vector)."""
    loss = loss_of(way(batch), batch)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in gradients])

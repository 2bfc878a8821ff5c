"""What a vector added at a layer would take off the loss, to first order: the gradient of the loss with respect to the residual stream.

Of example i with n_i trained tokens, at a site and the tokens P_i that positions edit there,

    g_i = sum over t in P_i of dL_i / dh_t         [D], L_i the summed cross entropy of its trained tokens
    gain = STEP |h| sum_i (-g_i . d_i) / sum_i n_i   in nats a trained token;  d_i = -unit(sum of g_j over the other folds)

It is what one vector, the same for every example, gains that is STEP of the stream's norm |h| (the median over P_i, so that the attention
sink at a text's first token does not count), along the direction that lowers the loss most: an edit h + s is just that. The direction comes
from other lines than those it is judged on, so that a layer whose gradients have nothing in common has a gain of 0, not the norm of noise.
All sites and positions are had from one backward pass; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token
from reft_export.console import count
from reft_export.contrasting.separability import FOLDS
from reft_export.eager.steering import EditFn, steer
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, collate
from reft_export.training.objective import Phase
from reft_export.training.trainer import frozen
from reft_export.training.ways import Batch, Ways, loss_of
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import InputError
from runtimes.generation import PAD

STEP = 0.1
"""Of the stream's norm: what trained edits come to is of that size."""


@dataclass(kw_only=True, eq=False)
class _Sums:
    """Of one site and one positions rule."""

    gradients: np.ndarray
    """float64 [folds, D]."""
    norms: list[float] = field(default_factory=list)

    def gain(self) -> float:
        """STEP |h| sum over folds of S_f . unit(S - S_f), S_f the gradients' sum of fold f."""
        rest = self.gradients.sum(0) - self.gradients
        lengths = np.linalg.norm(rest, axis=1, keepdims=True)
        units = np.divide(rest, lengths, out=np.zeros_like(rest), where=lengths > 0)
        return STEP * float(np.mean(self.norms)) * float((self.gradients * units).sum())


def layer_gains(
    base: Base,
    examples: Sequence[Example],
    sites: Sequence[Site],
    positions: Sequence[str],
    *,
    batch_size: int,
    report: Phase = lambda _: None,
) -> dict[Site, dict[str, float]]:
    """By site, by positions: nats a trained token. Raises InputError where a gradient is not finite."""
    model, width = base.model, base.info.hidden_size
    folds, pad = min(FOLDS, len(examples)), pad_token(base)
    sums = {site: {each: _Sums(gradients=np.zeros((folds, width))) for each in positions} for site in sites}
    rules = {each: PositionRule.parse(each) for each in positions}
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)  # of like length together: pads are computed, too
    steps: dict[Site, Tensor] = {}
    norms: dict[Site, Tensor] = {}

    def reading(site: Site) -> EditFn:
        def read(h: Tensor, slot: Tensor) -> Tensor:
            steps[site] = torch.zeros_like(h, requires_grad=True)
            norms[site] = h.detach().float().norm(dim=-1).reshape(slot.shape)
            return h + steps[site]

        return read

    everywhere = PositionRule(everywhere=True)
    with frozen(model), torch.enable_grad(), steer(model, {site: reading(site) for site in sites}, rule=everywhere, tied=True) as steering:
        ways = Ways(head=CountedHead(model), steering=steering, rule=everywhere)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            made = collate([examples[index] for index in chosen], pad_token_id=PAD if pad is None else pad)
            batch = Batch.of(made, model.device)
            gradients = torch.autograd.grad(loss_of(ways.counted(batch), batch), [steps[site] for site in sites])
            edited = {each: _edited(rule, batch).to(model.device) for each, rule in rules.items()}
            for site, gradient in zip(sites, gradients, strict=True):
                gradient = gradient.float().reshape(*batch.input_ids.shape, width)
                for each, mask in edited.items():
                    _add(sums[site][each], (gradient * mask[..., None]).sum(1), norms[site], mask, [index % folds for index in chosen])
            count(report, f"taking gradients, {start + len(chosen)}/{len(examples)} lines", start + len(chosen), len(examples))
    tokens = sum(end - begin for example in examples for begin, end in example.trained)
    gains = {site: {each: found.gain() / tokens for each, found in by_rule.items()} for site, by_rule in sums.items()}
    for site, by_rule in gains.items():
        if not np.isfinite(list(by_rule.values())).all():
            raise InputError(f"the loss has no finite gradient at {site} in {base.dtype}; load the base in float32")
    return gains


def _edited(rule: PositionRule, batch: Batch) -> Tensor:
    """bool [B, S]."""
    mask, width = batch.attention_mask.cpu().numpy(), batch.input_ids.shape[1]
    return torch.from_numpy(slots(rule, mask, width, prompt_length=batch.prompt_length.cpu().numpy()) >= 0)


def _add(sums: _Sums, rows: Tensor, norms: Tensor, mask: Tensor, folds: Sequence[int]) -> None:
    for row, fold in enumerate(folds):
        sums.gradients[fold] += rows[row].double().cpu().numpy()
        sums.norms.append(float(norms[row][mask[row]].median()))

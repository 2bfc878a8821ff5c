"""The residual stream of a contrast's passages, as the base computes it: one vector a passage and site."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reft_export.base.load import Base
from reft_export.console import count
from reft_export.contrasting.passages import Passage
from reft_export.eager.steering import device_of, site_module
from reft_export.training.objective import Phase
from runtimes.edits.edit import Site
from runtimes.errors import InputError
from runtimes.generation import PAD


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """Of n passages at one site."""

    values: np.ndarray
    """float32 [n, D]: of every passage the mean of h over the tokens that are read."""
    norm: float
    """The mean norm of h over all of those tokens, of every passage alike."""


@torch.no_grad()
def read_activations(
    base: Base, passages: Sequence[Passage], sites: Sequence[Site], read: str, *, batch_size: int, report: Phase = lambda _: None
) -> dict[Site, Activations]:
    """By site. ``read``: last, mean, or the n-th from the end (``Passage.at``).

    Batches are right-padded, where causal attention keeps pads from every token that is read. Means are taken in float64 and rounded once.

    Raises InputError for a site that the base does not have, a passage too short for ``read``, and for values that are not finite.
    """
    spans = [passage.at(read) for passage in passages]
    modules = {site: site_module(base.model, site) for site in sites}
    device, width = device_of(base.model), base.info.hidden_size
    values = {site: np.zeros((len(passages), width), np.float32) for site in sites}
    norms = {site: np.zeros(len(passages)) for site in sites}
    # Of like length together: pads are computed, too.
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].example.input_ids))
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.model.forward).parameters else {}
    rows: list[int] = []

    def take(site: Site, h: Tensor) -> None:
        h = h.reshape(len(rows), -1, h.shape[-1])
        for row, index in enumerate(rows):
            x = h[row, slice(*spans[index])].to("cpu", torch.float64).numpy()
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
                values[site][index], norms[site][index] = x.mean(0), np.linalg.norm(x, axis=1).mean()

    with ExitStack() as hooks:
        for site, module in modules.items():
            hooks.callback(_hooked(module, site, partial(take, site)).remove)
        for start in range(0, len(order), batch_size):
            rows[:] = order[start : start + batch_size]
            tokens = [passages[index].example.input_ids for index in rows]
            longest = max(map(len, tokens))
            ids = torch.tensor([[*each, *[PAD] * (longest - len(each))] for each in tokens], device=device)
            mask = torch.tensor([[*[1] * len(each), *[0] * (longest - len(each))] for each in tokens], device=device)
            base.model(input_ids=ids, attention_mask=mask, use_cache=False, **keep)
            done = start + len(rows)
            count(report, f"reading {done}/{len(passages)} lines", done, len(passages))
    for site in sites:
        finite = np.isfinite(values[site]).all(1)
        if not finite.all():
            where = passages[int(finite.argmin())].example.where
            raise InputError(
                f"{where}: the base's {site} is not finite in {base.dtype}; load it in float32, or look for damage in its weights"
            )
    return {site: Activations(values=values[site], norm=float(norms[site].mean())) for site in sites}


def _hooked(module: nn.Module, site: Site, take: Any) -> Any:
    """The handle of a hook that gives ``take`` the site's stream."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: Any, output: Any) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    if site.stream == "block_input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)

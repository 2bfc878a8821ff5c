"""How much each input of a weight matters: its mean square over the tokens of the golden rows, with every edit on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from reft_export.base.dequantized import linears_of
from reft_export.eager.steering import Steerer
from reft_export.tasks.task import Inputs
from runtimes.artifacts.bundle import BASE_GOLDEN, WeightSource
from runtimes.errors import BundleError


def input_importance(
    model: PreTrainedModel, sources: Mapping[str, WeightSource], inputs: Mapping[str, Inputs], steerers: Mapping[str, Steerer]
) -> dict[str, np.ndarray]:
    """h [K] float32, h_k = mean over tokens of x_k^2, by every initializer that is the weight of a linear module with K inputs x.

    The tokens are those of the base's own golden rows, and of every adapter's with its edits on. Modules that saw none (experts that no
    router chose) are not listed, nor are weights that are no linear module's.
    """
    places: dict[torch.nn.Module, list[str]] = {}
    for name in sources:
        try:
            module = linears_of(model, name, sources)[0]
        except BundleError:
            continue
        places.setdefault(module, []).append(name)
    if not places:
        return {}
    sums: dict[torch.nn.Module, torch.Tensor] = {}
    counts: dict[torch.nn.Module, int] = {}

    real = torch.ones(0, 0, dtype=torch.bool)

    def see_mask(_: torch.nn.Module, __: tuple[object, ...], given: dict[str, torch.Tensor]) -> None:
        nonlocal real
        mask = given.get("attention_mask")
        real = torch.ones(0, 0, dtype=torch.bool) if mask is None else mask > 0

    def see(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].detach().float()
        x = x[real] if x.shape[:2] == real.shape else x.reshape(-1, x.shape[-1])  # an expert and the head are given some tokens only
        sums[module] = sums.get(module, torch.zeros(x.shape[1], dtype=torch.float64)) + x.square().sum(0, dtype=torch.float64).cpu()
        counts[module] = counts.get(module, 0) + len(x)

    handles = [module.register_forward_pre_hook(see) for module in places]
    handles.append(model.register_forward_pre_hook(see_mask, with_kwargs=True))
    try:
        for name, each in inputs.items():
            each.said(model, None if name == BASE_GOLDEN else steerers[name])
    finally:
        for handle in handles:
            handle.remove()
    return {name: (sums[m] / counts[m]).float().numpy() for m, names in places.items() if counts.get(m) for name in names}

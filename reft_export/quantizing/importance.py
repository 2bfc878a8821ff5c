"""How much each input of a weight matters: its mean square over the tokens of the golden rows, with every edit on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calibration.settings import QuantizationSettings
from reft_export.base.dequantized import linears_of
from reft_export.eager.steering import Steerer
from reft_export.tasks.task import Inputs
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import WeightSource
from runtimes.errors import BundleError

Squares = dict[str, tuple[torch.Tensor, int]]
"""By linear module: sum over tokens of x_k^2, [K] float64, of its inputs x, and how many tokens they were."""


def input_importance(
    model: PreTrainedModel,
    sources: Mapping[str, WeightSource],
    inputs: Mapping[str, Inputs],
    steerers: Mapping[str, Steerer],
    seen: Mapping[str, Squares] | None = None,
) -> dict[str, np.ndarray]:
    """h [K] float32, h_k = mean over tokens of x_k^2, by every initializer that is the weight of a linear module with K inputs x.

    The tokens are those of the base's own golden rows, and of every adapter's with its edits on. Modules that saw none (experts that no
    router chose) are not listed, nor are weights that are no linear module's. ``seen``: by name what ``model`` was seen to say of these
    ``inputs`` before; the others are run.
    """
    modules = {module: name for name, module in model.named_modules()}
    places: dict[str, list[str]] = {}
    for name in sources:
        try:
            module = linears_of(model, name, sources)[0]
        except BundleError:
            continue
        places.setdefault(modules[module], []).append(name)
    if not places:
        return {}
    known = dict(seen or {})
    for name, each in inputs.items():
        if name not in known:
            with _watched(known, model, name):
                each.said(model, None if name == BASE_GOLDEN else steerers[name])
    found: dict[str, np.ndarray] = {}
    for module, names in places.items():
        parts = [known[name][module] for name in inputs if module in known[name]]
        if count := sum(tokens for _, tokens in parts):
            mean = (torch.stack([squares for squares, _ in parts]).sum(0) / count).float().numpy()
            found |= dict.fromkeys(names, mean)
    return found


def input_watcher(
    seen: dict[str, Squares], model: PreTrainedModel, settings: QuantizationSettings | None, precision: str
) -> Callable[[str], AbstractContextManager[object]]:
    """``around`` for ``fp32_answers``: puts into ``seen`` what ``input_importance`` would run the adapters once more for.

    It watches nothing where ``settings`` do not ask for it, or where the model that they quantize is not that of float32 (``precision``).
    """
    wanted = settings is not None and settings.method == "imatrix" and precision == "fp32"
    return partial(_watched, seen, model) if wanted else nullcontext


@contextmanager
def _watched(seen: dict[str, Squares], model: PreTrainedModel, name: str) -> Iterator[None]:
    """Puts what the model's linear modules are given inside the ``with`` into ``seen[name]``; the model itself is not kept."""
    squares = seen[name] = {}
    real = torch.ones(0, 0, dtype=torch.bool)

    def see_mask(_: torch.nn.Module, __: tuple[object, ...], given: dict[str, torch.Tensor]) -> None:
        nonlocal real
        mask = given.get("attention_mask")
        real = torch.ones(0, 0, dtype=torch.bool) if mask is None else mask > 0

    def see(place: str, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].detach().float()
        every = x.ndim == 3 and x.shape[:2] == real.shape  # an expert and a head are given some tokens only
        x = x[real] if every else x.reshape(-1, x.shape[-1])
        total, count = squares.get(place, (torch.zeros(x.shape[1], dtype=torch.float64), 0))
        squares[place] = total + x.square().sum(0, dtype=torch.float64).cpu(), count + len(x)

    linears = [(place, module) for place, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    handles = [module.register_forward_pre_hook(partial(see, place)) for place, module in linears]
    handles.append(model.register_forward_pre_hook(see_mask, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

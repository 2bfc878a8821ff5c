"""Adapters with random parameters: what an edit does to a graph does not depend on training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from reft_export.base.classifiers import head_parameters
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm, commonest, one_form
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule


def random_adapter(
    base: BaseModel,
    sites: Sequence[Site],
    *,
    method: str = "loreft",
    positions: str = "f2+l2",
    tied: bool = True,
    activation: str = "",
    rank: int = 4,
    seed: int = 0,
) -> Adapter:
    """Projections R, P, W2 [r, D] have orthonormal rows, other matrices entries of variance 1 / D, vectors of variance 4.

    RED has no rank, whatever ``rank`` says: its scale [D] is around 1 and its bias [D] around 0, with a deviation of 0.3.
    """
    forms = one_form(sites, method=method, rank=rank, activation=activation)
    return mixed_adapter(base, forms, positions=positions, tied=tied, seed=seed)


def mixed_adapter(
    base: BaseModel,
    forms: Mapping[Site, EditForm],
    *,
    positions: str = "f2+l2",
    rules: Mapping[Site, PositionRule] | None = None,
    tied: bool = True,
    seed: int = 0,
) -> Adapter:
    """As ``random_adapter``, each site with a form of its own, and with ``rules`` with positions of its own."""
    rule, rules = PositionRule.parse(positions), rules or {}
    generator = np.random.default_rng(seed)
    tensors = {}
    for site, form in forms.items():
        method, rank = form.method, form.rank
        for group in rules.get(site, rule).groups(tied=tied):
            for name in METHODS[method].names:
                if METHODS[method].full_rank:
                    value = (name == "scale") + 0.3 * generator.standard_normal(base.hidden_size)
                elif name in ("R", "P", "W2"):
                    value = np.linalg.qr(generator.standard_normal((base.hidden_size, rank)))[0].T
                elif name[0].isupper():
                    value = generator.standard_normal((rank, base.hidden_size)) * base.hidden_size**-0.5
                else:
                    value = 2 * generator.standard_normal(rank)
                tensors[".".join(filter(None, (str(site), group, name)))] = np.ascontiguousarray(value, np.float32)
    own = commonest(forms)
    return Adapter(
        method=own.method,
        rank=own.rank,
        sites=tuple(forms),
        positions=rule,
        rules=rules,
        tied=tied,
        activation=own.activation,
        forms=forms,
        base=base,
        tensors=tensors,
    )


def random_head(model: PreTrainedModel, seed: int = 0) -> dict[str, np.ndarray]:
    """Another head than the classifier's own, by parameter name, float32: a deviation of 0.2 from each parameter."""
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(parameter.detach().numpy() + 0.2 * generator.standard_normal(parameter.shape), np.float32)
        for name, parameter in head_parameters(model).items()
    }

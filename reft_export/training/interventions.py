"""The trained modules: each is h -> h + delta(h) at one site and slot, with the delta and the parameters of its method's entry in
``runtimes.edits.methods.METHODS``.

Parameters are float32 whatever the base's dtype, and delta is computed in float32. Initial values are pyreft's: R a
random matrix with orthonormal rows, every linear map uniform in +-1/sqrt(D) (torch's default for Linear), s uniform in
[0, 1). RED starts as its authors' does, with scale 1 and bias 0: it edits nothing. Others start so on request (``start_without_edit``).

Dropout zeroes elements of delta and scales the others by 1/(1 - p), while training only. pyreft drops elements of
h + delta, and so noises the frozen residual stream as well; here an edit that is dropped leaves h as it was.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", equations 2 and 3;
pyreft/interventions.py. RED: Wu et al. 2024, "Advancing Parameter Efficiency in Fine-tuning via Representation Editing".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reft_export.eager.steering import ACTIVATION_FUNCTIONS, EditFn, edit_rows
from reft_export.training.avoided import Avoided
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm, commonest, described
from runtimes.edits.methods import METHODS, Initial, Parameter
from runtimes.edits.positions import PositionRule, Positions, RuleSets
from runtimes.errors import AdapterError, InputError


class OrthonormalRows(nn.Module):
    """R [r, D] with R R^T = I, from a free V [r, D]: V^T = Q T by QR with T's diagonal positive, R = Q^T.

    R depends on the row spaces of V's leading rows alone: scaling V, as weight decay does, leaves R as it is. (Under
    torch's own orthogonal parametrization AdamW's weight decay destroys R, and its backward is some hundred times
    slower.)

    With ``avoided`` [k, D], orthonormal rows, R avoided^T = 0, too.

    V starts with rows of length 1/2. AdamW moves each of its numbers by the learning rate, which turns R by twice that, as a step of
    torch's parametrization does (R there is a product of reflections I - 2 v v^T / |v|^2): a rate means here what it means in pyreft.
    """

    LENGTH = 0.5

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.V = nn.Parameter(torch.empty(rank, width))
        self.avoided: Tensor | None
        self.register_buffer("avoided", None, persistent=False)
        nn.init.orthogonal_(self.V, gain=self.LENGTH)

    @torch.no_grad()
    def start_at(self, R: Tensor) -> None:
        self.V.copy_(R).mul_(self.LENGTH)

    def forward(self) -> Tensor:
        q, t = torch.linalg.qr(_outside(self.V, self.avoided).T)
        return (q * torch.where(torch.diagonal(t) < 0, -1.0, 1.0).to(q.dtype)).T


class FreeRows(nn.Module):
    """X [r, D] with X avoided^T = 0, from a free V [r, D]: X = V (I - avoided^T avoided), for orthonormal ``avoided`` [k, D]."""

    def __init__(self, V: nn.Parameter, avoided: Tensor) -> None:
        super().__init__()
        self.V = V
        self.avoided: Tensor
        self.register_buffer("avoided", avoided, persistent=False)

    def forward(self) -> Tensor:
        return _outside(self.V, self.avoided)


def _outside(V: Tensor, avoided: Tensor | None) -> Tensor:
    return V if avoided is None else V - (V @ avoided.T) @ avoided


INITIAL: Mapping[Initial, Callable[[Parameter, tuple[int, ...], int], nn.Parameter | OrthonormalRows]] = {
    "orthonormal": lambda parameter, shape, width: OrthonormalRows(*shape),
    "linear": lambda parameter, shape, width: nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(width)),
    "unit": lambda parameter, shape, width: nn.Parameter(torch.rand(shape)),
    "no edit": lambda parameter, shape, width: nn.Parameter(torch.full(shape, parameter.no_edit)),
}
"""(parameter, its shape, D) -> what is trained, by what the method says of it."""


class Intervention(nn.Module):
    """One trained edit. Its parameters are attributes, called as the method calls them."""

    def __init__(self, form: EditForm, width: int, *, dropout: float = 0.0, avoided: Avoided | None = None) -> None:
        super().__init__()
        self.method = METHODS[form.method]
        self.act = ACTIVATION_FUNCTIONS[form.activation]
        self.dropout = nn.Dropout(dropout)
        shapes = self.method.shapes(form.rank, width)
        for parameter in self.method.parameters:
            value = INITIAL[parameter.initial](parameter, shapes[parameter.name], width)
            if avoided is not None and "D" in parameter.axes and (basis := avoided.of(parameter.role)) is not None:
                rows = torch.from_numpy(np.asarray(basis, np.float32))
                if isinstance(value, OrthonormalRows):
                    value.avoided = rows
                else:
                    value = FreeRows(value, rows)
            setattr(self, parameter.name, value)

    def forward(self, h: Tensor) -> Tensor:
        """The delta of rows h [t, D], in h's dtype: float32 for a float32 module."""
        return self.dropout(self.method.delta(self.parameters_of(), h, self.act).expand_as(h))

    def edited(self, h: Tensor) -> Tensor:
        """The edited rows, h + delta."""
        return h + self(h)

    def interchanged(self, h: Tensor, source: Tensor) -> Tensor:
        """h + R^T (R source - R h) of consreft: the rows h [t, D] with what R reads of ``source`` [t, D] in place of what it reads of h."""
        values = self.parameters_of()
        return h + self.dropout(self.method.delta(values | {"s": source @ values["R"].T}, h, self.act))

    def edited_in(self, rows: range, h: Tensor) -> Tensor:
        """The rows h edited by a part of the rank alone: h + R_S^T (act(W_S h + b_S) - R_S h) of LoReFT, S = ``rows``."""
        every, part = self.parameters_of(), slice(rows.start, rows.stop)
        values = {each.name: every[each.name][part] if each.axes[0] == "r" else every[each.name] for each in self.method.parameters}
        return h + self.dropout(self.method.delta(values, h, self.act).expand_as(h))

    def trained(self) -> Iterator[tuple[Parameter, nn.Parameter]]:
        """What the optimiser moves: of orthonormal rows, and of those that avoid others, the free ones that they are made of."""
        for parameter in self.method.parameters:
            value = getattr(self, parameter.name)
            yield parameter, value.V if isinstance(value, (OrthonormalRows, FreeRows)) else value

    @torch.no_grad()
    def start_at(self, values: Mapping[str, Tensor]) -> None:
        """Sets the parameters of these names."""
        for name, value in values.items():
            target = getattr(self, name)
            if isinstance(target, OrthonormalRows):
                target.start_at(value)
            else:
                (target.V if isinstance(target, FreeRows) else target).copy_(value)

    def parameters_of(self) -> dict[str, Tensor]:
        """The adapter's parameters, by name."""
        values = {name: getattr(self, name) for name in self.method.names}
        return {name: value() if isinstance(value, (OrthonormalRows, FreeRows)) else value for name, value in values.items()}


class Interventions(nn.Module):
    """Everything one run trains: an Intervention per site, or a prefix and a suffix one when untied.

    ``forms``: what each site's edit is. ``rules``: each site's positions, where they follow several rules. ``avoided``: by site, what its
    edit keeps out of. ``subspaces``: the rows of each, of which a row of a batch is edited by one. Raises InputError for a rank above D.
    """

    def __init__(
        self,
        forms: Mapping[Site, EditForm],
        *,
        width: int,
        tied: bool = True,
        dropout: float = 0.0,
        avoided: Mapping[Site, Avoided] | None = None,
        rules: Mapping[Site, PositionRule] | None = None,
        subspaces: Sequence[range] = (),
    ) -> None:
        super().__init__()
        if wide := [form for form in forms.values() if form.rank > width]:
            raise InputError(f"rank {wide[0].rank} does not fit this base; use 1 to its width {width}")
        self.forms, self.width, self.tied, self.dropout = dict(forms), width, tied, dropout
        self.sites = tuple(forms)
        self.rules = dict(rules or {})
        self.subspaces = tuple(subspaces)
        self.sets = RuleSets(tuple(dict.fromkeys(self.rules.values())), tied) if rules else None
        groups = {site: self.rules[site].groups(tied=tied) if rules else ("",) if tied else ("prefix", "suffix") for site in self.sites}
        self.keys = {site: tuple(".".join(filter(None, (str(site), g))) for g in groups[site]) for site in self.sites}
        self._by_key = {
            key: Intervention(self.forms[site], width, dropout=dropout, avoided=(avoided or {}).get(site))
            for site, keys in self.keys.items()
            for key in keys
        }
        # ModuleDict refuses dots in its keys.
        self.each = nn.ModuleDict({key.replace(".", "-"): module for key, module in self._by_key.items()})

    def intervention(self, key: str) -> Intervention:
        """By the adapter's tensor prefix: ``<layer>.<stream>[.prefix|.suffix]``."""
        return self._by_key[key]

    def edits(self) -> dict[Site, EditFn]:
        """The edit functions that ``reft_export.eager.steering.steer`` takes; gradients flow through them."""
        return {site: partial(edit_rows, edits=self._slots(site)) for site in self.sites}

    def _slots(self, site: Site) -> list[Callable[[Tensor], Tensor] | None]:
        """What each slot does at a site; None: nothing."""
        if self.subspaces:
            (key,) = self.keys[site]
            return [partial(self.intervention(key).edited_in, rows) for rows in self.subspaces]
        return [None if each is None else each.edited for each in self.by_slot(site)]

    def by_slot(self, site: Site) -> list[Intervention | None]:
        """Of every slot the intervention at a site; None: nothing. (In subspaces a slot has a part of the one that there is.)"""
        own = list(map(self.intervention, self.keys[site]))
        if self.sets is None:
            return list(own)
        number = self.sets.rules.index(self.rules[site])
        return [None if found[number] < 0 else own[found[number]] for found in self.sets.sets]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay where the method's parameters take it."""
        decays = {id(value) for module in self._by_key.values() for parameter, value in module.trained() if parameter.decays}
        decayed = [p for p in self.parameters() if id(p) in decays]
        plain = [p for p in self.parameters() if id(p) not in decays]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

    @torch.no_grad()
    def start_without_edit(self) -> None:
        """Sets every intervention to its method's start of y = h; the method must have one."""
        for module in self._by_key.values():
            start = module.method.no_edit_start
            assert start is not None, f"{module.method.formula} has no start that edits nothing"
            module.start_at(start(module.parameters_of()))

    @torch.no_grad()
    def start_from(self, adapter: Adapter) -> None:
        """Sets every parameter to a trained adapter's, for a refit; raises AdapterError for one of another form."""
        mine, theirs = ({"form": described(f), "sites": ", ".join(map(str, sorted(f)))} for f in (self.forms, adapter.site_forms))
        mine["tied"], theirs["tied"] = str(self.tied), str(adapter.tied)
        different = [name for name in mine if mine[name] != theirs[name]]
        if different or self.forms != adapter.site_forms:
            name = (different or ["sites"])[0]
            raise AdapterError(
                f"cannot start from this adapter: its {name} is {theirs[name]}, the settings say {mine[name]}; leave it to the adapter"
            )
        for keys in self.keys.values():
            for key in keys:
                module = self.intervention(key)
                module.start_at({name: torch.from_numpy(adapter.tensors[f"{key}.{name}"]) for name in module.method.names})

    @torch.no_grad()
    def to_adapter(
        self,
        base: BaseModel,
        positions: Positions,
        *,
        dtype: str = "float32",
        trained_on: str | None = None,
        training: Mapping[str, Any] | None = None,
        head: Mapping[str, np.ndarray] | None = None,
    ) -> Adapter:
        """The adapter as it stands, R materialised; raises AdapterError for parameters that are not finite."""
        tensors = {
            f"{key}.{name}": value.detach().to("cpu", torch.float32).numpy().copy(order="C")
            for keys in self.keys.values()
            for key in keys
            for name, value in self.intervention(key).parameters_of().items()
        }
        own = commonest(self.forms)
        return Adapter(
            method=own.method,
            rank=own.rank,
            sites=self.sites,
            forms=self.forms,
            positions=positions.rules[0] if isinstance(positions, RuleSets) else positions,
            rules=self.rules,
            tied=self.tied,
            base=base,
            tensors={name: np.ascontiguousarray(value) for name, value in tensors.items()},
            activation=own.activation,
            dropout=self.dropout,
            dtype=dtype,
            trained_on=trained_on,
            training=dict(training or {}),
            head=dict(head or {}),
        )

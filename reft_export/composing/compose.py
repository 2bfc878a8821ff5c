"""Several adapters of one base as one: at each site and position group their edits act in series, in the order given, each at its strength.

    linear edits      y = h + U^T (A h + b): U = [U1; U2], A = [A1; A2 (I + U1^T A1)], b = [b1; b2 + A2 U1^T b1], held as direft
    RED               scale = scale2 scale1, bias = scale2 bias1 + bias2, held as red
    an activation     rows stacked, held as direft or noreft: only where none of them reads what an earlier one writes, as an activation of
                      an activation fits no stored form

Strength s is y = h + s (edit(h) - h) (runtimes/edits/strength.py). A site that one adapter edits alone, at strength 1, keeps its edit as it
is. A site has one method, one activation and one rank, and an adapter one rule of positions: what does not fit is refused by name. The rank
is the sum of the site's ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from pathlib import Path

import numpy as np

from reft_export.base.adapters import folders_of, load_adapters
from reft_export.composing.alike import check_alike, is_plain
from reft_export.composing.overlap import TOUCHES, Overlap, interaction, overlap_of
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Edit, LowRankEdit, Site, in_sequence
from runtimes.edits.form import EditForm, commonest, described
from runtimes.edits.methods import METHODS, Values
from runtimes.edits.strength import at_strength, check_strength, scaled
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import claimed


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Two adapters at one site and position group; ``overlap`` is None where an edit is of full rank (RED), which touches every channel."""

    site: Site
    group: str
    first: str
    second: str
    overlap: Overlap | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Composition:
    """The composed adapter, and what its parts have to do with each other."""

    adapter: Adapter
    strengths: Mapping[str, float]
    """Of every part, by name, in order."""
    ranks: Mapping[Site, int]
    """0: RED."""
    meetings: tuple[Meeting, ...]
    notes: tuple[str, ...]
    """What was decided that nobody asked for."""


def compose_adapters(
    adapters: Sequence[Path],
    output: Path,
    *,
    strengths: Mapping[str, float] | None = None,
    accept_base: bool = False,
    force: bool = False,
) -> Composition:
    """Writes the adapters in these folders as one to ``output``. An adapter's name is its folder's, or is given: ``Path("name=folder")``.

    ``strengths``: by name, 1 where it is left out. ``accept_base``: bases of equal weights will do. The result is float32, rounded once
    from float64.

    Raises what ``compose`` raises, AdapterError for a folder that cannot be read, InputError for an output that cannot be written.

    Example::

        made = compose_adapters([Path("pirate"), Path("polite")], Path("both"), strengths={"polite": 0.5})
        print(made.adapter.rank, made.meetings[0].overlap)
    """
    with claimed(output, force=force, inputs=folders_of(adapters)):
        made = compose(load_adapters(adapters), strengths or {}, accept_base=accept_base)
        save_adapter(made.adapter, output, force=force)
    return made


def compose(adapters: Mapping[str, Adapter], strengths: Mapping[str, float], *, accept_base: bool = False) -> Composition:
    """The edits of all ``adapters``, by name, one after the other.

    Raises InputError for fewer than two adapters and for strengths that are of none or no numbers; AdapterError for adapters that differ in
    their base, positions or form, so that one adapter cannot hold them.
    """
    if len(adapters) < 2:
        raise InputError(f"{len(adapters)} adapter is given, expected two or more; name the folder of another one")
    if unknown := sorted(set(strengths) - set(adapters)):
        raise InputError(f"a strength is given for {unknown[0]}, which is none of {', '.join(adapters)}; give it for one of them")
    for name, strength in strengths.items():
        if not check_strength(strength, name):
            raise InputError(f"the strength of {name} is 0, which adds nothing; leave the adapter out")
    every = {name: strengths.get(name, 1.0) for name in adapters}
    notes = check_alike(adapters, accept_base=accept_base)
    first = next(iter(adapters.values()))
    slots = _slots(adapters)
    sites = sorted({site for site, _ in slots})
    kinds = {site: _kind(site, adapters, every) for site in sites}
    values = {slot: _values(slot, parts, *kinds[slot[0]], every) for slot, parts in slots.items()}
    ranks = {site: _rows(each, kinds[site][0]) for (site, _), each in values.items()}
    forms = {site: EditForm(method=method, rank=ranks[site], activation=act) for site, (method, act) in kinds.items()}
    own = commonest(forms)
    adapter = Adapter(
        method=own.method,
        rank=own.rank,
        sites=tuple(sites),
        positions=first.positions,
        tied=all(adapter.tied for adapter in adapters.values()),
        base=first.base,
        tensors={
            ".".join(filter(None, (str(site), group, name))): value
            for (site, group), each in values.items()
            for name, value in _rounded(each).items()
        },
        activation=own.activation,
        forms=forms,
        dtype=first.dtype,
        trained_on=first.trained_on,
        training=_provenance(adapters, every),
        head=first.head,
        probes=first.probes,
    )
    return Composition(
        adapter=adapter,
        strengths=every,
        ranks=ranks,
        meetings=meetings_of(adapters),
        notes=tuple(notes),
    )


def meetings_of(adapters: Mapping[str, Adapter]) -> tuple[Meeting, ...]:
    """Every two of the adapters, by name, at every site and position group that both edit."""
    found = []
    for (site, group), parts in _slots(adapters).items():
        for (one, first), (other, second) in combinations(_edits(site, parts).items(), 2):
            overlap = None
            if isinstance(first, LowRankEdit) and isinstance(second, LowRankEdit):
                overlap = overlap_of(first, second)
            found.append(Meeting(site=site, group=group, first=one, second=other, overlap=overlap))
    return tuple(found)


Parts = Mapping[str, tuple[Adapter, str]]
"""Of one site and group: the adapters that edit there, by name, each with its own group."""


def _slots(adapters: Mapping[str, Adapter]) -> dict[tuple[Site, str], Parts]:
    """Who edits what. One edit of a tied adapter is both of an untied one's."""
    sites = sorted({site for adapter in adapters.values() for site in adapter.sites})
    groups = ("",) if all(adapter.tied for adapter in adapters.values()) else ("prefix", "suffix")
    return {
        (site, group): {name: (a, group if group in a.groups_of(site) else "") for name, a in adapters.items() if site in a.sites}
        for site in sites
        for group in groups
    }


def _edits(site: Site, parts: Parts) -> dict[str, Edit]:
    return {name: adapter.edit(site, group) for name, (adapter, group) in parts.items()}


def _values(slot: tuple[Site, str], parts: Parts, method: str, activation: str, strengths: Mapping[str, float]) -> Values:
    """The parameters of ``method`` that do what the parts do one after the other, in float64."""
    site, _ = slot
    if (alone := _alone(parts, strengths)) is not None:
        adapter, group = parts[alone]
        return {key: np.asarray(value, np.float64) for key, value in adapter.parameters(site, group).items()}
    edits = _edits(site, parts)
    if not activation:
        series = reduce(in_sequence, (scaled(edit, strengths[name]) for name, edit in edits.items()))
        of_edit = METHODS[method].of_edit
        assert of_edit is not None
        return of_edit(series)
    for (one, first), (other, second) in combinations(edits.items(), 2):
        assert isinstance(first, LowRankEdit) and isinstance(second, LowRankEdit)
        if (found := interaction(second.A, first.U)) > TOUCHES:
            raise AdapterError(
                f"{other} reads at {site} what {one} writes there (interaction {found:.2g}, expected at most {TOUCHES:g}), and one "
                f"{activation} after another is no one edit; train {other} with --orthogonal-to {one}, or at other sites"
            )
    stacked: dict[str, list[np.ndarray]] = {}
    for name, (adapter, group) in parts.items():
        for key, value in _own(adapter, site, group, method, strengths[name]).items():
            stacked.setdefault(key, []).append(value)
    return {key: np.concatenate(each) for key, each in stacked.items()}


def _own(adapter: Adapter, site: Site, group: str, method: str, strength: float) -> Values:
    """An activated edit's parameters as ``method`` has them."""
    own = {key: np.asarray(value, np.float64) for key, value in adapter.parameters(site, group).items()}
    as_noreft = METHODS[adapter.form(site).method].as_noreft
    if method == "noreft" and as_noreft is not None:
        return as_noreft(own)
    return own | {"W2": strength * own["W2"]}


def _rows(values: Values, method: str) -> int:
    """The edit's rank; 0 of a method without one."""
    return next((len(values[parameter.name]) for parameter in METHODS[method].parameters if parameter.axes[0] == "r"), 0)


def _rounded(values: Values) -> dict[str, np.ndarray]:
    """In float32. Raises InputError for what float32 does not hold."""
    with np.errstate(over="ignore"):
        rounded = {name: np.asarray(value, np.float32) for name, value in values.items()}
    for name, value in rounded.items():
        if not np.isfinite(value).all():
            raise InputError(f"the composed {name} is beyond float32; lower the strengths")
    return rounded


def _alone(parts: Mapping[str, object], strengths: Mapping[str, float]) -> str | None:
    """The name of the one part, where it is the only one and at strength 1."""
    names = list(parts)
    return names[0] if len(names) == 1 and strengths[names[0]] == 1 else None


def _kind(site: Site, adapters: Mapping[str, Adapter], strengths: Mapping[str, float]) -> tuple[str, str]:
    """(method, activation) that hold all the edits of ``site``; raises AdapterError where none does."""
    forms = {name: adapter.form(site) for name, adapter in adapters.items() if site in adapter.sites}
    if (alone := _alone(forms, strengths)) is not None:
        return forms[alone].method, forms[alone].activation
    named = ", ".join(f"{name} ({form})" for name, form in forms.items())
    full_rank = {METHODS[form.method].full_rank for form in forms.values()}
    if len(full_rank) > 1:
        raise AdapterError(
            f"a scale and bias (RED) and a low-rank edit fit no one edit of {site}: {named}; compose those of one form, and run the "
            "others beside them as adapters of their own"
        )
    if full_rank == {True}:
        return "red", ""
    activations = {form.activation for form in forms.values()}
    if activations == {""}:
        return "direft", ""
    if len(activations) > 1:
        raise AdapterError(f"{site} has one activation, or none at all: {named}; compose those that have the same")
    activation = activations.pop()
    if {form.method for form in forms.values()} == {"direft"}:
        return "direft", activation
    if any(METHODS[form.method].as_noreft is None for form in forms.values()):
        raise AdapterError(f"with an activation direft and the others fit no one method: {named}; compose those of one method")
    for name, form in forms.items():
        if strengths[name] != 1:
            raise AdapterError(
                f"with an activation no stored form holds {name} ({form.method}) at strength {strengths[name]:g}; leave it out, and "
                "give a strength when it runs: reft-export run --strength"
            )
    return "noreft", activation


def _provenance(adapters: Mapping[str, Adapter], strengths: Mapping[str, float]) -> dict[str, object]:
    first = next(iter(adapters.values()))
    return {
        "composed": " + ".join(str(at_strength(name, strengths[name])) for name in adapters),
        "parts": {name: {"digest": a.digest, "form": described(a.site_forms), "strength": strengths[name]} for name, a in adapters.items()},
        **({"data": {"chat_template": False}} if is_plain(first) else {}),
    }

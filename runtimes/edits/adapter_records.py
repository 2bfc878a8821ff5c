"""What adapter.json and a bundle's adapters/<name>.json say of where and by which rule an adapter edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class RuleRecord:
    """A position rule. ``positions``: its grammar is ``PositionRule``'s; ``tied``: one edit for prefix and suffix."""

    positions: str
    truncate: bool
    tied: bool

    @property
    def rule(self) -> PositionRule:
        return replace(PositionRule.parse(self.positions), truncate=self.truncate)


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """A site, ``<layer>.<stream>``; its rule by number; and where they are not the adapter's, its rank and the form of its edit:
    ``EditForm.name``."""

    site: str
    rule: int = 0
    rank: int | None = None
    form: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProbesRecord:
    """``probes.jsonl``: so many prompts with their completions, and the file's sha256."""

    count: int
    sha256: str


def site_records(forms: Mapping[Site, EditForm], own: EditForm) -> tuple[SiteRecord, ...]:
    """Sites that all follow the first rule; ``own``: the form that the adapter's own keys say."""
    return tuple(
        SiteRecord(
            site=str(site),
            rank=None if form.rank == own.rank else form.rank,
            form=None if form.name == own.name else form.name,
        )
        for site, form in forms.items()
    )


def forms_of(sites: Sequence[SiteRecord], own: EditForm) -> dict[Site, EditForm]:
    """The form of every site; the inverse of ``site_records``. Raises AdapterError for one that this version does not know."""
    forms = {}
    for record in sites:
        try:
            forms[Site.parse(record.site)] = EditForm.named(
                own.name if record.form is None else record.form, own.rank if record.rank is None else record.rank
            )
        except AdapterError as e:
            raise AdapterError(f"site {record.site}: {e}") from None
    return forms


def rule_record(positions: PositionRule, *, tied: bool) -> RuleRecord:
    return RuleRecord(positions=str(positions), truncate=positions.truncate, tied=tied)


def sites_of(sites: Sequence[SiteRecord], rules: Sequence[RuleRecord]) -> tuple[Site, ...]:
    """The sites; raises AdapterError for what the format has room for and this version does not know."""
    if len(rules) != 1:
        raise AdapterError(f"the adapter has {len(rules)} position rules, and this version knows adapters of one; update reft-export")
    for record in sites:
        if record.rule != 0:
            raise AdapterError(f"site {record.site} follows rule {record.rule}, and the adapter has rule 0 alone; copy it again")
    return tuple(Site.parse(record.site) for record in sites)


def from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of version 1 (``positions``, ``truncate``, ``tied``, ``sites`` as strings) as version 2's; others as they are."""
    rule = {key: content[key] for key in ("positions", "truncate", "tied") if key in content}
    new = {key: value for key, value in content.items() if key not in rule}
    if unknown := {"rules"} & set(new):
        raise AdapterError(f"unknown keys {sorted(unknown)} in a file of version 1")
    sites = content.get("sites")
    if isinstance(sites, list):
        new["sites"] = [{"site": site} for site in sites]
    return new | {"rules": [rule]}

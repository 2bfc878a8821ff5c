"""What adapter.json and a bundle's adapters/<name>.json say of where and by which rule an adapter edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import MOST_RULES, PositionRule, Positions, of_rules
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


def site_records(forms: Mapping[Site, EditForm], own: EditForm, rules: Mapping[Site, PositionRule]) -> tuple[SiteRecord, ...]:
    """``own``: the form that the adapter's own keys say; ``rules``: every site's, by number as ``rule_records`` lists them."""
    numbers = {rule: number for number, rule in enumerate(dict.fromkeys(rules.values()))}
    return tuple(
        SiteRecord(
            site=str(site),
            rule=numbers[rules[site]],
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


def rule_records(rules: Mapping[Site, PositionRule], *, tied: bool) -> tuple[RuleRecord, ...]:
    """Each rule once, in the order of the sites; one without a prefix and a suffix is tied."""
    return tuple(
        RuleRecord(positions=str(rule), truncate=rule.truncate, tied=len(rule.groups(tied=tied)) == 1)
        for rule in dict.fromkeys(rules.values())
    )


def rules_of(sites: Sequence[SiteRecord], rules: Sequence[RuleRecord]) -> dict[Site, PositionRule]:
    """The rule of every site; ``sites_of`` has checked the numbers."""
    every = [record.rule for record in rules]
    return {Site.parse(record.site): every[record.rule] for record in sites}


def positions_of(sites: Sequence[SiteRecord], rules: Sequence[RuleRecord]) -> Positions:
    """Where the adapter edits: its one rule, or the sets of its several."""
    return of_rules(rules_of(sites, rules).values(), tied=tied_of(rules))


def tied_of(rules: Sequence[RuleRecord]) -> bool:
    """Whether prefix and suffix share their edits; raises AdapterError for an adapter of which some do and some do not."""
    both = {record.tied for record in rules if record.rule.first and record.rule.last}
    if len(both) > 1:
        raise AdapterError("some of its position rules are tied and some are not, and an adapter is one or the other; copy it again")
    return next(iter(both), True)


def sites_of(sites: Sequence[SiteRecord], rules: Sequence[RuleRecord]) -> tuple[Site, ...]:
    """The sites; raises AdapterError for a number of rules that no adapter has, and for a site that follows none of them."""
    if not 1 <= len(rules) <= MOST_RULES:
        raise AdapterError(f"the adapter has {len(rules)} position rules, expected 1 to {MOST_RULES}; copy it again")
    for record in sites:
        if not 0 <= record.rule < len(rules):
            raise AdapterError(f"site {record.site} follows rule {record.rule}, and the adapter has {len(rules)}, from 0; copy it again")
    if unused := sorted(set(range(len(rules))) - {record.rule for record in sites}):
        raise AdapterError(f"no site follows position rule {unused[0]}; copy the adapter again")
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

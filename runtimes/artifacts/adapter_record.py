"""adapters/<name>.json: where an artifact's adapter edits, and how."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.adapter_records import (
    RuleRecord,
    SiteRecord,
    forms_of,
    from_version_1,
    positions_of,
    rule_records,
    site_records,
    sites_of,
    tied_of,
)
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import Positions
from runtimes.errors import AdapterError, BundleError, ReftError
from runtimes.files.records import RecordError, from_json, read_json_object, to_json
from runtimes.files.sealed import canonical_text


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """adapters/<name>.json: what the device needs to know of an adapter besides its banks, and where it came from."""

    method: str
    rank: int
    sites: tuple[SiteRecord, ...]
    rules: tuple[RuleRecord, ...]
    activation: str
    base: BaseModel
    trained_on: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterRecord:
        return cls(
            method=adapter.method,
            rank=adapter.rank,
            sites=site_records(adapter.site_forms, adapter.own, adapter.site_rules),
            rules=rule_records(adapter.site_rules, tied=adapter.tied),
            activation=adapter.activation,
            base=adapter.base,
            trained_on=adapter.trained_on,
            training=dict(adapter.training),
        )

    @property
    def where(self) -> Positions:
        """Where the adapter edits."""
        return positions_of(self.sites, self.rules)

    @property
    def positions(self) -> str:
        return str(self.where)

    @property
    def tied(self) -> bool:
        return tied_of(self.rules)

    @property
    def own(self) -> EditForm:
        """The form of every site that does not say another."""
        return EditForm(method=self.method, rank=self.rank, activation=self.activation)

    @property
    def site_forms(self) -> dict[Site, EditForm]:
        """The form of every site."""
        return forms_of(self.sites, self.own)

    def check(self) -> None:
        """Raises AdapterError or InputError for a form, sites or rules that this version does not know."""
        sites_of(self.sites, self.rules)
        self.site_forms  # noqa: B018  # checks every form
        self.where  # noqa: B018  # parses the grammar


def check_adapter_name(name: str) -> str:
    """An adapter's name becomes a file name and a CLI value."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == BASE_GOLDEN:
        raise AdapterError(
            f"adapter name {name!r} cannot be used: letters, digits, '.', '_', '-', and not {BASE_GOLDEN!r}; rename its folder"
        )
    return name


def write_adapter_record(folder: Path, name: str, record: AdapterRecord) -> None:
    path = folder / "adapters" / f"{check_adapter_name(name)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(canonical_text(to_json(record)), encoding="ascii", newline="\n")


def renew_records(folder: Path, adapters: Collection[str]) -> None:
    """Writes each adapter's record as it is written today."""
    for name in adapters:
        path = folder / "adapters" / f"{name}.json"
        if path.is_file():
            write_adapter_record(folder, name, read_adapter_record(path))


def read_adapter_record(path: Path) -> AdapterRecord:
    """An artifact's adapters/<name>.json, whose hash its manifest holds; of version 1 too. Raises BundleError."""
    content = read_json_object(path, BundleError)
    try:
        record = from_json(AdapterRecord, from_version_1(content) if "positions" in content else content)
        record.check()
    except (RecordError, ReftError) as e:
        raise BundleError(f"{path}: {e}") from None
    return record

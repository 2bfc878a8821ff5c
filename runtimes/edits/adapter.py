"""The adapter folder: ``adapter.json`` + ``adapter.safetensors``, and ``probes.jsonl`` where it has probes. Nothing is pickled, nothing is
implied, unknown keys are refused.

adapter.json is sealed (runtimes/files/sealed.py) and holds the sha256 of every other file of the adapter, so that one changed bit of any
is refused. Version 1 had no digests; it is read, and ``reft-export upgrade`` writes version 2.

Tensors are the trained parameters in float32, named ``<layer>.<stream>[.prefix|.suffix].<parameter>`` (the middle part only when
untied). Their parameters: runtimes/edits/methods.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.edits.adapter_records import (
    ProbesRecord,
    RuleRecord,
    SiteRecord,
    forms_of,
    from_version_1,
    rule_records,
    rules_of,
    site_records,
    sites_of,
    tied_of,
)
from runtimes.edits.edit import Edit, Site, no_edit_like
from runtimes.edits.form import EditForm
from runtimes.edits.methods import METHODS, fold_parameters
from runtimes.edits.op import PROMPT_LENGTH, RULE_DEFAULTS, EditNode, bank_of, no_edit_bank, node_of
from runtimes.edits.positions import PositionRule, Positions, RuleSets, of_rules
from runtimes.edits.probes import Probe, check_probes, probes_bytes, read_probes
from runtimes.errors import AdapterError, ReftError
from runtimes.files.folders import atomic_folder, marker
from runtimes.files.hashes import sha256_of
from runtimes.files.records import RecordError, from_json, read_regular, to_json
from runtimes.files.sealed import DIGEST, FIRST_VERSION, Format, read_sealed, write_sealed

FORMAT = "reft-export adapter"
FORMAT_VERSION = 2
CONFIG_FILE = "adapter.json"
TENSOR_FILE = "adapter.safetensors"
PROBES_FILE = "probes.jsonl"
ADAPTER_FORMAT = Format(version_key="format_version", version=FORMAT_VERSION, error=AdapterError, remedy="copy the adapter again")
HEAD = "head."
"""What the names of a classification head's tensors begin with."""


@dataclass(frozen=True, kw_only=True)
class BaseParts:
    """What a fingerprint was made of, to say in what two bases differ. Files written before fingerprints had a version lack it."""

    config: dict[str, Any]
    """The keys of config.json that decide what the base computes, as reft_export.base.config spells them."""
    weights: str
    """sha256 over all tensors."""
    tensors: dict[str, str]
    """The first digits of every tensor's digest by its name; run together where names differ in numbers alone
    (runtimes.edits.same_base)."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The base an adapter was trained on. ``fingerprint``, ``parts``: see reft_export.base.fingerprint. ``labels``: a classifier's, else
    none.

    ``model_type``: its family as config.json says; empty in adapters that were saved before it was recorded."""

    name: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    labels: tuple[str, ...] = ()
    parts: BaseParts | None = None
    model_type: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A trained intervention, independent of any framework. ``edits()`` folds it."""

    method: str
    """Of every site that ``forms`` does not name, as are ``rank`` and ``activation``."""
    rank: int
    sites: tuple[Site, ...]
    positions: PositionRule
    """Of every site that ``rules`` does not name."""
    tied: bool
    """Whether a rule with a prefix and a suffix has one edit for both, at every site."""
    base: BaseModel
    tensors: Mapping[str, np.ndarray]
    activation: str = ""
    forms: Mapping[Site, EditForm] = field(default_factory=dict)
    """Of sites whose edits are of another form than the adapter's; those that are of its own are left out."""
    rules: Mapping[Site, PositionRule] = field(default_factory=dict)
    """Of sites that follow another rule than ``positions``; at most four rules in all. Those that follow it are left out."""
    dropout: float = 0.0
    dtype: str = "float32"
    """The dtype of the base while it was trained."""
    trained_on: str | None = None
    """Digest of the bundle whose dequantized weights it was trained on, if it was."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Data and settings it was trained with; provenance only."""
    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    """A classifier's head that was trained with the edit, by the base's parameter names; empty: the base's own."""
    probes: tuple[Probe, ...] = ()
    """Lines of its own task (runtimes/edits/probes.py): what it is measured on. They are no part of its digest."""

    def __post_init__(self) -> None:
        own = self.own
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise AdapterError("an adapter needs at least one site, each once")
        for what, given in (("form", self.forms), ("rule", self.rules)):
            if strange := sorted(set(given) - set(self.sites)):
                raise AdapterError(f"a {what} is given for {strange[0]}, which the adapter does not edit")
        object.__setattr__(self, "forms", {site: form for site, form in self.forms.items() if form != own})
        object.__setattr__(self, "rules", {site: rule for site, rule in self.rules.items() if rule != self.positions})
        for site in self.sites:
            if site.layer >= self.base.num_hidden_layers:
                raise AdapterError(
                    f"layer {site.layer} does not exist in {self.base.name} ({self.base.num_hidden_layers} layers, "
                    f"0 to {self.base.num_hidden_layers - 1})"
                )
        if not self.tied and all(len(self.groups_of(site)) == 1 for site in self.sites):
            raise AdapterError(f"an untied adapter needs a prefix and a suffix (f<n>+l<n>); its positions are {self.where}")
        self._check_tensors()
        self._check_head()
        check_probes(self.probes, self.base.labels)

    def _check_head(self) -> None:
        if self.head and not self.base.labels:
            raise AdapterError(f"the adapter holds a classification head, and its base {self.base.name} has no labels")
        for key, value in self.head.items():
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise AdapterError(f"{HEAD}{key} is {value.dtype}, expected finite float32; the file is damaged or its training diverged")

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[tuple[int, ...], EditForm]] = {}
        for site in self.sites:
            form = self.form(site)
            shapes = METHODS[form.method].shapes(form.rank, self.base.hidden_size)
            expected |= {self._key(site, group, name): (shape, form) for group in self.groups_of(site) for name, shape in shapes.items()}
        missing, unknown = sorted(set(expected) - set(self.tensors)), sorted(set(self.tensors) - set(expected))
        if missing or unknown:
            raise AdapterError(f"adapter tensors do not match its sites: missing {missing[:4]}, unknown {unknown[:4]}")
        for key, value in self.tensors.items():
            shape, form = expected[key]
            if value.shape != shape:
                raise AdapterError(
                    f"{key} has shape {list(value.shape)}, expected {list(shape)} (rank {form.rank}, "
                    f"{self.base.name} has width {self.base.hidden_size})"
                )
            if value.dtype != np.float32:
                raise AdapterError(f"{key} is {value.dtype}; adapters store float32")
            if not np.isfinite(value).all():
                raise AdapterError(f"{key} holds values that are not finite; the file is damaged or its training diverged")

    @property
    def own(self) -> EditForm:
        """The form of every site that ``forms`` does not name."""
        return EditForm(method=self.method, rank=self.rank, activation=self.activation)

    def form(self, site: Site) -> EditForm:
        """What the edits of one of the ``sites`` are."""
        return self.forms.get(site) or self.own

    @property
    def site_forms(self) -> dict[Site, EditForm]:
        """The form of every site."""
        return {site: self.form(site) for site in self.sites}

    @property
    def site_rules(self) -> dict[Site, PositionRule]:
        """The positions of every site."""
        return {site: self.rule(site) for site in self.sites}

    def rule(self, site: Site) -> PositionRule:
        """The positions of one of the ``sites``."""
        return self.rules.get(site) or self.positions

    @cached_property
    def where(self) -> Positions:
        """Where the adapter edits: its one rule, or the sets of its several."""
        return of_rules(self.site_rules.values(), tied=self.tied)

    def groups_of(self, site: Site) -> tuple[str, ...]:
        """The edits of one of the ``sites``, in order: one, or untied a prefix's and a suffix's."""
        return self.rule(site).groups(tied=self.tied)

    @property
    def groups(self) -> tuple[str, ...]:
        """The same where all sites follow one rule."""
        return ("",) if self.tied else ("prefix", "suffix")

    @staticmethod
    def _key(site: Site, group: str, parameter: str) -> str:
        return ".".join(filter(None, (str(site), group, parameter)))

    @property
    def digest(self) -> str:
        """sha256 over the method, the forms of sites that have others, and the trained parameters."""
        digest = hashlib.sha256(self.method.encode())
        for site, form in sorted(self.forms.items(), key=lambda item: item[0]):
            digest.update(f"{site}: {form}".encode())
        stored = self.stored()
        for name in sorted(stored):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(stored[name]).tobytes())
        return digest.hexdigest()

    def stored(self) -> dict[str, np.ndarray]:
        """Every tensor of the adapter's file: the edits' parameters, and the head's as ``head.<parameter name>``."""
        return {**self.tensors, **{f"{HEAD}{name}": value for name, value in self.head.items()}}

    def edits(self) -> dict[Site, tuple[Edit, ...]]:
        """The folded edits of every site, one per slot, in float64: nothing is rounded before ``banks`` rounds once."""
        return {site: self._slots(site) for site in self.sites}

    def _slots(self, site: Site) -> tuple[Edit, ...]:
        own = tuple(self.edit(site, group) for group in self.groups_of(site))
        if not isinstance(self.where, RuleSets):
            return own
        nothing, number = no_edit_like(own[0]), self.where.rules.index(self.rule(site))
        return tuple(nothing if found[number] < 0 else own[found[number]] for found in self.where.sets)

    def edit(self, site: Site, group: str) -> Edit:
        """The folded edit of one of the site's ``groups``, in float64."""
        form = self.form(site)
        return fold_parameters(form.method, self.parameters(site, group), form.activation)

    def parameters(self, site: Site, group: str) -> dict[str, np.ndarray]:
        """The trained parameters of one of the site's ``groups``, by name."""
        return {name: self.tensors[self._key(site, group, name)] for name in METHODS[self.form(site).method].names}

    def nodes(self) -> tuple[EditNode, ...]:
        """The op nodes that this adapter needs in a graph."""
        return tuple(sorted(node_of(site, edits[0]) for site, edits in self.edits().items()))

    def banks(self, nodes: tuple[EditNode, ...], dtype: np.dtype) -> dict[str, np.ndarray]:
        """Every bank of a graph with ``nodes``, in ``dtype``: this adapter's where it has an edit, no edit elsewhere.

        Raises AdapterError when the graph lacks a node that the adapter needs.
        """
        mine = {node_of(site, edits[0]): edits for site, edits in self.edits().items()}
        missing = sorted(set(mine) - set(nodes), key=lambda node: node.name)
        if missing:
            # --sites makes nodes of the plain low-rank op.
            or_sites = " or with --sites" if missing[0] == EditNode(site=missing[0].site) else ""
            raise AdapterError(
                f"the graph has no edit node {missing[0].name} ({len(missing)} missing); export it with this adapter{or_sites}"
            )
        banks: dict[str, np.ndarray] = {}
        for node in nodes:
            arrays = bank_of(mine[node], dtype) if node in mine else no_edit_bank(self.base.hidden_size, dtype, node.op)
            banks.update(zip(node.bank_names, arrays, strict=True))
        return banks

    def rule_tensors(self) -> dict[str, np.ndarray]:
        """The numbers of the graph's rule; of an adapter whose slots are handed in they edit nothing."""
        if isinstance(self.where, RuleSets):
            return {name: np.array([number], np.int64) for name, number in RULE_DEFAULTS.items() if name != PROMPT_LENGTH}
        return self.where.tensors(tied=self.tied)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """adapter.json, key by key."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    digest: str = ""
    """Of this file (runtimes/files/sealed.py)."""
    tensors_sha256: str | None = None
    """Of adapter.safetensors; None in version 1 alone."""
    method: str
    rank: int
    sites: tuple[SiteRecord, ...]
    rules: tuple[RuleRecord, ...]
    """Of positions, one to four."""
    activation: str
    dropout: float
    dtype: str
    base: BaseModel
    trained_on: str | None
    training: dict[str, Any]
    head: tuple[str, ...] = ()
    """Parameter names of the head, in the order in which they are applied."""
    probes: ProbesRecord | None = None
    """Prompts and completions of the adapter's own task, in probes.jsonl."""


def save_adapter(adapter: Adapter, folder: Path, *, force: bool = False) -> None:
    """Writes the adapter atomically; an existing folder is kept unless ``force``."""
    from safetensors.numpy import save_file

    config = AdapterConfig(
        method=adapter.method,
        rank=adapter.rank,
        sites=site_records(adapter.site_forms, adapter.own, adapter.site_rules),
        rules=rule_records(adapter.site_rules, tied=adapter.tied),
        activation=adapter.activation,
        dropout=adapter.dropout,
        dtype=adapter.dtype,
        base=adapter.base,
        trained_on=adapter.trained_on,
        training=dict(adapter.training),
        head=tuple(adapter.head),
    )
    probes = probes_bytes(adapter.probes)
    if adapter.probes:
        config = replace(config, probes=ProbesRecord(count=len(adapter.probes), sha256=hashlib.sha256(probes).hexdigest()))
    with atomic_folder(folder, force=force) as work:
        save_file({k: np.ascontiguousarray(v) for k, v in adapter.stored().items()}, work / TENSOR_FILE)
        if config.probes is not None:
            (work / PROBES_FILE).write_bytes(probes)
        write_adapter_config(work, config)


def write_adapter_config(folder: Path, config: AdapterConfig) -> None:
    """adapter.json over the tensors that lie in ``folder`` already. Raises AdapterError for what JSON cannot hold."""
    content = to_json(config) | {"format_version": FORMAT_VERSION, "tensors_sha256": sha256_of(folder / TENSOR_FILE)}
    try:
        write_sealed(marker(folder, CONFIG_FILE), content)
    except ValueError as e:
        raise AdapterError(f"{folder / CONFIG_FILE} cannot be written: {e}; train again with finite settings") from None


def load_adapter(folder: Path) -> Adapter:
    """Reads and checks an adapter folder; raises AdapterError naming the file and what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (marker(folder, name) if name == CONFIG_FILE else folder / name).is_file():
            raise AdapterError(f"{folder} is not an adapter folder: {name} is missing; another library's is read by reft-export import")
    config = read_adapter_config(folder)
    try:
        tensors = load(_read_hashed(folder / TENSOR_FILE, config.tensors_sha256))
    except (SafetensorError, ValueError, KeyError) as e:  # KeyError: a dtype that numpy has not
        raise AdapterError(f"{folder / TENSOR_FILE} is damaged ({e}); copy it again from where it was trained") from None
    probes: tuple[Probe, ...] = ()
    if config.probes is not None:
        probes = read_probes(_read_hashed(folder / PROBES_FILE, config.probes.sha256), str(folder / PROBES_FILE))
        if len(probes) != config.probes.count:
            raise AdapterError(f"{folder / PROBES_FILE} has {len(probes)} lines, expected {config.probes.count}; copy the adapter again")
    if missing := [name for name in config.head if f"{HEAD}{name}" not in tensors]:
        raise AdapterError(f"{folder / TENSOR_FILE} lacks {HEAD}{missing[0]}, which {CONFIG_FILE} names; copy the adapter again")
    head = {name: tensors.pop(f"{HEAD}{name}") for name in config.head}
    try:
        own = EditForm(method=config.method, rank=config.rank, activation=config.activation)
        return Adapter(
            method=config.method,
            rank=config.rank,
            sites=sites_of(config.sites, config.rules),
            forms=forms_of(config.sites, own),
            positions=config.rules[0].rule,
            rules=rules_of(config.sites, config.rules),
            tied=tied_of(config.rules),
            activation=config.activation,
            dropout=config.dropout,
            dtype=config.dtype,
            base=config.base,
            trained_on=config.trained_on,
            training=config.training,
            tensors=tensors,
            head=head,
            probes=probes,
        )
    except ReftError as e:
        raise AdapterError(f"{folder}: {e}") from None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """adapter.json, whose own digest is right where it has one; raises AdapterError."""
    path = marker(folder, CONFIG_FILE)
    content = read_sealed(path, ADAPTER_FORMAT)
    try:
        if content["format_version"] == FIRST_VERSION:
            if unknown := sorted({DIGEST, "tensors_sha256", "probes"} & set(content)):
                raise RecordError(f"unknown keys {unknown} in a file of version {FIRST_VERSION}")
            content = from_version_1(content)
        config = from_json(AdapterConfig, content)
    except (RecordError, AdapterError) as e:
        raise AdapterError(f"{path}: {e}") from None
    if config.tensors_sha256 is None and config.format_version != FIRST_VERSION:
        raise AdapterError(f"{path} lacks the sha256 of {TENSOR_FILE}; copy the adapter again")
    if config.format != FORMAT:
        raise AdapterError(f"{path} is {config.format!r}, expected {FORMAT!r}; pass the folder of an adapter")
    return config


def _read_hashed(path: Path, sha256: str | None) -> bytes:
    """The bytes of ``path``, of that ``sha256`` where there is one. Raises AdapterError."""
    try:
        content = read_regular(path)
    except OSError as e:
        raise AdapterError(f"{path} cannot be read ({e.strerror}); copy the adapter again") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError(f"{path} is damaged: it does not match its sha256 in {CONFIG_FILE}; copy the adapter again")
    return content

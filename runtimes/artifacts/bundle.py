"""The bundle folder: everything a device needs to run a steered decoder or classifier, and nothing else; and what an engine shares with it.

manifest.json                 Manifest below, sealed (runtimes/files/sealed.py), with the sha256 of every other hashed file
model.onnx, model.onnx.data   the folded graph
adapters/<name>.onnx_adapter  banks and rule of one adapter, in onnxruntime's own container; or <name>.banks, the same of an adapter
                              whose slots are handed in at every step, which no stock runtime does
adapters/<name>.json          AdapterRecord below
golden/<name>.npz             eager inputs and outputs, "base" and one per adapter (see runtimes/artifacts/golden_schema.py)
genai_config.json             for stock onnxruntime-genai, where it supports the family; users edit it, so it is not hashed
lib/<platform>/               the op library, where asked for
tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from runtimes.artifacts.golden_schema import LAYOUTS, GoldenSchema, read_golden
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.artifacts.values import (
    CacheType,
    Embeddings,
    Exporter,
    KvCache,
    Logits,
    Padding,
    Precision,
    QuantizationMethod,
    Rules,
    Scheme,
    Slots,
    TaskName,
)
from runtimes.edits.adapter import Adapter, BaseModel, BaseParts
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
from runtimes.edits.op import OP_TYPE, OP_VERSION, EditNode
from runtimes.edits.positions import Positions, needs_slots
from runtimes.errors import AdapterError, BundleError, ReftError
from runtimes.files.folders import UNPROVEN, marker
from runtimes.files.hashes import sha256_of
from runtimes.files.records import RecordError, from_json, read_json_object, to_json
from runtimes.files.sealed import DIGEST, FIRST_VERSION, Format, canonical_text, read_sealed, write_sealed

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = Format(version_key="schema_version", version=SCHEMA_VERSION, error=BundleError, remedy="copy the folder or export again")
ENGINE_MANIFEST = "engine.json"
"""Of an engine's folder, which is read by ``runtimes.artifacts.engine``."""
GRAPH_FILE = "model.onnx"
BANKS, EXPLICIT_BANKS = "onnx_adapter", "banks"
"""What the names of adapters' files end in: the second one where no graph computes the slots."""
DATA_FILE = "model.onnx.data"
BASE_GOLDEN = "base"
NOT_HASHED = (MANIFEST_FILE, MANIFEST_FILE + UNPROVEN, "genai_config.json")
WEIGHT_ONLY_SCHEMES: tuple[Scheme, ...] = ("weight-only", "qdq-int4")
"""Schemes that leave activations in the graph's float type."""
ACTIVATION_SCHEMES: tuple[Scheme, ...] = ("dynamic", "static", "qdq-int8", "fp8")
"""Those that quantize them too."""
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    name: str
    model_type: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    context_length: int
    num_attention_heads: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    sliding_window: int | None = None
    """Columns that the narrowest attention layer sees. Right-padded rows are exact only until it is full: it counts pads too."""
    parts: BaseParts | None = None
    """What the fingerprint was made of; older bundles lack it."""

    def check(self) -> None:
        """Raises RecordError for a size that no model has."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "context_length", "num_attention_heads", "sliding_window"):
            _check_number(f"model.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """Where fixed activation ranges came from."""

    ranges: str
    """sha256 of the calibration file."""
    graph: str
    """Digest of the float bundle whose graph ran."""
    data: str
    """sha256 of the prompts' file."""
    observer: str
    mixture: dict[str, float]
    """Share of the base and of each adapter."""
    prompts: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the base's weights are stored, and whether what they are multiplied by is quantized too.

    ``accuracy_level``: MatMulNBits, 4 quantizes activations too.
    """

    scheme: Scheme
    bits: int
    block_size: int
    """Input values that share a scale; 0 is one scale per output column."""
    symmetric: bool
    accuracy_level: int
    method: QuantizationMethod = "rtn"
    embeddings: int = 0
    """Bits of the token embedding; 0 is float."""
    kept: tuple[str, ...] = ()
    """Weights that stayed in float by choice."""
    int8: tuple[str, ...] = ()
    """Weights of 8 bits among those of 4."""
    cache: CacheType = "float"
    """How keys and values are stored."""
    origin: str = ""
    """How many weights keep the integers of the base's own checkpoint, and how that was quantized."""
    calibration: CalibrationRecord | None = None

    def check(self) -> None:
        """Raises RecordError for numbers that no scheme has."""
        _check_number("quantization.bits", self.bits, 4, 8)
        _check_number("quantization.block_size", self.block_size, 0)
        _check_number("quantization.accuracy_level", self.accuracy_level, 0, 4)
        _check_number("quantization.embeddings", self.embeddings, 0, 8)

    @property
    def label(self) -> str:
        """What a parity rung calls it."""
        if self.scheme != "weight-only":
            return self.scheme
        cache = "" if self.cache == "float" else f", {self.cache} cache"
        return f"int{self.bits} level {self.accuracy_level}{cache}"

    @property
    def quantizes_activations(self) -> bool:
        return self.scheme not in WEIGHT_ONLY_SCHEMES or self.accuracy_level == 4

    @property
    def rounds(self) -> bool:
        """Whether anything but weights is quantized: float noise may then carry as far as a level of the grid."""
        return self.quantizes_activations or self.cache != "float"

    @property
    def rounds_inside(self) -> bool:
        """Whether activations are rounded inside MatMulNBits, where no reference can follow; its level 1, of the same weights, is exact."""
        return self.scheme == "weight-only" and self.accuracy_level == 4


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    layer: int
    stream: str
    op: str = OP_TYPE
    activation: str = ""
    activated: str = "all"

    @property
    def node(self) -> EditNode:
        site = Site(layer=self.layer, stream=self.stream)
        return EditNode(site=site, op=self.op, activation=self.activation, activated=self.activated)

    @classmethod
    def of(cls, node: EditNode) -> NodeRecord:
        return cls(layer=node.site.layer, stream=node.site.stream, op=node.op, activation=node.activation, activated=node.activated)


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """The parameter an initializer came from: ``initializer = parameter[slice]``, transposed where ``transpose``."""

    parameter: str
    transpose: bool = False
    axis: int | None = None
    start: int | None = None
    stop: int | None = None
    joined: tuple[WeightSource, ...] = ()
    """Whole parameters whose rows follow in the same initializer (q, k and v in one), before it is transposed."""


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    name: str
    dtype: str
    shape: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    sha256: str
    size: int

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        return cls(sha256=sha256_of(path), size=path.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json. What its enumerations may say, and mean: runtimes/artifacts/values.py.

    ``schema_version`` is the one that was read; the current one is written, whatever it says."""

    schema_version: int = SCHEMA_VERSION
    digest: str = ""
    """Of the file that was read; the writer makes it anew."""
    op_version: int = OP_VERSION
    created_by: str
    model: ModelRecord
    precision: Precision
    quantization: Quantization | None
    exporter: Exporter
    opset: int
    ir_version: int
    logits: Logits
    slots: Slots
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    nodes: tuple[NodeRecord, ...]
    adapters: tuple[str, ...]
    parity_budget: dict[str, float]
    weights: dict[str, WeightSource]
    """Initializer name in the unquantized graph -> the parameter it came from; refit and dequantized parity use only this."""
    genai: str
    """"supported", or why stock onnxruntime-genai cannot open this folder."""
    padding: Padding = "left"
    """none: GroupQueryAttention takes a row's cache as full. A classifier's pads stand on the right."""
    kv_cache: KvCache = "appended"
    """How a step's keys and values join those before: in-place (every attention is a GroupQueryAttention that reads the graph's own past
    and writes its own present, so that both may be one buffer), appended (the graph returns a longer copy), or none: a classifier's."""
    rules: Rules = "shared"
    """Version 1 is always so."""
    embeddings: Embeddings | None = None
    """None: not recorded."""
    retention: dict[str, float] | None = None
    """By adapter: the share of its training that quantization left, measured on its probes. None: not measured."""
    loss: dict[str, float] | None = None
    """By adapter: what quantization cost it, in nats a token of its probes' completions, where that was accepted."""
    task: TaskName = TEXT_GENERATION
    labels: tuple[str, ...] = ()
    """A classifier's, in the order of its logits."""
    head: dict[str, WeightSource] = field(default_factory=dict)
    """A classifier's overridable initializers reft.head.* -> the parameter each came from; adapters carry every one."""
    not_held: tuple[str, ...] = ()
    """Adapters that were added without their base: no golden arrays say what the eager model does with them."""
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def mixes_rows(self) -> bool:
        """Whether the rows of one batch may be steered by different adapters."""
        return self.rules == "row"

    def check(self) -> None:
        """Raises ReftError for what no bundle has: numbers out of range, tasks that do not fit, nodes and adapters that cannot be."""
        if self.op_version != OP_VERSION:
            raise RecordError(f"op version {self.op_version}; this version runs {OP_VERSION}; export again")
        self.model.check()
        if self.quantization is not None:
            self.quantization.check()
        for name in ("opset", "ir_version"):
            _check_number(name, getattr(self, name), 1)
        if LAYOUTS[self.task].has_labels != bool(self.labels):
            raise RecordError(f"task {self.task} with {len(self.labels)} labels, which is unknown")
        if LAYOUTS[self.task].has_labels != (self.kv_cache == "none"):
            raise RecordError(f"kv_cache is {self.kv_cache!r}, which {self.task} does not have")
        self._check_nodes()
        for name in self.adapters:
            check_adapter_name(name)
        for records in (self.inputs, self.outputs):
            _check_once("tensors", [record.name for record in records])
        for key in ("retention", "loss"):
            if unknown := sorted(set(getattr(self, key) or {}) - set(self.adapters)):
                raise RecordError(f"{key} of adapter {unknown[0]!r}, which is not listed")

    def _check_nodes(self) -> None:
        nodes = [record.node for record in self.nodes]
        _check_once("nodes", [node.name for node in nodes])
        if beyond := [node.name for node in nodes if node.site.layer >= self.model.num_hidden_layers]:
            raise RecordError(f"node {beyond[0]} is beyond the model's {self.model.num_hidden_layers} layers")
        if self.adapters and not nodes:
            raise RecordError(f"no edit nodes, and adapters that need them ({', '.join(self.adapters)})")


def _check_number(name: str, value: int | None, lowest: int, highest: int | None = None) -> None:
    if value is not None and (value < lowest or (highest is not None and value > highest)):
        raise RecordError(f"{name} is {value}, expected {f'at least {lowest}' if highest is None else f'{lowest} to {highest}'}")


def _check_once(what: str, names: Sequence[str]) -> None:
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise RecordError(f"{what} list {twice[0]} twice")


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


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One adapter of an artifact: its banks' file, and the rule by which it edits."""

    name: str
    file: Path
    positions: Positions
    tied: bool


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an artifact runs at once; None is no limit of its own."""

    tokens: int
    """Of one row, prompt and answer."""
    reason: str
    """What limits ``tokens``."""
    rows: int | None = None
    columns: int | None = None
    """Of a prompt, in one call."""


def check_adapter_name(name: str) -> str:
    """An adapter's name becomes a file name and a CLI value."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == BASE_GOLDEN:
        raise AdapterError(
            f"adapter name {name!r} cannot be used: letters, digits, '.', '_', '-', and not {BASE_GOLDEN!r}; rename its folder"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Artifact(ABC):
    """What a bundle and an engine share: the manifest, the adapters and the golden arrays of an opened folder.

    Its hashes were checked before anything else was read.
    """

    folder: Path
    manifest: Manifest

    @property
    @abstractmethod
    def digest(self) -> str:
        """Two artifacts with one digest run the same base weights."""

    @property
    @abstractmethod
    def frozen(self) -> str | None:
        """The adapter, or "base", that is all it runs; None where adapters swap."""

    @property
    @abstractmethod
    def limits(self) -> Limits: ...

    @abstractmethod
    def adapter_file(self, name: str) -> Path:
        """The file with every bank and rule of an adapter."""

    @abstractmethod
    def adapter_tensors(self, name: str) -> dict[str, np.ndarray]:
        """Every bank and rule of an adapter, by the name of the graph's input."""

    @property
    def nodes(self) -> tuple[EditNode, ...]:
        return tuple(record.node for record in self.manifest.nodes)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return self.manifest.adapters

    def adapter_record(self, name: str) -> AdapterRecord:
        if name not in self.adapter_names:
            known = ", ".join(self.adapter_names) or "none"
            raise BundleError(f"{self.folder} has no adapter {name!r}; it has: {known}")
        path = self.folder / "adapters" / f"{name}.json"
        record = read_adapter_record(path)
        here = {str(node.site) for node in self.nodes}
        if missing := [site.site for site in record.sites if str(Site.parse(site.site)) not in here]:
            raise BundleError(f"{path}: site {missing[0]} has no edit node in this artifact; export it with the adapter again")
        return record

    def adapter(self, name: str) -> StoredAdapter:
        """Raises BundleError for an adapter that it does not hold."""
        record = self.adapter_record(name)
        return StoredAdapter(
            name=name,
            file=self.adapter_file(name),
            positions=record.where,
            tied=record.tied,
        )

    @property
    def golden_names(self) -> tuple[str, ...]:
        names = (BASE_GOLDEN, *self.adapter_names)
        return tuple(name for name in names if f"golden/{name}.npz" in self.manifest.files)

    def golden(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of ``name``, as runtimes/artifacts/golden_schema.py describes and checks them."""
        if name in self.manifest.not_held:
            raise BundleError(not_held(self.folder, name))
        if name not in self.golden_names:
            raise BundleError(f"{self.folder} has no golden arrays for {name!r}; it has: {', '.join(self.golden_names) or 'none'}")
        return read_golden(self.golden_file(name), self.golden_schema(name))

    def golden_file(self, name: str) -> Path:
        return self.folder / "golden" / f"{name}.npz"

    def golden_schema(self, name: str) -> GoldenSchema:
        m = self.manifest
        return GoldenSchema(
            task=m.task,
            vocabulary=m.model.vocab_size,
            labels=len(m.labels),
            context=m.model.context_length,
            adapter=name != BASE_GOLDEN,
            float32=m.precision == "fp32" and m.quantization is None,
            noisy=m.quantization is not None and m.quantization.rounds,
        )


@dataclass(frozen=True, kw_only=True)
class Bundle(Artifact):
    """An opened bundle: a graph for onnxruntime, whose adapters swap."""

    @property
    def graph_path(self) -> Path:
        return self.folder / GRAPH_FILE

    @property
    def frozen(self) -> None:
        return None

    @property
    def limits(self) -> Limits:
        return context_limits(self.manifest.model)

    def adapter_file(self, name: str) -> Path:
        where = self.adapter_record(name).where
        if (file := bank_file(name, where)) not in self.manifest.files:
            listed = self.folder / MANIFEST_FILE
            raise BundleError(f"{listed} lists no {file}, where the banks of an adapter that edits at {where} are; export the bundle again")
        return self.folder / file

    def adapter_tensors(self, name: str) -> dict[str, np.ndarray]:
        return read_onnx_adapter(self.adapter(name).file)

    @property
    def digest(self) -> str:
        """sha256 over the graph's files: two bundles with one digest run the same base weights."""
        lines = [f"{p} {self.manifest.files[p].sha256}" for p in (GRAPH_FILE, DATA_FILE) if p in self.manifest.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def bank_file(name: str, where: Positions) -> str:
    """The file of an adapter's banks in a bundle."""
    return f"adapters/{name}.{EXPLICIT_BANKS if needs_slots(where) else BANKS}"


def not_held(folder: Path, *names: str) -> str:
    """What is to be said of adapters in ``Manifest.not_held``."""
    if len(names) == 1:
        which, added, them = f"adapter {names[0]} is", "it was", "it"
    else:
        which, added, them = f"adapters {', '.join(names)} are", "they were", "them"
    return (
        f"{which} not held against the eager model: {added} added to {folder} without the base; add {them} again with --model and --force"
    )


def context_limits(model: ModelRecord) -> Limits:
    return Limits(tokens=model.context_length, reason=f"the context of {model.name} ({model.context_length})")


def open_bundle(path: Path | str, *, verify: bool = False) -> Bundle:
    """Reads the manifest and checks every file's size and sha256; ``verify`` hashes large files again too.

    Raises BundleError for anything missing, changed, unknown or outside the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; a bundle is the folder that `reft-export export` writes")
    if (folder / ENGINE_MANIFEST).is_file():
        raise BundleError(f"{folder} is an engine, which run, parity, bench and inspect take; pass the bundle that it was built from")
    if not marker(folder, MANIFEST_FILE).is_file():
        raise BundleError(f"{folder} is not a bundle: {MANIFEST_FILE} is missing; make one with `reft-export export`")
    manifest = read_manifest(marker(folder, MANIFEST_FILE))
    expected = {GRAPH_FILE, *(f"adapters/{check_adapter_name(n)}.json" for n in manifest.adapters)}
    expected |= {f"adapters/{n}.{BANKS}" for n in manifest.adapters if f"adapters/{n}.{EXPLICIT_BANKS}" not in manifest.files}
    unlisted = sorted(expected - set(manifest.files))
    if unlisted:
        raise BundleError(f"{folder / MANIFEST_FILE}: no hash for {unlisted}; export again")
    check_adapters(folder / MANIFEST_FILE, manifest.files, manifest.adapters)
    check_not_held(folder / MANIFEST_FILE, manifest)
    check_files(folder, manifest.files, MANIFEST_FILE, verify=verify)
    return Bundle(folder=folder, manifest=manifest)


def read_manifest(path: Path) -> Manifest:
    """A bundle's manifest, which an engine holds too; raises BundleError for one that was changed, is of another version, or says what
    cannot be."""
    content = read_sealed(path, MANIFEST_FORMAT)
    try:
        if content["schema_version"] == FIRST_VERSION:
            content = first_version(content)
        manifest = from_json(Manifest, content)
        manifest.check()
    except (RecordError, ReftError) as e:
        raise BundleError(f"{path}: {e}") from None
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hashes every file under ``folder`` and writes manifest.json; called last, inside the atomic write. Records of adapters that were
    copied from version 1 are written anew."""
    renew_records(folder, manifest.adapters)
    seal_manifest(folder, replace(manifest, files=hash_files(folder, NOT_HASHED)))


def seal_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes a bundle's manifest.json with the files that ``manifest`` lists."""
    write_manifest_file(marker(folder, MANIFEST_FILE), manifest)


def write_manifest_file(path: Path, manifest: Manifest) -> None:
    """Of an engine it is a file like any other, which engine.json lists."""
    write_sealed(path, to_json(replace(manifest, schema_version=SCHEMA_VERSION)))


def first_version(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 with version 2's keys as they were then; those that it cannot have are refused as unknown."""
    if unknown := sorted({DIGEST, "kv_cache", "rules", "embeddings", "retention", "loss", "not_held"} & set(content)):
        raise RecordError(f"unknown keys {unknown} in a file of version {FIRST_VERSION}")
    return {**content, "kv_cache": "none" if content.get("labels") else "appended", "rules": "shared"}


def hash_files(folder: Path, without: Collection[str]) -> dict[str, FileRecord]:
    """size and sha256 of every file under ``folder``, by its path relative to it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in without)
    return {p.relative_to(folder).as_posix(): FileRecord.of(p) for p in paths}


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


def check_adapters(listed_in: Path, files: Collection[str], adapters: Collection[str]) -> None:
    """Raises BundleError where files of an adapter are listed and the adapter is not, as no parity would be taken of it, or is twice."""
    if len(set(adapters)) != len(adapters):
        raise BundleError(f"{listed_in}: an adapter is listed twice ({', '.join(adapters)}); export again")
    for path in map(PurePosixPath, sorted(files)):
        name = path.name.rpartition(".")[0]
        if str(path.parent) in ("adapters", "golden") and name not in adapters and str(path) != f"golden/{BASE_GOLDEN}.npz":
            raise BundleError(f"{listed_in}: {path} is listed, and adapter {name!r} is not; export again")


def check_not_held(listed_in: Path, manifest: Manifest) -> None:
    """Raises BundleError where what is said not to be held is no adapter, or has golden arrays."""
    for name in manifest.not_held:
        if name not in manifest.adapters or f"golden/{name}.npz" in manifest.files:
            wrong = "has golden arrays" if name in manifest.adapters else "is no adapter of it"
            raise BundleError(f"{listed_in}: {name!r} is listed as not held, and {wrong}; export again")


def check_files(folder: Path, files: Mapping[str, FileRecord], listed_in: str, *, verify: bool) -> None:
    """Raises BundleError for a file of the list ``listed_in`` that is missing, changed or outside the folder, and for a file that
    would be read without being listed."""
    read = [name for name in (DATA_FILE, *TOKENIZER_FILES) if (folder / name).is_file()]
    read += [path.relative_to(folder).as_posix() for path in (folder / TEMPLATE_FOLDER).glob("*")]
    read += [path.relative_to(folder).as_posix() for path in (folder / "adapters").glob(f"*.{EXPLICIT_BANKS}")]
    if foreign := sorted(set(read) - set(files)):
        raise BundleError(f"{folder / foreign[0]} is not listed in {listed_in}, and would be used; remove it or export again")
    for name, record in files.items():
        _check_file(folder, name, record, listed_in, verify=verify)


def check_listed_name(name: str, listed_in: Path) -> PurePosixPath:
    """A file's name in a manifest, as a path inside its folder. Raises BundleError for one that leaves it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"{listed_in} names {name!r}, which leaves the folder; it is refused")
    return relative


def _check_file(folder: Path, name: str, record: FileRecord, listed_in: str, *, verify: bool) -> None:
    path = folder / check_listed_name(name, folder / listed_in)
    # A link is as good as what it leads to, wherever that is: the hub's cache is made of them.
    if not path.is_file():
        raise BundleError(f"{path} is {'no regular file' if path.exists() else 'missing'}; copy the folder again")
    size = path.stat().st_size
    if size != record.size:
        raise BundleError(f"{path} has {size} bytes, expected {record.size}; it is truncated or was changed; copy the folder again")
    if sha256_of(path, remember=not verify) != record.sha256:
        raise BundleError(f"{path} does not match its sha256 in {listed_in}; it was changed or damaged; copy the folder again")

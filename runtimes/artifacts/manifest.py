"""manifest.json: what a bundle is, sealed (runtimes/files/sealed.py), with the sha256 of every other file. An engine holds it, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtimes.artifacts.adapter_record import check_adapter_name, renew_records
from runtimes.artifacts.golden_schema import LAYOUTS
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
from runtimes.edits.adapter import BaseParts
from runtimes.edits.edit import Site
from runtimes.edits.op import OP_TYPE, OP_VERSION, EditNode
from runtimes.errors import BundleError, ReftError
from runtimes.files.folders import UNPROVEN, marker
from runtimes.files.hashes import sha256_of
from runtimes.files.records import RecordError, from_json, to_json
from runtimes.files.sealed import DIGEST, FIRST_VERSION, Format, read_sealed, write_sealed

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = Format(version_key="schema_version", version=SCHEMA_VERSION, error=BundleError, remedy="copy the folder or export again")
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
NOT_HASHED = (MANIFEST_FILE, MANIFEST_FILE + UNPROVEN, "genai_config.json")
WEIGHT_ONLY_SCHEMES: tuple[Scheme, ...] = ("weight-only", "qdq-int4")
"""Schemes that leave activations in the graph's float type."""
ACTIVATION_SCHEMES: tuple[Scheme, ...] = ("dynamic", "static", "qdq-int8", "fp8")
"""Those that quantize them too."""


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

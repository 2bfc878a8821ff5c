"""The bundle folder: everything a device needs to run a steered decoder or classifier, and nothing else; and what an engine shares with it.

manifest.json                 Manifest below, with the sha256 of every other hashed file
model.onnx, model.onnx.data   the folded graph
adapters/<name>.onnx_adapter  banks and rule of one adapter, in onnxruntime's own container
adapters/<name>.json          AdapterRecord below
golden/<name>.npz             eager inputs and outputs, "base" and one per adapter (see runtimes/artifacts/golden_schema.py)
genai_config.json             for stock onnxruntime-genai, where it supports the family; users edit it, so it is not hashed
lib/<platform>/               the op library, where asked for
tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from runtimes.artifacts.golden_schema import LAYOUTS, GoldenSchema, read_golden
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import BaseModel, BaseParts
from runtimes.edits.edit import Site
from runtimes.edits.op import OP_TYPE, OP_VERSION, EditNode
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, BundleError, ReftError
from runtimes.files.hashes import sha256_of
from runtimes.files.records import RecordError, from_json, read_json, to_json

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
ENGINE_MANIFEST = "engine.json"
"""Of an engine's folder, which is read by ``runtimes.artifacts.engine``."""
GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
BASE_GOLDEN = "base"
NOT_HASHED = (MANIFEST_FILE, "genai_config.json")
WEIGHT_ONLY_SCHEMES = ("weight-only", "qdq-int4")
"""Schemes that leave activations in the graph's float type."""
ACTIVATION_SCHEMES = ("dynamic", "static", "qdq-int8", "fp8")
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

    ``scheme``: weight-only, dynamic, static, qdq-int4, qdq-int8 or fp8. ``accuracy_level``: MatMulNBits, 4 quantizes activations too.
    """

    scheme: str
    bits: int
    block_size: int
    """Input values that share a scale; 0 is one scale per output column."""
    symmetric: bool
    accuracy_level: int
    method: str = "rtn"
    embeddings: int = 0
    """Bits of the token embedding; 0 is float."""
    kept: tuple[str, ...] = ()
    """Weights that stayed in float by choice."""
    calibration: CalibrationRecord | None = None

    @property
    def label(self) -> str:
        """What a parity rung calls it."""
        return f"int{self.bits} level {self.accuracy_level}" if self.scheme == "weight-only" else self.scheme

    @property
    def quantizes_activations(self) -> bool:
        return self.scheme not in WEIGHT_ONLY_SCHEMES or self.accuracy_level == 4


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


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``precision`` is the graph's float type; ``logits`` all or last; ``slots`` graph or input; ``task`` one of
    runtimes/tasks/task.py."""

    schema_version: int = SCHEMA_VERSION
    op_version: int = OP_VERSION
    created_by: str
    model: ModelRecord
    precision: str
    quantization: Quantization | None
    exporter: str
    opset: int
    ir_version: int
    logits: str
    slots: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    nodes: tuple[NodeRecord, ...]
    adapters: tuple[str, ...]
    parity_budget: dict[str, float]
    weights: dict[str, WeightSource]
    """Initializer name in the unquantized graph -> the parameter it came from; refit and dequantized parity use only this."""
    genai: str
    """"supported", or why stock onnxruntime-genai cannot open this folder."""
    padding: str = "left"
    """Where pads may stand in a batch of rows of unequal length: left, or none (GroupQueryAttention takes a row's cache as full); a
    classifier's stand on the right."""
    task: str = TEXT_GENERATION
    labels: tuple[str, ...] = ()
    """A classifier's, in the order of its logits."""
    head: dict[str, WeightSource] = field(default_factory=dict)
    """A classifier's overridable initializers reft.head.* -> the parameter each came from; adapters carry every one."""
    not_held: tuple[str, ...] = ()
    """Adapters that were added without their base: no golden arrays say what the eager model does with them."""
    files: dict[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """adapters/<name>.json: what the device needs to know of an adapter besides its banks, and where it came from."""

    method: str
    rank: int
    sites: tuple[str, ...]
    positions: str
    truncate: bool
    tied: bool
    activation: str
    base: BaseModel
    trained_on: str | None = None
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """One adapter of an artifact: its banks' file, and the rule by which it edits."""

    name: str
    file: Path
    positions: PositionRule
    tied: bool
    rank: int
    method: str


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
        try:
            return from_json(AdapterRecord, read_json(path, BundleError))
        except RecordError as e:
            raise BundleError(f"{path}: {e}") from None

    def adapter(self, name: str) -> StoredAdapter:
        """Raises BundleError for an adapter that it does not hold."""
        record = self.adapter_record(name)
        return StoredAdapter(
            name=name,
            file=self.adapter_file(name),
            positions=replace(PositionRule.parse(record.positions), truncate=record.truncate),
            tied=record.tied,
            rank=record.rank,
            method=record.method,
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
            noisy=m.quantization is not None and m.quantization.quantizes_activations,
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
        return self.folder / "adapters" / f"{name}.onnx_adapter"

    def adapter_tensors(self, name: str) -> dict[str, np.ndarray]:
        return read_onnx_adapter(self.adapter(name).file)

    @property
    def digest(self) -> str:
        """sha256 over the graph's files: two bundles with one digest run the same base weights."""
        lines = [f"{p} {self.manifest.files[p].sha256}" for p in (GRAPH_FILE, DATA_FILE) if p in self.manifest.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def not_held(folder: Path, name: str) -> str:
    """What is to be said of an adapter in ``Manifest.not_held``."""
    return (
        f"adapter {name} is not held against the eager model: it was added to {folder} without its base; add it again with --model and "
        "--force"
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
    if not (folder / MANIFEST_FILE).is_file():
        raise BundleError(f"{folder} is not a bundle: {MANIFEST_FILE} is missing; make one with `reft-export export`")
    raw = read_json(folder / MANIFEST_FILE, BundleError)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(f"{folder / MANIFEST_FILE}: schema version {version!r}; this version reads {SCHEMA_VERSION}; export again")
    try:
        manifest = from_json(Manifest, raw)
        nodes = [record.node for record in manifest.nodes]
    except (RecordError, ReftError) as e:
        raise BundleError(f"{folder / MANIFEST_FILE}: {e}") from None
    if manifest.op_version != OP_VERSION:
        raise BundleError(f"{folder}: op version {manifest.op_version}; this version runs {OP_VERSION}; export again")
    if manifest.task not in LAYOUTS or LAYOUTS[manifest.task].has_labels != bool(manifest.labels):
        raise BundleError(f"{folder / MANIFEST_FILE}: task {manifest.task!r} with {len(manifest.labels)} labels is unknown; export again")
    expected = {GRAPH_FILE, *(f"adapters/{check_adapter_name(n)}.{s}" for n in manifest.adapters for s in ("onnx_adapter", "json"))}
    unlisted = sorted(expected - set(manifest.files))
    if unlisted or len(set(nodes)) != len(nodes):
        raise BundleError(f"{folder / MANIFEST_FILE}: no hash for {unlisted or 'a node listed twice'}; export again")
    check_adapters(folder / MANIFEST_FILE, manifest.files, manifest.adapters)
    check_not_held(folder / MANIFEST_FILE, manifest)
    check_files(folder, manifest.files, MANIFEST_FILE, verify=verify)
    return Bundle(folder=folder, manifest=manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hashes every file under ``folder`` and writes manifest.json; called last, inside the atomic write."""
    content = to_json(manifest) | {"files": to_json(hash_files(folder, NOT_HASHED))}
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def hash_files(folder: Path, without: Collection[str]) -> dict[str, FileRecord]:
    """size and sha256 of every file under ``folder``, by its path relative to it."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in without)
    return {p.relative_to(folder).as_posix(): FileRecord(sha256=sha256_of(p), size=p.stat().st_size) for p in paths}


def write_adapter_record(folder: Path, name: str, record: AdapterRecord) -> None:
    path = folder / "adapters" / f"{check_adapter_name(name)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


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
    if foreign := sorted(set(read) - set(files)):
        raise BundleError(f"{folder / foreign[0]} is not listed in {listed_in}, and would be used; remove it or export again")
    for name, record in files.items():
        _check_file(folder, name, record, listed_in, verify=verify)


def _check_file(folder: Path, name: str, record: FileRecord, listed_in: str, *, verify: bool) -> None:
    relative = PurePosixPath(name)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder / listed_in} names {name!r}, which leaves the folder; it is refused")
    if not path.is_file():
        raise BundleError(f"{path} is missing; copy the folder again")
    size = path.stat().st_size
    if size != record.size:
        raise BundleError(f"{path} has {size} bytes, expected {record.size}; it is truncated or was changed; copy the folder again")
    if sha256_of(path, remember=not verify) != record.sha256:
        raise BundleError(f"{path} does not match its sha256 in {listed_in}; it was changed or damaged; copy the folder again")

"""The engine folder: a bundle that `build` turned into a TensorRT engine, for one TensorRT version and a list of GPUs.

    engine.json                  EngineManifest below, sealed (runtimes/files/sealed.py), with the sha256 of every hashed file
    engine.plan                  the serialized engine
    manifest.json                the bundle's manifest: model, nodes, adapters, parity budget; its files are in engine.json
    adapters/<name>.safetensors  every bank and rule of one adapter, under the engine's input names
    adapters/<name>.json         as in the bundle
    lib/                         the plugin that the engine was built with, where it was
    golden/, tokenizer files     as in the bundle

An engine answers to every verb that runs a bundle; it has a plan in place of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np

from runtimes.artifacts.artifact import Artifact, Limits
from runtimes.artifacts.bundle import ENGINE_MANIFEST, context_limits
from runtimes.artifacts.engine_adapter import read_engine_adapter
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.listed_files import check_adapters, check_files
from runtimes.artifacts.manifest import MANIFEST_FILE, FileRecord, TensorRecord, hash_files, read_manifest
from runtimes.artifacts.values import EngineCache, Target
from runtimes.errors import BundleError
from runtimes.files.folders import UNPROVEN, marker
from runtimes.files.records import RecordError, from_json, to_json
from runtimes.files.sealed import DIGEST, FIRST_VERSION, Format, read_sealed, write_sealed

SCHEMA_VERSION = 2
ENGINE_FORMAT = Format(version_key="schema_version", version=SCHEMA_VERSION, error=BundleError, remedy="copy the folder or build it again")
PLAN_FILE = "engine.plan"
PROFILES = ("prefill", "decode")
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """The shapes that a profile admits for one input, and the one it is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One optimization profile. ``name`` is "prefill" or "decode"; ``shapes`` by input name, for inputs with a dimension that varies."""

    name: str
    shapes: dict[str, ShapeRange]


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """The plugin library that the engine needs: its file's name under lib/, and its sha256."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    schema_version: int = SCHEMA_VERSION
    """The one that was read; the current one is written, whatever it says."""
    digest: str = ""
    """Of the file that was read; the writer makes it anew."""
    created_by: str
    target: Target
    tensorrt_version: str
    """Of the builder, as its package states it (1.7.1.116)."""
    compute_capabilities: tuple[str, ...]
    """The GPUs that the engine runs on ("8.6", "8.9")."""
    plugin: PluginRecord | None
    """None where the edit was expanded into the engine's own layers."""
    bundle_digest: str
    """Of the bundle that it was built from."""
    graph_digest: str
    """sha256 of the derived graph that the builder read."""
    frozen: str | None
    """The adapter whose banks became constants ("base": no adapter's); None where adapters are engine inputs and swap."""
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    cache: EngineCache = "whole"
    """What ``present.*`` are; engines that do not say give all of it."""
    profiles: tuple[Profile, ...]
    weight_streaming: bool
    build_seconds: float
    rebuild: str
    """The command that builds this engine again."""
    files: dict[str, FileRecord] = field(default_factory=dict)

    def check(self) -> None:
        """Raises RecordError for profiles that no engine has."""
        names = [profile.name for profile in self.profiles]
        if sorted(names) != sorted(PROFILES):
            raise RecordError(f"profiles {names}, expected {list(PROFILES)}")
        for profile in self.profiles:
            for name, shape in profile.shapes.items():
                sizes = (shape.min, shape.opt, shape.max)
                if len(set(map(len, sizes))) != 1 or not all(0 <= a <= b <= c for a, b, c in zip(*sizes, strict=True)):
                    raise RecordError(f"profile {profile.name} has {name} from {shape.min} over {shape.opt} to {shape.max}")


@dataclass(frozen=True, kw_only=True)
class Engine(Artifact):
    """An opened engine folder: a plan for TensorRT, whose adapters swap or are frozen into it."""

    engine: EngineManifest

    @property
    def plan_path(self) -> Path:
        return self.folder / PLAN_FILE

    @property
    def plugin_path(self) -> Path | None:
        return None if self.engine.plugin is None else self.folder / "lib" / self.engine.plugin.file

    @property
    def frozen(self) -> str | None:
        return self.engine.frozen

    @property
    def limits(self) -> Limits:
        """What it was built for, within the model's context."""
        whole = context_limits(self.manifest.model)
        profiles = {profile.name: profile.shapes for profile in self.engine.profiles}
        rows, columns = profiles["prefill"]["input_ids"].max
        tokens = min(shapes.max[2] for name, shapes in profiles["decode"].items() if name.startswith("past_key_values.")) + 1
        if tokens < whole.tokens:
            whole = Limits(tokens=tokens, reason=f"the context that {self.folder} was built for ({tokens}; --context raises it)")
        return replace(whole, rows=rows, columns=columns)

    def adapter_file(self, name: str) -> Path:
        return self.folder / "adapters" / f"{name}.safetensors"

    def adapter_tensors(self, name: str) -> dict[str, np.ndarray]:
        return read_engine_adapter(self.adapter(name).file)

    @property
    def digest(self) -> str:
        """Of the bundle that the engine was built from."""
        return self.engine.bundle_digest


def is_engine(path: Path | str) -> bool:
    return marker(Path(path), ENGINE_MANIFEST).is_file()


def open_engine(path: Path | str, *, verify: bool = False) -> Engine:
    """Reads both manifests and checks every file's size and sha256; ``verify`` hashes large files again too.

    Raises BundleError for anything missing, changed, unknown or outside the folder.
    """
    folder = Path(path)
    if not is_engine(folder):
        raise BundleError(f"{folder} is not an engine: {ENGINE_MANIFEST} is missing; make one with `reft-export build`")
    engine, manifest = read_engine_manifest(marker(folder, ENGINE_MANIFEST)), read_manifest(folder / MANIFEST_FILE)
    needed = {PLAN_FILE, MANIFEST_FILE, *(f"adapters/{name}.{suffix}" for name in manifest.adapters for suffix in ("safetensors", "json"))}
    if engine.plugin is not None:
        needed.add(f"lib/{engine.plugin.file}")
    unlisted = sorted(needed - set(engine.files))
    if unlisted:
        raise BundleError(f"{folder / ENGINE_MANIFEST}: no hash for {unlisted}; build it again")
    if engine.frozen not in (None, BASE_GOLDEN, *manifest.adapters):
        raise BundleError(f"{folder / ENGINE_MANIFEST}: frozen adapter {engine.frozen!r} is not listed; build it again")
    check_adapters(folder / ENGINE_MANIFEST, engine.files, manifest.adapters)
    check_files(folder, engine.files, ENGINE_MANIFEST, verify=verify)
    return Engine(folder=folder, manifest=replace(manifest, files=engine.files), engine=engine)


def read_engine_manifest(path: Path) -> EngineManifest:
    """Raises BundleError for an engine.json that was changed, is of another version, or says what this version does not know."""
    content = read_sealed(path, ENGINE_FORMAT)
    try:
        if content["schema_version"] == FIRST_VERSION and DIGEST in content:
            raise RecordError(f"unknown keys ['{DIGEST}'] in a file of version {FIRST_VERSION}")
        engine = from_json(EngineManifest, content)
        engine.check()
    except RecordError as e:
        raise BundleError(f"{path}: {e}; build it again") from None
    return engine


def write_engine_manifest(folder: Path, engine: EngineManifest) -> EngineManifest:
    """Hashes every file under ``folder`` and writes engine.json; called last, inside the atomic write."""
    complete = replace(engine, schema_version=SCHEMA_VERSION, files=hash_files(folder, (ENGINE_MANIFEST, ENGINE_MANIFEST + UNPROVEN)))
    seal_engine_manifest(folder, complete)
    return complete


def seal_engine_manifest(folder: Path, engine: EngineManifest) -> None:
    """Writes engine.json with the files that ``engine`` lists."""
    write_sealed(marker(folder, ENGINE_MANIFEST), to_json(replace(engine, schema_version=SCHEMA_VERSION)))

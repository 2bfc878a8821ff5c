"""The bundle folder: everything a device needs to run a steered decoder or classifier, and nothing else.

manifest.json                 Manifest of manifest.py, sealed (runtimes/files/sealed.py), with the sha256 of every other hashed file
model.onnx, model.onnx.data   the folded graph
adapters/<name>.onnx_adapter  banks and rule of one adapter, in onnxruntime's own container; or <name>.banks, the same of an adapter
                              whose slots are handed in at every step, which no stock runtime does
adapters/<name>.json          AdapterRecord of adapter_record.py
golden/<name>.npz             eager inputs and outputs, "base" and one per adapter (see runtimes/artifacts/golden_schema.py)
genai_config.json             for stock onnxruntime-genai, where it supports the family; users edit it, so it is not hashed
lib/<platform>/               the op library, where asked for
tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.artifacts.artifact import Artifact, Limits
from runtimes.artifacts.listed_files import BANKS, EXPLICIT_BANKS, check_adapters, check_files, check_not_held
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE, MANIFEST_FILE, ModelRecord, read_manifest
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.positions import Positions, needs_slots
from runtimes.errors import BundleError
from runtimes.files.folders import marker

ENGINE_MANIFEST = "engine.json"
"""Of an engine's folder, which is read by ``runtimes.artifacts.engine``."""


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

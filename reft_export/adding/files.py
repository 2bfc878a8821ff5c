"""A bundle's files copied into one that is being made, and an adapter's written into it or left out of it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from graph_passes.external import load_graph
from graph_passes.head import head_defaults
from graph_passes.slots.add import rule_names
from reft_export.bundling.files import head_tensors, write_adapter
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.listed_files import BANKS, EXPLICIT_BANKS
from runtimes.artifacts.manifest import MANIFEST_FILE, NOT_HASHED, Manifest
from runtimes.edits.adapter import Adapter
from runtimes.errors import BundleError
from runtimes.files.folders import copy_file
from runtimes.files.hashes import sha256_of


def copy_bundle(bundle: Bundle, work: Path, *, without: Collection[str] = ()) -> None:
    """Every file of the bundle but those of the adapters ``without``; session configs that its user may have edited among them.

    Raises BundleError for a copy that is not what the manifest says: new hashes would vouch for the damage.
    """
    dropped = {path for name in without for path in files_of(name)}
    for name in (*bundle.manifest.files, *NOT_HASHED):
        if name in dropped or name == MANIFEST_FILE or not (bundle.folder / name).is_file():
            continue
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(bundle.folder / name, work / name)
        record = bundle.manifest.files.get(name)
        if record is not None and sha256_of(work / name) != record.sha256:
            raise BundleError(
                f"{bundle.folder / name} was copied to other bytes than {MANIFEST_FILE} says; check the disk, and copy it again"
            )


def copy_unlisted(bundle: Bundle, work: Path) -> None:
    """What else lies in the bundle's folder, which is its user's: called after the manifest, which does not list it."""
    for folder, _, names in os.walk(bundle.folder):
        for path in (Path(folder) / name for name in names):
            name = path.relative_to(bundle.folder)
            if name.as_posix() not in (*bundle.manifest.files, MANIFEST_FILE) and not (work / name).exists() and path.is_file():
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, work / name)


def files_of(name: str) -> tuple[str, ...]:
    """Paths of an adapter's files in a bundle, there or not."""
    return f"adapters/{name}.{BANKS}", f"adapters/{name}.{EXPLICIT_BANKS}", f"adapters/{name}.json", f"golden/{name}.npz"


def write_adapters(bundle: Bundle, adapters: Mapping[str, Adapter]) -> Bundle:
    """Banks, rules and records of ``adapters`` into the bundle that is being made; it as it is then, its manifest not yet written.

    They count as not held until their golden arrays are there.
    """
    m, graph = bundle.manifest, load_graph(bundle.graph_path)
    defaults, rules = head_defaults(graph, m.head), rule_names(graph.graph)
    for name, adapter in adapters.items():
        head = head_tensors(adapter, m.head, defaults)
        write_adapter(bundle.folder, name, adapter, bundle.nodes, precision=m.precision, rules=rules, head=head)
    names = tuple(dict.fromkeys((*m.adapters, *adapters)))
    measured = without_figures(m, adapters)
    return replace(bundle, manifest=replace(measured, adapters=names, not_held=_listed(names, {*m.not_held, *adapters})))


def held(bundle: Bundle, names: Collection[str]) -> Bundle:
    """The bundle whose adapters ``names`` have golden arrays by now."""
    m = bundle.manifest
    return replace(bundle, manifest=replace(m, not_held=tuple(name for name in m.not_held if name not in names)))


def without_adapters(bundle: Bundle, names: Collection[str]) -> Bundle:
    m = bundle.manifest
    left = tuple(name for name in m.adapters if name not in names)
    return replace(bundle, manifest=replace(without_figures(m, names), adapters=left, not_held=_listed(left, m.not_held)))


def without_figures(manifest: Manifest, names: Collection[str]) -> Manifest:
    """Without what was measured of the adapters ``names``."""
    retention, loss = (
        None if figures is None else {name: value for name, value in figures.items() if name not in names}
        for figures in (manifest.retention, manifest.loss)
    )
    return replace(manifest, retention=retention, loss=loss)


def _listed(names: Collection[str], chosen: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in chosen)

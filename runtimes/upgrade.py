"""Adapters, bundles and engines of version 1 as version 2, whose files have digests: nothing but their JSON changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runtimes.artifacts.adapter_record import renew_records
from runtimes.artifacts.bundle import ENGINE_MANIFEST, open_bundle
from runtimes.artifacts.engine import open_engine, read_engine_manifest, seal_engine_manifest
from runtimes.artifacts.manifest import MANIFEST_FILE, FileRecord, read_manifest, seal_manifest, write_manifest_file
from runtimes.edits.adapter import CONFIG_FILE, load_adapter, read_adapter_config, write_adapter_config
from runtimes.errors import InputError
from runtimes.files.folders import atomic_folder, claimed, marker
from runtimes.files.sealed import FIRST_VERSION, expected

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Upgraded:
    """``kind``: adapter, bundle or engine. ``written``: the folder, or None where it was of version 2 already."""

    kind: str
    written: Path | None


def upgrade_folder(path: Path | str, output: Path | str | None = None, *, force: bool = False, report: Report = lambda _: None) -> Upgraded:
    """Rewrites an adapter, a bundle or an engine of version 1 to version 2: in its place, or to ``output``.

    Every hash is checked first, every file is read again afterwards, and the folder changes in one step or not at all; of files that lie in
    it without being listed, none is lost. What needs another graph (``rules`` "row", ``kv_cache`` "in-place") needs a new export.

    Raises InputError for another folder and for an output that cannot be written, AdapterError or BundleError for one that is damaged.

    Example::

        upgraded = upgrade_folder("pirate-bundle")
        print(upgraded.kind, upgraded.written)
    """
    source = Path(path).resolve()
    destination = source if output is None else Path(output)
    kind = _kind_of(source, Path(path))
    with claimed(destination, force=force or output is None, inputs=() if output is None else [source]), expected():
        report("checking every hash")
        if not kind.read(source):
            return Upgraded(kind=kind.name, written=None)
        with atomic_folder(destination, force=force or output is None) as work:
            report("copying")
            shutil.copytree(
                source,
                work,
                dirs_exist_ok=True,
                ignore_dangling_symlinks=True,
                copy_function=shutil.copyfile,
                ignore=lambda folder, _, source=source: [kind.file] if Path(folder) == source else [],
            )
            shutil.copyfile(source / kind.file, marker(work, kind.file))
            report("writing version 2")
            kind.rewrite(work)
            report("reading it again")
            kind.read(work)
    return Upgraded(kind=kind.name, written=destination if output is not None else Path(path))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    name: str
    file: str
    """That tells a folder of it."""
    read: Callable[[Path], bool]
    """Checks every hash and every record of a folder; whether any is of version 1."""
    rewrite: Callable[[Path], None]


def _read_adapter(folder: Path) -> bool:
    load_adapter(folder)
    return read_adapter_config(folder).format_version == FIRST_VERSION


def _rewrite_adapter(folder: Path) -> None:
    write_adapter_config(folder, read_adapter_config(folder))


def _read_bundle(folder: Path) -> bool:
    bundle = open_bundle(folder, verify=True)
    for name in bundle.adapter_names:
        bundle.adapter_record(name)
    return bundle.manifest.schema_version == FIRST_VERSION


def _rewrite_bundle(folder: Path) -> None:
    manifest = read_manifest(marker(folder, MANIFEST_FILE))
    seal_manifest(folder, replace(manifest, files=_rewrite_records(folder, manifest.adapters, manifest.files)))


def _read_engine(folder: Path) -> bool:
    engine = open_engine(folder, verify=True)
    for name in engine.adapter_names:
        engine.adapter_record(name)
    return FIRST_VERSION in (engine.engine.schema_version, engine.manifest.schema_version)


def _rewrite_engine(folder: Path) -> None:
    engine, manifest = read_engine_manifest(marker(folder, ENGINE_MANIFEST)), read_manifest(folder / MANIFEST_FILE)
    files = _rewrite_records(folder, manifest.adapters, engine.files)
    write_manifest_file(folder / MANIFEST_FILE, replace(manifest, files={}))
    seal_engine_manifest(folder, replace(engine, files=files | {MANIFEST_FILE: FileRecord.of(folder / MANIFEST_FILE)}))


KINDS = (
    _Kind(name="engine", file=ENGINE_MANIFEST, read=_read_engine, rewrite=_rewrite_engine),  # which holds a bundle's manifest, too
    _Kind(name="bundle", file=MANIFEST_FILE, read=_read_bundle, rewrite=_rewrite_bundle),
    _Kind(name="adapter", file=CONFIG_FILE, read=_read_adapter, rewrite=_rewrite_adapter),
)


def _kind_of(source: Path, path: Path) -> _Kind:
    for kind in KINDS:
        if (source / kind.file).is_file():
            return kind
    raise InputError(f"{path} is not an adapter folder ({CONFIG_FILE}), a bundle ({MANIFEST_FILE}) or an engine ({ENGINE_MANIFEST})")


def _rewrite_records(folder: Path, adapters: tuple[str, ...], files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Writes each adapter's record anew; the list of files with their hashes. All others keep those that they had."""
    renew_records(folder, adapters)
    names = [f"adapters/{name}.json" for name in adapters]
    return {**files, **{name: FileRecord.of(folder / name) for name in names}}

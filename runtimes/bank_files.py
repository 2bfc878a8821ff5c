"""Adapters that a bank can load, in its bundle or in folders: listed by name and size, read and verified one by one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.artifacts.addition import check_addition, check_known_base
from runtimes.artifacts.artifact import StoredAdapter
from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import CONFIG_FILE, PROBES_FILE, TENSOR_FILE, load_adapter
from runtimes.edits.op import EditNode, is_no_edit
from runtimes.edits.positions import Positions, slot_count
from runtimes.errors import BundleError, InputError
from runtimes.precision import NUMPY_DTYPES

Edits = Mapping[EditNode, tuple[np.ndarray, ...]]
"""Of one adapter, by the nodes that it uses: the parameters of its groups' edits, stacked."""


@dataclass(frozen=True, kw_only=True)
class ListedAdapter:
    """An adapter that a bank can load. ``size``: bytes of its files; ``folder``: None in the bundle."""

    name: str
    size: int
    folder: Path | None = None


def adapters_in(folder: Path) -> Iterator[ListedAdapter]:
    """Every adapter that is a folder in ``folder``, in the order of their names, by their files' sizes alone.

    Raises InputError for a folder that cannot be read, AdapterError for a name that no adapter can have.
    """
    try:
        entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as e:
        raise InputError(f"{folder} cannot be listed ({e.strerror}); pass the folder that adapters' folders are in") from None
    for entry in entries:
        if (listed := listed_adapter(Path(entry.path), entry.name)) is not None:
            check_adapter_name(entry.name)
            yield listed


def listed_adapter(folder: Path, name: str) -> ListedAdapter | None:
    """None where there is no adapter in ``folder``."""
    try:
        size = sum(os.stat(f"{folder}/{file}").st_size for file in (CONFIG_FILE, TENSOR_FILE))
    except OSError:
        return None
    with contextlib.suppress(OSError):
        size += os.stat(f"{folder}/{PROBES_FILE}").st_size
    return ListedAdapter(name=name, size=size, folder=folder)


def read_edits(bundle: Bundle, listed: ListedAdapter) -> tuple[Edits, Positions, bool]:
    """The adapter's edits in the graph's float type, its positions, and whether it is tied.

    Raises AdapterError or BundleError where it is damaged or does not fit ``bundle``.
    """
    if listed.folder is None:
        stored = bundle.adapter(listed.name)
        return _stored_edits(bundle, stored), stored.positions, stored.tied
    adapter = load_adapter(listed.folder)
    check_known_base(bundle, listed.name, adapter)
    check_addition(bundle, listed.name, adapter)
    nodes = adapter.nodes()
    banks = adapter.banks(nodes, NUMPY_DTYPES[bundle.manifest.precision])
    return {node: tuple(banks[name] for name in node.bank_names) for node in nodes}, adapter.where, adapter.tied


def _stored_edits(bundle: Bundle, stored: StoredAdapter) -> Edits:
    """What an adapter of the bundle edits. Raises BundleError for banks that are none of the graph's, or no numbers."""
    tensors = bundle.adapter_tensors(stored.name)
    width, dtype = bundle.manifest.model.hidden_size, NUMPY_DTYPES[bundle.manifest.precision]
    slots = slot_count(stored.positions, tied=stored.tied)
    edits: dict[EditNode, tuple[np.ndarray, ...]] = {}
    for node in bundle.nodes:
        if missing := [name for name in node.bank_names if name not in tensors]:
            raise BundleError(f"{stored.file} does not hold {missing[0]}, which the graph takes of every adapter; export the bundle again")
        arrays = tuple(tensors[name] for name in node.bank_names)
        if is_no_edit(arrays, node.op):
            continue
        rank = rank_of(node, arrays)
        for name, bank, array in zip(node.bank_names, node.spec.banks, arrays, strict=True):
            shape = (slots, *({"r": rank, "D": width}[axis] for axis in bank.axes))
            if array.shape != shape or array.dtype != dtype or not np.isfinite(array.astype(np.float32)).all():
                raise BundleError(
                    f"{stored.file}: {name} is {array.dtype} {list(array.shape)}, expected finite {dtype} {list(shape)}; "
                    "export the bundle again"
                )
        edits[node] = arrays
    return edits


def rank_of(node: EditNode, arrays: Sequence[np.ndarray]) -> int:
    """Rows of an edit's axis r; 1 for an op without one."""
    ranks = (array.shape[1] for bank, array in zip(node.spec.banks, arrays, strict=True) if "r" in bank.axes and array.ndim > 1)
    return next(ranks, 1)

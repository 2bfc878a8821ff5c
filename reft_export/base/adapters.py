"""Adapters that go onto one base: read by name, held to the base, and the edit nodes that they need of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.base.checkpoint import Checkpoint
from reft_export.base.classifiers import check_head
from reft_export.base.stored import Tensor
from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.edits.adapter import Adapter, load_adapter
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.edits.same_base import require_same, require_same_size, require_same_tensors
from runtimes.errors import InputError
from runtimes.files.folders import name_of

if TYPE_CHECKING:  # fold and every refusal run without torch, whose import takes longer
    from reft_export.base.load import Base

REMEDY = "pass the base it was trained on"


def load_adapters(folders: Sequence[Path]) -> dict[str, Adapter]:
    """Adapters by name, which is the folder's, or is given with it: ``name=folder``."""
    adapters: dict[str, Adapter] = {}
    for name, folder in map(_named, folders):
        if name in adapters:
            raise InputError(f"two adapters are called {name}; an adapter's name is its folder's: give one another with -a NAME={folder}")
        adapters[name] = load_adapter(folder)
    return adapters


def folders_of(adapters: Sequence[Path]) -> list[Path]:
    """Those that ``load_adapters`` reads."""
    return [folder for _, folder in map(_named, adapters)]


def _named(adapter: Path) -> tuple[str, Path]:
    name, equals, folder = str(adapter).partition("=")
    if not equals or Path(adapter).exists() or "/" in name:
        return name_of(Path(adapter)), Path(adapter)
    return check_adapter_name(name), Path(folder)


def check_fit(name: str, adapter: Adapter, base: Base, *, accept_base: bool = False) -> None:
    """Raises AdapterError, naming both models and in what they differ, for an adapter that was trained on another base.

    ``accept_base``: one of equal weights will do.
    """
    check_adapter_name(name)
    claim = f"adapter {name} was trained on"
    require_same(claim, adapter.base, "this base is", base.info, REMEDY, former=base.former_fingerprint, accept=accept_base)
    check_head(adapter, base.model)


def check_fit_to_files(name: str, adapter: Adapter, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """As ``check_fit``, by what the base's files tell before torch is loaded: its sizes, and its tensors' values."""
    check_adapter_name(name)
    claim = f"adapter {name} was trained on"
    require_same_size(claim, adapter.base, checkpoint.name, checkpoint.layers, checkpoint.width, REMEDY)
    require_same_tensors(claim, adapter.base, "this base is", checkpoint.name, {n: t.digest for n, t in tensors.items()}, REMEDY)


def union_nodes(adapters: Sequence[Adapter], sites: Sequence[Site], layers: int) -> tuple[EditNode, ...]:
    """The nodes of all adapters and sites; every block output where neither is given, so that adapters can come later."""
    nodes = {node for adapter in adapters for node in adapter.nodes()} | {EditNode(site=site) for site in sites}
    return tuple(sorted(nodes or {EditNode(site=Site(layer=layer)) for layer in range(layers)}))


def check_layers(nodes: Sequence[EditNode], name: str, layers: int) -> None:
    """Raises InputError for a node at a layer that the base ``name`` does not have."""
    for node in nodes:
        if node.site.layer >= layers:
            raise InputError(f"site {node.site}: layer {node.site.layer} does not exist in {name} ({layers} layers, 0 to {layers - 1})")

"""What a bundle and an engine share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.artifacts.adapter_record import AdapterRecord, read_adapter_record
from runtimes.artifacts.golden_schema import BASE_GOLDEN, GoldenSchema, read_golden
from runtimes.artifacts.manifest import Manifest
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.edits.positions import Positions
from runtimes.errors import BundleError


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


def not_held(folder: Path, *names: str) -> str:
    """What is to be said of adapters in ``Manifest.not_held``."""
    if len(names) == 1:
        which, added, them = f"adapter {names[0]} is", "it was", "it"
    else:
        which, added, them = f"adapters {', '.join(names)} are", "they were", "them"
    return (
        f"{which} not held against the eager model: {added} added to {folder} without the base; add {them} again with --model and --force"
    )

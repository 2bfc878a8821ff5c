"""A bundle with its graph changed, for as long as something is measured on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from graph_passes.accessors import dtype_of, name_of
from graph_passes.external import load_graph
from graph_passes.slots.add import rules_of
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE, Manifest, Quantization
from runtimes.errors import BundleError
from runtimes.files.claims import scratch_folder
from runtimes.files.folders import copy_file


@contextmanager
def variant(bundle: Bundle, change: Callable[[ir.Model], object]) -> Iterator[Bundle]:
    """A temporary bundle whose graph was changed, and whose weights are a copy: onnxruntime follows no link out of the graph's folder, and
    a hard link would change the bundle's own file. It lies beside the bundle where that can be written, and is gone afterwards.
    """
    with scratch_folder(_scratch_parent(bundle.folder) / bundle.folder.name, ".variant") as folder:
        graph = load_graph(bundle.graph_path)
        change(graph)
        ir.save(graph, folder / GRAPH_FILE)
        if (bundle.folder / DATA_FILE).is_file():
            copy_file(bundle.folder / DATA_FILE, folder / DATA_FILE)
        for name in bundle.adapter_names:
            (folder / "adapters").mkdir(exist_ok=True)
            for suffix in (bundle.adapter_file(name).suffix, ".json"):
                shutil.copyfile(bundle.folder / "adapters" / f"{name}{suffix}", folder / "adapters" / f"{name}{suffix}")
        yield Bundle(folder=folder, manifest=_as_changed(bundle.manifest, graph.graph))


def _as_changed(manifest: Manifest, graph: ir.Graph) -> Manifest:
    """Without the edit nodes, rules and inputs that the graph has no more, and with its types: a session holds one against the other."""
    left = {name_of(value) for value in (*graph.inputs, *graph.initializers.values())}
    types = {value.name: dtype_of(value).name.lower() for value in (*graph.inputs, *graph.outputs)}
    return replace(
        manifest,
        inputs=tuple(replace(record, dtype=types[record.name]) for record in manifest.inputs if record.name in types),
        outputs=tuple(replace(record, dtype=types[record.name]) for record in manifest.outputs),
        nodes=tuple(record for record in manifest.nodes if left.issuperset(record.node.bank_names)),
        rules=rules_of(graph),
    )


def quantization_of(bundle: Bundle) -> Quantization:
    """Raises BundleError for a float bundle."""
    if bundle.manifest.quantization is None:
        raise BundleError(f"{bundle.folder} is a float bundle, and what is measured here is of a quantized one")
    return bundle.manifest.quantization


def _scratch_parent(folder: Path) -> Path:
    parent = folder.resolve().parent
    return parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())

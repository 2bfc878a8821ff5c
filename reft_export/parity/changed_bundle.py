"""A bundle with its graph changed, for as long as something is measured on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from graph_passes.external import load_graph
from runtimes.artifacts.bundle import DATA_FILE, GRAPH_FILE, Bundle, Quantization
from runtimes.errors import BundleError
from runtimes.files.folders import copy_file


@contextmanager
def variant(bundle: Bundle, change: Callable[[ir.Model], object]) -> Iterator[Bundle]:
    """A temporary bundle whose graph was changed, and whose weights are a copy: onnxruntime follows no link out of the graph's folder, and
    a hard link would change the bundle's own file. It lies beside the bundle where that can be written, and is gone afterwards.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{bundle.folder.name}.", suffix=".variant", dir=_scratch_folder(bundle.folder)))
    try:
        graph = load_graph(bundle.graph_path)
        change(graph)
        ir.save(graph, folder / GRAPH_FILE)
        if (bundle.folder / DATA_FILE).is_file():
            copy_file(bundle.folder / DATA_FILE, folder / DATA_FILE)
        for name in bundle.adapter_names:
            (folder / "adapters").mkdir(exist_ok=True)
            for suffix in (".onnx_adapter", ".json"):
                shutil.copyfile(bundle.folder / "adapters" / f"{name}{suffix}", folder / "adapters" / f"{name}{suffix}")
        yield Bundle(folder=folder, manifest=bundle.manifest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quantization_of(bundle: Bundle) -> Quantization:
    """Raises BundleError for a float bundle."""
    if bundle.manifest.quantization is None:
        raise BundleError(f"{bundle.folder} is a float bundle, and what is measured here is of a quantized one")
    return bundle.manifest.quantization


def _scratch_folder(folder: Path) -> Path | None:
    parent = folder.resolve().parent
    return parent if os.access(parent, os.W_OK) else None

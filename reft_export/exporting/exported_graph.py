"""What every exporter hands on: a graph, and where its weights came from."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from runtimes.artifacts.manifest import WeightSource


@dataclass(frozen=True, kw_only=True)
class ExportedGraph:
    """``weights``: initializer name -> the checkpoint parameter it came from."""

    model: ir.Model
    weights: dict[str, WeightSource]
    note: str = ""
    """Why the graph is not the one that the target would like best; "" where it is."""

"""optimum-onnx's exporter: the graph that optimum-cli makes, for those who compare with it or ship it already.

Its linear weights are renamed by number, its attention is written out, and its graph takes position_ids.
"""

from __future__ import annotations

from pathlib import Path

from graph_passes.external import load_graph
from reft_export.base.load import Base
from reft_export.bundling.weight_sources import find_weight_sources
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.installed import check_optimum
from reft_export.exporting.process import folder_of, run_exporter


def export_optimum(base: Base, scratch: Path, *, opset: int) -> ExportedGraph:
    """The float32 graph of ``base``'s folder with its KV cache. Its weights stay in files under ``scratch`` until it is written.

    Raises BackendUnavailable as ``check_optimum`` does, ExportError with optimum's own reason for a family it cannot export.
    """
    check_optimum()
    arguments = ["--model", folder_of(base).resolve(), "--task", "text-generation-with-past", "--opset", str(opset), "--framework", "pt"]
    family = base.model.config.model_type
    run_exporter("optimum.exporters.onnx", [*arguments, "graph"], scratch, what=f"optimum could not export {family}")
    graph = load_graph(scratch / "graph" / "model.onnx")
    return ExportedGraph(model=graph, weights=find_weight_sources(graph, base.model))

"""Which function makes the graph, by task and exporter. Each route is imported when it is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.exporting.settings import ExportSettings
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.exporting.exported_graph import ExportedGraph

Route = Callable[["Base", Path, ExportSettings], "ExportedGraph"]
"""(base, a folder for the exporter's own files, settings) to the graph. The base's weights are rearranged in place."""


def _classifier(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    from reft_export.exporting.dynamo_classifier import export_classifier

    return export_classifier(base.model, opset=settings.opset)


def _builder(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    from reft_export.exporting.builder import export_builder

    return export_builder(base, scratch, precision=settings.float_type, last_logits=settings.logits == "last")


def _optimum(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    from reft_export.exporting.optimum import export_optimum

    return _plain(export_optimum(base, scratch, opset=settings.opset), settings)


def _transformers(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    from reft_export.exporting.transformers import export_transformers

    return _plain(export_transformers(base.model, opset=settings.opset, last_logits=settings.logits == "last"), settings)


def _dynamo(base: Base, scratch: Path, settings: ExportSettings) -> ExportedGraph:
    from reft_export.exporting.dynamo import export_dynamo
    from reft_export.exporting.repeated import export_repeated

    in_place = settings.target == "onnxruntime"
    last = settings.logits == "last"
    return export_repeated(
        base.model,
        lambda model, variable: export_dynamo(model, opset=settings.opset, last_logits=last, in_place=in_place, variable=variable),
    )


def _plain(exported: ExportedGraph, settings: ExportSettings) -> ExportedGraph:
    """An exporter's own graph, which writes attention out whatever the target."""
    if settings.target == "tensorrt":
        return exported
    return replace(exported, note=f"the KV cache is copied at every step, as in every graph of --exporter {settings.exporter}")


ROUTES: dict[tuple[str, str], Route] = {
    (TEXT_GENERATION, "dynamo"): _dynamo,
    (TEXT_GENERATION, "builder"): _builder,
    (TEXT_GENERATION, "optimum"): _optimum,
    (TEXT_GENERATION, "transformers"): _transformers,
    (TEXT_CLASSIFICATION, "dynamo"): _classifier,
}

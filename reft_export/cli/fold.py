"""``reft-export fold``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.console import guarded, out, print_json, progress
from reft_export.cli.options import Adapters, AsJson, Force, Output, Sites, Slots, parse_sites

if TYPE_CHECKING:
    from reft_export.fold_edge import EdgeFoldResult


def register(app: typer.Typer) -> None:
    app.command("fold")(guarded(fold))


def fold(
    graph: Annotated[Path, typer.Argument(help="An ONNX decoder with a KV cache, or an encoder classifier: the file or its folder.")],
    output: Output,
    adapters: Adapters = None,
    slots: Slots = "graph",
    sites: Sites = "",
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="TensorRT-Edge-LLM: weight files that its runtime switches, in place of constants.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fold adapters into an ONNX decoder, or classifier, that you already have; the input is never written to.

    TensorRT-Edge-LLM's exports stay what they are.
    """
    from reft_export.fold import fold_bundle
    from reft_export.fold_edge import EdgeFoldResult

    with progress() as report:
        result = fold_bundle(
            graph, list(adapters or []), output, slots=slots, sites=parse_sites(sites), as_lora=as_lora, force=force, report=report
        )
    if isinstance(result, EdgeFoldResult):
        _show_edge(result, output, as_json)
        return
    if as_json:
        print_json({"bundle": str(output), "nodes": [n.name for n in result.nodes], "found": result.found})
        return
    for name, how in result.found.items():
        out.print(f"{name}: {how}")
    out.print(f"{output}: {len(result.nodes)} edit nodes, adapters: {', '.join(result.adapters) or 'none'}")
    out.print(
        "an ONNX graph does not say which checkpoint it came from, so the adapters' fingerprints are not checked yet, and there are no "
        f"golden arrays: `reft-export parity {output} -m MODEL` does both"
    )


def _show_edge(result: EdgeFoldResult, output: Path, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "edge_llm": str(output),
                "adapters": result.adapters,
                "nodes": [n.name for n in result.nodes],
                "found": result.found,
                "layout": result.layout,
                "build": result.build,
                "notes": result.notes,
            }
        )
        return
    for name, how in result.found.items():
        out.print(f"{name}: {how}")
    out.print(f"{output}: {len(result.nodes)} edit nodes, adapters: {', '.join(result.adapters)}; the engine is built as before:")
    for line in (*result.build, *result.notes):
        out.print(f"  {line}", markup=False)

"""``reft-export fold``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.guard import guarded, parity_failed
from reft_export.cli.hub_adapters import here
from reft_export.cli.options import AcceptBase, Adapters, AsJson, Force, Output, Sites, parse_sites
from reft_export.console import out, print_json, print_parity, progress

if TYPE_CHECKING:
    from reft_export.folding.edge_llm import EdgeLLMFoldResult
    from reft_export.folding.fold import FoldResult


def register(app: typer.Typer) -> None:
    app.command("fold")(guarded(fold))


def fold(
    graph: Annotated[Path, typer.Argument(help="An ONNX decoder with a KV cache, or an encoder classifier: the file or its folder.")],
    output: Output,
    adapters: Adapters = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The base that the graph was exported from: fingerprints and parity are checked, and the bundle can be quantized.",
        ),
    ] = None,
    sites: Sites = "",
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="TensorRT-Edge-LLM: weight files that its runtime switches, in place of constants.")
    ] = False,
    accept_base: AcceptBase = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fold adapters into an ONNX decoder, or classifier, that you already have; the input is never written to.

    TensorRT-Edge-LLM's exports stay what they are.
    """
    from reft_export.folding.edge_llm import EdgeLLMFoldResult
    from reft_export.folding.fold import fold_bundle
    from runtimes.errors import ParityError

    folders, chosen = here(adapters), parse_sites(sites)
    try:
        with progress() as report:
            result = fold_bundle(
                graph,
                folders,
                output,
                sites=chosen,
                as_lora=as_lora,
                model=model,
                accept_base=accept_base,
                force=force,
                report=report,
            )
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    if isinstance(result, EdgeLLMFoldResult):
        _show_edge_llm(result, output, as_json)
    else:
        _show_bundle(result, output, with_base=model is not None, as_json=as_json)


def _show_bundle(result: FoldResult, output: Path, *, with_base: bool, as_json: bool) -> None:
    if as_json:
        parity = None if result.parity is None else json.loads(result.parity.to_json())
        nodes = [n.name for n in result.nodes]
        print_json({"bundle": str(output), "nodes": nodes, "found": result.found, "parity": parity, "not_run": result.not_run})
        return
    for name, how in result.found.items():
        out.print(f"{name}: {how}", markup=False)
    if result.parity is not None:
        print_parity(result.parity)
    out.print(f"{output}: {len(result.nodes)} edit nodes, adapters: {', '.join(result.adapters) or 'none'}", markup=False)
    if result.not_run:
        out.print(f"no step of it was run here: {result.not_run}", markup=False)
    if with_base:
        return
    remedy = f"fold with -m MODEL does both, or `reft-export parity {output} -m MODEL`"
    if result.quantized:
        remedy = f"its {result.quantized} quantized weights are no checkpoint's, so no eager model is its equal"
    out.print(
        "an ONNX graph does not say which checkpoint it came from, so the adapters' fingerprints are not checked, and there are no "
        f"golden arrays: {remedy}",
        markup=False,
    )


def _show_edge_llm(result: EdgeLLMFoldResult, output: Path, as_json: bool) -> None:
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
        out.print(f"{name}: {how}", markup=False)
    adapters = ", ".join(result.adapters)
    out.print(f"{output}: {len(result.nodes)} edit nodes, adapters: {adapters}; the engine is built as before:", markup=False)
    for line in (*result.build, *result.notes):
        out.print(f"  {line}", markup=False)

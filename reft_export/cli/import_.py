"""``reft-export import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Force, Model, Output
from reft_export.console import escape, out, print_json, progress


def register(app: typer.Typer) -> None:
    app.command("import")(guarded(import_))


def import_(
    foreign: Annotated[Path, typer.Argument(help="A pyreft or AdapterHub folder, RED's .pth, or a .gguf, .npz or .safetensors file.")],
    model: Model,
    output: Output,
    format: Annotated[
        str | None, typer.Option("--format", help="pyreft, adapterhub, red, gguf, npz, safetensors; default: detected.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="Which tokens are edited: f2+l2, f3, l1, prompt, all. pyreft does not record it.")
    ] = None,
    tied: Annotated[
        bool | None, typer.Option("--tied/--untied", help="pyreft's share_weights: one edit for prefix and suffix, or one each.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", help="pyreft's act_fn: none, relu, gelu, gelu_tanh, silu, tanh, sigmoid.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="noreft or direft, where the files are the same (AdapterHub without orthogonality).")
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option("--stream", help="Vectors without one: block_output, block_input, attention_output, mlp_output. RED asks for it."),
    ] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Vectors, RED: the layers to edit, 3, 8-16 or 3;9.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="Steering vectors: their strength; default 1.")] = None,
    subspace: Annotated[
        str | None,
        typer.Option("--subspace", help="Of an edit in subspaces: parts, or rows, by number, 0, 0-3, 0;2 or all; of ours by name."),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option("--probes", help="JSONL as train reads it: up to 32 lines that it is measured on. Also for an adapter of ours."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Turn another library's adapter into an adapter folder. What its format does not record is asked for, never guessed."""
    from reft_export.importing.foreign import Request
    from reft_export.importing.importer import OWN, import_adapter
    from runtimes.edits.form import described

    request = Request(
        positions=positions,
        tied=tied,
        activation=activation,
        method=method,
        layers=layers,
        scale=scale,
        stream=stream,
        subspace=subspace,
    )
    with progress() as report:
        result = import_adapter(foreign, model, output, request, format=format, probes=probes, force=force, report=report)
    a = result.adapter
    if as_json:
        print_json(
            {
                "adapter": str(output),
                "format": result.format,
                "method": a.method,
                "rank": a.rank,
                "forms": {str(site): str(form) for site, form in a.forms.items()},
                "positions": str(a.positions),
                "tied": a.tied,
                "activation": a.activation,
                "sites": [str(s) for s in a.sites],
                "base": a.base.name,
                "probes": len(a.probes),
                "notes": list(result.notes),
            }
        )
        return
    for note in result.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    if result.format == OWN:
        what = "the adapter" if subspace is None else f"its subspace {subspace}, {described(a.site_forms)}"
        out.print(escape(f"{output}: {what}, with {len(a.probes)} probes" + ("" if probes is None else f" of {probes}")))
        return
    form = f"{described(a.site_forms)}, {'tied' if a.tied else 'untied'}"
    said = f", {len(a.probes)} probes" if a.probes else ""
    out.print(escape(f"{output}: {form}, positions {a.positions}, {len(a.sites)} sites{said}; from {result.format}, for {a.base.name}"))
    out.print(f"{result.format} does not fingerprint its base: that this one has its width and layers is all that could be checked")

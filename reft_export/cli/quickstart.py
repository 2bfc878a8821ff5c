"""``reft-export quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import Force


def register(app: typer.Typer) -> None:
    app.command("quickstart")(guarded(quickstart))


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter, the bundles and the report.")] = Path(
        "quickstart-out"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="smollm2 (what `make models` downloads, in real-models of the current folder), or a folder or .gguf file of a chat model: "
            "the story of a real one, in minutes. Default: the built-in tiny model.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """The whole story on the built-in tiny model, offline, or on a real one: train, export, fold, quantize, run, prove."""
    from reft_export.quickstart.subjects import subject_of
    from runtimes.files.folders import check_destination

    subject = subject_of(model)
    check_destination(output, force=force)
    # torch, when there is nothing more to refuse
    from reft_export.quickstart.story import tell

    tell(output, subject, force=force)

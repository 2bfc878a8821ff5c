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
    force: Force = False,
) -> None:
    """The whole story on the built-in tiny model, offline: train, export, fold, quantize, run, prove."""
    from reft_export.quickstart.story import tell

    tell(output, force=force)

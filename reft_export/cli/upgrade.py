"""``reft-export upgrade``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Force
from reft_export.console import escape, out, print_json, progress


def register(app: typer.Typer) -> None:
    app.command("upgrade")(guarded(upgrade))


def upgrade(
    path: Annotated[Path, typer.Argument(help="An adapter folder, a bundle folder or an engine folder of version 1.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write; default: in its place, in one step.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite files of version 1 as version 2, which carry digests. Weights and edits stay as they are, to the bit."""
    from runtimes.upgrade import upgrade_folder

    with progress() as report:
        upgraded = upgrade_folder(path, output, force=force, report=report)
    if as_json:
        print_json({"kind": upgraded.kind, "written": None if upgraded.written is None else str(upgraded.written)})
    elif upgraded.written is None:
        out.print(escape(f"{path}: this {upgraded.kind} is of version 2 already; nothing was written"))
    else:
        out.print(escape(f"{upgraded.written}: the {upgraded.kind}, version 2, every hash checked"))

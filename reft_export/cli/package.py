"""``reft-export package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Force
from reft_export.console import escape, out, print_json, progress, size


def register(app: typer.Typer) -> None:
    app.command("package")(guarded(package))


def package(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    wheels: Annotated[
        Path | None, typer.Option("--wheels", help="A folder of wheels for the device: reft-export's, onnxruntime's and what they need.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write the archive and its checksum to.")] = None,
    archive: Annotated[bool, typer.Option("--archive", help="A tarball with an install script, for a device without a network.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Pack a bundle with all that it is installed from, for a device without a network."""
    from reft_export.packaging.archive import package_archive
    from runtimes.errors import InputError
    from runtimes.open import open_artifact

    if not archive or wheels is None or output is None:
        missing = [name for name, given in {"--archive": archive, "--wheels": wheels, "-o": output}.items() if not given]
        raise InputError(f"missing: {', '.join(missing)}; say reft-export package BUNDLE --archive --wheels WHEELS -o OUT")
    opened = open_artifact(bundle, verify=True)
    with progress() as report:
        report("packing")
        made = package_archive(opened, wheels, output, force=force)
    if as_json:
        print_json({"archive": str(made.archive), "sha256": made.sha256, "files": made.files, "bytes": made.size})
        return
    out.print(
        escape(f"{made.archive}: {size(made.size)}, {made.files} files; on the device: tar xf {made.archive.name}, then install.sh in it")
    )

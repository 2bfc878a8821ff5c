"""``reft-export package``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Force
from reft_export.console import escape, out, print_json, progress, size

if TYPE_CHECKING:
    from runtimes.artifacts.artifact import Artifact


def register(app: typer.Typer) -> None:
    app.command("package")(guarded(package))


def package(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    wheels: Annotated[
        Path | None,
        typer.Option("--wheels", help="Of --archive: a folder of wheels for the device: reft-export's, onnxruntime's and what they need."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write to.")] = None,
    archive: Annotated[bool, typer.Option("--archive", help="A tarball with an install script, for a device without a network.")] = False,
    triton: Annotated[
        bool, typer.Option("--triton", help="A model repository for Triton's onnxruntime backend, and a client of it.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Pack a bundle for a device without a network, with all that it is installed from, or for a Triton server."""
    from runtimes.errors import InputError
    from runtimes.open import open_artifact

    if archive == triton or output is None or (wheels is None) == archive:
        raise InputError(
            "say reft-export package BUNDLE --archive --wheels WHEELS -o OUT, or reft-export package BUNDLE --triton -o OUT; got "
            + (" ".join(_given(archive=archive, triton=triton, wheels=wheels, output=output)) or "neither")
        )
    opened = open_artifact(bundle, verify=True)
    with progress() as report:
        report("packing")
        if wheels is None:
            _triton(opened, output, force=force, as_json=as_json)
        else:
            _archive(opened, wheels, output, force=force, as_json=as_json)


def _given(**options: object) -> list[str]:
    return [f"--{name}" for name, value in options.items() if value]


def _archive(opened: Artifact, wheels: Path, output: Path, *, force: bool, as_json: bool) -> None:
    from reft_export.packaging.archive import package_archive

    made = package_archive(opened, wheels, output, force=force)
    if as_json:
        print_json({"archive": str(made.archive), "sha256": made.sha256, "files": made.files, "bytes": made.size})
        return
    out.print(
        escape(f"{made.archive}: {size(made.size)}, {made.files} files; on the device: tar xf {made.archive.name}, then install.sh in it")
    )


def _triton(opened: Artifact, output: Path, *, force: bool, as_json: bool) -> None:
    from reft_export.packaging.triton import package_triton

    made = package_triton(opened, output, force=force)
    if as_json:
        about = {"model": made.model, "adapters": list(made.adapters), "left_out": list(made.left_out)}
        print_json({"repository": str(made.folder / "models"), **about})
        return
    out.print(escape(f"{made.folder / 'models'}: {made.model}, adapters {', '.join(made.adapters) or 'none'}; how to ask: README.md"))
    if made.left_out:
        out.print(escape(f"left out, as no graph computes their positions: {', '.join(made.left_out)}"))

"""``reft-export parity``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AcceptBase, AsJson, Kernel, Provider, check_session_options
from reft_export.console import print_parity, progress


def register(app: typer.Typer) -> None:
    app.command("parity")(guarded(parity))


def parity(
    bundle: Annotated[Path, typer.Argument(help="A bundle or engine folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The base: runs eager PyTorch again, for every rung of a bundle; without it, the golden arrays serve."
        ),
    ] = None,
    provider: Provider = None,
    kernel: Kernel = None,
    full: Annotated[bool, typer.Option("--full", help="Show every rung, not the worst of each kind.")] = False,
    report_file: Annotated[Path | None, typer.Option("--report", help="Also write the report as JSON to this file.")] = None,
    accept_base: AcceptBase = False,
    verify: Annotated[bool, typer.Option("--verify", help="Hash large files again, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold a bundle or an engine against eager PyTorch; exits 3 when a budget is missed."""
    from reft_export.parity.check import check_parity
    from runtimes.errors import InputError, ParityError
    from runtimes.files.placed import place

    check_session_options(provider, kernel)
    if report_file is not None and not report_file.absolute().parent.is_dir():
        raise InputError(f"--report {report_file}: its folder does not exist")
    # A miss leaves the stages as any refusal does: what is quick ends in its one line.
    with suppress(ParityError), progress() as say:
        report = check_parity(bundle, model, provider=provider, kernel=kernel, accept_base=accept_base, verify=verify, report=say)
        report.require()
    if report_file is not None:
        place(report_file, f"{report.to_json()}\n".encode())
    if as_json:
        typer.echo(report.to_json())
    else:
        print_parity(report, title=f"{bundle} against {'eager PyTorch' if model else 'its golden arrays'}", full=full)
    report.require()

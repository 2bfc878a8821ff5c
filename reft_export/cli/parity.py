"""``reft-export parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.console import guarded, print_parity, progress
from reft_export.cli.options import AsJson, Kernel, Provider, check_session_options


def register(app: typer.Typer) -> None:
    app.command("parity")(guarded(parity))


def parity(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The base: runs eager PyTorch again, for every rung; without it, the golden arrays serve."),
    ] = None,
    provider: Provider = "cpu",
    kernel: Kernel = None,
    full: Annotated[bool, typer.Option("--full", help="Show every rung, not the worst of each kind.")] = False,
    report_file: Annotated[Path | None, typer.Option("--report", help="Also write the report as JSON to this file.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash large files again, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold a bundle against eager PyTorch; exits 3 when a budget is missed."""
    from runtimes.bundle import open_bundle
    from runtimes.errors import InputError
    from runtimes.golden import check_golden

    check_session_options(provider, kernel)
    if report_file is not None and not report_file.absolute().parent.is_dir():
        raise InputError(f"--report {report_file}: its folder does not exist")
    opened = open_bundle(bundle, verify=verify)
    with progress() as say:
        if model is not None:
            from reft_export.parity import host_ladder

            report = host_ladder(opened, model, provider=provider, kernel=kernel, report=say)
        else:
            from runtimes.ort_session import OrtSession

            say("running the golden inputs")
            report = check_golden(opened, OrtSession(opened, provider=provider, kernel=kernel))
    if report_file is not None:
        report_file.write_text(report.to_json() + "\n", encoding="utf-8")
    if as_json:
        typer.echo(report.to_json())
    else:
        print_parity(report, title=f"{bundle} against {'eager PyTorch' if model else 'its golden arrays'}", full=full)
    report.require()

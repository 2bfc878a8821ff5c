"""``reft-export add``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.export import show_forecast, show_result
from reft_export.cli.guard import guarded, parity_failed
from reft_export.cli.hub_adapters import here
from reft_export.cli.options import AcceptBase, AcceptLoss, Adapters, AsJson, DryRun, MinRetention, refuse_given
from reft_export.console import progress
from reft_export.parity.quality import MIN_RETENTION, QualityGate

GOES_IN = ("adapters", "model", "min_retention", "accept_loss", "accept_base")
"""Parameters that are of adapters that come, by what typer calls them."""


def register(app: typer.Typer) -> None:
    app.command("add")(guarded(add))


def add(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle, float or quantized; it stays whole whatever happens.")],
    adapters: Adapters = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The base, as for export: the bundle is held against eager PyTorch. Without it the adapter is marked as not held.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; default: the bundle itself, replaced in one step.")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="An adapter to take out, by name; repeat for several.")] = None,
    min_retention: MinRetention = MIN_RETENTION,
    accept_loss: AcceptLoss = False,
    accept_base: AcceptBase = False,
    force: Annotated[bool, typer.Option("--force", help="Replace adapters of the same names, and an existing output.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put adapters into a finished bundle, or take them out, in seconds: nothing is exported again."""
    from reft_export.adding.add import add_adapter, plan_addition, plan_removal, remove_adapter
    from runtimes.errors import ParityError

    if remove:
        refuse_given(context, GOES_IN, "for adapters that come, and --remove takes some out")
        if dry_run:
            from reft_export.forecast import forecast_removal

            show_forecast(forecast_removal(plan_removal(bundle, remove, output=output, force=force), remove), as_json=as_json)
            return
        with progress() as report:
            result = remove_adapter(bundle, remove, output=output, force=force, report=report)
        show_result(output or bundle, result, as_json=as_json)
        return
    adapters = here(adapters)
    if dry_run:
        from reft_export.forecast import forecast_addition

        plan = plan_addition(bundle, adapters, model=model, output=output, accept_base=accept_base, force=force)
        show_forecast(forecast_addition(*plan, model), as_json=as_json)
        return
    if model is None:
        refuse_given(context, ("min_retention", "accept_loss"), "of what is held against eager PyTorch, with --model")
    quality = QualityGate(min_retention=min_retention, accept_loss=accept_loss)
    try:
        with progress() as report:
            result = add_adapter(
                bundle,
                adapters,
                model=model,
                output=output,
                quality=quality,
                accept_base=accept_base,
                force=force,
                report=report,
            )
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    show_result(output or bundle, result, as_json=as_json)

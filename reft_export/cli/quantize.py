"""``reft-export quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.console import guarded, parity_failed, progress
from reft_export.cli.export import show_result
from reft_export.cli.options import AccuracyLevel, AsJson, BlockSize, Force, Model, Output, check_choice


def register(app: typer.Typer) -> None:
    app.command("quantize")(guarded(quantize))


def quantize(
    bundle: Annotated[Path, typer.Argument(help="A float bundle.")],
    model: Model,
    output: Output,
    precision: Annotated[str, typer.Option("--precision", "-p", help="int4 or int8.")] = "int4",
    scheme: Annotated[str, typer.Option("--scheme", help="weight-only: blockwise, activations stay in float.")] = "weight-only",
    block_size: BlockSize = 32,
    accuracy_level: AccuracyLevel = 4,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a bundle's base weights; the edits stay in the graph's float type, and parity is proven on the same weights."""
    from calibration.weight_only import WeightOnlySettings
    from reft_export.quantize import quantize_bundle
    from runtimes.errors import ParityError

    check_choice("--precision", precision, ("int4", "int8"))
    check_choice("--scheme", scheme, ("weight-only",))
    settings = WeightOnlySettings(bits=int(precision[3:]), block_size=block_size, accuracy_level=accuracy_level)
    try:
        with progress() as report:
            result = quantize_bundle(bundle, model, output, settings, force=force, report=report)
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    show_result(output, result, as_json=as_json)

"""The ``reft-export`` command."""

from __future__ import annotations

import typer

from reft_export.cli import bench, build, doctor, export, fold, import_, inspect, parity, quantize, quickstart, run, train
from reft_export.cli.once import OnceTyper
from runtimes.version import VERSION

app = OnceTyper(
    name="reft-export",
    help="Train a ReFT intervention, fold it into an ONNX decoder, quantize it, run it on a device, and prove it is the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"reft-export {VERSION}")
        raise typer.Exit


@app.callback()
def top_level(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Train a ReFT intervention, fold it into an ONNX decoder, quantize it, run it on a device, and prove it is the same."""


for verb in (quickstart, train, import_, export, fold, quantize, build, run, parity, bench, inspect, doctor):
    verb.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()

"""The ``reft-export`` command."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from io import TextIOWrapper

import typer

from reft_export.cli.once import OnceTyper
from reft_export.cli.usage import OneLineGroup
from runtimes.version import VERSION

VERBS = {
    name: f"reft_export.cli.{name.replace('import', 'import_')}"
    for name in (
        "quickstart",
        "train",
        "sweep",
        "steer",
        "import",
        "compose",
        "export",
        "fold",
        "quantize",
        "add",
        "build",
        "run",
        "serve",
        "parity",
        "evaluate",
        "bench",
        "inspect",
        "package",
        "push",
        "pull",
        "upgrade",
        "doctor",
    )
}
"""The module of each, in the order of --help."""


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"reft-export {VERSION}")
        raise typer.Exit


def top_level(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """Train a ReFT intervention, fold it into an ONNX decoder, quantize it, run it on a device, and prove it is the same."""


def application(verbs: Iterable[str] = VERBS) -> OnceTyper:
    app = OnceTyper(
        name="reft-export",
        cls=OneLineGroup,
        help=top_level.__doc__,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(top_level)
    for verb in verbs:
        import_module(VERBS[verb]).register(app)
    return app


def __getattr__(name: str) -> OnceTyper:
    """``app`` is all of it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return application()


def main() -> None:
    """A verb that is named is all that is imported: each takes a while, and all are needed for --help alone."""
    # torch's threads wait busily for each other by default: where another process has one's core, most of the time goes there.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding has not
    try:
        application([verb] if verb in VERBS else VERBS)()
    finally:
        gc.freeze()  # what is left goes with the process: to look through it once more takes an eighth of a short answer's time


if __name__ == "__main__":
    main()

"""What every verb is wrapped in: a user's mistake becomes one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar, get_type_hints

import typer

from reft_export.console import err, escape, interrupt, print_parity
from runtimes.errors import ParityError, ReftError
from runtimes.files.folders import NO_SPACE, disk_is_full

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
"""The exit code of errors that stand for a signal: its own takes the place."""
LONGEST = 300
"""Characters of a message that is not ours."""
LONGEST_LINE = 1200
"""Characters of an error: one that lists what is known is shorter."""
NOT_ERRORS = (typer.Exit, typer.Abort, SystemExit, GeneratorExit)
DEBUG = Parameter(
    "debug",
    Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error too.")],
)

HOST_EXTRAS = {
    "torch": "host",
    "transformers": "host",
    "huggingface_hub": "host",
    "onnx": "host",
    "onnx_ir": "host",
    "onnxscript": "host",
    "accelerate": "host",
    "gguf": "host",
    "onnxruntime": "cpu",
    "onnxruntime_genai": "genai",
    "datasets": "data",
    "pyarrow": "data",
    "optuna": "sweep",
    "fastapi": "serve",
    "pydantic": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "ray": "cluster",
}


def guarded(verb: Callable[P, R]) -> Callable[..., R]:
    """Runs a verb; what goes wrong ends in one line on stderr and an exit code, and in a traceback above it with ``--debug`` alone."""

    @wraps(verb)
    def run(*args: Any, debug: bool = False, **options: Any) -> R:
        interrupt.listen()
        try:
            return verb(*args, **options)
        except NOT_ERRORS:
            raise
        except BrokenPipeError:
            sys.stderr.close()  # the reader of a pipe went away: there is nobody to tell
            raise typer.Exit(1) from None
        except BaseException as e:  # a panic of a Rust library is no Exception
            if debug:
                err.print(traceback.format_exc(), markup=False)
            message, code = _told(e, verb.__name__)
            if _is_said_by_another(e):
                raise typer.Exit(code) from None
            fail(message, code)

    hints = get_type_hints(verb, include_extras=True)
    own = [each.replace(annotation=hints[each.name]) for each in signature(verb).parameters.values()]
    made: Any = run
    made.__signature__ = Signature([*own, DEBUG])
    made.__annotations__ = {each.name: each.annotation for each in (*own, DEBUG)}
    return run


def _told(e: BaseException, verb: str) -> tuple[str, int]:
    """(one line, the exit code)."""
    if interrupt.seen or isinstance(e, KeyboardInterrupt):
        stated = isinstance(e, KeyboardInterrupt) or getattr(e, "exit_code", None) == INTERRUPTED
        return (str(e) if stated else "") or interrupt.said, interrupt.exit_code
    if isinstance(e, ReftError):
        return str(e), e.exit_code
    if isinstance(e, RecursionError):
        return "what was read is nested too deeply to be followed: it is damaged, or no model; export or fetch it again", 2
    if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded
        return "out of memory; close other programs or use a smaller model (--dry-run forecasts the need)", 1
    if isinstance(e, ModuleNotFoundError) and (extra := HOST_EXTRAS.get((e.name or "").partition(".")[0])):
        # A device that builds an engine has no use for torch.
        return f"{e.name} is not installed; pip install 'reft-export[{'build' if (verb, extra) == ('build', 'host') else extra}]'", 4
    if disk_is_full(e):
        return f"{NO_SPACE}; no output was written", 1
    if isinstance(e, OSError) and e.filename is not None:
        return f"{e.filename} cannot be read or written: {e.strerror}", 2
    said = " ".join(str(e).split())[:LONGEST] or "without a word"
    return f"{type(e).__name__}: {said}; this is a bug of reft-export: run it again with --debug, and report what that shows", 1


def _is_said_by_another(e: BaseException) -> bool:
    """Of the processes that a launcher started for one verb each meets the same refusals and is stopped by the same signal: the first says
    so."""
    from reft_export.training.processes import leads

    return not leads() and isinstance(e, (ReftError, KeyboardInterrupt)) and not getattr(e, "of_one_process", False)


def fail(message: str, code: int) -> NoReturn:
    said = " ".join(message.split())
    if len(said) > LONGEST_LINE:  # a value of a file's, which could be all of the file
        said = f"{said[: LONGEST_LINE // 2]} .. {said[-LONGEST_LINE // 2 :]}"
    with suppress(OSError):  # where the terminal has hung up, the exit code says it all
        err.print(f"[bold red]error:[/] {escape(said)}")
    raise typer.Exit(code) from None


def parity_failed(e: ParityError, *, as_json: bool) -> None:
    """Shows the figures of a failed gate before the error line."""
    from runtimes.parity.figures import ParityReport

    if not isinstance(e.report, ParityReport):
        return
    if as_json:
        sys.stdout.write(e.report.to_json() + "\n")
    else:
        print_parity(e.report, title="parity (failed)")

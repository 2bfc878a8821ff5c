"""What every verb is wrapped in: a user's mistake becomes one line and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec, TypeVar

import typer

from reft_export.console import err, escape, interrupt, print_parity
from runtimes.errors import ParityError, ReftError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130
"""128 + SIGINT, what a shell expects after Ctrl-C."""

HOST_EXTRAS = {
    "torch": "host",
    "transformers": "host",
    "onnx": "host",
    "onnx_ir": "host",
    "onnxscript": "host",
    "accelerate": "host",
    "gguf": "host",
    "onnxruntime": "cpu",
    "onnxruntime_genai": "genai",
}


def guarded(verb: Callable[P, R]) -> Callable[P, R]:
    """Runs a verb; a user's mistake ends in one line on stderr and the error's exit code, never in a traceback."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        interrupt.listen()
        try:
            return verb(*args, **kwargs)
        except ReftError as e:
            fail(str(e), e.exit_code)
        except KeyboardInterrupt as e:
            fail(str(e) or "interrupted", INTERRUPTED)
        except MemoryError:
            fail("out of memory; close other programs or use a smaller model (--dry-run forecasts the need)", 1)
        except ModuleNotFoundError as e:
            extra = HOST_EXTRAS.get((e.name or "").partition(".")[0])
            if extra is None:
                raise
            fail(f"{e.name} is not installed; pip install 'reft-export[{extra}]'", 4)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of a pipe went away: there is nobody to tell
            raise typer.Exit(1) from None
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                fail("no space left on the disk; nothing was written", 1)
            if e.filename is None:
                raise
            fail(f"{e.filename} cannot be read or written: {e.strerror}", 2)

    return run


def fail(message: str, code: int) -> NoReturn:
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")
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

"""What a command line that cannot be read is told: one line, as of every refusal, in place of click's boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup

from reft_export.cli.guard import fail

UsageError: type[Exception] = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "UsageError")
"""click's, or typer's copy of it, by typer's version."""
LONGEST_VALUE = 40
"""Characters of a value that is repeated to whoever gave it."""


@contextmanager
def read_in_one_line(ctx: Any, args: Sequence[str]) -> Iterator[None]:
    """Within, ``args`` are read for the command of ``ctx``: what click refuses becomes one line with its suggestions, and exit code 2."""
    try:
        yield
    except UsageError as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            raise  # it shows the help
        said = " ".join(e.format_message().split()).removesuffix(".")  # pyright: ignore[reportAttributeAccessIssue]
        what, meant, which = (said[:1].lower() + said[1:]).partition(". Did you mean ")
        got = _given(ctx, args, e)
        verb = "reft-export" if ctx.parent is None else f"reft-export {ctx.info_name}"
        said = f"{what} (did you mean {which})" if meant else what
        fail(f"{said}{'' if got is None else f', not {shown(got)!r}'}; see {verb} --help", 2)


def shown(value: str) -> str:
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}.."


def _given(ctx: Any, args: Sequence[str], error: Any) -> str | None:
    """The value that was of the wrong type or out of range, as it was typed; click does not always say it."""
    parameter = getattr(error, "param", None)
    if parameter is None or type(error).__name__ == "MissingParameter":
        return None
    with suppress(UsageError):
        values, _, _ = ctx.command.make_parser(ctx).parse_args(list(args))
        value = values.get(parameter.name)
        return value if isinstance(value, str) and value not in error.message else None
    return None


class OneLineGroup(TyperGroup):
    """The application, whose own options and whose verbs' names are read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with read_in_one_line(ctx, list(args)):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        with read_in_one_line(ctx, list(args)):
            return super().resolve_command(ctx, args)

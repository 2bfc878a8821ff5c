"""Commands whose options of one value are given once: of two values click would take the last, and drop the other without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from reft_export.cli.guard import fail
from reft_export.cli.usage import read_in_one_line, shown

SEPARATORS = {
    ("train", "layers"): ("layers", ";"),
    ("train", "stream"): ("streams", ";"),
    ("import", "layers"): ("layers", ";"),
    ("export", "sites"): ("sites", ";"),
    ("fold", "sites"): ("sites", ";"),
    ("quantize", "mixture"): ("shares", ","),
}
"""By verb and parameter, options whose one value holds several: what those are, and what stands between them."""
ONE_FILE = "join the files to one"
REMEDIES = {
    ("train", "start"): "training goes on from one adapter",
    ("run", "adapter"): "one adapter answers; in a file of --prompts each line may name its own",
    ("run", "prompts"): f"{ONE_FILE}, or pipe them into --prompts -",
    ("quantize", "calibrate"): ONE_FILE,
    ("quantize", "refit"): ONE_FILE,
    ("quantize", "checker_data"): ONE_FILE,
    ("quantize", "perplexity"): ONE_FILE,
    ("build", "freeze"): "one adapter becomes part of an engine; build one engine for each",
}
"""By verb and parameter, what to do instead where that is not just to leave one of them out."""


class OnceCommand(TyperCommand):
    """A verb that refuses a repeated option, unless the option takes several (a list), in one line with exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for arg in args:
            try:
                arg.encode()
            except UnicodeEncodeError:  # bytes that are no UTF-8 come as halves of surrogates
                fail(f"argument {arg!r} is not UTF-8; type it in a UTF-8 terminal, or rename the file", 2)
        with read_in_one_line(ctx, list(args)):
            if not ctx.resilient_parsing:
                self._refuse_repeats(ctx, args)
            return super().parse_args(ctx, args)

    def _refuse_repeats(self, ctx: Any, args: Sequence[str]) -> None:
        # click's own class of options, or typer's copy of it, by typer's version.
        options: list[Any] = [p for p in self.get_params(ctx) if p.param_type_name == "option" and not p.multiple]
        # The command's own parser, told to keep every value: what counts as an option and what as its value is its decision.
        parser = self.make_parser(ctx)
        for option in options:
            for name in (*option.opts, *option.secondary_opts):
                if option.is_flag:
                    parser.add_option(obj=option, opts=[name], dest=option.name, action="append_const", const=name)
                else:
                    parser.add_option(obj=option, opts=[name], dest=option.name, action="append", nargs=option.nargs)
        values, _, _ = parser.parse_args(list(args))
        if any(option.is_eager and option.name in values for option in options):
            return  # --help is answered, whatever stands beside it
        for option in options:
            if len(given := values.get(option.name, ())) > 1:
                fail(_repeated(self.name or "", option, given), 2)


def _repeated(verb: str, option: Any, given: Sequence[str]) -> str:
    name = max(option.opts, key=len)
    times = "twice" if len(given) == 2 else f"{len(given)} times"
    if (verb, option.name) in SEPARATORS:
        what, separator = SEPARATORS[verb, option.name]
        remedy = f"; several {what} go in one value: {name} '{separator.join(given)}'"
    else:
        remedy = f"; {REMEDIES[verb, option.name]}" if (verb, option.name) in REMEDIES else ""
    return f"{name} is given {times} ({', '.join(map(shown, given))}); give it once{remedy}"


class OnceTyper(typer.Typer):
    """An application whose every verb is a OnceCommand."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=OnceCommand, **options)

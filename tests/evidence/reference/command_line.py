"""docs/cli.md: every verb with its arguments and options, read from the verbs' own signatures.

Not from the parser that typer makes of them, nor from --help: those differ between releases of typer and with the terminal.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from reft_export.cli.main import app
from runtimes import errors
from runtimes.version import VERSION

TYPES = {"str": "text", "int": "integer", "float": "number", "Path": "path", "bool": "flag"}
CODES = {
    0: "ok",
    1: "failure",
    2: "usage, or refused input",
    3: "a parity budget was missed",
    4: "device and artifact do not fit, or something is not installed",
    129: "hung up; what was being written is removed",
    130: "interrupted, likewise",
    143: "terminated, likewise",
}
HEAD = f"""# The command line

    $ reft-export --version
    reft-export {VERSION}

Written by `make docs` from the verbs' own signatures; do not edit this page. What a verb is for, with examples:
[the pages of its subject](index.md#verbs).

An option is given once; one that is repeatable takes a value each time (`-a one -a two`). `reft-export train --help` says of a verb
what stands here.
"""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An argument or an option, as a verb's signature declares it."""

    names: tuple[str, ...]
    """Of an option, the short one first and the one that switches off last; of an argument its metavar."""
    type: str
    repeatable: bool
    required: bool
    default: Any
    info: ArgumentInfo | OptionInfo

    @classmethod
    def of(cls, declared: inspect.Parameter, hint: Any) -> Parameter:
        """Raises KeyError for a type that the page has no word for."""
        hint = _without_none(hint)  # Python 3.10 takes a default of None for a type, too
        kind, info = _without_none(hint.__origin__), hint.__metadata__[0]
        repeatable = get_origin(kind) is list
        metavar = declared.name.upper()
        forms = [form for name in (info.default, *(info.param_decls or ())) for form in name.split("/")] if _is_option(info) else [metavar]
        return cls(
            names=tuple(sorted(forms, key=lambda form: form.startswith("--"))),
            type=TYPES[(get_args(kind)[0] if repeatable else kind).__name__],
            repeatable=repeatable,
            required=declared.default is inspect.Parameter.empty,
            default=None if declared.default is inspect.Parameter.empty else declared.default,
            info=info,
        )

    @property
    def usage(self) -> str:
        return f"{self.names[0]} {self.names[-1].strip('-').upper()}" if _is_option(self.info) else self.names[0]

    @property
    def row(self) -> str:
        limits = [f"{word} {limit}" for word, limit in (("at least", self.info.min), ("at most", self.info.max)) if limit is not None]
        kind = ", ".join([self.type, *limits, *(["repeatable"] if self.repeatable else [])])
        names = ", ".join(f"`{name}`" for name in self.names)
        return f"| {names} | {kind} | {self._default()} | {_cell(self.info.help or '')} |\n"

    def _default(self) -> str:
        if self.required:
            return "required"
        if self.default in (None, "") or (self.default is False and len(self.names) == 1):
            return ""
        return f"`{self.names[0 if self.default else -1]}`" if self.type == "flag" else f"`{self.default}`"


def page() -> str:
    return "\n".join([HEAD, _codes(), *(_verb(command.name, command.callback) for command in app.registered_commands)])


def _codes() -> str:
    classes: dict[int, list[str]] = {code: [] for code in CODES}
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, errors.ReftError):
            classes[error.exit_code].append(f"`{name}`")
    rows = "".join(f"| {code} | {CODES[code]} | {', '.join(names)} |\n" for code, names in classes.items())
    return f"## Exit codes\n\n| code | when | error classes (`runtimes/errors.py`) |\n|---|---|---|\n{rows}"


def _verb(name: str | None, function: Callable[..., Any] | None) -> str:
    hints = get_type_hints(function, include_extras=True)
    declared = [each for each in inspect.signature(function).parameters.values() if hints[each.name] is not typer.Context]
    parameters = [Parameter.of(each, hints[each.name]) for each in declared]
    parameters.sort(key=lambda each: (_is_option(each.info), not each.required))
    usage = " ".join(["reft-export", name, *(each.usage for each in parameters if each.required), "[OPTIONS]"])
    rows = "".join(each.row for each in parameters)
    return f"## {name}\n\n    {usage}\n\n{inspect.getdoc(function)}\n\n| | type | default | |\n|---|---|---|---|\n{rows}"


def _is_option(info: ArgumentInfo | OptionInfo) -> bool:
    return isinstance(info, OptionInfo)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    (kind,) = (each for each in get_args(kind) if each is not type(None))
    return kind


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")

"""jinja2's immutable sandbox with a budget: a chat template comes with a model, and is to end soon whatever it says.

Every round of a loop, call, filter, comparison and operator is a step, and more on long values; what would be far larger than what it is
made of is measured before it is made. Neither holds an ordinary template back: one of a thousand messages takes some ten thousand steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any

import jinja2
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

STEPS = 500_000
"""A few seconds."""
CALL = 5
"""Steps of one."""
SIZE = 16_000_000
"""Characters of a text and of the prompt, or entries of a list with all that is in it."""
WIDTH = 10_000
"""Of padding and indentation, and digits of a number."""
GROWING = {"center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "tojson", "zfill"}
"""Methods and filters whose result can be larger than their arguments together; the others' is not."""
WIDE = GROWING | {"batch", "round", "slice", "truncate"}
"""Those that take a width."""
LAYOUTS = {"format", "format_map", "_strftime_now"}
SHALLOW = {"abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length"}
"""Filters that look at no more than one entry of a list."""
LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters for pages and programmers, whose time is more than linear."""

_left: ContextVar[list[int] | None] = ContextVar("left", default=None)


class OverBudget(jinja2.TemplateError):
    """A template that would take too long, or make too much."""


@contextmanager
def budget() -> Iterator[None]:
    token = _left.set([STEPS])
    try:
        yield
    finally:
        _left.reset(token)


def _step(count: int = 1) -> None:
    left = _left.get()
    if left is not None:
        left[0] -= count
        if left[0] < 0:
            raise OverBudget(f"it takes more than {STEPS} steps")


def _joined(pieces: Iterable[str]) -> str:
    """The pieces of a template, macro or block as one text."""
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        _step(1 + len(piece) // 1000)
        _check_size(size)
        parts.append(piece)
    return "".join(parts)


def measured(value: Any) -> Any:
    """``value``, of which all entries at all levels are together at most SIZE, which takes steps of its own to see."""
    if isinstance(value, str):
        _step(1 + len(value) // 1000)
    elif isinstance(value, (list, tuple, dict)):
        entries, size, stack = 0, 0, [value]
        while stack:
            for each in _entries(stack.pop()):
                entries += 1
                if entries % 10 == 0:
                    _step()
                size += 1 + (len(each) if isinstance(each, str) else 0)
                if isinstance(each, (list, tuple, dict)):
                    stack.append(each)
                _check_size(size)
        _step(1 + size // 1000)
    return value


def _entries(value: Any) -> Iterator[Any]:
    yield from value
    if isinstance(value, dict):
        yield from value.values()


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})
    concat = staticmethod(_joined)

    def __init__(self, *, tojson: Callable[..., str], **options: Any) -> None:
        super().__init__(**options, finalize=measured)
        known = {name: each for name, each in self.filters.items() if name not in LEFT_OUT} | {"tojson": tojson}
        self.filters = {name: _as_steps(name, each) for name, each in known.items()}
        self.filters |= {"counted": _Counted, "measured": measured, "joined": lambda values: _joined(str(measured(v)) for v in values)}
        self.tests = {name: _as_steps(name, each) for name, each in self.tests.items()}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "counted")
        for concat in tree.find_all(nodes.Concat):
            concat.nodes = [_filtered(nodes.List(concat.nodes, lineno=concat.lineno), "joined")]
        for compare in tree.find_all(nodes.Compare):
            compare.expr = _filtered(compare.expr, "measured")
            for operand in compare.ops:
                operand.expr = _filtered(operand.expr, "measured")
        for item in tree.find_all(nodes.Getitem):
            if isinstance(item.arg, nodes.Slice):
                item.node = _filtered(item.node, "measured")
        return tree

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _step(CALL)
        args = tuple(map(_listed, args))
        method = getattr(obj, "__wrapped__", obj)  # the sandbox has a str.format of its own around the text's
        values = (getattr(method, "__self__", None), *args, *kwargs.values())
        _check_arguments(getattr(obj, "__name__", ""), values)
        if isinstance(obj, jinja2.runtime.LoopContext) and args:  # the next level of a recursive loop
            args = (_Counted(args[0]), *args[1:])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        measured(left)
        measured(right)
        if operator == "%" and isinstance(left, str):
            _check_arguments("format", (left, right))
        elif operator == "**":
            _check_size(_digits(left) * max(_repeats(right), 1), WIDTH, "digits")
        elif operator in ("*", "+") and _is_number(left) and _is_number(right):
            _check_size(_digits(left) + _digits(right), WIDTH, "digits")
        elif operator == "*":
            _check_size(_size(left) * _size(right))
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


class _Counted:
    """An iterable of which every round is a step. It has a length where the iterable has, as loop.length and loop.last ask."""

    def __init__(self, of: Any) -> None:
        self._of = of

    def __iter__(self) -> Iterator[Any]:
        for each in self._of:
            _step()
            yield each

    def __len__(self) -> int:
        return len(self._of)


def _listed(value: Any) -> Any:
    """What cannot be measured before it is gone through, as a list."""
    return list(_Counted(value)) if isinstance(value, Iterator) else value


def _filtered(node: Any, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _as_steps(name: str, of: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test, whose arguments are measured first."""

    def called(*args: Any, **kwargs: Any) -> Any:
        _step()
        args = tuple(map(_listed, args))
        if name not in SHALLOW:
            _check_arguments(name, (*args, *kwargs.values()))
        return of(*args, **kwargs)

    return update_wrapper(called, of)  # with jinja2's marks of what is passed first


def _check_arguments(name: str, values: tuple[Any, ...]) -> None:
    """Raises OverBudget for a width that is none, and where the result of ``name`` would be larger than SIZE."""
    for value in values:
        measured(value)
    numbers = [abs(value) for value in values if _is_number(value)]
    if name in WIDE and any(number > WIDTH for number in numbers):
        raise OverBudget(f"{name} is asked for a width of more than {WIDTH}")
    layouts = [value for value in values if isinstance(value, str)] if name in LAYOUTS else []
    if any(re.search(r"\d{5}|\*", layout) for layout in layouts):
        raise OverBudget(f"{name} is asked for a width of more than four digits")
    if name not in GROWING:
        return
    texts = [value for value in values if isinstance(value, str)]
    if name == "replace" and len(texts) > 2:
        text, old, new = texts[:3]
        _check_size((len(text) // max(len(old), 1) + 1) * len(new) + len(text))
    elif name != "replace":
        _check_size(math.prod(max(_size(value), 1) for value in values if not isinstance(value, bool)))


def _check_size(size: float, most: int = SIZE, what: str = "characters or entries") -> None:
    if size > most:
        raise OverBudget(f"it makes a value of more than {most} {what}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _digits(value: Any) -> int:
    return value.bit_length() // 3 + 1 if isinstance(value, int) else 1


def _repeats(value: Any) -> int:
    return abs(int(value)) if isinstance(value, (int, float)) and math.isfinite(value) else 0


def _size(value: Any) -> int:
    """Of a number how often it repeats a text, else the length."""
    if isinstance(value, (int, float)):
        return _repeats(value)
    return len(value) if hasattr(value, "__len__") else 1

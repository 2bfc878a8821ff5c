"""What an evaluation asks of every model in its table."""

from __future__ import annotations

from dataclasses import dataclass

from reft_export.training.forms import AUTO, FORMS
from reft_export.training.settings import CHAT_TEMPLATE, METRICS
from runtimes.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Raises InputError for values out of range."""

    metrics: tuple[str, ...] | None = None
    """Of answers, in the order of the table's columns: those of training (reft_export/training/questions.py); None: exact-match where
    lines have answers, accuracy of a classifier. The likelihood of completions and labels is always taken; ``loss`` stands for it alone."""
    format: str = AUTO
    chat_template: str = AUTO
    """always, never, or auto: as all the adapters in the table were trained, else where there is one."""
    max_length: int | None = None
    """Tokens of a line; None: the shortest context in the table."""
    max_new_tokens: int | None = None
    """Of a greedy answer; None: as many as the longest answer of the data has, and 64 at least where a function judges."""
    batch_size: int = 8
    limit: int | None = None
    """The first so many lines."""

    def __post_init__(self) -> None:
        metrics = self.metrics or ()
        for name in metrics:
            if name not in METRICS and not (":" in name and name.rpartition(":")[2].isidentifier()):
                raise InputError(f"--metric {name!r} is unknown; known: {', '.join(METRICS)}, or file.py:function")
        if twice := [name for at, name in enumerate(metrics) if name in metrics[:at]]:
            raise InputError(f"--metric {twice[0]} is given twice; give it once")
        for name, known in (("format", (AUTO, *FORMS)), ("chat_template", CHAT_TEMPLATE)):
            if getattr(self, name) not in known:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")

"""What a decoder is asked of held-out examples, and what makes an answer right.

    accuracy      Of the distinct answers of all the data, at most MOST_CHOICES, the one with the largest log p(answer | prompt), over
                  its tokens, is the example's own.
    exact-match   The greedy answer is the example's own, but for white space around it; of an interchange its beginning is.
    file.py:name  A function of the user's, (answer, the line's record) -> bool, says so of the greedy answer. The file is run.

A prompt is all that stands before an example's last answer, as on a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from reft_export.evaluation.checker import load_function
from reft_export.training.forms import TEXT
from reft_export.training.sources import Lines, read_object, sources_of
from reft_export.training.tokenizing import Example
from runtimes.errors import InputError

MOST_CHOICES = 20
CHECKED_TOKENS = 64
"""Of a greedy answer that a function checks, at least; more where the data's own answers are longer."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out example's last answer, and the tokens before it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    where: str
    marks: tuple[int, ...] = ()
    """The numbers of the tokens that the prompt marks."""
    source: tuple[int, ...] = ()
    """Of an interchange: the prompt's source. The answer is then what the model goes on with, and does not end it."""


def question_of(example: Example) -> Question:
    start, end = example.trained[-1]
    prompt, answer = example.input_ids[:start], example.input_ids[start:end]
    return Question(prompt=prompt, answer=answer, where=example.where, marks=example.marks, source=example.source)


def check_answers(examples: Iterable[Example], name: str) -> None:
    """Raises InputError for plain text, which has no answers that metric ``name`` could be of."""
    if texts := [example.where for example in examples if example.form == TEXT]:
        raise InputError(f"--metric {name} is of answers, and {texts[0]} is plain text; leave it out")


def choices_of(examples: Iterable[Example]) -> tuple[tuple[int, ...], ...]:
    """The data's distinct answers; raises InputError where accuracy cannot choose among them: too many, or all the same."""
    choices = tuple(sorted({question_of(example).answer for example in examples if not example.truncated}))
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise InputError(
            f"--metric accuracy chooses among the data's distinct answers, 2 to {MOST_CHOICES} of them, and there are {len(choices)}; "
            "use exact-match, or a function"
        )
    return choices


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerCheck:
    """A function of the user's, with the lines that it is told; ``records`` by where they stand."""

    name: str
    function: Callable[..., Any]
    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, name: str, data: Lines, questions: Sequence[Question]) -> AnswerCheck:
        """Tried on an empty answer. Raises InputError for a function that cannot be called, or says neither True nor False."""
        wanted = {question.where for question in questions}
        lines = (line for source in sources_of(data) for line in source.lines() if line.where in wanted)
        records = {line.where: record for line in lines if (record := read_object(line)) is not None}
        check = cls(name=name, function=load_function(name, option="--metric"), records=records)
        check.passes(questions[0], "")
        return check

    def passes(self, question: Question, answer: str) -> bool:
        try:
            with redirect_stdout(sys.stderr):  # ours is for the result alone
                verdict = self.function(answer, dict(self.records[question.where]))
            known = bool(verdict in (True, False))
        except (Exception, SystemExit) as e:  # the function is the user's: anything can come out of it
            said = f"{type(e).__name__}: {e}"
            raise InputError(f"--metric {self.name} raised {said} for {question.where} and answer {answer[:60]!r}; correct it") from e
        if not known:
            raise InputError(f"--metric {self.name} returned {verdict!r} for {question.where}; expected True or False")
        return bool(verdict)

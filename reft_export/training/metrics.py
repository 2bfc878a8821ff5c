"""The task's own metric on held-out examples, beside their loss: the share that is done right.

    accuracy      Of the distinct answers of all the data, at most MOST_CHOICES, the one with the largest log p(answer | prompt), over
                  its tokens, is the example's own.
    exact-match   The greedy answer is the example's own, but for white space around it.
    file.py:name  A function of the user's, (answer, the line's record) -> bool, says so of the greedy answer. The file is run.

A prompt is all that stands before an example's last answer, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import stop_tokens
from reft_export.eager.steering import Steering
from reft_export.evaluation.checker import load_function
from reft_export.training.data import Examples
from reft_export.training.forms import TEXT
from reft_export.training.greedy import greedy_answers, text_of
from reft_export.training.settings import ACCURACY, EXACT_MATCH, LOSS
from reft_export.training.sources import Data, read_object, sources_of
from reft_export.training.tokenizing import IGNORED, Example
from reft_export.training.ways import Batch, Way
from runtimes.errors import InputError
from runtimes.generation import PAD

MOST_CHOICES = 20
CHECKED_TOKENS = 64
"""Of a greedy answer that a function checks, at least; more where the data's own answers are longer."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out example's last answer, and the tokens before it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    where: str


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerMetric:
    """Of a decoder. ``choices`` of accuracy, ``check`` and ``records`` of a function."""

    name: str
    base: Base
    batch_size: int
    questions: tuple[Question, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    check: Callable[[str, Mapping[str, Any]], Any] | None = None
    records: Mapping[str, Mapping[str, Any]]

    @torch.no_grad()
    def measure(self, steering: Steering, way: Way) -> float:
        """The share of the questions that are answered right by the base as ``steering`` steers it; ``way``: to its logits."""
        right = self._chosen(way) if self.choices else self._answered(steering)
        return sum(right) / len(right)

    def _chosen(self, way: Way) -> list[bool]:
        rows = [(question.prompt, choice) for question in self.questions for choice in self.choices]
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            found += log_likelihoods(way, rows[start : start + self.batch_size], self.base.model.device)
        width = len(self.choices)
        scores = [found[start : start + width] for start in range(0, len(found), width)]
        return [self.choices[row.index(max(row))] == question.answer for row, question in zip(scores, self.questions, strict=True)]

    def _answered(self, steering: Steering) -> list[bool]:
        longest = max(len(question.answer) for question in self.questions)
        most = longest if self.check is None else max(longest, CHECKED_TOKENS)
        right: list[bool] = []
        for start in range(0, len(self.questions), self.batch_size):
            batch = self.questions[start : start + self.batch_size]
            for question, answer in zip(batch, self._greedy(steering, [each.prompt for each in batch], most), strict=True):
                right.append(
                    answer.strip() == self._text(question.answer).strip() if self.check is None else self._checked(question, answer)
                )
        return right

    def _greedy(self, steering: Steering, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
        return [self._text(answer) for answer in greedy_answers(self.base, prompts, most, steering=steering)]

    def _text(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in stop_tokens(self.base)]  # one need not be special, which decoding leaves out
        return text_of(self.base, kept)

    def _checked(self, question: Question, answer: str) -> bool:
        assert self.check is not None
        try:
            verdict = self.check(answer, dict(self.records[question.where]))
        except Exception as e:  # the function is the user's: anything can come out of it
            said = f"{type(e).__name__}: {e}"
            raise InputError(f"--metric {self.name} raised {said} for {question.where} and answer {answer[:60]!r}; correct it") from e
        if verdict not in (True, False):
            raise InputError(f"--metric {self.name} returned {verdict!r} for {question.where}; expected True or False")
        return bool(verdict)


def answer_metric(name: str, base: Base, examples: Examples[Example], held_out_data: Data, batch_size: int) -> AnswerMetric | None:
    """What ``name`` measures; None of the loss alone.

    Raises InputError for plain text, which has no answers; for accuracy, where the answers are too many or all the same; and for a function
    that cannot be called, which is tried on an empty answer.
    """
    if name == LOSS:
        return None
    everything = [*examples.training, *examples.held_out]
    if texts := [example.where for example in everything if example.form == TEXT]:
        raise InputError(f"--metric {name} is of answers, and {texts[0]} is plain text; leave it out")
    questions = tuple(map(_question, examples.held_out))
    if name == ACCURACY:
        choices = tuple(sorted({_question(example).answer for example in everything if not example.truncated}))
        if not 2 <= len(choices) <= MOST_CHOICES:
            raise InputError(
                f"--metric accuracy chooses among the data's distinct answers, 2 to {MOST_CHOICES} of them, and there are {len(choices)}; "
                "use exact-match, or a function"
            )
        return AnswerMetric(name=name, base=base, batch_size=batch_size, questions=questions, choices=choices, records={})
    if name == EXACT_MATCH:
        return AnswerMetric(name=name, base=base, batch_size=batch_size, questions=questions, records={})
    check: Any = load_function(name, option="--metric")
    records = _records(held_out_data, {question.where for question in questions})
    metric = AnswerMetric(name=name, base=base, batch_size=batch_size, questions=questions, check=check, records=records)
    metric._checked(questions[0], "")
    return metric


def _question(example: Example) -> Question:
    start, end = example.trained[-1]
    return Question(prompt=example.input_ids[:start], answer=example.input_ids[start:end], where=example.where)


def _records(data: Data, wanted: set[str]) -> dict[str, Mapping[str, Any]]:
    """By where they stand, the lines as they are in the data."""
    lines = (line for source in sources_of(data) for line in source.lines() if line.where in wanted)
    return {line.where: record for line in lines if (record := read_object(line)) is not None}


def log_likelihoods(way: Way, rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> list[float]:
    """log p(answer | prompt) of every (prompt, answer), summed over the answer's tokens, in nats. ``way``: to logits, as in training."""
    width, counts = max(len(prompt) + len(answer) for prompt, answer in rows), [len(answer) for _, answer in rows]

    def padded(fill: int, each: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in each], device=device)

    batch = Batch(
        input_ids=padded(PAD, [[*prompt, *answer] for prompt, answer in rows]),
        attention_mask=padded(0, [[1] * (len(prompt) + len(answer)) for prompt, answer in rows]),
        labels=padded(IGNORED, [[*[IGNORED] * len(prompt), *answer] for prompt, answer in rows]),
        prompt_length=torch.tensor([len(prompt) for prompt, _ in rows], device=device),
    )
    said = torch.log_softmax(way(batch).float(), -1).gather(1, batch.targets[:, None])[:, 0]
    return [float(each.sum()) for each in said.split(counts)]

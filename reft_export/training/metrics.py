"""The task's own metric on held-out examples, beside their loss: the share that is done right (questions.py says when one is)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_export.base.load import Base
from reft_export.base.token_rules import stop_tokens
from reft_export.eager.steering import Steering
from reft_export.training.data import Examples
from reft_export.training.greedy import greedy_answers, text_of
from reft_export.training.questions import CHECKED_TOKENS, AnswerCheck, Question, check_answers, choices_of, question_of
from reft_export.training.settings import ACCURACY, EXACT_MATCH, LOSS
from reft_export.training.sources import Lines
from reft_export.training.tokenizing import IGNORED, Example
from reft_export.training.ways import Batch, Way, counted_log_likelihoods
from runtimes.edits.positions import marks_of
from runtimes.generation import PAD


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerMetric:
    """Of a decoder. ``choices`` of accuracy, ``check`` of a function."""

    base: Base
    batch_size: int
    questions: tuple[Question, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    check: AnswerCheck | None = None

    @torch.no_grad()
    def measure(self, steering: Steering, way: Way) -> float:
        """The share of the questions that are answered right by the base as ``steering`` steers it; ``way``: to its logits."""
        right = self._chosen(way) if self.choices else self._answered(steering)
        return sum(right) / len(right)

    def _chosen(self, way: Way) -> list[bool]:
        rows = [(question.prompt, choice) for question in self.questions for choice in self.choices]
        marks = [question.marks for question in self.questions for _ in self.choices] if self._marked else None
        sources = [question.source for question in self.questions for _ in self.choices]
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            marked = None if marks is None else marks[part]
            found += log_likelihoods(way, rows[part], self.base.model.device, marked, sources[part])
        width = len(self.choices)
        scores = [found[start : start + width] for start in range(0, len(found), width)]
        return [self.choices[row.index(max(row))] == question.answer for row, question in zip(scores, self.questions, strict=True)]

    def _answered(self, steering: Steering) -> list[bool]:
        longest = max(len(question.answer) for question in self.questions)
        most = longest if self.check is None else max(longest, CHECKED_TOKENS)
        right: list[bool] = []
        for start in range(0, len(self.questions), self.batch_size):
            batch = self.questions[start : start + self.batch_size]
            for question, answer in zip(batch, self._greedy(steering, batch, most), strict=True):
                own = self._text(question.answer)
                right.append(answer.strip() == own.strip() if self.check is None else self.check.passes(question, answer))
        return right

    def _greedy(self, steering: Steering, questions: Sequence[Question], most: int) -> list[str]:
        marks = [each.marks for each in questions] if self._marked else None
        prompts, sources = ([getattr(each, name) for each in questions] for name in ("prompt", "source"))
        answers = greedy_answers(self.base, prompts, most, steering=steering, marks=marks, sources=sources)
        if self.check is None:
            answers = [a[: len(each.answer)] if each.source else a for a, each in zip(answers, questions, strict=True)]
        return [self._text(answer) for answer in answers]

    @property
    def _marked(self) -> bool:
        return any(question.marks for question in self.questions)

    def _text(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in stop_tokens(self.base)]  # one need not be special, which decoding leaves out
        return text_of(self.base, kept)


def answer_metric(name: str, base: Base, examples: Examples[Example], held_out_data: Lines, batch_size: int) -> AnswerMetric | None:
    """What ``name`` measures; None of the loss alone.

    Raises InputError for plain text, which has no answers; for accuracy, where the answers are too many or all the same; and for a function
    that cannot be called, which is tried on an empty answer.
    """
    if name == LOSS:
        return None
    everything = [*examples.training, *examples.held_out]
    check_answers(everything, name)
    questions = tuple(map(question_of, examples.held_out))
    return AnswerMetric(
        base=base,
        batch_size=batch_size,
        questions=questions,
        choices=choices_of(everything) if name == ACCURACY else (),
        check=None if name in (ACCURACY, EXACT_MATCH) else AnswerCheck.load(name, held_out_data, questions),
    )


def log_likelihoods(
    way: Way,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    marks: Sequence[Sequence[int]] | None = None,
    sources: Sequence[Sequence[int]] = (),
) -> list[float]:
    """log p(answer | prompt) of every (prompt, answer), summed over the answer's tokens, in nats. ``way``: to logits, as in training.
    ``marks``: the numbers of each prompt's marked tokens; ``sources``: each prompt's, of an interchange."""
    return [float(each.sum()) for each in token_log_likelihoods(way, rows, device, marks, sources)]


def token_log_likelihoods(
    way: Way,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    device: torch.device,
    marks: Sequence[Sequence[int]] | None = None,
    sources: Sequence[Sequence[int]] = (),
) -> tuple[Tensor, ...]:
    """[answer's tokens] of every (prompt, answer): log p of each, given all before it, in nats. ``marks``, ``sources``: as of
    ``log_likelihoods``."""

    def padded(fill: int, each: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, each))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in each], device=device)

    batch = Batch(
        input_ids=padded(PAD, [[*prompt, *answer] for prompt, answer in rows]),
        attention_mask=padded(0, [[1] * (len(prompt) + len(answer)) for prompt, answer in rows]),
        labels=padded(IGNORED, [[*[IGNORED] * len(prompt), *answer] for prompt, answer in rows]),
        prompt_length=torch.tensor([len(prompt) for prompt, _ in rows], device=device),
        marks=None if marks is None else torch.from_numpy(marks_of(marks)),
        sources=padded(IGNORED, sources) if any(sources) else None,
    )
    return counted_log_likelihoods(way(batch), batch)

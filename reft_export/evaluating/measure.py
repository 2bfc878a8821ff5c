"""One row of the table: what a model answers, how likely it finds the data's own answers, and how long both took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from reft_export.console import count
from reft_export.evaluating.held_out import HeldOut
from reft_export.evaluating.held_out_texts import HeldOutTexts
from reft_export.evaluating.subjects import Pair, Subject, TextSubject, Who
from reft_export.training.settings import ACCURACY
from runtimes.errors import ReftError
from runtimes.tasks.classification import label_log_probabilities

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Line by line, in the order of the data."""

    who: Who
    likelihoods: tuple[np.ndarray, ...]
    """log p [answer's tokens] of the data's own answers, in nats."""
    answers: tuple[str, ...]
    """Greedy; none where no metric is of them."""
    right: Mapping[str, np.ndarray]
    """bool [lines] by metric."""
    chosen: tuple[int, ...]
    """Of accuracy and of classifiers: which choice is the likeliest."""
    new_tokens: int
    """Of all greedy answers, stop tokens included."""
    seconds: float
    """Answers and likelihoods together, without loading."""

    @property
    def losses(self) -> np.ndarray:
        """-log p of each line's answer, summed over its tokens [lines]."""
        return np.array([-float(each.sum(dtype=np.float64)) for each in self.likelihoods])


def measure(subject: Subject, held_out: HeldOut, *, batch_size: int, context: int, report: Report) -> Measured:
    """``batch_size``: prompts of like length that are answered together, the same ones by every model of the table. ``context``: the
    shortest of them all, so that every model's answers may be as long."""
    report(f"evaluating {subject.who}")
    started = time.monotonic()
    likelihoods = _likelihoods(subject, held_out, batch_size, report)
    own = tuple(likelihoods[question.prompt, question.answer] for question in held_out.questions)
    answers, new_tokens = _answers(subject, held_out, batch_size, context, report) if held_out.generates else ((), 0)
    seconds = time.monotonic() - started
    chosen = _chosen(held_out, likelihoods)
    right = {}
    for name in held_out.metrics:
        if name == ACCURACY:
            said = (held_out.choices[choice] == question.answer for choice, question in zip(chosen, held_out.questions, strict=True))
        else:
            said = (held_out.right(name, question, answer) for question, answer in zip(held_out.questions, answers, strict=True))
        right[name] = np.fromiter(said, bool)
    return Measured(who=subject.who, likelihoods=own, answers=answers, right=right, chosen=chosen, new_tokens=new_tokens, seconds=seconds)


def measure_texts(subject: TextSubject, held_out: HeldOutTexts, *, batch_size: int, report: Report) -> Measured:
    """Of a classifier: its logits say both the label and how likely the line's own is. Texts of like length are asked together."""
    report(f"evaluating {subject.who}")
    started, examples = time.monotonic(), held_out.examples
    order = sorted(range(len(examples)), key=lambda line: (len(examples[line].text), line))
    logits = np.empty((len(examples), len(held_out.labels)), np.float32)
    for start in range(0, len(order), batch_size):
        lines = order[start : start + batch_size]
        logits[lines] = subject.logits([examples[line].text for line in lines])
        done = min(start + batch_size, len(order))
        count(report, f"{subject.who}: classified {done} of {len(order)} texts", done, len(order))
    seconds = time.monotonic() - started
    if not np.isfinite(logits).all():
        raise ReftError(
            f"{subject.who}: the model's logits are not finite, and no label is the likeliest; check it with `reft-export parity`"
        )
    gold, chosen = np.array(held_out.gold), logits.argmax(1)
    return Measured(
        who=subject.who,
        likelihoods=tuple(label_log_probabilities(logits, gold)[:, None]),
        answers=(),
        right=dict.fromkeys(held_out.metrics, np.equal(chosen, gold)),
        chosen=tuple(chosen.tolist()),
        new_tokens=0,
        seconds=seconds,
    )


def _likelihoods(subject: Subject, held_out: HeldOut, batch_size: int, report: Report) -> dict[Pair, np.ndarray]:
    """Of every line's own answer, and of all that accuracy chooses among; pairs of like length together."""
    wanted = {(question.prompt, answer) for question in held_out.questions for answer in (question.answer, *held_out.choices)}
    pairs = sorted(wanted, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    found = {}
    for done, (pair, values) in enumerate(zip(pairs, subject.likelihoods(pairs, batch_size), strict=True), 1):
        found[pair] = values
        count(report, f"{subject.who}: likelihood of {done} of {len(pairs)} answers", done, len(pairs))
    return found


def _answers(subject: Subject, held_out: HeldOut, batch_size: int, context: int, report: Report) -> tuple[tuple[str, ...], int]:
    """(texts, tokens of all)."""
    questions = held_out.questions
    order = sorted(range(len(questions)), key=lambda line: (len(questions[line].prompt), line))
    texts, tokens = [""] * len(questions), 0
    for start in range(0, len(order), batch_size):
        lines = order[start : start + batch_size]
        prompts = [questions[line].prompt for line in lines]
        most = min(held_out.max_new_tokens, context - max(map(len, prompts)))
        for line, answer in zip(lines, subject.answers(prompts, most), strict=True):
            texts[line], tokens = held_out.text(answer), tokens + len(answer)
        done = min(start + batch_size, len(order))
        count(report, f"{subject.who}: answered {done} of {len(order)} prompts", done, len(order))
    return tuple(texts), tokens


def _chosen(held_out: HeldOut, likelihoods: Mapping[Pair, np.ndarray]) -> tuple[int, ...]:
    """The likeliest choice of each question, by number; of equally likely ones the first."""
    if not held_out.choices:
        return ()
    scores = [[float(likelihoods[question.prompt, choice].sum()) for choice in held_out.choices] for question in held_out.questions]
    return tuple(row.index(max(row)) for row in scores)

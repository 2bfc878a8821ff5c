"""The held-out lines, rendered and tokenized once for every model in the table: all of them answer the same tokens.

Lines of prompts and answers are asked for their last answer. Of plain text the tokens behind its first half, rounded up, are scored; the
half is the prompt, by which positions are counted, as in runtimes/parity/perplexity.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.evaluating.settings import EvaluationSettings
from reft_export.training.data import DataFile, load_data
from reft_export.training.forms import TEXT
from reft_export.training.questions import CHECKED_TOKENS, AnswerCheck, Question, check_answers, choices_of, question_of
from reft_export.training.settings import ACCURACY, EXACT_MATCH, LOSS
from reft_export.training.tokenizing import Example
from runtimes.errors import InputError
from runtimes.text.chat import trained_without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_export.evaluating.device_tokenizer import DeviceTokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """``questions``: a line's prompt and what is scored behind it. ``answers``: the metrics of greedy answers, and of chosen ones, by
    the name that the table has for them."""

    files: tuple[DataFile, ...]
    templated: bool
    examples: tuple[Example, ...]
    questions: tuple[Question, ...]
    metrics: tuple[str, ...]
    choices: tuple[tuple[int, ...], ...]
    checks: Mapping[str, AnswerCheck] = field(default_factory=dict)
    max_new_tokens: int
    tokenizer: Any
    """Of the model that the lines were read with; it also makes text of every model's answers."""
    stop_tokens: frozenset[int]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def gold(self) -> None:
        """Answers are no labels."""
        return None

    @property
    def generates(self) -> bool:
        return any(name != ACCURACY for name in self.metrics)

    @property
    def truncated(self) -> int:
        return sum(example.truncated for example in self.examples)

    def text(self, tokens: Sequence[int]) -> str:
        """Of an answer, without what ends it and without other special tokens."""
        kept = [token for token in tokens if token not in self.stop_tokens]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def choice(self, number: int) -> str:
        return self.text(self.choices[number])

    def told(self, line: int) -> dict[str, str]:
        question = self.questions[line]
        return {"line": question.where, "prompt": self.prompt_text(question), "expected": self.text(question.answer)}

    @property
    def scored_tokens(self) -> int:
        return sum(len(question.answer) for question in self.questions)

    def record(self) -> dict[str, Any]:
        return {"scored_tokens": self.scored_tokens, "chat_template": self.templated}

    def note(self) -> str:
        through = "through the chat template" if self.templated else "through no chat template"
        return f"{len(self)} lines, {self.scored_tokens} tokens of their own answers scored, prompts {through}"

    def prompt_text(self, question: Question) -> str:
        return str(self.tokenizer.decode(list(question.prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def right(self, name: str, question: Question, answer: str) -> bool:
        """Whether a greedy answer is, by exact match or the function."""
        if name == EXACT_MATCH:
            return answer.strip() == self.text(question.answer).strip()
        return self.checks[name].passes(question, answer)


def chat_template_of(asked: str, training: Mapping[str, Mapping[str, Any]]) -> str:
    """``asked``, where it is auto decided by the ``training`` records of all adapters in the table, by where they are: one for all rows.

    Raises InputError where some were trained through the chat template and others without.
    """
    if asked != "auto":
        return asked
    without = {where for where, record in training.items() if trained_without_template(record)}
    if without and len(without) < len(training):
        through = next(where for where in training if where not in without)
        raise InputError(
            f"{min(without)} was trained without the chat template and {through} through it, and all rows answer the same prompts; "
            "pass --chat-template always or never, or evaluate them apart"
        )
    return "never" if without else "auto"


def check_asked(data: Sequence[Path], settings: EvaluationSettings, context: int) -> None:
    """Raises InputError for a file that is given twice, and for lines that are to be longer than the shortest ``context`` in the table."""
    if len({path.resolve() for path in data}) < len(data):
        twice = next(path for at, path in enumerate(data) if path.resolve() in {each.resolve() for each in data[:at]})
        raise InputError(f"{twice} is named twice, and its lines would count twice; name each once")
    if (settings.max_length or 0) > context:
        raise InputError(f"--max-length is {settings.max_length}; the shortest context in the table ends at {context}")


def read_held_out(
    data: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | DeviceTokenizer,
    settings: EvaluationSettings,
    *,
    stop_tokens: Collection[int],
    context: int,
    chat_template: str,
) -> HeldOut:
    """``context``: the shortest in the table. Raises InputError for lines that nobody can be asked."""
    reader: Any = tokenizer  # either one: what is read of it is what DeviceTokenizer has
    read = load_data(
        list(data),
        reader,
        max_length=settings.max_length or context,
        chat_template=chat_template,
        stop_tokens=stop_tokens,
        form=settings.format,
    )
    examples = read.examples[: settings.limit]
    asked = settings.metrics
    if asked is None:
        asked = () if all(example.form == TEXT for example in examples) else (EXACT_MATCH,)
    metrics = tuple(name for name in asked if name != LOSS)
    for name in metrics:
        check_answers(examples, name)
    questions = tuple(_asked(example) for example in examples)
    checks = {name: AnswerCheck.load(name, list(data), questions) for name in metrics if name not in (ACCURACY, EXACT_MATCH)}
    longest = max(len(question.answer) for question in questions)
    return HeldOut(
        files=read.files,
        templated=read.templated,
        examples=examples,
        questions=questions,
        metrics=metrics,
        choices=choices_of(examples) if ACCURACY in metrics else (),
        checks=checks,
        max_new_tokens=settings.max_new_tokens or (max(longest, CHECKED_TOKENS) if checks else longest),
        tokenizer=tokenizer,
        stop_tokens=frozenset(stop_tokens),
    )


def check_same_tokens(one: HeldOut, who: str, other: HeldOut, whose: str) -> None:
    """Raises InputError, naming the first line and token, where two models' tokenizers or templates read the data otherwise."""
    for mine, others in zip(one.examples, other.examples, strict=True):
        if mine.input_ids != others.input_ids or mine.prompt_length != others.prompt_length:
            pairs = list(zip(mine.input_ids, others.input_ids, strict=False))
            at = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
            raise InputError(
                f"{mine.where} is {len(mine.input_ids)} tokens to {who} and {len(others.input_ids)} to {whose}, which differ from token "
                f"{at} on: they have other tokenizers or chat templates; evaluate them apart"
            )


def _asked(example: Example) -> Question:
    if example.form == TEXT:
        prompt = example.prompt_length
        return Question(prompt=example.input_ids[:prompt], answer=example.input_ids[prompt:], where=example.where)
    return question_of(example)

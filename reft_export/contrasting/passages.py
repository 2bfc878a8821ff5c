"""The two sides of a contrast, as tokens of which some are read.

A line is what training reads (reft_export/training/data.py), or the part of it that comes before an answer:

    {"prompt": .., "completion": ..}    {"messages": [.., the assistant's]}     the completion's tokens are read, without its end token
    {"prompt": ..}                      {"messages": [.., the user's]}          the rendered prompt's, up to where an answer begins
    {"text": ..}                                                                the text's as it is, through no chat template

The first token of a prompt or text is not read where there are others: decoders keep an attention sink there, whose norm is hundreds of
times that of other tokens. A file that holds both sides has lines {"positive": LINE, "negative": LINE}, where a string is a text, or
{"prompt": .., "positive": .., "negative": ..} with two completions of one prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_export.training.data import DataFile, iter_examples
from reft_export.training.sources import Data, Line, Source, read_object, sources_of
from reft_export.training.tokenizing import Example
from runtimes.errors import InputError

if TYPE_CHECKING:  # lines are refused without torch
    from transformers import PreTrainedTokenizerBase

LEAST = 2
"""Lines a side: one tells nothing of what the others have in common, nor can it be held out."""
SIDES = ("positive", "negative")
ANSWER = "."
"""Stands in for the answer that a prompt alone lacks, so that it is read by the rules of those that have one."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One line of one side."""

    example: Example
    """Of a prompt alone or a text its tokens are the prompt."""
    start: int
    stop: int
    """The tokens that are read, ``stop`` not among them."""
    templated: bool | None
    """Its prompt went through the chat template; None: a text."""
    record: Mapping[str, Any] | None
    """The line, where it has a completion."""

    @property
    def answered(self) -> bool:
        return self.record is not None

    def at(self, read: str) -> tuple[int, int]:
        """[first, behind the last) of the tokens to take the mean of. Raises InputError where there are too few for the n-th."""
        if read == "mean":
            return self.start, self.stop
        number = 1 if read == "last" else abs(int(read))
        if number > self.stop - self.start:
            raise InputError(
                f"{self.example.where}: {self.stop - self.start} tokens can be read, and read is {read}, counted from their end; use last "
                "or mean, or lengthen the line"
            )
        return self.stop - number, self.stop - number + 1


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Both sides."""

    positive: tuple[Passage, ...]
    negative: tuple[Passage, ...]
    files: Mapping[str, DataFile]
    """By side; one file that holds both is ``pairs``."""

    @property
    def both(self) -> tuple[Passage, ...]:
        return (*self.positive, *self.negative)

    @property
    def templated(self) -> bool:
        """Prompts went through the chat template, so those at inference must, too. Of texts alone they did not."""
        return any(passage.templated for passage in self.both)

    def reads(self, read: str) -> str:
        """What ``read`` means here."""
        return ("mean" if self.told else "last") if read == "auto" else read

    @property
    def told(self) -> bool:
        """Every line says something of its side's own: a completion or a text, not a prompt alone."""
        return all(passage.answered or passage.templated is None for passage in self.both)


class _One(Source):
    """A source of one line, made of another's: with its number and place."""

    def __init__(self, line: Line, record: Mapping[str, Any]) -> None:
        super().__init__([record])
        self._line = Line(raw=json.dumps(record).encode(), number=line.number, where=line.where)

    def lines(self) -> Iterator[Line]:
        yield self._line


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Lines by the rules of one base: its tokenizer, its stop tokens, its context."""

    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    max_length: int
    chat_template: str

    def contrast(self, positive: Data, negative: Data | None) -> Contrast:
        """Raises InputError, naming file and line, for what is none of the forms, and for fewer than LEAST lines a side."""
        if negative is None:
            return self._pairs(positive)
        found = {side: self._side(data, side) for side, data in zip(SIDES, (positive, negative), strict=True)}
        return Contrast(
            positive=found["positive"][0], negative=found["negative"][0], files={side: file for side, (_, file) in found.items()}
        )

    def _side(self, data: Data, side: str) -> tuple[tuple[Passage, ...], DataFile]:
        source = _only(data)
        passages = []
        for line, record in _records(source):
            if "positive" in record and "negative" in record:
                raise InputError(f"{line.where}: the line holds both sides, and so does its file; give that file alone")
            passages.append(self._passage(line, record, line.where))
        _check_enough(len(passages), source.where, side)
        return tuple(passages), DataFile(file=source.name, sha256=source.sha256)

    def _pairs(self, data: Data) -> Contrast:
        source = _only(data)
        sides: dict[str, list[Passage]] = {side: [] for side in SIDES}
        for line, record in _records(source):
            if missing := [side for side in SIDES if side not in record]:
                raise InputError(
                    f"{line.where}: lacks {missing[0]}; a file alone holds both sides in each line: positive and negative, or prompt, "
                    "positive and negative; else give the negative lines' file, too"
                )
            if unknown := sorted(set(record) - {*SIDES, "prompt"}):
                raise InputError(f"{line.where}: has unknown keys {unknown}; a line has positive, negative, and prompt where they share it")
            for side in SIDES:
                sides[side].append(self._passage(line, _half(record, side, line.where), f"{line.where}, {side}"))
        _check_enough(len(sides["positive"]), source.where, "of pairs")
        file = DataFile(file=source.name, sha256=source.sha256)
        return Contrast(positive=tuple(sides["positive"]), negative=tuple(sides["negative"]), files={"pairs": file})

    def _passage(self, line: Line, record: Mapping[str, Any], where: str) -> Passage:
        line = Line(raw=line.raw, number=line.number, where=where)
        if set(record) == {"text"}:
            example = self._prompt(line, {"prompt": record["text"]}, "never", "text")
            return _unanswered(example, templated=None)
        messages = record.get("messages")
        last = messages[-1] if isinstance(messages, list) and messages else None
        if set(record) == {"prompt"}:
            return _unanswered(self._prompt(line, record, self.chat_template), templated=self.templated)
        if isinstance(last, dict) and last.get("role") != "assistant" and set(record) == {"messages"}:
            return _unanswered(self._prompt(line, record, self.chat_template), templated=True)
        example = self._example(line, record, self.chat_template)
        end = len(example.input_ids) - (example.input_ids[-1] in self.stop and len(example.input_ids) - example.prompt_length > 1)
        return Passage(
            example=example, start=example.prompt_length, stop=end, templated=self.templated or messages is not None, record=dict(record)
        )

    @property
    def templated(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None)) and self.chat_template != "never"

    def _prompt(self, line: Line, record: Mapping[str, Any], template: str, called: str = "prompt") -> Example:
        """The tokens before an answer, by the rules of a line that has one."""
        if not isinstance(value := record.get("prompt", ""), str) or (called == "text" and not value.strip()):
            raise InputError(f"{line.where}: {called} is {'empty' if isinstance(value, str) else type(value).__name__}, expected a string")
        if "messages" in record:
            whole = {"messages": [*record["messages"], {"role": "assistant", "content": ANSWER}]}
        else:
            whole = {**record, "completion": ANSWER}
        example = self._example(line, whole, template)
        return Example(
            input_ids=example.input_ids[: example.prompt_length],
            prompt_length=example.prompt_length,
            line=example.line,
            where=example.where,
        )

    def _example(self, line: Line, record: Mapping[str, Any], template: str) -> Example:
        made = iter_examples(
            _One(line, record), self.tokenizer, max_length=self.max_length, chat_template=template, stop_tokens=tuple(self.stop)
        )
        return next(made)


def _unanswered(example: Example, *, templated: bool | None) -> Passage:
    length = example.prompt_length
    return Passage(example=example, start=min(1, length - 1), stop=length, templated=templated, record=None)


def _only(data: Data) -> Source:
    sources = sources_of(data)
    if len(sources) != 1:
        raise InputError(f"{len(sources)} files are given for one side of the contrast, expected one; join them")
    return sources[0]


def _records(source: Source) -> Iterator[tuple[Line, dict[str, Any]]]:
    for line in source.lines():
        record = read_object(line)
        if record is not None:
            yield line, record


def _half(record: Mapping[str, Any], side: str, where: str) -> Mapping[str, Any]:
    """One side of a pair as a line."""
    value = record[side]
    if "prompt" in record:
        return {"prompt": record["prompt"], "completion": value}
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {side} is {type(value).__name__}, expected a text, or an object that is a line")
    return value


def _check_enough(count: int, where: str, side: str) -> None:
    if count < LEAST:
        said = "no lines" if not count else f"{count} line"
        raise InputError(
            f"{where} has {said} {'' if side == 'of pairs' else 'of the '}{side}{'' if side == 'of pairs' else ' side'}, expected at least "
            f"{LEAST}, better some dozens; add lines that have in common only what steers"
        )

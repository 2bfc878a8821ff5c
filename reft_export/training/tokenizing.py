"""Rendered lines as token ids with the loss on what is trained.

prompt     The tokens that inference starts from: those before the first trained answer. Of plain text the first half, rounded up.
completion Prompt and completion are tokenized together where that leaves the prompt's tokens as they are, else apart; so are the pieces
           of a conversation of which every answer is trained.
end        An answer ends with the first of the stop tokens that nothing but white space and stop tokens follows, and what a template
           writes behind it is not trained. Where the last answer, or a text, has none, the tokenizer's eos is added, or the first stop
           token for a tokenizer without. What was cut to max_length has no end. The stop tokens are those at which a device stops
           (runtimes/text/stop_tokens.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reft_export.base.token_rules import plain_tokens, prompt_tokens
from reft_export.training.rendering import Piece, Rendered
from runtimes.errors import InputError
from runtimes.text.marks import marked_tokens, without_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without a loss."""

Span = tuple[int, int]
"""The first token, and the one behind the last."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized line."""

    input_ids: tuple[int, ...]
    prompt_length: int
    """What positions see as the prompt: the tokens before the first trained answer; of plain text its first half, rounded up."""
    line: int
    where: str
    """File and line, for messages."""
    truncated: bool = False
    """It, or what it is preferred to, was cut to max_length, and so has no end token."""
    spans: tuple[Span, ...] = ()
    """The trained tokens, in order; none stands for all behind the prompt."""
    form: str = "prompt-completion"
    """Of reft_export/training/forms.py."""
    prompted: tuple[int, ...] = ()
    """What the teacher of a distillation sees in place of the prompt's tokens."""

    marks: tuple[int, ...] = ()
    """The numbers of the prompt's tokens that it marks, where the run edits those."""
    subspace: int | None = None
    """Which of the run's subspaces edits it."""
    rejected: Example | None = None
    """Of a pair: the answer that is preferred less, behind the same prompt."""
    source: tuple[int, ...] = ()
    """Of an interchange: the prompt whose hidden states it takes over."""

    @property
    def for_teacher(self) -> Example:
        """The same answers behind the teacher's prompt."""
        moved = len(self.prompted) - self.prompt_length
        return replace(
            self,
            input_ids=(*self.prompted, *self.input_ids[self.prompt_length :]),
            prompt_length=len(self.prompted),
            spans=tuple((start + moved, end + moved) for start, end in self.spans),
            prompted=(),
            marks=(),  # a teacher that sees another prompt is not steered
        )

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> tuple[Span, ...]:
        return self.spans or ((self.prompt_length, len(self.input_ids)),)

    @property
    def trained_tokens(self) -> int:
        return sum(end - start for start, end in self.trained)

    @property
    def labels(self) -> tuple[int, ...]:
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.trained:
            labels[start:end] = self.input_ids[start:end]
        return tuple(labels)


@dataclass(frozen=True)
class Tokenizing:
    """How the lines of one run are tokenized. ``stop``: the tokens that end an answer; ``end``: the one that is added; ``marks``: prompts
    mark tokens, and the marks are taken out (runtimes/text/marks.py)."""

    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    end: int
    max_length: int
    marks: bool = False

    def example(self, line: Rendered, *, number: int, where: str, form: str) -> Example:
        """Raises InputError for a prompt without tokens, or that leaves no room for an answer, and for a text of one token; with
        ``marks`` for a prompt that marks nothing, and for lines that have no one prompt."""
        marked = tuple[int, ...]()
        if self.marks:
            line, marked = self._without_marks(line, where)
        if line.pieces[0].trained:
            return self._text(line.pieces[0].text, number=number, where=where, form=form)
        parts = self._parts(line.pieces, special=not line.templated)
        head = len(parts[0])
        if not head:
            raise InputError(f"{where}: the prompt has no tokens")
        if head >= self.max_length:
            raise InputError(
                f"{where}: the prompt has {head} tokens, which leaves none of {self.max_length} for its completion; "
                "shorten it, or raise max_length as far as the base's context goes"
            )
        tokens, spans = list[int](), list[Span]()
        for index, (piece, part) in enumerate(zip(line.pieces, parts, strict=True)):
            if piece.trained:
                kept = self._until_end(part)
                if index == len(parts) - 1:
                    part = part[:kept] if kept else [*part, self.end]
                spans.append((len(tokens), len(tokens) + (kept or len(part))))
            tokens += part
        return Example(
            input_ids=tuple(tokens[: self.max_length]),
            prompt_length=head,
            line=number,
            where=where,
            truncated=len(tokens) > self.max_length,
            spans=self._within(spans) if len(spans) > 1 else (),
            form=form,
            marks=marked,
        )

    def _text(self, text: str, *, number: int, where: str, form: str) -> Example:
        tokens = prompt_tokens(self.tokenizer, text, self.stop)
        kept = self._until_end(tokens)
        tokens = tokens[:kept] if kept else [*tokens, self.end]
        cut = tokens[: self.max_length]
        if len(cut) < 2:
            raise InputError(f"{where}: the text has one token, and the first is not trained; lengthen it, or raise max_length")
        return Example(
            input_ids=tuple(cut),
            prompt_length=(len(cut) + 1) // 2,
            line=number,
            where=where,
            truncated=len(tokens) > len(cut),
            spans=((1, len(cut)),),
            form=form,
        )

    def _without_marks(self, line: Rendered, where: str) -> tuple[Rendered, tuple[int, ...]]:
        """(the line without its prompt's marks, the numbers of the tokens that they mark)."""
        prompt, *rest = line.pieces
        if prompt.trained:
            raise InputError(f"{where}: is plain text, which has no prompt that could mark tokens; give prompt and completion")
        if len(rest) > 1:
            raise InputError(f"{where}: with positions marked one answer is trained, and here are several; pass --train-on last")
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{where}: positions marked need a fast tokenizer, which says where its tokens stand in a text; use another base"
            )
        try:
            text, spans = without_marks(prompt.text)
            framed = self.tokenizer(text, add_special_tokens=not line.templated, return_offsets_mapping=True, verbose=False)
            return replace(line, pieces=(replace(prompt, text=text), *rest)), marked_tokens(framed["offset_mapping"], spans)
        except InputError as e:
            raise InputError(f"{where}: {e}") from None

    def _parts(self, pieces: Sequence[Piece], *, special: bool) -> list[list[int]]:
        """The tokens of every piece; ``special``: the tokenizer's own stand in front of the first."""

        def ids(text: str) -> list[int]:
            return prompt_tokens(self.tokenizer, text, self.stop) if special else plain_tokens(self.tokenizer, text)

        texts = [piece.text for piece in pieces]
        joined = "".join(texts)
        whole = list(self.tokenizer(joined, add_special_tokens=special, verbose=False)["input_ids"])
        beginnings = [ids("".join(texts[:count])) for count in range(1, len(texts))]
        if all(whole[: len(each)] == each and len(each) < len(whole) for each in beginnings):
            cuts = [0, *map(len, beginnings), len(whole)]
            return [whole[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        return [beginnings[0], *(plain_tokens(self.tokenizer, text) for text in texts[1:])]

    def _until_end(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are up to the end token, by the rule of the module's docstring; None without one."""
        length = None
        for index in reversed(range(len(tokens))):
            if tokens[index] in self.stop:
                length = index + 1
            elif str(self.tokenizer.decode(list(tokens[index : index + 1]))).strip():
                break
        return length

    def _within(self, spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple((start, min(end, self.max_length)) for start, end in spans if start < self.max_length)

"""Training data of a decoder: files or records, one example a line, as token ids with the loss on what is trained.

sources     where the lines lie
forms       what a line is read as
rendering   what the model sees of it, and which parts are trained
tokenizing  its token ids, its prompt and its end

Empty lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from reft_export.base.token_rules import end_token
from reft_export.training.distilled_data import PromptedTeacher
from reft_export.training.forms import AUTO, FORMS, TEXT, read_record
from reft_export.training.rendering import rendered
from reft_export.training.sources import Lines, Source, read_object, sources_of
from reft_export.training.tokenizing import IGNORED, Example, Tokenizing
from runtimes.edits.positions import marks_of
from runtimes.errors import InputError

if TYPE_CHECKING:  # a file that is not there is said before torch is loaded
    import torch
    from transformers import PreTrainedTokenizerBase


class Tokenized(Protocol):
    """An example, of whatever task."""

    @property
    def where(self) -> str: ...

    @property
    def input_ids(self) -> tuple[int, ...]: ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def length(self) -> int:
        """All of its tokens."""
        ...

    @property
    def trained(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def form(self) -> str: ...

    @property
    def marks(self) -> tuple[int, ...]: ...

    @property
    def truncated(self) -> bool: ...


SUBSPACE = "subspace"
"""The key of a line that names the subspace which edits it."""

E = TypeVar("E", bound=Tokenized)


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of training data, by its name and the bytes of its lines."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainingData(Generic[E]):
    """Whole files, tokenized, one behind the other."""

    files: tuple[DataFile, ...]
    examples: tuple[E, ...]
    templated: bool = False
    """The examples went through the tokenizer's chat template, so prompts at inference must, too."""

    @property
    def digest(self) -> str:
        """Two runs with one digest saw the same examples in the same order: a file's sha256, or that of several files' sha256."""
        digests = [each.sha256 for each in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def truncated_lines(self) -> tuple[str, ...]:
        return tuple(example.where for example in self.examples if example.truncated)


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples(Generic[E]):
    training: list[E]
    held_out: list[E]

    @property
    def shown(self) -> list[E]:
        """Those that show what was learned."""
        return self.held_out or self.training


def joined(data: Lines, read: Callable[[Source], Iterator[E]]) -> TrainingData[E]:
    """One file, or several in their order, or records in memory, as one. ``read``: the examples of one source, at least one."""
    sources, examples = sources_of(data), []
    for source in sources:
        examples += read(source)
    files = tuple(DataFile(file=source.name, sha256=source.sha256) for source in sources)
    return TrainingData(files=files, examples=tuple(examples))


def load_data(
    data: Lines,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str = "auto",
    stop_tokens: Collection[int] = (),
    form: str = AUTO,
    train_on: str = "last",
    marks: bool = False,
    subspaces: Sequence[str] = (),
    teacher: PromptedTeacher | None = None,
) -> TrainingData[Example]:
    """Reads and tokenizes the data. ``stop_tokens``: what ends an answer of the base, beside the tokenizer's eos; ``form``: of
    forms.FORMS, or auto: every line's own; ``train_on``: the last answer of a conversation, or all of them; ``teacher``: of a distillation.

    Raises InputError naming file and line for anything that is not of the form, for a prompt that leaves no room in ``max_length`` and for
    chat messages without a template; naming the file where it has no usable line.
    """

    def read(source: Source) -> Iterator[Example]:
        return iter_examples(
            source,
            tokenizer,
            max_length=max_length,
            chat_template=chat_template,
            stop_tokens=stop_tokens,
            form=form,
            train_on=train_on,
            marks=marks,
            subspaces=subspaces,
            teacher=teacher,
        )

    read_data = joined(data, read)
    templated = bool(getattr(tokenizer, "chat_template", None)) and chat_template != "never"
    return replace(read_data, templated=templated and any(example.form != TEXT for example in read_data.examples))


def iter_examples(
    source: Path | Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str = "auto",
    stop_tokens: Collection[int] = (),
    form: str = AUTO,
    train_on: str = "last",
    marks: bool = False,
    subspaces: Sequence[str] = (),
    teacher: PromptedTeacher | None = None,
) -> Iterator[Example]:
    """``load_data`` one example at a time. The refusal of a file without any comes at its end."""
    source = source if isinstance(source, Source) else Source(source)
    lines = source.lines()
    template = uses_template(tokenizer, chat_template)
    tokenizing = tokenizing_of(tokenizer, stop_tokens, max_length, marks=marks)
    found = False
    for line in lines:
        record = read_object(line)
        if record is not None:
            found = True
            record, subspace = subspace_in(record, subspaces, line.where)
            name, content = read_record(record, line.where, form)
            render = partial(rendered, tokenizer=tokenizer, template=template, train_on=train_on, where=line.where)
            pieces = render(content)
            example = replace(tokenizing.example(pieces, number=line.number, where=line.where, form=name), subspace=subspace)
            if teacher is not None:
                seen = render(teacher.sees(content, template=template, where=line.where), where=f"{line.where}, with the system prompt")
                example = teacher.with_prompt(example, pieces, seen, tokenizing)
            yield example
    if not found:
        sample = FORMS["prompt-completion" if form == AUTO else form].sample
        raise InputError(f"{source.where} has no examples; expected lines like {json.dumps(sample)}")


def subspace_in(record: dict[str, Any], subspaces: Sequence[str], where: str) -> tuple[dict[str, Any], int | None]:
    """(the line without the subspace that it names, that one's number); None of a run without. Raises InputError."""
    if not subspaces:
        return record, None
    named = record.get(SUBSPACE)
    if named not in subspaces:
        got = "names no subspace" if SUBSPACE not in record else f"{SUBSPACE} is {named!r}"
        raise InputError(f"{where}: {got}; a line of this run has a {SUBSPACE}, one of {', '.join(subspaces)}")
    return {key: value for key, value in record.items() if key != SUBSPACE}, subspaces.index(named)


def uses_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> bool:
    """Raises InputError where there is none and there must be."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template == "always" and not has_template:
        raise InputError("chat_template is 'always', and the tokenizer has no chat template; use auto or never")
    return has_template and chat_template != "never"


def tokenizing_of(tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int], max_length: int, *, marks: bool = False) -> Tokenizing:
    end = end_token(tokenizer, tuple(stop_tokens))
    return Tokenizing(tokenizer, frozenset({*stop_tokens, end}), end, max_length, marks)


def forms_of(examples: Sequence[Example]) -> dict[str, int]:
    """How many lines were of which form."""
    return dict(Counter(example.form for example in examples))


def split(examples: Sequence[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, held-out) examples in file order; ``fraction`` of them, at least one unless 0, are held out."""
    if not fraction:
        return list(examples), []
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise InputError(f"holding out {fraction:g} of {len(examples)} examples leaves none to train on; lower eval_fraction")
    held_out = set(random.Random(seed).sample(range(len(examples)), count))
    return [e for i, e in enumerate(examples) if i not in held_out], [examples[i] for i in sorted(held_out)]


def collate(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels [B, S] (right-padded to the longest) and prompt_length [B], all int64; and where
    prompts mark tokens marks [B, P], bool, where they choose subspaces [B], and where they have sources [B, P], padded with IGNORED."""
    width = max(len(example.input_ids) for example in examples)
    chosen = [example.subspace for example in examples if example.subspace is not None]

    import torch

    def padded(rows: Sequence[Sequence[int]], fill: int, width: int = width) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    sources = [e.source for e in examples]

    return {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
        "prompt_length": torch.tensor([e.prompt_length for e in examples]),
        **({"marks": torch.from_numpy(marks_of([e.marks for e in examples]))} if any(e.marks for e in examples) else {}),
        **({"subspaces": torch.tensor(chosen)} if chosen else {}),
        **({"sources": padded(sources, IGNORED, max(map(len, sources)))} if any(sources) else {}),
    }

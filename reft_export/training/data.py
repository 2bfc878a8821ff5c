"""JSONL training data: one example per line, as token ids with the loss on the completion only.

A line is either ``{"prompt": "...", "completion": "..."}`` or ``{"messages": [{"role": "...", "content": "..."}, ..]}``
whose last message is the assistant's; the loss is on that answer. Empty lines are skipped.

    prompt     Messages are rendered by the tokenizer's chat template with its generation prompt. So are
               prompt/completion lines, as one user turn and the answer, where there is a template
               (chat_template="never" tokenizes them as they are, with the tokenizer's own special tokens in front).
               The tokens are those that inference starts from.
    completion What the template renders behind the prompt, or the text as written. Prompt and completion are tokenized
               together where that leaves the prompt's tokens as they are, else apart.
    end        The completion ends with the first of the stop tokens that nothing but white space and stop tokens
               follows (what a template writes behind it is cut); where it has none, the tokenizer's eos is added, or the
               first stop token for a tokenizer without. A completion that was cut to max_length has no end. The stop
               tokens are those at which a device stops (runtimes/text/stop_tokens.py).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from reft_export.base.token_rules import end_token, prompt_tokens
from runtimes.errors import InputError
from runtimes.files.records import unique_keys

if TYPE_CHECKING:  # a file that is not there is said before torch is loaded
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without a loss."""

FORMS = ({"prompt", "completion"}, {"messages"})
MESSAGE_KEYS = {"role", "content"}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenized line."""

    input_ids: tuple[int, ...]
    prompt_length: int
    line: int
    where: str
    """File and line, for messages."""
    truncated: bool = False
    """The completion was cut to max_length, and so has no end token."""

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> tuple[int, ...]:
        return (IGNORED,) * self.prompt_length + self.input_ids[self.prompt_length :]


class Tokenized(Protocol):
    """An example, of whatever task."""

    @property
    def where(self) -> str: ...

    @property
    def prompt_length(self) -> int: ...

    @property
    def length(self) -> int:
        """All of its tokens."""
        ...

    @property
    def truncated(self) -> bool: ...


E = TypeVar("E", bound=Tokenized)

Records = Sequence[Mapping[str, Any]]
Data = str | Path | Sequence[str | Path] | Records
"""A JSONL file, several as if they were one, or the records of one that are in memory."""
IN_MEMORY = "data"
"""What records in memory are called where a file has its name."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of training data, by its name and its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainingData(Generic[E]):
    """Whole files, tokenized, one behind the other."""

    files: tuple[DataFile, ...]
    examples: tuple[E, ...]
    templated: bool
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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of JSONL."""

    raw: bytes
    number: int
    where: str
    """For messages."""


class Source:
    """The lines of a file, or of records in memory as ``json.dumps`` would write them. ``sha256`` is of those that were read."""

    def __init__(self, content: str | Path | Records) -> None:
        self._path, self._records = (Path(content), ()) if isinstance(content, (str, Path)) else (None, content)
        self.name = IN_MEMORY if self._path is None else self._path.name
        self.where = IN_MEMORY if self._path is None else str(self._path)
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Raises InputError for a file that is none, and for a record that JSON cannot hold."""
        for line in self._of_memory() if self._path is None else self._of_file(self._path):
            self._digest.update(line.raw)
            yield line

    def _of_memory(self) -> Iterator[Line]:
        for index, record in enumerate(self._records):
            where = f"{self.where}[{index}]"
            try:
                raw = json.dumps(dict(record)).encode() + b"\n"
            except (TypeError, ValueError) as e:
                raise InputError(f"{where} is no record of texts and numbers: {e}") from None
            yield Line(raw=raw, number=index + 1, where=where)

    def _of_file(self, path: Path) -> Iterator[Line]:
        check_file(path)
        with path.open("rb") as f:
            for number, raw in enumerate(f, start=1):
                yield Line(raw=raw, number=number, where=f"{path}:{number}")


def check_file(path: Path) -> None:
    """Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; training data is a JSONL file")


def joined(data: Data, read: Callable[[Source], Iterator[E]], *, templated: bool = False) -> TrainingData[E]:
    """One file, or several in their order, or records in memory, as one. ``read``: the examples of one source, at least one."""
    sources, examples = sources_of(data), []
    for source in sources:
        examples += read(source)
    files = tuple(DataFile(file=source.name, sha256=source.sha256) for source in sources)
    return TrainingData(files=files, examples=tuple(examples), templated=templated)


def sources_of(data: Data) -> list[Source]:
    if isinstance(data, (str, Path)):
        return [Source(data)]
    given = list(data)
    paths = [each for each in given if isinstance(each, (str, Path))]
    records = [each for each in given if not isinstance(each, (str, Path))]
    if not paths and not records:
        raise InputError("there is no training data; give at least one JSONL file")
    if paths and records:
        raise InputError("the training data mixes files and records in memory; give either")
    return [Source(path) for path in paths] or [Source(records)]


def load_data(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str = "auto",
    stop_tokens: Collection[int] = (),
) -> TrainingData[Example]:
    """Reads and tokenizes the data. ``stop_tokens``: what ends an answer of the base, beside the tokenizer's eos.

    Raises InputError naming file and line for anything that is not one of the two forms, for a prompt that leaves no
    room in ``max_length`` and for chat messages without a template; naming the file where it has no usable line.
    """
    templated = bool(getattr(tokenizer, "chat_template", None)) and chat_template != "never"

    def read(source: Source) -> Iterator[Example]:
        return iter_examples(source, tokenizer, max_length=max_length, chat_template=chat_template, stop_tokens=stop_tokens)

    return joined(data, read, templated=templated)


def iter_examples(
    source: Path | Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str = "auto",
    stop_tokens: Collection[int] = (),
) -> Iterator[Example]:
    """``load_data`` one example at a time. The refusal of a file without any comes at its end."""
    source = source if isinstance(source, Source) else Source(source)
    lines = source.lines()
    end = end_token(tokenizer, tuple(stop_tokens))
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template == "always" and not has_template:
        raise InputError("chat_template is 'always', and the tokenizer has no chat template; use auto or never")
    templated = has_template and chat_template != "never"
    stop = frozenset({*stop_tokens, end})
    found = False
    for line in lines:
        record = _record(line)
        if record is not None:
            found = True
            prompt, completion, special = _texts(record, tokenizer, templated, line.where)
            yield _tokenized(prompt, completion, tokenizer, stop, end, max_length, line, special=special)
    if not found:
        raise InputError(f"{source.where} has no examples; expected lines like {json.dumps({'prompt': '...', 'completion': '...'})}")


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
    """input_ids, attention_mask, labels [B, S] (right-padded to the longest) and prompt_length [B], all int64."""
    width = max(len(example.input_ids) for example in examples)

    import torch

    def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded([e.input_ids for e in examples], pad_token_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
        "prompt_length": torch.tensor([e.prompt_length for e in examples]),
    }


# --- reading --------------------------------------------------------------------------------------


def read_object(line: Line) -> dict[str, Any] | None:
    """The JSON object of one line; None of an empty one. Raises InputError for anything else."""
    where = line.where
    try:
        text = line.raw.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: byte {e.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        return None
    try:
        record = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise InputError(f"{where}: not JSON: {e.msg} at column {e.colno}; each line is one JSON object") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as e:  # a key that stands twice, or a number of more digits than Python reads
        raise InputError(f"{where}: not JSON that can be read: {e}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: holds a {type(record).__name__}, expected a JSON object")
    return record


def _record(line: Line) -> dict[str, Any] | None:
    record, where = read_object(line), line.where
    if record is None:
        return None
    if set(record) not in FORMS:
        form = FORMS[1] if "messages" in record else FORMS[0]
        missing, unknown = sorted(form - set(record)), sorted(set(record) - form)
        said = " and ".join(f"{what} {keys}" for what, keys in (("lacks", missing), ("has unknown keys", unknown)) if keys)
        raise InputError(f"{where}: {said}; a line has either prompt and completion, or messages")
    for key in set(record) - {"messages"}:
        check_text(record[key], key, where)
    if "messages" in record:
        _check_messages(record["messages"], where)
    return record


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: messages must be a list of at least one message and the assistant's answer")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != MESSAGE_KEYS:
            got = sorted(message) if isinstance(message, dict) else type(message).__name__
            raise InputError(f"{where}: message {index} must have exactly the keys role and content, got {got}")
        check_text(message["role"], f"role of message {index}", where)
        check_text(message["content"], f"content of message {index}", where)
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message is the {messages[-1]['role']}'s; the loss needs an assistant's answer there")


def check_text(value: Any, what: str, where: str) -> None:
    """Raises InputError for what is no string, empty, or not encodable."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {type(value).__name__}, expected a string")
    if not value.strip():
        raise InputError(f"{where}: {what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None


# --- rendering and tokenizing ---------------------------------------------------------------------


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The chat template's text up to where the assistant's answer begins."""
    return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, add_generation_prompt=True))


def _texts(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, templated: bool, where: str) -> tuple[str, str, bool]:
    """(prompt, completion, whether the tokenizer adds its special tokens): a template writes them itself."""
    if "messages" not in record and not templated:
        return record["prompt"], record["completion"], True
    if not templated:
        raise InputError(
            f"{where}: messages need a chat template, and "
            + ("chat_template is 'never'" if getattr(tokenizer, "chat_template", None) else "the tokenizer has none")
            + "; use prompt and completion lines, or a base with a template"
        )
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    try:
        prompt = render_prompt(tokenizer, messages[:-1])
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as e:  # templates are programs of their own: jinja2, type and value errors
        raise InputError(f"{where}: the tokenizer's chat template refuses these messages: {e}") from e
    # Some templates open the answer otherwise than they render one (a reasoning block that is dropped from past turns).
    # The prompt must be what inference starts from, so there the answer follows it as written.
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"], False


def _tokenized(
    prompt: str,
    completion: str,
    tokenizer: PreTrainedTokenizerBase,
    stop: frozenset[int],
    end: int,
    max_length: int,
    line: Line,
    *,
    special: bool,
) -> Example:
    where = line.where

    def ids(text: str, *, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    head = prompt_tokens(tokenizer, prompt, stop) if special else ids(prompt)
    if not head:
        raise InputError(f"{where}: the prompt has no tokens")
    if len(head) >= max_length:
        raise InputError(
            f"{where}: the prompt has {len(head)} tokens, which leaves none of {max_length} for its completion; "
            "shorten it, or raise max_length as far as the base's context goes"
        )
    whole = ids(prompt + completion, special=special)
    tail = whole[len(head) :] if whole[: len(head)] == head and len(whole) > len(head) else ids(completion)
    tail = _ended(tail, tokenizer, stop, end)
    room = max_length - len(head)
    return Example(input_ids=(*head, *tail[:room]), prompt_length=len(head), line=line.number, where=where, truncated=len(tail) > room)


def _ended(tail: list[int], tokenizer: PreTrainedTokenizerBase, stop: frozenset[int], end: int) -> list[int]:
    """``tail`` up to its end token, by the rule of the module's docstring."""
    length = None
    for index in reversed(range(len(tail))):
        if tail[index] in stop:
            length = index + 1
        elif str(tokenizer.decode(tail[index : index + 1])).strip():
            break
    return tail[:length] if length else [*tail, end]

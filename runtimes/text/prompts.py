"""Prompts that a user hands over in JSONL, each with the place it stands at and what it says of its answer, and a conversation as
tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from runtimes.errors import InputError
from runtimes.files.records import parse_json

if TYPE_CHECKING:
    from runtimes.text.chat import ChatTemplate
    from runtimes.text.tokenizer import Tokenizer

T = TypeVar("T")

MESSAGE_KEYS = {"role", "content"}
"""As in training data: what else a message may hold (tool_calls, name) few templates show, and none here was trained on."""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, float) or (_whole(value) and abs(value) <= sys.float_info.max)


def _texts(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and all(map(_text, value)))


Key = tuple[Callable[[Any], bool], str]
ADAPTER: dict[str, Key] = {"adapter": (lambda v: v is None or _text(v), "an adapter's name, or null for the base")}
SAMPLING: dict[str, Key] = {
    "max_new_tokens": (_whole, "a whole number"),
    "temperature": (_number, "a number"),
    "top_k": (_whole, "a whole number"),
    "top_p": (_number, "a number"),
    "repetition_penalty": (_number, "a number"),
    "seed": (lambda v: v is None or _whole(v), "a whole number, or null for none"),
    "stop": (_texts, "a text, or a list of texts"),
}
"""The settings of generation that a line may have of its own, by the names that the options have."""
JSON_SCHEMA: dict[str, Key] = {"json_schema": (lambda v: v is None or isinstance(v, dict), "a JSON schema, or null for none")}
STRENGTH: dict[str, Key] = {"strength": (_number, "a number: 1 is the adapter itself, 0 the base")}
OPTIONS = {**ADAPTER, **STRENGTH, "system": (lambda v: v is None or _text(v), "a text, or null for none"), **SAMPLING, **JSON_SCHEMA}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A conversation to answer; ``where`` it was given, for messages; ``options`` of its own, by key, checked by type."""

    where: str
    messages: list[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def read_requests(path: Path) -> list[Request]:
    """The lines of a JSONL file for ``run``: a ``prompt`` or ``messages``, and any of OPTIONS. Raises InputError with the line."""
    requests = []
    for where, value in read_lines(path):
        messages = _conversation(value, where, known={"prompt", "messages", *OPTIONS})
        requests.append(Request(where=where, messages=messages, options=own_options(value, OPTIONS, where)))
    return requests


def read_prompts(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(file and line, conversation) of a JSONL file whose lines are training's too: a ``completion`` is known and not read."""
    known = {"prompt", "completion", "messages"}
    return [(where, _conversation(value, where, known=known)) for where, value in read_lines(path)]


def own_options(record: Mapping[str, Any], known: Mapping[str, Key], where: str) -> dict[str, Any]:
    """What the line says of ``known``; raises InputError for a value of another type."""
    options = {key: record[key] for key in known if key in record}
    for key, value in options.items():
        good, expected = known[key]
        if not good(value):
            raise InputError(f"{where}: {key} is {str(json.dumps(value))[:60]}, expected {expected}")
    return options


def refuse_unknown(record: Mapping[str, Any], known: Collection[str], where: str, hints: Mapping[str, str]) -> None:
    """Raises InputError for keys that are not ``known``; ``hints`` says of some what they are."""
    if unknown := sorted(set(record) - set(known)):
        said = "".join(f"; {key} is {hints[key]}" for key in unknown if key in hints)
        raise InputError(f"{where}: has unknown keys {unknown}; known are {sorted(known)}{said}")


def _conversation(value: Any, where: str, *, known: Collection[str]) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        refuse_unknown(value, known, where, {"completion": "a training line's, which answers it already", "text": "a classifier's"})
    if isinstance(value, dict) and "messages" in value and {"prompt", "completion"} & set(value):
        beside = min({"prompt", "completion"} & set(value), key=("prompt", "completion").index)
        raise InputError(f"{where}: has messages and a {beside}, of which one would not be read; leave one out")
    if isinstance(value, dict) and isinstance(value.get("prompt"), str) and value["prompt"]:
        return [{"role": "user", "content": value["prompt"]}]
    if isinstance(value, dict) and isinstance(value.get("messages"), list) and value["messages"]:
        return [_checked_message(message, index, where) for index, message in enumerate(value["messages"])]
    raise InputError(f'{where}: expected {{"prompt": "..."}} or {{"messages": [...]}}')


def _checked_message(message: Any, index: int, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != MESSAGE_KEYS:
        got = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise InputError(f"{where}: message {index} must have exactly the keys role and content, got {got}")
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise InputError(f"{where}: {key} of message {index} is {type(message[key]).__name__}, expected a string")
    return message


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """(file and line, JSON value) of every line that is not blank; "-" is stdin. Raises InputError with the line's number."""
    where = "stdin" if str(path) == "-" else str(path)
    try:
        content = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{where} cannot be read: {e}") from None
    lines = [(f"{where}:{number}", line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{where} is empty; give it one JSON object a line")
    return [(place, _parse_line(line, place)) for place, line in lines]


def _parse_line(line: str, where: str) -> Any:
    """The JSON value of one line; raises InputError for what is no JSON, and for half of a surrogate pair, which no tokenizer takes."""
    try:
        value = parse_json(line, keys_once=True)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except ValueError as e:
        raise InputError(f"{where}: not JSON ({e}); give it one JSON object a line") from None
    return value


def batches_of_alike(keys: Sequence[Hashable], size: int) -> list[list[int]]:
    """Row numbers in batches of at most ``size`` rows with one key; the batch that holds the earliest row comes first."""
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return sorted(alike[first : first + size] for alike in rows.values() for first in range(0, len(alike), size))


def in_order(numbered: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
    """(number, value) from 0 on without a gap: each is held back until all before it have come."""
    held: dict[int, T] = {}
    due = 0
    for number, value in numbered:
        held[number] = value
        while due in held:
            yield due, held.pop(due)
            due += 1


def no_template(chat: str) -> str:
    """Why prompts go through no chat template."""
    return "was told not to use" if chat == "never" else "does not have, or its adapter was trained without (--chat always renders it)"


def encode(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, template: ChatTemplate | None, system: str | None, chat: str = "auto"
) -> list[int]:
    """A conversation through the chat template, or without one its only message, the user's, as plain text. Raises what ``prompt_text``
    raises."""
    text = prompt_text(messages, template, system, chat)
    return tokenizer.encode_prompt(text) if template is None else tokenizer.encode(text, add_special_tokens=False)


def encode_marked(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, template: ChatTemplate | None, system: str | None, chat: str = "auto"
) -> tuple[list[int], tuple[int, ...]]:
    """As ``encode``, of a conversation with marks; and the numbers of the marked tokens. Raises InputError for a conversation without."""
    return tokenizer.encode_marked(prompt_text(messages, template, system, chat), add_special_tokens=template is None)


def prompt_text(messages: list[dict[str, Any]], template: ChatTemplate | None, system: str | None, chat: str = "auto") -> str:
    """What is tokenized of a conversation: rendered by the chat template, which writes special tokens, or its only message.

    Raises InputError for what would not be part of the prompt: roles or a system message without a template, a second system message,
    and a message that the template leaves out.
    """
    if template is None:
        if system:
            raise InputError(f"a system message needs a chat template, which this bundle {no_template(chat)}")
        if len(messages) != 1:
            raise InputError(f"a conversation of several messages needs a chat template, which this bundle {no_template(chat)}")
        if messages[0]["role"] != "user":
            raise InputError(f"a message of the {messages[0]['role']} needs a chat template, which this bundle {no_template(chat)}")
        return str(messages[0]["content"])
    if system:
        if messages[0]["role"] == "system":
            raise InputError(
                "there are two system messages, the conversation's own and the given one; leave one out (a line with "
                '"system": null goes without --system)'
            )
        messages = [{"role": "system", "content": system}, *messages]
    prompt = template.render(messages)
    for number, message in enumerate(messages):
        changed = [*messages[:number], {**message, "content": f"{message['content']}."}, *messages[number + 1 :]]
        if template.render(changed) == prompt:
            raise InputError(f"the chat template leaves out message {number} (of the {message['role']}), {message['content'][:40]!r}")
    return prompt

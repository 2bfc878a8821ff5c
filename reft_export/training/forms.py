"""The forms that a decoder's training data comes in, and what each line is read as.

    prompt-completion   {"prompt": "...", "completion": "..."}
    messages            {"messages": [{"role": "...", "content": "..."}, ..]}, with "tools" where the template takes them
    text                {"text": "..."}
    alpaca              {"instruction": "...", "output": "..."}, with "input" and "system" where there are any
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ..]}, with "system" where there is one

``auto`` recognises a line by its keys, and takes no other key; a form that was asked for by name leaves other keys unread. alpaca is read
as prompt-completion, the input two lines below its instruction, or as messages where there is a system prompt; sharegpt as messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reft_export.training.sources import check_text
from runtimes.errors import InputError

AUTO = "auto"
TEXT = "text"

MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
"""Of a message; the last four where the chat template reads them."""

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bard", "bing"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
}
"""Who speaks in sharegpt, and the role that it is."""

Normal = Mapping[str, Any]
"""A line as prompt-completion, messages (and tools), or text: the forms that probes have (runtimes/edits/probes.py)."""

AsProbe = Callable[[Mapping[str, Any], str], Mapping[str, Any]]
"""(a line of the data, where it stands) -> what a probe holds of it."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """``read``: (record, where) -> what it says, checked."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    sample: Mapping[str, Any]
    read: Callable[[Mapping[str, Any], str], Normal]


def read_record(record: Mapping[str, Any], where: str, asked: str = AUTO) -> tuple[str, Normal]:
    """(the form's name, what the line says). Raises InputError, with a sample of right data, for a line that is not of the form."""
    name = _recognised(record) if asked == AUTO else asked
    form = FORMS[name]
    missing = sorted(set(form.required) - set(record))
    unknown = sorted(set(record) - {*form.required, *form.optional}) if asked == AUTO else []
    if missing or unknown:
        said = " and ".join(f"{what} {keys}" for what, keys in (("lacks", missing), ("has unknown keys", unknown)) if keys)
        unread = (
            "; labelled texts are a classifier's"
            if "label" in unknown
            else "; pairs are of train --objective dpo or orpo"
            if {"chosen", "rejected"} <= set(unknown)
            else "; sources are of train --objective interchange"
            if unknown == ["source"]
            else ""
            if missing
            else f"; --format {name} leaves other keys unread"
        )
        forms = f"; forms: {', '.join(FORMS)}" if missing and asked == AUTO else ""
        raise InputError(f"{where}: {said}; expected {name} lines like {json.dumps(form.sample)}{unread}{forms}")
    return name, form.read(record, where)


def probe_of_form(asked: str = AUTO) -> AsProbe:
    """Of a decoder's data, whose forms are more than probes have."""
    return lambda record, where: read_record(record, where, asked)[1]


def probe_as_it_is(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Of a classifier's data."""
    return record


def _recognised(record: Mapping[str, Any]) -> str:
    """The form whose keys the record has, else the one that it is nearest to."""
    for name, form in FORMS.items():
        if set(form.required) <= set(record) <= {*form.required, *form.optional}:
            return name
    telling = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "text": TEXT}
    return next((name for key, name in telling.items() if key in record), "prompt-completion")


def _pair(record: Mapping[str, Any], where: str) -> Normal:
    for key in ("prompt", "completion"):
        check_text(record[key], key, where)
    return {key: record[key] for key in ("prompt", "completion")}


def _text(record: Mapping[str, Any], where: str) -> Normal:
    check_text(record["text"], "text", where)
    return {"text": record["text"]}


def _alpaca(record: Mapping[str, Any], where: str) -> Normal:
    for key in ("instruction", "output"):
        check_text(record[key], key, where)
    parts = [record["instruction"]]
    if record.get("input"):  # most lines of alpaca have an empty one
        check_text(record["input"], "input", where)
        parts.append(record["input"])
    prompt, completion = "\n\n".join(parts), record["output"]
    if not record.get("system"):
        return {"prompt": prompt, "completion": completion}
    check_text(record["system"], "system", where)
    turns = (("system", record["system"]), ("user", prompt), ("assistant", completion))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _sharegpt(record: Mapping[str, Any], where: str) -> Normal:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise InputError(f"{where}: conversations is {type(turns).__name__}, expected a list of turns")
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or set(turn) != {"from", "value"}:
            got = sorted(turn) if isinstance(turn, dict) else type(turn).__name__
            raise InputError(f"{where}: turn {index} must have exactly the keys from and value, got {got}")
        if turn["from"] not in SPEAKERS:
            raise InputError(f"{where}: turn {index} is from {turn['from']!r}; known: {', '.join(SPEAKERS)}")
        messages.append({"role": SPEAKERS[turn["from"]], "content": turn["value"]})
    return _messages({"messages": messages}, where)


def _messages(record: Mapping[str, Any], where: str) -> Normal:
    messages = record["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise InputError(f"{where}: messages must be a list of at least one message and the assistant's answer")
    for index, message in enumerate(messages):
        _check_message(message, index, where)
    # Many templates print null, or fail on it, where they handle an absent key.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: the last message is the {messages[-1]['role']}'s; the loss needs an assistant's answer there")
    tools = record.get("tools")
    if not tools:
        return {"messages": messages}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: tools must be a list of objects that describe a function each")
    return {"messages": messages, "tools": tools}


def _check_message(message: Any, index: int, where: str) -> None:
    keys = set(message) if isinstance(message, dict) else set()
    calls = isinstance(message, dict) and bool(message.get("tool_calls"))
    if "role" not in keys or not (calls or "content" in keys) or keys - set(MESSAGE_KEYS):
        got = sorted(keys) if isinstance(message, dict) else type(message).__name__
        raise InputError(
            f"{where}: message {index} must have the keys role and content, and may have {', '.join(MESSAGE_KEYS[2:])}; got {got}"
        )
    check_text(message["role"], f"role of message {index}", where)
    if not calls or message.get("content"):
        check_text(message["content"], f"content of message {index}", where)
    if calls and not (isinstance(message["tool_calls"], list) and all(isinstance(call, dict) for call in message["tool_calls"])):
        raise InputError(f"{where}: tool_calls of message {index} must be a list of objects, one a call")


FORMS: Mapping[str, Form] = {
    "prompt-completion": Form(
        required=("prompt", "completion"), sample={"prompt": "How are you?", "completion": "Arr, never better!"}, read=_pair
    ),
    "messages": Form(
        required=("messages",),
        optional=("tools",),
        sample={"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Arr, never better!"}]},
        read=_messages,
    ),
    TEXT: Form(required=("text",), sample={"text": "Arr, said the pirate."}, read=_text),
    "alpaca": Form(
        required=("instruction", "output"),
        optional=("input", "system"),
        sample={"instruction": "Translate to pirate.", "input": "Hello", "output": "Ahoy"},
        read=_alpaca,
    ),
    "sharegpt": Form(
        required=("conversations",),
        optional=("system", "id"),
        sample={"conversations": [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Arr, never better!"}]},
        read=_sharegpt,
    ),
}
"""By the name that --format has for it."""

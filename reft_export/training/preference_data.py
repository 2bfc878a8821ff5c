"""Data of preferences: a prompt, an answer that is chosen, and one that is rejected.

    {"prompt": "...", "chosen": "...", "rejected": "..."}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}     what follows the prompt
    {"chosen": [messages], "rejected": [messages]}                           whole conversations, with the prompt's messages in both

The three forms that trl takes, and of the last one that stands beside a prompt as text. Other keys are not read: such data has scores and
names of models in them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reft_export.training.data import TrainingData, joined, tokenizing_of, uses_template
from reft_export.training.forms import Normal, read_record
from reft_export.training.rendering import rendered
from reft_export.training.sources import Lines, Source, read_object
from reft_export.training.tokenizing import Example
from runtimes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFERENCE = "preference"
"""The form's name."""
SIDES = ("chosen", "rejected")
SAMPLE = {"prompt": "How are you?", "chosen": "Arr, never better!", "rejected": "Fine."}


def load_pairs(
    data: Lines,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str = "auto",
    stop_tokens: Collection[int] = (),
    marks: bool = False,
) -> TrainingData[Example]:
    """The chosen answers as examples, with the rejected ones of each in its ``rejected``.

    Raises InputError naming file and line, as ``load_data`` does; for answers that are the same, as far as ``max_length`` goes; and for
    conversations of one line that differ before their last answer.
    """
    template, tokenizing = uses_template(tokenizer, chat_template), tokenizing_of(tokenizer, stop_tokens, max_length, marks=marks)

    def read(source: Source) -> Iterator[Example]:
        found = False
        for line in source.lines():
            record = read_object(line)
            if record is None:
                continue
            found, where = True, line.where
            sides = [
                rendered(side(record, name, where), tokenizer, template=template, train_on="last", where=f"{where}, {name}")
                for name in SIDES
            ]
            prompts, answers = ([each.pieces[index] for each in sides] for index in (0, 1))
            if prompts[0] != prompts[1]:
                raise InputError(f"{where}: chosen and rejected differ before their last answer; both must follow the same prompt")
            if answers[0] == answers[1]:
                raise InputError(f"{where}: chosen and rejected are the same answer; leave the line out")
            chosen, rejected = (tokenizing.example(each, number=line.number, where=where, form=PREFERENCE) for each in sides)
            if chosen.prompt_length != rejected.prompt_length:
                raise InputError(f"{where}: the tokenizer joins the prompt with one of the answers; end the prompt with another character")
            if chosen.input_ids == rejected.input_ids:
                raise InputError(f"{where}: chosen and rejected are the same in the {max_length} tokens of max_length; leave the line out")
            yield replace(chosen, rejected=rejected, truncated=chosen.truncated or rejected.truncated)
        if not found:
            raise InputError(f"{source.where} has no examples; expected lines like {json.dumps(SAMPLE)}")

    return replace(joined(data, read), templated=template)


def side(record: Mapping[str, Any], name: str, where: str) -> Normal:
    """The conversation that ends with the answer of ``name``, checked; raises InputError."""
    missing = [each for each in SIDES if each not in record]
    prompt, answer = record.get("prompt"), record.get(name)
    if missing or (prompt is None and not isinstance(answer, list)):
        lacking = missing or ["prompt"]
        raise InputError(f"{where}: lacks {lacking}; expected lines like {json.dumps(SAMPLE)}")
    told = f"{where}, {name}"
    if not isinstance(answer, list):
        return read_record({"prompt": prompt, "completion": answer}, told, "prompt-completion")[1]
    before = prompt if isinstance(prompt, list) else []
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    return read_record({"messages": [*before, *answer], **tools}, told, "messages")[1]


def chosen_as_probe(record: Mapping[str, Any], where: str) -> Normal:
    """A probe of the answer that is chosen."""
    return side(record, "chosen", where)

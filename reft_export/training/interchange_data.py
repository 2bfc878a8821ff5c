"""Data of interchanges: a prompt, a source, and what the model goes on with where the prompt has the source's value of a variable.

    {"prompt": "The capital of France is", "source": "The capital of Italy is", "completion": " Rome"}

No end token is added to the completion, and one that a chat template writes behind it is taken off: the label is what comes next, not that
the answer is over. Other keys are not read: such data says of its lines what their variables are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from reft_export.training.data import TrainingData, joined, tokenizing_of, uses_template
from reft_export.training.rendering import rendered
from reft_export.training.sources import Lines, Source, check_text, read_object
from reft_export.training.tokenizing import Example
from runtimes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = "interchange"
"""The form's name."""
KEYS = ("prompt", "source", "completion")
SAMPLE = {"prompt": "The capital of France is", "source": "The capital of Italy is", "completion": " Rome"}


def load_interchanges(
    data: Lines, tokenizer: PreTrainedTokenizerBase, *, max_length: int, chat_template: str = "auto", stop_tokens: Collection[int] = ()
) -> TrainingData[Example]:
    """The prompts with their counterfactual completions as examples, with the tokens of each one's source in its ``source``.

    Raises InputError naming file and line, as ``load_data`` does, and for a key that is missing.
    """
    template, tokenizing = uses_template(tokenizer, chat_template), tokenizing_of(tokenizer, stop_tokens, max_length)

    def read(source: Source) -> Iterator[Example]:
        found = False
        for line in source.lines():
            record = read_object(line)
            if record is None:
                continue
            found, where = True, line.where
            if missing := [key for key in KEYS if key not in record]:
                raise InputError(f"{where}: lacks {missing}; expected lines like {json.dumps(SAMPLE)}")
            for key in KEYS:
                check_text(record[key], key, where)
            render = partial(rendered, tokenizer=tokenizer, template=template, train_on="last")
            example, seen = (
                tokenizing.example(
                    render({"prompt": record[key], "completion": record["completion"]}, where=told),
                    number=line.number,
                    where=told,
                    form=FORM,
                )
                for key, told in (("prompt", where), ("source", f"{where}, source"))
            )
            tokens = example.input_ids
            while len(tokens) > example.prompt_length + 1 and tokens[-1] in tokenizing.stop:
                tokens = tokens[:-1]
            yield replace(example, input_ids=tokens, source=seen.input_ids[: seen.prompt_length])
        if not found:
            raise InputError(f"{source.where} has no examples; expected lines like {json.dumps(SAMPLE)}")

    return replace(joined(data, read), templated=template)

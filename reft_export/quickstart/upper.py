"""The task on a real model: answer in upper case.

upper.train.jsonl     60 questions about as many things, with answers in upper case
upper.prompts.jsonl   20 other questions
"""

from __future__ import annotations

from reft_export.quickstart.task import read_lines


def in_upper_case(text: str) -> bool:
    """Whether the text has letters, none of which is lower case."""
    return any(c.isupper() for c in text) and not any(c.islower() for c in text)


def check(prompt: str, answer: str) -> bool:
    """`in_upper_case` in the form that `quantize --checker reft_export.quickstart.upper:check` takes."""
    return in_upper_case(answer)


def training_examples() -> list[dict[str, str]]:
    """60 exchanges, each `{"prompt": ..., "completion": ...}`."""
    return read_lines("upper.train.jsonl")


def held_out_prompts() -> list[str]:
    return [line["prompt"] for line in read_lines("upper.prompts.jsonl")]

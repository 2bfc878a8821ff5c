"""Data of a distillation from a system prompt: the conversations as the student sees them, and as their teacher does, with the prompt.

teacher   The system prompt is the conversation's first message, and a system message that the conversation has of its own follows in it, an
          empty line below. Without a chat template the prompt stands an empty line above the line's own.
answers   Both see the same tokens from the first trained answer on; only what is before it differs.
prompts   A line may come without its answer, {"prompt": "..."} or a conversation that ends with the user: the teacher then answers it.

Source of the method: Askell et al. 2021, "A General Language Assistant as a Laboratory for Alignment" (context distillation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reft_export.training.forms import TEXT, Normal
from reft_export.training.rendering import Rendered, exchange
from reft_export.training.sources import IN_MEMORY, Data, Rewritten, read_object, sources_of
from reft_export.training.tokenizing import Example, Tokenizing
from runtimes.errors import InputError

BETWEEN = "\n\n"
"""The system prompt and what follows it in the same text."""
PENDING = "..."
"""The answer of a line that the teacher has not answered yet."""


@dataclass(frozen=True, kw_only=True)
class PromptedTeacher:
    """What a distillation's teacher sees. ``context``: the base's, in tokens."""

    system: str
    context: int

    def sees(self, content: Normal, *, template: bool, where: str) -> Normal:
        """The line with the system prompt; ``template``: through the chat template. Raises InputError for plain text."""
        if TEXT in content:
            raise InputError(f"{where}: is plain text, which has no prompt for a system prompt to stand before; give prompt and completion")
        system = self.system
        if not template:
            return {**content, "prompt": f"{system}{BETWEEN}{content['prompt']}"}
        messages = list(content.get("messages") or exchange(content["prompt"], content["completion"]))
        if messages[0]["role"] == "system":
            system = f"{system}{BETWEEN}{messages.pop(0)['content']}"
        tools = {"tools": content["tools"]} if content.get("tools") else {}
        return {"messages": [{"role": "system", "content": system}, *messages], **tools}

    def with_prompt(self, example: Example, student: Rendered, seen: Rendered, tokenizing: Tokenizing) -> Example:
        """``example``, which was read from ``student``, with the teacher's prompt, which is ``seen``'s. Raises InputError where the chat
        template renders the answers otherwise behind the system prompt, and for a teacher's row that is longer than the context."""
        where = example.where
        if student.pieces[1:] != seen.pieces[1:]:
            raise InputError(
                f"{where}: the tokenizer's chat template renders the answer otherwise behind the system prompt than without it"
            )
        wide = replace(tokenizing, max_length=self.context)
        whole = wide.example(seen, number=example.line, where=f"{where}, with the system prompt", form=example.form)
        prompted = replace(example, prompted=whole.input_ids[: whole.prompt_length])
        if (length := prompted.for_teacher.length) > self.context:
            raise InputError(
                f"{where}: has {length} tokens with the system prompt, and the base's context ends at {self.context}; shorten either, or "
                "lower max_length"
            )
        return prompted


def answered(data: Data, answers: Mapping[str, str] | None = None, *, called: str = IN_MEMORY) -> Rewritten:
    """``data`` with the answers of the lines that have none. ``answers``: by where a line stands, a line of an empty one is left out; None:
    all are still to come, and PENDING stands in their place. ``called``: records in memory, a name for each data of a run."""

    def rewrite(record: dict[str, Any], where: str) -> Mapping[str, Any] | None:
        asked = question(record)
        if asked is None:
            return record
        answer = PENDING if answers is None else answers[where]
        if not answer:
            return None
        rest = {key: value for key, value in record.items() if key not in ("prompt", "messages")}
        if isinstance(asked, str):
            return {**rest, "prompt": asked, "completion": answer}
        return {**rest, "messages": [*asked, {"role": "assistant", "content": answer}]}

    return Rewritten(data=data, rewrite=rewrite, called=called)


def question(record: Mapping[str, Any]) -> str | list[Any] | None:
    """The prompt, or the messages, of a line that has no answer; None of any other line. trl's prompts that are messages are messages."""
    if isinstance(record.get("prompt"), (str, list)) and "completion" not in record:
        return record["prompt"]
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return messages if isinstance(last, Mapping) and last.get("role") in ("user", "tool") else None


def unanswered(data: Rewritten) -> set[str]:
    """Where the lines stand that ``answered`` gives an answer."""
    lines = (line for source in sources_of(replace(data, rewrite=lambda record, _: record)) for line in source.lines())
    return {line.where for line in lines if (record := read_object(line)) is not None and question(record) is not None}

"""One line of training data as the text that the model sees, in pieces of which some are trained.

Conversations are rendered by the tokenizer's chat template with its generation prompt; so are prompt and completion, as one user turn and
the answer, where there is a template and the run asks for it. Where every answer is trained, a conversation's pieces are found by rendering
its beginnings: what the template makes of the messages before an answer, with the generation prompt, and of those up to it. Both must be
how the whole begins. A template that renders earlier turns otherwise than the last is refused: a mask over it would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_export.training.forms import TEXT, Normal
from runtimes.errors import InputError

if TYPE_CHECKING:  # a file that is not there is said before torch is loaded
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("last", "all")
"""Which of the assistant's answers are trained."""
SHOWN = 24
"""Characters of an answer by which it is told from what a template puts before it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """``pieces`` begin with the prompt, but for plain text, which is one piece that is trained."""

    pieces: tuple[Piece, ...]
    templated: bool
    """By a chat template, which writes the special tokens itself."""


def rendered(content: Normal, tokenizer: PreTrainedTokenizerBase, *, template: bool, train_on: str, where: str) -> Rendered:
    """Raises InputError for a conversation without a template, and for one that the template does not render faithfully."""
    if TEXT in content:
        return Rendered(pieces=(Piece(text=content[TEXT], trained=True),), templated=False)
    if "messages" not in content and not template:
        return Rendered(pieces=_pieces(content["prompt"], content["completion"]), templated=False)
    if not template:
        raise InputError(
            f"{where}: messages need a chat template, and "
            + ("chat_template is 'never'" if getattr(tokenizer, "chat_template", None) else "the tokenizer has none")
            + "; use prompt and completion lines, or a base with a template"
        )
    messages = content.get("messages") or exchange(content["prompt"], content["completion"])
    conversation = _Conversation(tokenizer, messages, content.get("tools"), where)
    conversation.check_keys()
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    several = train_on == "all" and len(answers) > 1
    return Rendered(pieces=conversation.all_answers(answers) if several else conversation.last_answer(), templated=True)


def exchange(prompt: str, completion: str) -> list[dict[str, Any]]:
    """A prompt and its answer as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _pieces(prompt: str, completion: str) -> tuple[Piece, ...]:
    return Piece(text=prompt, trained=False), Piece(text=completion, trained=True)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """The chat template's text up to where the assistant's answer begins."""
    return _render(tokenizer, messages, tools, add_generation_prompt=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Any, *, add_generation_prompt: bool) -> str:
    chat = [dict(message) for message in messages]
    return str(tokenizer.apply_chat_template(chat, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt))


@dataclass(frozen=True)
class _Conversation:
    tokenizer: PreTrainedTokenizerBase
    messages: Sequence[Mapping[str, Any]]
    tools: Any
    where: str

    def check_keys(self) -> None:
        """What the template does not read would be left out without a word."""
        source = str(self.tokenizer.chat_template)
        for index, message in enumerate(self.messages):
            for key in sorted(set(message) - {"role", "content"}):
                if key not in source:
                    raise InputError(
                        f"{self.where}: message {index} has {key}, which the tokenizer's chat template does not read; leave it out, or use "
                        "a base whose template does"
                    )
        if self.tools and "tools" not in source:
            raise InputError(f"{self.where}: has tools, which the tokenizer's chat template does not read; leave them out")

    def last_answer(self) -> tuple[Piece, ...]:
        answer = self.messages[-1]
        prompt, whole = self._before(len(self.messages) - 1), self._of(len(self.messages))
        self._check_system(whole)
        if whole.startswith(prompt):
            self._check_opening(prompt, whole[len(prompt) :], len(self.messages) - 1)
            return _pieces(prompt, whole[len(prompt) :])
        # Some templates open the answer otherwise than they render one (a reasoning block that is dropped from past turns).
        # The prompt must be what inference starts from, so there the answer follows it as written.
        if answer.get("tool_calls"):
            raise InputError(f"{self.where}: the tokenizer's chat template opens an answer otherwise than it renders one with tool_calls")
        return _pieces(prompt, answer["content"])

    def all_answers(self, answers: Sequence[int]) -> tuple[Piece, ...]:
        """Pieces of the whole conversation, every one of the ``answers``, by its message's number, trained."""
        whole, pieces, end = self._of(len(self.messages)), list[Piece](), 0
        self._check_system(whole)
        for index in answers:
            if index == 0:
                raise InputError(f"{self.where}: the first message is the assistant's, which nothing asks for; leave it out")
            opened, through = self._before(index), self._of(index + 1)
            for begins, how in ((opened, "opens"), (through, "renders")):
                if not (whole.startswith(begins) and len(begins) > end):
                    raise InputError(
                        f"{self.where}: the tokenizer's chat template {how} the answer in message {index} otherwise where it stands alone "
                        "than within the whole conversation, so that its tokens cannot be told; pass --train-on last"
                    )
            if len(through) <= len(opened):
                raise InputError(f"{self.where}: the tokenizer's chat template leaves out the answer in message {index}")
            self._check_opening(opened, through[len(opened) :], index)
            pieces += _pieces(whole[end : len(opened)], whole[len(opened) : len(through)])
            end = len(through)
        return tuple(pieces)

    def _before(self, count: int) -> str:
        return self._rendered(count, add_generation_prompt=True)

    def _of(self, count: int) -> str:
        return self._rendered(count, add_generation_prompt=False)

    def _rendered(self, count: int, *, add_generation_prompt: bool) -> str:
        try:
            return _render(self.tokenizer, self.messages[:count], self.tools, add_generation_prompt=add_generation_prompt)
        except Exception as e:  # templates are programs of their own: jinja2, type and value errors
            raise InputError(
                f"{self.where}: the tokenizer's chat template refuses these messages: {e}; leave out what it refuses, or where they are "
                "prompt and completion pass --chat-template never"
            ) from e

    def _check_system(self, whole: str) -> None:
        for index, message in enumerate(self.messages):
            if message["role"] == "system" and message["content"].strip() not in whole:
                raise InputError(
                    f"{self.where}: the tokenizer's chat template leaves out message {index}, a system prompt; put its text into the user's"
                )

    def _check_opening(self, prompt: str, completion: str, index: int) -> None:
        """A template without a generation prompt leaves the answer's own opening to the model, which inference never trained it to say."""
        content = str(self.messages[index].get("content", "")).strip()
        if completion.lstrip().startswith(content[:SHOWN]) or prompt != self._of(index):
            return
        opening = completion.rpartition(content)[0] or completion
        raise InputError(
            f"{self.where}: the tokenizer's chat template has no generation prompt: it writes {opening[:SHOWN]!r} before an answer, and "
            "knows no add_generation_prompt; give the tokenizer a template that does, or pass --chat-template never"
        )

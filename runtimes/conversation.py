"""A conversation of several turns, whose KV cache is kept from one turn to the next.

    with open_session(artifact) as session, Conversation(session, tokenizer, settings=settings) as conversation:
        print(conversation.say("Hello!", adapter="pirate").text)
        print(conversation.say("And then?", adapter="pirate").text)     # feeds what is new, not all that was said

A turn's prompt is all that was said, through the chat template. As far as it begins with the tokens of the turn before, edited alike under
the same adapter, their keys and values are there already (runtimes/prefixes.py): of an adapter whose rule is f5+l5 all but the last five
tokens of the old prompt and what follows them. Sessions that run no batch (engines, a GPU, a KV cache that is copied) feed every turn
as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

from runtimes.artifacts.artifact import Artifact
from runtimes.bank import AdapterBank
from runtimes.batch_rows import Ticket
from runtimes.batching import Batcher, batchable
from runtimes.edits.strength import at_strength
from runtimes.errors import BackendUnavailable, InputError
from runtimes.generation import Generation, GenerationSettings, generate
from runtimes.open import open_bank
from runtimes.rows import AdapterRows
from runtimes.session import Session
from runtimes.text.chat import ChatTemplate, template_for
from runtimes.text.prompts import encode, no_template
from runtimes.text.tokenizer import Tokenizer

OnText = Callable[[str], None]


def conversing_template(artifact: Artifact, adapter: str | None, chat: str) -> ChatTemplate:
    """Raises BundleError for an adapter that is not there, InputError where there is no chat template to go through."""
    if adapter is not None:
        artifact.adapter(adapter)
    template = template_for(artifact, adapter, chat)
    if template is None:
        raise InputError(f"a conversation needs a chat template, which {artifact.folder} {no_template(chat)}; ask with --prompt")
    return template


class Conversation:
    """Turns of a user and the model; a context manager, which owns the session's steps while it is open.

    ``system``: a system message. ``chat``: as of ``template_for``. ``prefill_chunk``: as of ``generate``.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        settings: GenerationSettings = GenerationSettings(),
        system: str | None = None,
        chat: str = "auto",
        prefill_chunk: int | None = None,
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.reused = 0
        """Tokens of the last turn's prompt that were in the cache."""
        self._session, self._tokenizer, self._settings = session, tokenizer, settings
        self._system, self._chat, self._chunk = system, chat, prefill_chunk
        self._bank = _bank_of(session)
        self._batcher = _batcher_of(session, tokenizer, self._bank, prefill_chunk)

    def __enter__(self) -> Conversation:
        if self._batcher is not None:
            self._batcher.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._batcher is not None:
            self._batcher.close()

    def say(self, text: str, *, adapter: str | None = None, strength: float = 1.0, on_text: OnText | None = None) -> Generation:
        """The answer to ``text`` after all that was said; both are part of the conversation from then on.

        A turn that is refused or interrupted leaves the conversation as it was. New tokens are as many as the settings say, or as many as
        the context has room for. Raises InputError for an adapter without a chat template and a full
        context, BundleError for an unknown adapter.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode(messages, self._tokenizer, self.template(adapter), self._system, self._chat)
        settings = self._fitting(len(prompt))
        if self._batcher is None:
            answer, self.reused = self._alone(prompt, settings, adapter, strength, on_text), 0
        else:
            answer, self.reused = _batched(self._batcher.submit(prompt, settings, adapter=adapter, strength=strength, on_text=on_text))
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def begin_anew(self) -> None:
        """Forgets all that was said, but the system message."""
        self.messages = []

    def template(self, adapter: str | None) -> ChatTemplate:
        """Raises BundleError for an adapter that is not there, InputError for one whose prompts go through no chat template."""
        return conversing_template(self._session.bundle, adapter, self._chat)

    def _fitting(self, prompt: int) -> GenerationSettings:
        limits = self._session.bundle.limits
        room = limits.tokens - prompt
        if room < 1:
            raise InputError(f"the conversation has {prompt} tokens, which do not fit {limits.reason}; begin a new one")
        return replace(self._settings, max_new_tokens=min(room, self._settings.max_new_tokens))

    def _alone(
        self, prompt: list[int], settings: GenerationSettings, adapter: str | None, strength: float, on_text: OnText | None
    ) -> Generation:
        listen = None if on_text is None else lambda _, piece: on_text(piece)
        if strength == 1 or adapter is None:
            self._session.set_adapter(adapter)
            return generate(self._session, self._tokenizer, [prompt], settings, on_text=listen, prefill_chunk=self._chunk)[0]
        if self._bank is None:
            raise InputError(f"adapter {adapter!r} steers at its own strength here; leave --strength out")
        with AdapterRows(self._bank, [at_strength(adapter, strength)]) as rows:
            self._session.set_rows(rows)
            return generate(self._session, self._tokenizer, [prompt], settings, on_text=listen, prefill_chunk=self._chunk)[0]


def _batched(ticket: Ticket) -> tuple[Generation, int]:
    """The answer, and how many tokens of its prompt were in the cache."""
    try:
        return ticket.result(), ticket.reused
    except KeyboardInterrupt:
        ticket.cancel()
        raise


def _bank_of(session: Session) -> AdapterBank | None:
    """None where rows share one adapter: an engine, a bundle of version 1."""
    try:
        return open_bank(session.bundle)
    except InputError:
        return None


def _batcher_of(session: Session, tokenizer: Tokenizer, bank: AdapterBank | None, prefill_chunk: int | None) -> Batcher | None:
    """None where this session runs no batch whose prompts begin with what is there."""
    if bank is None:
        return None
    try:
        return Batcher(batchable(session), tokenizer, bank, most_rows=1, prefill_chunk=prefill_chunk)
    except (InputError, BackendUnavailable):
        return None

"""What ``reft-export run --interactive`` does: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain

from reft_export.cli.guard import INTERRUPTED
from reft_export.cli.run_options import RunOptions
from reft_export.console import err, escape, interrupt, say
from runtimes.artifacts.artifact import Artifact
from runtimes.conversation import Conversation, conversing_template
from runtimes.edits.strength import check_strength
from runtimes.errors import InputError, ReftError
from runtimes.files.records import read_json_object
from runtimes.generation import GenerationSettings
from runtimes.session import Session
from runtimes.text.grammars import Grammars
from runtimes.text.tokenizer import Tokenizer

HELP = "/adapter NAME steers from now on (none: the base), /strength X how much, /reset begins anew, /exit or Ctrl-D ends, Ctrl-C an answer"
BASE = "none"


def prepare(opened: Artifact, options: RunOptions) -> Callable[[Session], None]:
    """What is left to do in a session. Raises InputError and BundleError for what can be refused before there is one."""
    settings = GenerationSettings(**options.settings)
    tokenizer = Tokenizer.load(opened.folder, opened.manifest.model)
    check_strength(options.strength, options.adapter or "every adapter")
    if options.as_json:
        raise InputError("--json is for answers to prompts, and --interactive is a conversation; leave one out")
    conversing_template(opened, options.adapter, options.chat)
    if options.json_schema is not None:
        try:
            grammar = Grammars(tokenizer, opened.manifest.model.vocab_size).json_schema(read_json_object(options.json_schema, InputError))
        except InputError as e:
            raise InputError(f"{options.json_schema}: {e}") from None
        settings = replace(settings, grammar=grammar)
    return partial(_converse, tokenizer=tokenizer, settings=settings, options=options)


def _converse(session: Session, *, tokenizer: Tokenizer, settings: GenerationSettings, options: RunOptions) -> None:
    with Conversation(
        session, tokenizer, settings=settings, system=options.system, chat=options.chat, prefill_chunk=options.prefill_chunk
    ) as conversation:
        terminal = sys.stdin.isatty()
        speaker = _Speaker(conversation, options.adapter, options.strength, stream=options.stream, patient=terminal)
        if terminal:
            err.print(f"[dim]{escape(HELP)}[/]")
        for line in chain(options.prompt, _typed() if terminal else _piped()):
            if not speaker.take(line):
                break


def _typed() -> Iterator[str]:
    """With arrow keys and a history, where Python was built with readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    with suppress(EOFError):
        while True:
            yield input("> ")
    err.print()


def _piped() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as e:
        raise InputError(f"stdin is no UTF-8 text: {e.reason} at byte {e.start}") from None


class _Speaker:
    """Takes a line at a time: a message, or a command. ``patient``: what cannot be done is said, and the conversation goes on."""

    def __init__(self, conversation: Conversation, adapter: str | None, strength: float, *, stream: bool, patient: bool) -> None:
        self.conversation, self.adapter, self.strength, self.stream, self.patient = conversation, adapter, strength, stream, patient

    def take(self, line: str) -> bool:
        """Whether the conversation goes on."""
        text = line.strip()
        if text in ("/exit", "/quit", "/bye"):
            return False
        if text:
            try:
                self._command(text) if text.startswith("/") else self._answer(text)
            except ReftError as e:
                if not self.patient:
                    raise
                err.print(f"[red]error:[/] {escape(str(e))}")
        return True

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "/reset" and not value:
            self.conversation.begin_anew()
        elif name == "/adapter" and value:
            adapter = None if value == BASE else value
            self.conversation.template(adapter)
            self.adapter = adapter
        elif name == "/strength" and value:
            self.strength = _number(value)
        elif name == "/help":
            err.print(escape(HELP))
        else:
            raise InputError(f"{text!r} is no command; {HELP}")

    def _answer(self, text: str) -> None:
        try:
            answer = self.conversation.say(
                text,
                adapter=self.adapter,
                strength=1.0 if self.adapter is None else self.strength,
                on_text=say if self.stream else None,
            )
        except KeyboardInterrupt:
            if interrupt.exit_code != INTERRUPTED or not self.patient:
                raise
            interrupt.seen = None
            err.print("\n[dim]stopped; the turn is forgotten[/]")
            return
        say("\n" if self.stream else f"{answer.text}\n")
        if answer.finish_reason == "length":
            err.print(f"[dim]cut at {len(answer.tokens)} tokens (--max-new-tokens)[/]")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"/strength {text}: expected a number, 1 is the adapter's own") from None
    check_strength(value, "/strength")
    return value

"""What ``reft-export run`` does with a decoder: prompts to the texts that continue them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from reft_export.cli.run_options import RunOptions, check_adapters
from reft_export.console import err, escape, say
from runtimes.artifacts.artifact import Artifact, Limits
from runtimes.bank import AdapterBank
from runtimes.edits.positions import needs_marks
from runtimes.edits.strength import at_strength, check_strength
from runtimes.errors import InputError
from runtimes.files.records import read_json_object
from runtimes.generation import Generation, GenerationSettings, batches, generate, padding_of, prefill_columns
from runtimes.open import open_bank
from runtimes.rows import AdapterRows
from runtimes.session import Session, as_decoder
from runtimes.speculation import check_speculation
from runtimes.text.chat import ChatTemplate, template_for
from runtimes.text.grammars import Grammars
from runtimes.text.prompts import SAMPLING, Request, batches_of_alike, encode, encode_marked, in_order, no_template, read_requests
from runtimes.text.tokenizer import Tokenizer

OnText = Callable[[int, str], None]


def prepare(opened: Artifact, options: RunOptions) -> Callable[[Session], None]:
    """What is left to do in a session. Raises InputError and BundleError, with the line, for what can be refused before there is one."""
    settings = GenerationSettings(**options.settings)
    check_strength(options.strength, options.adapter or "every adapter")
    check_speculation(opened, options.speculate)
    tokenizer = Tokenizer.load(opened.folder, opened.manifest.model)
    requests = _requests(options)
    check_adapters(opened, requests)
    templates = _templates(opened, requests, options)
    marking = {name for name in templates if name is not None and needs_marks(opened.adapter_record(name).where)}
    asks = [_ask(request, settings, tokenizer, templates, marking, options) for request in requests]
    asks = _another_sample_each(_held_to_schemas(asks, requests, options, tokenizer, opened.manifest.model.vocab_size))
    bank = _bank(opened, asks, options)
    for ask in asks:
        ask.check(opened.limits)
    return partial(_answer, tokenizer=tokenizer, asks=asks, limits=opened.limits, options=options, bank=bank)


def _bank(opened: Artifact, asks: Sequence[Ask], options: RunOptions) -> AdapterBank | None:
    """What holds adapters at another strength than their own. Raises InputError where they cannot have one."""
    if options.strength != 1 and all(ask.adapter is None for ask in asks):
        raise InputError(f"--strength {options.strength:g} is an adapter's, and none steers; name one with --adapter (-a)")
    scaled = [ask for ask in asks if ask.strength != 1]
    if not scaled:
        return None
    try:
        return open_bank(opened)
    except InputError as e:
        where = f"{scaled[0].where}: strength" if "strength" in scaled[0].own else "--strength"
        raise InputError(f"{where} {scaled[0].strength:g}: {e}") from None


def _requests(options: RunOptions) -> list[Request]:
    if options.prompts is not None:
        return read_requests(options.prompts)
    messages = [[{"role": "user", "content": text}] for text in options.prompt]
    return [Request(where=f"prompt {i}", messages=each) for i, each in enumerate(messages, 1)]


def _templates(opened: Artifact, requests: Sequence[Request], options: RunOptions) -> dict[str | None, ChatTemplate | None]:
    """The chat template by adapter, of those that answer. Raises InputError where one is asked for in vain."""
    names = {options.adapter, *(r.options["adapter"] for r in requests if "adapter" in r.options)}
    templates = {name: template_for(opened, name, options.chat) for name in names}
    if options.chat == "always" and None in templates.values():
        raise InputError(f"{opened.folder} has no chat template; drop --chat always")
    if options.system and not any(templates.values()):
        raise InputError(f"--system needs a chat template, which {opened.folder} {no_template(options.chat)}")
    return templates


def _answer(
    session: Session, *, tokenizer: Tokenizer, asks: Sequence[Ask], limits: Limits, options: RunOptions, bank: AdapterBank | None
) -> None:
    """Prints every answer as soon as those before it are there."""
    alone = len(asks) == 1 and not options.as_json
    on_text = (lambda _, piece: say(piece)) if alone and options.stream else None
    # An engine takes so many rows and columns in one call, whatever was asked for.
    batch_size, prefill_chunk = min(options.batch_size, limits.rows or options.batch_size), options.prefill_chunk
    if limits.columns is not None and max(len(ask.tokens) for ask in asks) > limits.columns:
        prefill_chunk = min(prefill_chunk or limits.columns, limits.columns)
    steer, said = Steer(session, bank, options.speculate), []
    _try_adapters(steer, asks)
    for index, answer in in_order(_answers(steer, tokenizer, asks, batch_size, on_text, prefill_chunk)):
        said.append(answer)
        if options.as_json:
            record = {"index": index, "adapter": asks[index].adapter, "text": answer.text, "finish_reason": answer.finish_reason}
            if asks[index].strength != 1:
                record["strength"] = asks[index].strength
            record |= {"prompt_tokens": answer.prompt_tokens, "tokens": len(answer.tokens)}
            if options.speculate:
                record |= {"proposed": answer.proposed, "accepted": answer.accepted}
            say(json.dumps(record, ensure_ascii=False) + "\n")
        elif on_text:
            say("\n")  # the text is there already
        else:
            if not alone:
                err.print(f"[dim]--- {escape(options.prompt[index])}[/]")
            say(answer.text + "\n")
    if options.speculate and not options.as_json:
        err.print(f"[dim]{_speculated(said)}[/]")


def _speculated(said: Sequence[Generation]) -> str:
    """What speculation gave: each answer's first token came of its prompt, the others of steps."""
    tokens, proposed, accepted = (sum(each) for each in zip(*((len(a.tokens) - 1, a.proposed, a.accepted) for a in said), strict=True))
    return f"tokens ahead: {accepted} of {proposed} kept, {tokens / max(tokens - accepted, 1):.2f} tokens a step"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt as it is run; ``own`` names what its line says itself, in place of the options."""

    where: str
    tokens: list[int]
    marks: tuple[int, ...] | None
    """The numbers of the tokens that it marks, where its adapter edits those."""
    adapter: str | None
    strength: float
    """1 where no adapter steers."""
    settings: GenerationSettings
    own: frozenset[str]

    def check(self, limits: Limits) -> None:
        """Raises InputError for no tokens, and for more than fit."""
        count = self.settings.max_new_tokens
        if not self.tokens:
            raise InputError(f"{self.where} is empty; a prompt needs at least one token")
        if len(self.tokens) + count > limits.tokens:
            option = "its max_new_tokens" if "max_new_tokens" in self.own else "--max-new-tokens"
            raise InputError(
                f"{self.where}: {len(self.tokens)} tokens and {count} new ones do not fit {limits.reason}; shorten it, or lower {option}"
            )


def _ask(
    request: Request,
    settings: GenerationSettings,
    tokenizer: Tokenizer,
    templates: Mapping[str | None, ChatTemplate | None],
    marking: Collection[str],
    options: RunOptions,
) -> Ask:
    """What a line says goes before what the options say. Raises InputError with the line."""
    own = request.options
    chosen = own.get("adapter", options.adapter)
    prompt = request.messages, tokenizer, templates[chosen], own.get("system", options.system), options.chat
    try:
        tokens, marks = encode_marked(*prompt) if chosen in marking else (encode(*prompt), None)
        return Ask(
            where=request.where,
            tokens=tokens,
            marks=marks,
            adapter=chosen,
            strength=_strength(own, chosen, options.strength),
            settings=replace(settings, **_sampling(own)),
            own=frozenset(own),
        )
    except InputError as e:
        raise InputError(f"{request.where}: {e}") from None


def _strength(own: Mapping[str, Any], adapter: str | None, given: float) -> float:
    """Raises InputError for one that is not finite, and for a line's own where nothing steers."""
    if adapter is None and "strength" in own:
        raise InputError("strength is an adapter's, and none steers this line; name one, or leave it out")
    return 1.0 if adapter is None else check_strength(float(own.get("strength", given)), adapter)


def _sampling(own: Mapping[str, Any]) -> dict[str, Any]:
    """A line's own settings of generation as GenerationSettings has them."""
    changes = {key: own[key] for key in SAMPLING if key in own}
    if "stop" in changes:
        changes["stop"] = (changes["stop"],) if isinstance(changes["stop"], str) else tuple(changes["stop"])
    return changes


def _held_to_schemas(
    asks: Sequence[Ask], requests: Sequence[Request], options: RunOptions, tokenizer: Tokenizer, vocab_size: int
) -> list[Ask]:
    """Each with its schema, where it has one. Raises InputError with the file or the line, BackendUnavailable without llguidance."""
    given = None if options.json_schema is None else read_json_object(options.json_schema, InputError)
    schemas = [request.options.get("json_schema", given) for request in requests]
    if all(schema is None for schema in schemas):
        return list(asks)
    grammars, held = Grammars(tokenizer, vocab_size), []
    for ask, schema in zip(asks, schemas, strict=True):
        try:
            grammar = None if schema is None else grammars.json_schema(schema)
        except InputError as e:
            raise InputError(f"{ask.where if 'json_schema' in ask.own else options.json_schema}: {e}") from None
        held.append(replace(ask, settings=replace(ask.settings, grammar=grammar)))
    return held


def _another_sample_each(asks: Sequence[Ask]) -> list[Ask]:
    """The same prompt with the same settings again is another sample of the seed, in whichever batch it runs; a line's own seed means
    the answer that the line has alone."""
    seen: Counter[Any] = Counter()
    numbered = []
    for ask in asks:
        if "seed" not in ask.own:
            same = (ask.adapter, ask.strength, ask.settings, tuple(ask.tokens), ask.marks)
            ask = replace(ask, settings=replace(ask.settings, sample=seen[same]))
            seen[same] += 1
        numbered.append(ask)
    return numbered


@dataclass(frozen=True)
class Steer:
    """Lets one adapter steer all rows of a batch, at its own strength or, through ``bank``, at another."""

    session: Session
    bank: AdapterBank | None
    speculate: int = 0

    def check(self, ask: Ask) -> None:
        """Raises InputError for an adapter that the session cannot take, or not at that strength."""
        if self.bank is None or ask.adapter is None or ask.strength == 1:
            self.session.set_adapter(ask.adapter)
        else:
            self.bank.load(at_strength(ask.adapter, ask.strength))

    def generate(
        self,
        tokenizer: Tokenizer,
        asks: Sequence[Ask],
        on_text: OnText | None,
        prefill_chunk: int | None,
    ) -> Iterator[Generation]:
        """Answers to ``asks``, of one adapter at one strength and one count of new tokens, in their order."""
        adapter, strength, tokens, settings = (
            asks[0].adapter,
            asks[0].strength,
            [ask.tokens for ask in asks],
            [ask.settings for ask in asks],
        )
        marks = [ask.marks for ask in asks if ask.marks is not None] or None  # those of one adapter all have some, or none has
        if self.bank is None or adapter is None or strength == 1:
            self.session.set_adapter(adapter)
            yield from generate(
                self.session,
                tokenizer,
                tokens,
                settings,
                on_text=on_text,
                marks=marks,
                prefill_chunk=prefill_chunk,
                speculate=self.speculate,
            )
            return
        decoder = as_decoder(self.session)
        answers: dict[int, Generation] = {}
        # Rows are those of a call: what generate would feed in several batches is fed so here.
        for batch in batches(tokens, padding_of(decoder), chunk=prefill_columns(decoder, prefill_chunk)):
            with AdapterRows(self.bank, [at_strength(adapter, strength)] * len(batch)) as rows:
                self.session.set_rows(rows)
                own, prompts = [settings[i] for i in batch], [tokens[i] for i in batch]
                said = None if marks is None else [marks[i] for i in batch]
                made = generate(
                    self.session,
                    tokenizer,
                    prompts,
                    own,
                    on_text=on_text,
                    marks=said,
                    prefill_chunk=prefill_chunk,
                    speculate=self.speculate,
                )
                answers.update(zip(batch, made, strict=True))
        yield from (answers[i] for i in range(len(asks)))


def _try_adapters(steer: Steer, asks: Sequence[Ask]) -> None:
    """Every adapter once, before the first answer: an engine may not take one. Raises InputError, with the line that names it."""
    for ask in {(ask.adapter, ask.strength): ask for ask in reversed(asks)}.values():
        try:
            steer.check(ask)
        except InputError as e:
            raise InputError(f"{ask.where}: {e}" if {"adapter", "strength"} & ask.own else str(e)) from None


def _answers(
    steer: Steer, tokenizer: Tokenizer, asks: Sequence[Ask], batch_size: int, on_text: OnText | None, prefill_chunk: int | None
) -> Iterator[tuple[int, Generation]]:
    """(number, answer) of every prompt, in batches of one adapter at one strength and one count of new tokens."""
    for batch in batches_of_alike([(ask.adapter, ask.strength, ask.settings.max_new_tokens) for ask in asks], batch_size):
        yield from zip(batch, steer.generate(tokenizer, [asks[i] for i in batch], on_text, prefill_chunk), strict=True)

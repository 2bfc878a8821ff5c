"""A running batch and its adapters, as requests reach them: names, prompts, limits, and what runs now."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock

from runtimes.bank import AdapterBank
from runtimes.batching import Batcher
from runtimes.edits.adapter import read_adapter_config
from runtimes.edits.adapter_records import positions_of, tied_of
from runtimes.errors import InputError
from runtimes.serving.doors import Doors
from runtimes.serving.edited import EditedTokens, Steered, edited_tokens
from runtimes.serving.flight import Ask, Flight
from runtimes.serving.grammars import SchemaCompiler
from runtimes.serving.metrics import Metrics
from runtimes.serving.refusals import Refusal
from runtimes.serving.requests import ChatRequest, CompletionRequest, TextRequest, adapter_of
from runtimes.serving.settings import ServeSettings
from runtimes.text.chat import ChatTemplate, trained_without_template
from runtimes.text.grammars import Grammar
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Tokenizer, check_token_ids


class TextServer(Doors):
    """Answers requests for text by ``batcher``, whose thread runs, with the adapters of ``bank``.

    Raises InputError for a folder of adapters inside the bundle, and what ``AdapterBank.scan`` raises of it.
    """

    metrics: Metrics

    def __init__(self, batcher: Batcher, bank: AdapterBank, tokenizer: Tokenizer, settings: ServeSettings) -> None:
        super().__init__(settings)
        self.batcher, self.bank, self.tokenizer = batcher, bank, tokenizer
        self.started = int(time.time())
        self.fingerprint = f"fp_{bank.bundle.digest[:12]}"
        self._template = ChatTemplate.load(bank.bundle.folder)
        self._schemas = SchemaCompiler(tokenizer, bank.bundle.manifest.model.vocab_size, wanted=settings.schemas)
        self._steered: dict[str, Steered] = {}
        """Adapters, as far as somebody asked."""
        self._flights: set[Flight] = set()
        self._lock = Lock()
        self._running: Counter[str] = Counter()
        self._changing: set[str] = set()
        if settings.adapters is not None:
            if settings.adapters.resolve().is_relative_to(bank.bundle.folder.resolve()):
                raise InputError(f"{settings.adapters} lies inside the bundle, which holds its own adapters; choose a folder beside it")
            bank.scan(settings.adapters)
        self.metrics = Metrics(batcher, bank, lambda: self.admitted_now)

    # --- from a request to tokens ---

    def adapter(self, model: str) -> str | None:
        """Raises Refusal 404 for a model that there is not."""
        try:
            name = adapter_of(model)
        except InputError:
            name = ""
        if name is not None and name not in self.bank:
            raise Refusal(404, f"there is no model {model!r}; GET /v1/models lists them", code="model_not_found", param="model")
        return name

    async def grammar(self, request: TextRequest) -> Grammar | None:
        """What the answers are held to. Raises Refusal."""
        schema = request.schema_of_answers
        return None if schema is None else await self._schemas.grammar(schema, self.retry_after)

    def asks(self, request: TextRequest, asker: str, grammar: Grammar | None = None) -> list[Ask]:
        """Every answer that is wanted, prompt by prompt; ``asker``: whose answered prompts they may go on from.

        Reads and renders: not for the event loop. Raises Refusal and InputError."""
        adapter = self.adapter(request.model)
        if adapter is None and request.strength is not None:
            raise Refusal(400, "strength is an adapter's, and base has none; name an adapter as the model", param="strength")
        strength = 1.0 if request.strength is None else request.strength
        prompts = [self._chat(request, adapter)] if isinstance(request, ChatRequest) else self._prompts(request)
        count = request.n or 1
        if count * len(prompts) > self.settings.max_choices:
            message = f"{count * len(prompts)} answers are asked for, at most {self.settings.max_choices} are given at once; lower n"
            raise Refusal(400, message, param="n")
        asks = []
        for prompt in prompts:
            new = self._new_tokens(request, len(prompt))
            edited = self._edited(prompt, adapter, strength) if request.reft is not None and request.reft.edited_tokens else None
            each = (request.generation(new, sample, grammar) for sample in range(count))
            own = partial(Ask, prompt=prompt, adapter=adapter, strength=strength, scope=asker, edited=edited)
            asks += [own(settings=settings) for settings in each]
        return asks

    def _edited(self, prompt: Sequence[int], adapter: str | None, strength: float) -> EditedTokens:
        return edited_tokens(self.tokenizer, prompt, None if adapter is None else self._known(adapter), strength)

    def _chat(self, request: ChatRequest, adapter: str | None) -> list[int]:
        messages = [message.plain() for message in request.messages]
        template = None if adapter is not None and self._known(adapter).plain else self._template
        try:
            return self._checked(encode(messages, self.tokenizer, template, None), "the conversation", "messages")
        except InputError as e:
            raise Refusal(400, str(e), param="messages") from None

    def _prompts(self, request: TextRequest) -> list[list[int]]:
        assert isinstance(request, CompletionRequest)
        texts = request.prompts
        try:
            encoded = [self.tokenizer.encode_prompt(each) if isinstance(each, str) else each for each in texts]
            return [self._checked(ids, f"prompt {number}", "prompt") for number, ids in enumerate(encoded)]
        except InputError as e:
            raise Refusal(400, str(e), param="prompt") from None

    def _checked(self, ids: Sequence[int], what: str, param: str) -> list[int]:
        most = self.settings.max_prompt_tokens
        if most is not None and len(ids) > most:
            message = f"{what} has {len(ids)} tokens, at most {most} are taken here; shorten it"
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        return check_token_ids(ids, self.bank.bundle.manifest.model.vocab_size, what)

    def _new_tokens(self, request: TextRequest, prompt: int) -> int:
        most = self.settings.max_new_tokens
        if request.new_tokens is not None:
            if request.new_tokens > most:
                message = f"{request.new_tokens} new tokens are asked for, at most {most} are given; lower max_tokens"
                raise Refusal(400, message, param="max_tokens")
            return request.new_tokens
        return max(1, min(most, self.bank.bundle.manifest.model.context_length - prompt))

    def _known(self, name: str) -> Steered:
        if name not in self._steered:
            folder, bundle = self.bank.listed[name].folder, self.bank.bundle
            record = bundle.adapter_record(name) if folder is None else read_adapter_config(folder)
            plain = trained_without_template(record.training)
            self._steered[name] = Steered(where=positions_of(record.sites, record.rules), tied=tied_of(record.rules), plain=plain)
        return self._steered[name]

    # --- what runs ---

    @contextmanager
    def flight(self, asks: Sequence[Ask], *, best: int | None, streams: bool) -> Iterator[Flight]:
        """On the event loop. At the end its rows are free. Raises Refusal where the adapter is being changed."""
        flight = Flight(asks, best=best, backlog=self.settings.backlog if streams else None, on_token=self.metrics.clock())
        start, late = time.monotonic(), Refusal(504, f"no answer within {self.settings.request_seconds:g} s; ask for less", code="timeout")
        timer = asyncio.get_running_loop().call_later(self.settings.request_seconds, flight.fail, late)
        self._flights.add(flight)
        try:
            with self._using(asks[0].adapter):
                yield flight
            self.took(time.monotonic() - start)
        finally:
            timer.cancel()
            flight.close()
            self._flights.discard(flight)

    async def submit(self, flight: Flight) -> None:
        """Raises what ``Batcher.submit`` raises. It may read an adapter: the loop goes on meanwhile."""
        await asyncio.to_thread(flight.submit, self.batcher)
        self.metrics.took([ask.prompt for ask in flight.asks])

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        if name is None:
            yield
            return
        with self._lock:
            if name in self._changing:
                raise Refusal(409, f"adapter {name} is being changed; ask again", code="adapter_changing", headers={"Retry-After": "1"})
            self._running[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._running[name] -= 1
                if not self._running[name]:
                    del self._running[name]

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Within, no request uses the adapter. Raises Refusal 409 where one does, or somebody else changes it."""
        with self._lock:
            # A row whose client hung up is there until the next step.
            if self._running[name] or name in self._changing or self.bank.live_rows(name):
                raise Refusal(409, f"adapter {name} is in use; change it when its requests have ended", code="adapter_in_use")
            del self._running[name]
            self._changing.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._changing.discard(name)
                self._steered.pop(name, None)

    def end_all(self) -> None:
        for flight in list(self._flights):
            flight.fail(self.stops())

"""Schemas of requests to grammars, beside the event loop: one is compiled at a time, a few wait, and nobody else waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtimes.errors import BackendUnavailable, InputError
from runtimes.serving.refusals import Refusal
from runtimes.text.grammars import Grammar, Grammars, source_of
from runtimes.text.tokenizer import Tokenizer

MOST_WAITING = 8
"""Schemas that nobody asked for lately, the one that is compiled among them."""
PARAM = "response_format"


class SchemaCompiler:
    """Reads the tokenizer now: it keeps Python's lock, which would stop every answer later. Refuses every schema without llguidance, and
    where it is not ``wanted``."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, wanted: bool = True) -> None:
        self._grammars: Grammars | None = None
        self._missing = "it was started with --no-schemas"
        try:
            if wanted:
                self._grammars = Grammars(tokenizer, vocab_size)
        except (BackendUnavailable, InputError) as e:
            self._missing = str(e)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reft-schemas")
        self._coming: dict[str, asyncio.Future[Grammar]] = {}
        """By their text: those who ask for one that is being compiled wait for it together."""

    async def grammar(self, schema: Mapping[str, Any], retry_after: int) -> Grammar:
        """Raises Refusal: 400 for a schema that cannot hold an answer, or where none can, 429 where too many are compiled already."""
        if self._grammars is None:
            raise Refusal(400, f"no JSON schema holds an answer of this server: {self._missing}", param=PARAM, code="no_grammars")
        try:
            source = source_of(schema)
            found = self._grammars.known(source)
            if found is None:
                found = await self._compiled(self._grammars, source, schema, retry_after)
            if isinstance(found, str):
                raise InputError(found)
        except InputError as e:
            raise Refusal(400, str(e), param=PARAM, code="invalid_json_schema") from None
        return found

    async def _compiled(self, grammars: Grammars, source: str, schema: Mapping[str, Any], retry_after: int) -> Grammar:
        coming = self._coming.get(source)
        if coming is None:
            if len(self._coming) >= MOST_WAITING:
                message = f"{len(self._coming)} JSON schemas are compiled or wait already; ask again later"
                raise Refusal(429, message, code="too_many_schemas", headers={"Retry-After": str(retry_after)})
            coming = self._coming[source] = asyncio.get_running_loop().run_in_executor(self._thread, grammars.json_schema, schema)
            coming.add_done_callback(lambda done: self._ended(source, done))
        return await asyncio.shield(coming)  # a client that hangs up does not end it for the others

    def _ended(self, source: str, done: asyncio.Future[Grammar]) -> None:
        del self._coming[source]
        if not done.cancelled():
            done.exception()  # it is told to those who are still there

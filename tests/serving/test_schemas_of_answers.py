"""Answers that fit a JSON schema, over HTTP by the official client: with every adapter, streamed or not, whatever else is asked."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

import jsonschema_rs
import openai
import pydantic
import pytest
from served import Served, serving, until
from toy_bundle import ADAPTERS, VOCABULARY

from runtimes.artifacts.bundle import Bundle
from runtimes.serving import grammars as module
from runtimes.serving.grammars import SchemaCompiler
from runtimes.serving.settings import ServeSettings
from runtimes.text import grammars as compiler
from runtimes.text.grammars import Grammar
from runtimes.text.tokenizer import Tokenizer

NAMES = ("base", *ADAPTERS)
MESSAGES = [{"role": "user", "content": "The fox"}]
SCHEMA: dict[str, Any] = {"type": "string", "pattern": "^[a-f]{3,8}$"}
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
NEVER_ENDS = {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 60)]}


def fits(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("model", NAMES)
def test_a_steered_answer_fits(served: Served, model: str) -> None:
    create = served.client().chat.completions.create
    ask: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 40, "response_format": fits(SCHEMA), "seed": 5}
    for options in ({"temperature": 0}, {"temperature": 2, "n": 3}, {"temperature": 1, "logprobs": True, "top_logprobs": 3}):
        answer = create(**ask, **options)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            assert jsonschema_rs.is_valid(SCHEMA, json.loads(choice.message.content))
        pieces = [chunk.choices[0] for chunk in create(**ask, **options, stream=True)]
        first = [piece for piece in pieces if piece.index == 0]
        assert "".join(piece.delta.content or "" for piece in first) == answer.choices[0].message.content


def test_an_object(served: Served) -> None:
    for seed in range(6):
        form = fits(RECORD) if seed % 2 else {"type": "json_object"}
        create = served.client().chat.completions.create
        choice = create(model="all", messages=MESSAGES, max_tokens=40, seed=seed, response_format=form).choices[0]
        assert choice.message.content.startswith("{") and (seed % 2 == 0 or choice.finish_reason == "stop")
        if choice.finish_reason == "stop":
            said = json.loads(choice.message.content)
            assert isinstance(said, dict) and (seed % 2 == 0 or jsonschema_rs.is_valid(RECORD, said))


def test_a_type_of_the_client_is_read_back(served: Served) -> None:
    class Answer(pydantic.BaseModel):
        yes: bool

    create = served.client().chat.completions.parse
    parsed = create(model="all", messages=MESSAGES, max_tokens=40, seed=1, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_log_probabilities_are_the_models_own(served: Served) -> None:
    """Of the token that was taken, and of those that the model likes better: the schema is not in them, as in vLLM."""
    ask: dict[str, Any] = {"model": "all", "messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    free = served.client().chat.completions.create(**ask, max_tokens=1).choices[0].logprobs.content[0]
    held = served.client().chat.completions.create(**ask, max_tokens=1, response_format=fits({"const": "Q"})).choices[0].logprobs.content[0]
    assert held.token == '"' and held.token != free.token and held.logprob < free.logprob
    assert [each.token for each in held.top_logprobs] == [each.token for each in free.top_logprobs]


def test_others_go_on_while_a_schema_does_not_compile(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SECONDS", 1)
    refused: list[openai.BadRequestError] = []

    def ask() -> None:
        try:
            served.client().chat.completions.create(model="base", messages=MESSAGES, response_format=fits(NEVER_ENDS))
        except openai.BadRequestError as e:
            refused.append(e)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: len(served.server._schemas._coming) == 1)
    answered = 0
    while asking.is_alive() and answered < 10:
        assert served.client().completions.create(model="all", prompt="Hi", max_tokens=3).usage.completion_tokens == 3
        answered += not refused
    asking.join()
    assert answered and refused[0].code == "invalid_json_schema" and refused[0].param == "response_format"
    assert "takes more than" in str(refused[0])


def test_schemas_that_wait_are_few(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 0)
    create = served.client().chat.completions.create
    with pytest.raises(openai.RateLimitError) as caught:
        create(model="base", messages=MESSAGES, max_tokens=2, response_format=fits({"const": "new"}))
    assert caught.value.code == "too_many_schemas" and caught.value.response.headers["Retry-After"]
    create(model="base", messages=MESSAGES, max_tokens=2, response_format=fits(SCHEMA))  # which is known
    create(model="base", messages=MESSAGES, max_tokens=2)


def test_those_who_ask_for_the_same_wait_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten with a schema that is new, where one may wait."""
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    schema = {"type": "string", "pattern": "^[g-k]{2,5}$"}
    tried: list[str] = []
    real = compiler._try

    def slowly(grammar: str) -> None:
        tried.append(grammar)
        until(lambda: served.metric("reft_requests_running") == 10)
        real(grammar)

    monkeypatch.setattr(compiler, "_try", slowly)

    async def ask(client: openai.AsyncOpenAI) -> str:
        answer = await client.chat.completions.create(
            model="all", messages=MESSAGES, max_tokens=20, temperature=0, response_format=fits(schema)
        )
        return answer.choices[0].message.content

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return list(await asyncio.gather(*(ask(client) for _ in range(10))))

    assert len(set(asyncio.run(all_of_them()))) == 1 and len(tried) == 1


def test_one_who_does_not_wait_does_not_end_it_for_the_others(tokenizer: Tokenizer) -> None:
    async def ask() -> tuple[Grammar, Grammar]:
        schemas = SchemaCompiler(tokenizer, VOCABULARY)
        asked = [asyncio.ensure_future(schemas.grammar(SCHEMA, 1)) for _ in range(3)]
        await asyncio.sleep(0)
        asked[0].cancel()
        return await asked[1], await asked[2]

    one, other = asyncio.run(ask())
    assert one is other


@pytest.mark.parametrize(("settings", "said"), [({}, r"pip install 'reft-export\[grammar\]'"), ({"schemas": False}, "--no-schemas")])
def test_where_there_are_none_they_are_refused(bundle: Bundle, settings: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not settings:
        monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(bundle, ServeSettings(**settings)) as each:
        create = each.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            create(model="base", messages=MESSAGES, response_format={"type": "json_object"})
        assert caught.value.code == "no_grammars"
        assert create(model="base", messages=MESSAGES, max_tokens=2, response_format={"type": "text"}).choices

"""Chats and completions by the official client, against the answers of ``generate`` for each prompt and adapter alone."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
from served import Served, until
from toy_bundle import ADAPTERS, ToyDecoder

from runtimes.generation import Generation, GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

NAMES = (None, *ADAPTERS)
MESSAGES = [{"role": "system", "content": "a b"}, {"role": "user", "content": "The fox"}]
RENDERED = "system: a b user: The fox "
DECODER = ToyDecoder.random()


def expected(alone: OrtSession, tokenizer: Tokenizer, name: str | None, prompt: str | Sequence[int], **settings: Any) -> Generation:
    alone.set_adapter(name)
    return generate(alone, tokenizer, [prompt], GenerationSettings(**{"temperature": 0.0, **settings}))[0]


def rendered(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(RENDERED, add_special_tokens=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "base:"])
def test_a_chat_is_answered_as_alone(served: Served, alone: OrtSession, tokenizer: Tokenizer, name: str | None, prefix: str) -> None:
    want = expected(alone, tokenizer, name, rendered(tokenizer), max_new_tokens=9)
    model = "base" if name is None else prefix + name
    answer = served.client().chat.completions.create(model=model, messages=MESSAGES, max_tokens=9, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role) == (want.text, "assistant")
    assert choice.finish_reason == want.finish_reason
    assert answer.usage.prompt_tokens == want.prompt_tokens
    assert answer.usage.completion_tokens == len(want.tokens)
    assert answer.model == model and answer.object == "chat.completion" and answer.system_fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_says_the_same_in_pieces(served: Served, alone: OrtSession, tokenizer: Tokenizer, name: str | None) -> None:
    want = expected(alone, tokenizer, name, rendered(tokenizer), max_new_tokens=12, temperature=0.9, seed=4)
    chunks = list(
        served.client().chat.completions.create(
            model=name or "base", messages=MESSAGES, max_completion_tokens=12, temperature=0.9, seed=4,
            stream=True, stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == want.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [want.finish_reason]
    assert chunks[0].choices[0].delta.role == "assistant" and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(want.tokens) and chunks[-2].usage is None
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_completions_of_text_and_of_tokens(served: Served, alone: OrtSession, tokenizer: Tokenizer, name: str | None) -> None:
    prompts = ["The fox", "Hi"]
    want = [expected(alone, tokenizer, name, prompt, max_new_tokens=7) for prompt in prompts]
    create = served.client().completions.create
    options: dict[str, Any] = {"model": name or "base", "max_tokens": 7, "temperature": 0}
    whole = create(prompt=prompts, **options)
    assert [(choice.index, choice.text) for choice in whole.choices] == [(0, want[0].text), (1, want[1].text)]
    assert whole.usage.prompt_tokens == sum(each.prompt_tokens for each in want)
    assert create(prompt=tokenizer.encode_prompt("Hi"), **options).choices[0].text == want[1].text
    streamed = ["", ""]
    for chunk in create(prompt=prompts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [each.text for each in want]
    assert len(create(prompt="Hi", model="base", temperature=0).choices[0].text) <= 16  # OpenAI's count, where nobody says


def test_n_answers_are_the_samples_of_a_seed(served: Served, alone: OrtSession, tokenizer: Tokenizer) -> None:
    chosen = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7}
    want = [expected(alone, tokenizer, "all", "The fox", sample=i, **chosen).text for i in range(3)]
    ask = {"model": "all", "prompt": "The fox", "max_tokens": 8, "n": 3}
    for _ in range(2):
        answer = served.client().completions.create(**ask, seed=7)  # the temperature is 1 unless it is said
        assert [choice.text for choice in answer.choices] == want
        assert answer.usage.prompt_tokens == len(tokenizer.encode_prompt("The fox"))
    assert len(set(want)) > 1
    assert [c.text for c in served.client().completions.create(**ask, seed=8).choices] != want


def test_a_stop_text_is_cut_off(served: Served, alone: OrtSession, tokenizer: Tokenizer) -> None:
    whole = expected(alone, tokenizer, "prompt", "The fox", max_new_tokens=12).text
    stop = whole[4:6]
    want = expected(alone, tokenizer, "prompt", "The fox", max_new_tokens=12, stop=(stop,))
    ask = {"model": "prompt", "prompt": "The fox", "max_tokens": 12, "temperature": 0}
    for given in (stop, [stop, "never"]):
        choice = served.client().completions.create(**ask, stop=given).choices[0]
        assert (choice.text, choice.finish_reason) == (want.text, "stop")
        assert stop not in choice.text
    pieces = [chunk.choices[0] for chunk in served.client().completions.create(**ask, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == want.text and pieces[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_decoder_in_numpy(served: Served, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode_prompt("The fox")
    ask: dict[str, Any] = {"model": "all", "prompt": prompt, "max_tokens": 6, "temperature": 1.3, "seed": 3, "logprobs": 4}
    told = served.client().completions.create(**ask).choices[0].logprobs
    tokens = list(_tokens(served, ask))
    logits = DECODER.logits([*prompt, *tokens], ADAPTERS["all"], len(prompt))[len(prompt) - 1 : -1]
    want = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(told.token_logprobs, want[range(6), tokens], atol=1e-4)
    for best, row in zip(told.top_logprobs, want, strict=True):
        assert math.isclose(max(best.values()), row.max(), abs_tol=1e-4)
    chat = served.client().chat.completions
    said: dict[str, Any] = {"model": "all", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    content = chat.create(**said).choices[0].logprobs.content
    assert len(content) == 5
    for each in content:
        assert len(each.top_logprobs) == 3 and each.logprob == each.top_logprobs[0].logprob  # greedy takes the likeliest
        assert each.bytes is None or bytes(each.bytes).decode() == each.token
    pieces = [chunk.choices[0].logprobs for chunk in chat.create(**said, stream=True)]
    streamed = [token for piece in pieces if piece is not None for token in piece.content]
    # The second time the prompt is in the cache, and fed in other chunks.
    np.testing.assert_allclose([token.logprob for token in streamed], [token.logprob for token in content], atol=1e-5)


def _tokens(served: Served, ask: dict[str, Any]) -> tuple[int, ...]:
    """What the server's own batch samples for that request."""
    settings = GenerationSettings(max_new_tokens=ask["max_tokens"], temperature=ask["temperature"], seed=ask["seed"])
    return served.server.batcher.submit(ask["prompt"], settings, adapter=ask["model"]).result(20).tokens


def test_models(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", *(n for name in ADAPTERS for n in (name, f"base:{name}"))]
    assert client.models.retrieve("base:all").id == "base:all"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "negative temperature": ({"temperature": -1}, "temperature", "temperature"),
    "text for a number": ({"max_tokens": "9"}, "max_tokens", "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "max_tokens"),
    "too many tokens": ({"max_tokens": 5000}, "at most 1024", "max_tokens"),
    "beyond the context": ({"max_tokens": 64}, "exceed the context of toy", None),
    "too many answers": ({"n": 100}, "at most 8", "n"),
    "tools": ({"tools": [{"type": "function"}]}, "tools is not supported", None),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty is not supported", None),
    "logit bias": ({"logit_bias": {"5": 1}}, "logit_bias is not supported", None),
    "a form of its own": ({"response_format": {"type": "grammar"}}, "'grammar' is not supported", "response_format"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "belong together", "response_format"),
    "a nameless schema": ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "name", "response_format"),
    "unknown field": ({"temprature": 1}, "temprature is not a field", None),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options are of a stream", None),
    "likeliest without logprobs": ({"top_logprobs": 3}, "needs logprobs", None),
    "two counts": ({"max_tokens": 3, "max_completion_tokens": 4}, "differ", None),
    "an empty stop": ({"stop": ""}, "stop", "stop"),
    "no messages": ({"messages": []}, "messages", "messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "messages"),
    "a tool's message": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "messages"),
    "half a character": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate", "messages"),
    "a name that is half a character": ({"model": "\ud800"}, "model", "model"),
    "not a number": ({"temperature": float("nan")}, "temperature", "temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_understood_is_refused(served: Served, case: str) -> None:
    changes, said, param = WRONG[case]
    body = json.dumps({"model": "base", "messages": MESSAGES, **changes})
    answer = served.http().post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"] and error["param"] == param


def test_what_asks_for_nothing_is_taken(served: Served) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "logit_bias": {}, "user": "me", "store": False,
        "response_format": {"type": "text"}, "extra_body": {"top_k": 3, "best_of": None, "reasoning_effort": None},
    }  # fmt: skip
    parts = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}, MESSAGES[1]]
    create = served.client().chat.completions.create
    want = create(model="all", messages=MESSAGES, max_tokens=5, temperature=0).choices[0].message.content
    assert create(model="all", messages=parts, max_tokens=5, temperature=0, **neutral).choices[0].message.content == want


def test_the_usage_tells_what_was_in_the_cache(served: Served) -> None:
    prompt = "naive cafe a lazy dog jumps over the quick"
    ask = {"model": "base", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    first, again = (served.client().completions.create(**ask).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1
    other = served.client().completions.create(**{**ask, "model": "all"}).usage
    assert other.prompt_tokens_details.cached_tokens == 0 and other.prompt_tokens == again.prompt_tokens


def test_an_adapter_at_a_strength(served: Served, alone: OrtSession, tokenizer: Tokenizer) -> None:
    create = served.client().completions.create
    for strength, name in ((0, None), (1, "all")):
        answer = create(model="all", prompt="The fox", max_tokens=8, temperature=0, extra_body={"strength": strength})
        assert answer.choices[0].text == expected(alone, tokenizer, name, "The fox", max_new_tokens=8).text
    with pytest.raises(openai.BadRequestError, match="base has none"):
        create(model="base", prompt="The fox", extra_body={"strength": 0.5})


@pytest.mark.parametrize("model", ["nobody", "base:nobody", "base:", "base:base", "other:all", "../all", "all/"])
def test_an_unknown_model_is_never_the_base(served: Served, model: str) -> None:
    for ask in ({"prompt": "Hi"}, {"prompt": "Hi", "stream": True}):
        with pytest.raises(openai.NotFoundError) as caught:
            served.client().completions.create(model=model, **ask)
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_a_chat_without_a_count_gets_what_the_context_leaves(served: Served) -> None:
    answer = served.client().chat.completions.create(model="base", messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens == 64 or answer.choices[0].finish_reason == "stop"


def test_forty_streams_at_once_each_with_its_own_adapter(served: Served, alone: OrtSession, tokenizer: Tokenizer) -> None:
    asks = [
        (
            NAMES[i % len(NAMES)],
            "The quick brown fox jumps"[: 2 + i % 20],
            GenerationSettings(max_new_tokens=3 + i % 20, temperature=i % 2, seed=i),
        )
        for i in range(40)
    ]
    want = [expected(alone, tokenizer, name, prompt, **vars(settings)).text for name, prompt, settings in asks]

    async def ask(client: openai.AsyncOpenAI, name: str | None, prompt: str, settings: GenerationSettings, streams: bool) -> str:
        options: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "seed": settings.seed}
        answer = await client.completions.create(model=name or "base", prompt=prompt, stream=streams, **options)
        return "".join([c.choices[0].text async for c in answer]) if streams else answer.choices[0].text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            return list(await asyncio.gather(*(ask(client, *each, streams=i % 5 != 0) for i, each in enumerate(asks))))

    assert asyncio.run(all_of_them()) == want
    assert len({tuple(expected(alone, tokenizer, name, "The fox", max_new_tokens=8).tokens) for name in NAMES}) == len(NAMES)
    until(lambda: served.metric("reft_requests_running") == 0)
    assert replace(served.server.batcher.load, cache_bytes=0) == replace(served.server.batcher.load, cache_bytes=0, decoding=0, waiting=0)

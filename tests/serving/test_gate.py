"""Who gets in, how much of it, and what is written of it: keys, sizes, limits, hang-ups, the log, the metrics, the end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError
from served import Served, serving, until

from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError, ReftError
from runtimes.serving import gate
from runtimes.serving.process import bind
from runtimes.serving.requests import ChatRequest, CompletionRequest
from runtimes.serving.settings import Keys, ServeSettings

KEY, OTHER, ADMIN = "sk-one", "sk-two", "adm-secret"
ASK: dict[str, Any] = {"model": "base", "prompt": "The fox", "max_tokens": 4, "temperature": 0}
LONG: dict[str, Any] = {"model": "all", "prompt": "Hi", "max_tokens": 60, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def keyed(bundle: Bundle) -> Iterator[Served]:
    with serving(bundle, ServeSettings(api_keys=(KEY, OTHER), admin_token=ADMIN, max_body=2000, max_prompt_tokens=20)) as each:
        yield each


def test_keys_open_what_is_asked_of_the_model(keyed: Served) -> None:
    for key in (KEY, OTHER, ADMIN):
        assert keyed.client(key).completions.create(**ASK).choices
        assert keyed.http(key).get("/v1/adapters").status_code == 200
    for key in ("sk-on", "sk-onee", "nobody", "\u00e9"):
        answer = keyed.http().post("/v1/completions", json=ASK, headers={"Authorization": f"Bearer {key}".encode()})
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        keyed.client("sk-no").models.list()
    for path in ("/v1/models", "/v1/adapters", "/v1/completions", "/v1/none"):
        assert keyed.http().get(path).status_code == 401, path
    for header in ("", "Bearer", f"Basic {KEY}", KEY):
        assert keyed.http().get("/v1/models", headers={"Authorization": header}).status_code == 401, header
    for path in ("/health", "/ready", "/metrics"):
        assert keyed.http().get(path).status_code == 200


def test_only_the_admin_token_changes_adapters(keyed: Served) -> None:
    for method in ("PUT", "DELETE"):
        assert keyed.http().request(method, "/v1/adapters/all").status_code == 401
        assert keyed.http("nobody").request(method, "/v1/adapters/all").status_code == 401
        assert keyed.http(KEY).request(method, "/v1/adapters/all").status_code == 403
    assert keyed.http(ADMIN).delete("/v1/adapters/all").status_code == 409  # it is let in, and the bundle keeps its own


def test_without_an_admin_token_nobody_does(served: Served) -> None:
    assert served.http("x").delete("/v1/adapters/all").json()["error"]["code"] == "no_admin_token"


def test_keys_are_compared_whole() -> None:
    keys = Keys(["one", "two"])
    assert "one" in keys and "two" in keys and "on" not in keys and "" not in keys and not Keys(())


def test_a_body_beyond_the_limit_is_refused(keyed: Served) -> None:
    big = json.dumps({**ASK, "prompt": "a" * 3000}).encode()
    headers = {"Content-Type": "application/json"}
    said = keyed.http(KEY).post("/v1/completions", content=big, headers=headers)
    assert said.status_code == 413 and said.json()["error"]["code"] == "too_large"
    in_chunks = keyed.http(KEY).post("/v1/completions", content=iter([big[:1500], big[1500:]]), headers=headers)  # of unknown length
    assert in_chunks.status_code == 413 and in_chunks.json()["error"]["code"] == "too_large"
    assert keyed.http(KEY).post("/v1/completions", json=ASK).status_code == 200


def test_a_prompt_beyond_the_limit_is_refused(keyed: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 20 are taken here") as caught:
        keyed.client(KEY).completions.create(**{**ASK, "prompt": list(range(2, 23))})
    assert caught.value.code == "context_length_exceeded"


BODIES = {
    "no JSON": b"{",
    "nested": b"[" * 1900,
    "a list": b"[]",
    "a number": b"1" * 1900,
    "not UTF-8": b'{"model": "\xff"}',
    "nothing": b"",
    "null": b"null",
    "keys twice": b'{"model": "base", "model": 3}',
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_no_request_is_refused(keyed: Served, case: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = keyed.http(KEY).post(path, content=BODIES[case], headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_routes_that_are_not_there_answer_as_errors(served: Served) -> None:
    assert served.http().get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert served.http().get("/v1/completions").status_code == 405


def test_a_body_that_does_not_come_is_not_waited_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with serving(bundle) as each, _connection(each) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in sock.recv(1000)


def _connection(served: Served) -> socket.socket:
    url = httpx.URL(served.url)
    return socket.create_connection((url.host, url.port), timeout=20)


def _ask_raw(sock: socket.socket, **body: Any) -> None:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_row(bundle: Bundle, stream: bool) -> None:
    with serving(bundle, slow=0.05) as each:
        with _connection(each) as sock:
            _ask_raw(sock, **{**LONG, "stream": stream})
            until(lambda: each.server.batcher.load.decoding == 1)
            assert each.server.bank.live_rows("all") == 1
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: each.server.batcher.load.decoding == 0, 2)  # of the three seconds that it would take
        until(lambda: any('"/v1/completions"' in line for line in each.lines))
        assert each.server.bank.live_rows("all") == 0
        assert each.metric("reft_requests_running") == 0
        assert each.client().completions.create(**ASK).choices


def test_a_stream_that_nobody_reads_ends_and_the_others_go_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's window and the server's buffer are made small, so that a few tokens fill them."""
    from runtimes.serving import text_routes

    monkeypatch.setattr(text_routes, "LAST_WORDS", 0.2)
    with serving(bundle, ServeSettings(backlog=5), slow=0.01) as each:
        original = text_routes.EventStream._send

        async def stuck(self: Any, send: Any) -> None:
            async def slowly(message: Any) -> None:
                await send(message)
                if self._flight.asks[0].prompt[-1] == 7:
                    await _forever()

            await original(self, slowly)

        monkeypatch.setattr(text_routes.EventStream, "_send", stuck)
        want = each.client().completions.create(**{**LONG, "stream": False}).choices[0].text
        with each.http().stream("POST", "/v1/completions", json={**LONG, "prompt": [7]}):
            told = [chunk.choices[0].text for chunk in each.client().completions.create(**LONG)]
            assert "".join(told) == want
            until(lambda: each.server.bank.live_rows("all") == 0)
            until(lambda: any('"did not read"' in line for line in each.lines))
        assert each.metric("reft_requests_running") == 0


async def _forever() -> None:
    import asyncio

    await asyncio.Event().wait()


def test_a_full_queue_and_too_many_requests_say_when_to_come_back(bundle: Bundle) -> None:
    with serving(bundle, slow=0.05, most_rows=1, queue=1) as each:
        running = each.client().completions.create(**LONG)
        next(iter(running))
        waiting = threading.Thread(target=lambda: list(each.client().completions.create(**{**LONG, "max_tokens": 2})))
        waiting.start()
        until(lambda: each.server.batcher.load.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            each.client().completions.create(**ASK)
        assert caught.value.code == "queue_full" and int(caught.value.response.headers["Retry-After"]) >= 1
        assert each.metric("reft_waiting") == 1 and each.metric("reft_rows_decoding") == 1
        running.close()
        waiting.join(20)
    with serving(bundle, ServeSettings(concurrency=1), slow=0.05) as each:
        first = iter(each.client().completions.create(**LONG))
        next(first)
        with pytest.raises(openai.RateLimitError) as caught:
            each.client().completions.create(**ASK)
        assert caught.value.code == "too_many_requests" and caught.value.response.headers["Retry-After"]
        assert each.client().models.list().data


def test_answers_of_one_request_come_all_or_none(bundle: Bundle) -> None:
    with serving(bundle, slow=0.05, most_rows=1, queue=2) as each:
        with pytest.raises(openai.RateLimitError):
            each.client().completions.create(**{**ASK, "max_tokens": 50, "n": 8})
        until(lambda: each.server.batcher.load.waiting == 0 and each.server.batcher.load.decoding == 0)


def test_a_request_that_takes_too_long_ends(bundle: Bundle) -> None:
    with serving(bundle, ServeSettings(request_seconds=0.3), slow=0.05) as each:
        with pytest.raises(openai.InternalServerError) as caught:
            each.client().completions.create(**{**LONG, "stream": False})
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        with pytest.raises(openai.APIError, match="no answer within"):
            list(each.client().completions.create(**LONG))
        until(lambda: each.server.batcher.load.decoding == 0)


def test_the_log_holds_no_prompt_no_key_and_no_answer(keyed: Served) -> None:
    before = len(keyed.lines)
    answer = keyed.client(KEY).completions.create(**{**ASK, "model": "all", "prompt": "fox SECRET"})
    keyed.http("sk-wrong").get("/v1/models?token=hidden")
    until(lambda: len(keyed.lines) >= before + 2)
    told, refused = (json.loads(line) for line in keyed.lines[before : before + 2])
    assert (told["status"], told["path"], told["adapter"], told["completion_tokens"]) == (200, "/v1/completions", "all", 4)
    assert told["seconds"] > 0 and told["id"] and told["prompt_tokens"]
    assert (refused["status"], refused["path"]) == (401, "/v1/models")
    text = "\n".join(keyed.lines[before:])
    assert not [word for word in ("SECRET", KEY, "sk-wrong", "hidden", answer.choices[0].text) if word in text]


def test_a_bug_is_told_in_the_log_by_its_place(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle) as each:

        def broken(*_: object) -> None:
            raise RuntimeError("SECRET")

        monkeypatch.setattr(each.server, "asks", broken)
        answer = each.http().post("/v1/completions", json=ASK)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        until(lambda: bool(each.lines))
        assert "RuntimeError at broken" in each.lines[0] and "SECRET" not in each.lines[0] + answer.text
        monkeypatch.undo()
        assert each.http().post("/v1/completions", json=ASK).status_code == 200


def test_a_run_that_fails_is_told_in_the_log(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(bundle) as each:

        def fails(*_: object) -> None:
            raise ReftError("onnxruntime says no")

        monkeypatch.setattr(each.server.batcher._session, "run_pool", fails)
        assert each.http().post("/v1/completions", json=ASK).status_code == 500
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(each.client().completions.create(**LONG))
        until(lambda: len(each.lines) == 2)
        assert all("ReftError at fails" in line for line in each.lines)
        monkeypatch.undo()
        assert each.http().post("/v1/completions", json=ASK).status_code == 200


def test_metrics(bundle: Bundle) -> None:
    with serving(bundle) as each:
        each.client().completions.create(**{**ASK, "model": "all", "n": 2})
        each.http().get("/v1/nothing/of/that/name")
        text = each.http().get("/metrics").text
        assert 'reft_requests_total{method="POST",route="/v1/completions",status="200"} 1.0' in text
        assert 'route="other",status="404"' in text and "of/that/name" not in text
        prompt = len(each.server.tokenizer.encode_prompt("The fox"))
        expected = {
            "reft_completion_tokens_total": 8, "reft_prompt_tokens_total": 2 * prompt, "reft_resident_adapters": 1,
            "reft_time_to_first_token_seconds_count": 2, "reft_time_between_tokens_seconds_count": 6, "reft_waiting": 0,
            "reft_rows_decoding": 0, "reft_rows_prefilling": 0,
        }  # fmt: skip
        assert {name: each.metric(name) for name in expected} == expected
        assert each.metric("reft_cache_bytes") > 0 and each.metric("reft_bank_bytes") > 0


def test_metrics_know_no_word_of_a_client(served: Served) -> None:
    for method in ("FOO1", "FOO2"):
        with _connection(served) as sock:
            sock.sendall(f"{method} /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            while sock.recv(1 << 16):
                pass
    assert "FOO" not in served.http().get("/metrics").text


@pytest.mark.parametrize(
    "body",
    [
        {"model": "base", "messages": [{"role": "user", "content": [{}] * 100_000}]},
        {"model": "base", "messages": [{}] * 100_000},
        {"model": "base", "prompt": [0.5] * 100_000},
    ],
)
def test_a_body_of_many_faults_costs_what_one_does(body: dict[str, Any]) -> None:
    """Each fault is an object of its own, which the framework copies: only the first is looked for."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 20


def test_stopping_lets_what_runs_finish(bundle: Bundle) -> None:
    with serving(bundle, ServeSettings(grace_seconds=20), slow=0.01) as each:
        want = each.client().completions.create(**{**LONG, "stream": False}).choices[0].text
        stream = iter(each.client().completions.create(**LONG))
        said = [next(stream).choices[0].text]
        each.running.should_exit = True
        until(lambda: each.server.stopping)
        with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
            each.http().get("/health")
        assert "".join([*said, *(chunk.choices[0].text for chunk in stream)]) == want


def test_stopping_ends_what_takes_longer_than_the_grace(bundle: Bundle) -> None:
    with serving(bundle, ServeSettings(grace_seconds=0.2), slow=0.1) as each:
        stream = iter(each.client().completions.create(**LONG))
        next(stream)
        each.running.should_exit = True
        start = time.monotonic()
        with pytest.raises(openai.APIError, match="the server stops"):
            list(stream)
        assert time.monotonic() - start < 3


def test_a_server_that_stops_is_not_ready(served: Served) -> None:
    served.server.stopping = True
    try:
        assert served.http().get("/ready").status_code == 503
        assert served.http().post("/v1/completions", json=ASK).status_code == 503
        assert served.http().get("/health").status_code == 200
    finally:
        served.server.stopping = False
    assert served.http().get("/ready").status_code == 200


def test_settings_that_limit_nothing_are_refused() -> None:
    keys = ({"api_keys": (wrong,)} for wrong in ("", "two words", "k\u00e9y"))
    for wrong in (*keys, {"max_body": 0}, {"request_seconds": 0}, {"grace_seconds": -1}, {"admin_token": ""}):
        with pytest.raises(InputError):
            ServeSettings(**wrong)


def test_an_address_that_is_taken_is_refused() -> None:
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ReftError, match="nothing can listen at 127.0.0.1"):
            bind("127.0.0.1", bound.getsockname()[1])

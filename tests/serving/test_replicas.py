"""Requests before replicas: whatever is lost, each is answered whole, once, and as by one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from served import Served, serving, until
from test_adapters import FILES, NEW, NEWER, files_of

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import save_adapter
from runtimes.serving.app import create_app
from runtimes.serving.forwarded import Forwarded, answered
from runtimes.serving.front import ATTEMPTS, ReplicaLost, create_front
from runtimes.serving.gate import Application, Message
from runtimes.serving.process import Running, bind
from runtimes.serving.resumed import Resumed
from runtimes.serving.settings import ServeSettings
from runtimes.serving.shared_folder import SharedFolder
from runtimes.text.tokenizer import Tokenizer

LONG: dict[str, Any] = {"model": "all", "prompt": "The fox", "max_tokens": 30, "temperature": 1.0, "n": 2}


@dataclass
class Dying:
    """Replicas that are applications of this process; the first ones are lost after so many messages of an answer."""

    app: Application
    after: list[int] = field(default_factory=list)
    asked: list[Forwarded] = field(default_factory=list)
    lost: int = 0

    async def ask(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        self.asked.append(request)
        left = self.after.pop(0) if self.after else None
        async for message in answered(self.app, request):
            if left == 0:
                self.lost += 1
                raise ReplicaLost
            left = None if left is None else left - 1
            yield message


@contextmanager
def front_of(replicas: Any, settings: ServeSettings = ServeSettings(), log: Any = lambda _: None) -> Iterator[str]:
    started: list[str] = []
    with bind("127.0.0.1", 0) as bound:
        gate, front = create_front(replicas, settings, log=log)
        running = Running(gate, front, bound, started.append)
        thread = Thread(target=lambda: running.run(sockets=[bound]), daemon=True)
        thread.start()
        until(lambda: bool(started))
        try:
            yield started[0]
        finally:
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def dying(served: Served) -> Dying:
    return Dying(create_app(served.server, log=lambda _: None))


def texts(url: str, *, stream: bool, **asked: Any) -> list[str]:
    """Of each answer; a stream's pieces joined."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    if not stream:
        return [choice.text for choice in client.completions.create(**LONG, **asked).choices]
    said: dict[int, str] = {}
    heads = set()
    for chunk in client.completions.create(**LONG, **asked, stream=True):
        heads.add((chunk.id, chunk.created))
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + choice.text
    assert len(heads) == 1
    return [said[index] for index in sorted(said)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [[0], [1], [2], [29], [3, 17, 1]])
def test_what_is_lost_is_asked_again_and_goes_on_where_it_was(dying: Dying, served: Served, stream: bool, after: list[int]) -> None:
    dying.after = list(after)
    with front_of(dying) as url:
        assert texts(url, stream=stream, seed=5) == texts(served.url, stream=False, seed=5)
        assert dying.lost == len(after) or not stream
        assert f"reft_replicas_lost_total {float(dying.lost)}" in httpx.get(f"{url}/metrics").text


def test_a_request_without_a_seed_says_the_same_when_it_is_asked_again(dying: Dying, served: Served) -> None:
    dying.after = [9]
    with front_of(dying) as url:
        one = texts(url, stream=True)
    seeds = {json.loads(request.body)["seed"] for request in dying.asked}
    assert len(dying.asked) == 2 and len(seeds) == 1
    assert one == texts(served.url, stream=False, seed=seeds.pop())


def test_one_that_kills_whatever_answers_it_ends(dying: Dying) -> None:
    dying.after = [2] * 9
    with front_of(dying) as url:
        assert httpx.post(f"{url}/v1/completions", json=LONG).json()["error"]["code"] == "replica_lost"
        assert len(dying.after) == 9 - ATTEMPTS
        with pytest.raises(openai.APIError, match="replicas were lost"):
            texts(url, stream=True)


def test_a_change_is_not_made_twice(dying: Dying) -> None:
    dying.after = [0]
    with front_of(dying, ServeSettings(admin_token="adm")) as url:
        answer = httpx.delete(f"{url}/v1/adapters/mine", headers={"Authorization": "Bearer adm"})
    assert answer.status_code == 503 and len(dying.asked) == 1


def test_a_replica_that_goes_on_otherwise_ends_the_stream() -> None:
    resumed = Resumed()
    event = {"id": "1", "created": 1, "choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    assert resumed.new(json.dumps(event)) == json.dumps(event)
    resumed.again()
    event["choices"][0]["text"] = "b"  # type: ignore[index]
    with pytest.raises(Exception, match="otherwise"):
        resumed.new(json.dumps(event))


def test_a_stream_that_is_lost_behind_its_end_ends_once(dying: Dying, served: Served) -> None:
    asked = {**LONG, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=asked) as whole:
        events = [line for line in whole.iter_lines() if line]
    dying.after = [1 + len(events)]  # its start, and every event: but not that there is no more
    with front_of(dying) as url, httpx.stream("POST", f"{url}/v1/completions", json=asked) as again:
        told = [line for line in again.iter_lines() if line]
    assert dying.lost == 1 and len(told) == len(events) and told.count("data: [DONE]") == 1


def test_who_is_sent_away_is_told_how_long_answers_take(dying: Dying, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(step=100.0)  # that an answer begins, and when it ends
    monkeypatch.setattr("runtimes.serving.front.time", SimpleNamespace(monotonic=lambda: next(clock)))
    gate, front = create_front(dying, ServeSettings(concurrency=1), log=lambda _: None)

    async def asked(body: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://front") as client:
            return await client.post("/v1/completions", json=body)

    for body, status, seconds in ((LONG, 200, 11), ({"model": "nobody", "prompt": "a"}, 404, 11), ({**LONG, "stream": True}, 200, 20)):
        assert (asyncio.run(asked(body)).status_code, front.retry_after) == (status, seconds)
    with front.admitted():
        refused = asyncio.run(asked(LONG))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")


def test_the_front_refuses_and_tells_what_one_process_does(dying: Dying, served: Served) -> None:
    with front_of(dying, ServeSettings(api_keys=("one",), max_body=2000)) as url, httpx.Client(base_url=url) as client:
        client.headers["Authorization"] = "Bearer two"
        assert client.get("/v1/models").status_code == 401 and not dying.asked
        client.headers["Authorization"] = "Bearer one"
        assert client.get("/v1/models").json() == served.http().get("/v1/models").json()
        assert client.post("/v1/completions", json={**LONG, "prompt": "a" * 3000}).status_code == 413
        for body in (b"", b"[]", b"{", b"{}", b"\xff", b'{"model": "nobody", "prompt": "a"}', json.dumps(LONG).encode("utf-16")):
            own, other = (each.post("/v1/completions", content=body) for each in (client, served.http()))
            assert own.status_code == other.status_code
            assert own.status_code == 200 or own.json() == other.json()
        assert client.get("/ready").json() == {"status": "ready"} and client.get("/").status_code == 200


def test_the_seed_is_put_in_where_there_is_none() -> None:
    scope = {"path": "/v1/completions", "method": "POST", "headers": [], "query_string": b""}
    for sent in (b'{"model":"a", "prompt": "\xc3\xa9"} \n', b'{"model":"a","prompt":"\xc3\xa9","seed":null}'):
        request = Forwarded.of(scope, sent)
        asked = json.loads(request.body)
        assert request.adapter == "a" and isinstance(asked.pop("seed"), int) and asked == {"model": "a", "prompt": "é"}
        assert len(request.body) <= len(sent) + 32
    kept = b'{"model":"base:b","prompt":"x","seed":3}'
    assert Forwarded.of(scope, kept).body == kept and Forwarded.of(scope, kept).adapter == "b"


# --- a folder of several processes ---


def text(url: str, model: str) -> str:
    answer = httpx.post(f"{url}/v1/completions", json={"model": model, "prompt": "The fox", "max_tokens": 8, "temperature": 0})
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else f"{answer.status_code}"


@dataclass
class Turns:
    """Two processes' applications over one folder, asked by turns."""

    servers: list[tuple[Application, SharedFolder]]
    asked: int = 0

    async def ask(self, request: Forwarded) -> AsyncGenerator[Message, None]:
        app, folder = self.servers[self.asked % len(self.servers)]
        self.asked += 1
        if request.path in ("/v1/models", "/v1/adapters"):
            await folder.refresh_all()
        async with folder.use(request.adapter, changes=request.changes):
            async for message in answered(app, request):
                yield message


def test_what_one_changes_the_other_sees(bundle: Bundle, tokenizer: Tokenizer, tmp_path: Path) -> None:
    home = tmp_path / "adapters"
    home.mkdir()
    settings = ServeSettings(adapters=home, admin_token="adm")
    want = {}
    for name, adapter in {"new": NEW, "newer": NEWER}.items():
        folder = tmp_path / "alone" / name / "mine"
        save_adapter(adapter, folder)
        with serving(bundle, ServeSettings(adapters=folder.parent)) as alone:
            want[name] = text(alone.url, "mine")
    assert len({*want.values()}) == 2
    with serving(bundle, settings) as one, serving(bundle, settings) as two:
        servers: list[tuple[Application, SharedFolder]] = [
            (create_app(each.server, log=lambda _: None), SharedFolder(each.server)) for each in (one, two)
        ]
        with front_of(Turns(servers), settings) as url, httpx.Client(base_url=url, headers={"Authorization": "Bearer adm"}) as admin:

            def put(adapter: Any, name: str) -> int:
                files = {n: (n, content) for n, content in files_of(adapter, tmp_path / name).items()}
                return admin.put("/v1/adapters/mine", files=files, params={"replace": True}).status_code

            assert [text(url, "mine") for _ in range(2)] == ["404", "404"]
            assert put(NEW, "put-new") == 201
            assert [text(url, "mine") for _ in range(4)] == [want["new"]] * 4
            assert put(NEWER, "put-newer") == 200
            assert [text(url, "base:mine") for _ in range(4)] == [want["newer"]] * 4
            listed = [admin.get("/v1/adapters").json()["data"] for _ in range(2)]
            assert all("mine" in {each["id"] for each in adapters} for adapters in listed)
            assert admin.delete("/v1/adapters/mine").status_code == 200
            assert [text(url, "mine") for _ in range(4)] == ["404"] * 4
            models = [admin.get("/v1/models").json()["data"] for _ in range(2)]
            assert not any("mine" in {each["id"] for each in known} for known in models)


def test_nothing_is_kept_of_names_that_are_no_adapters(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.server, "settings", ServeSettings(adapters=tmp_path))
    shared = SharedFolder(served.server)
    kept = {name: len(value) for name, value in vars(shared).items() if isinstance(value, dict)}

    async def asked() -> None:
        for number in range(5):
            async with shared.use(f"nobody-{number}"):
                pass

    asyncio.run(asked())
    assert {name: len(value) for name, value in vars(shared).items() if isinstance(value, dict)} == kept


def test_an_update_waits_for_what_runs(bundle: Bundle, tmp_path: Path) -> None:
    home = tmp_path / "adapters"
    save_adapter(NEW, home / "mine")
    with serving(bundle, ServeSettings(adapters=home), slow=0.01) as one:
        shared = SharedFolder(one.server)

        async def told() -> list[str]:
            order = []
            async with shared.use("mine"):
                save_adapter(NEWER, tmp_path / "next")
                for file in FILES:
                    (tmp_path / "next" / file).replace(home / "mine" / file)

                async def other() -> None:
                    async with shared.use("mine"):
                        order.append("new")

                waiting = asyncio.ensure_future(other())
                await asyncio.sleep(0.1)
                order.append("old")
            await waiting
            return order

        assert asyncio.run(told()) == ["old", "new"]

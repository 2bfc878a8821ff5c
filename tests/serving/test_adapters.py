"""Adapters that come and go while the server answers: whole or not at all, and only those that fit."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import Served, serving, until
from toy_bundle import ADAPTERS, toy_adapter

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.serving.settings import ServeSettings
from runtimes.text.tokenizer import Tokenizer

ADMIN = "adm"
FILES = ("adapter.json", "adapter.safetensors")
ASK: dict[str, Any] = {"prompt": "The fox", "max_tokens": 8, "temperature": 0}
NEW, NEWER = toy_adapter("all", seed=11), toy_adapter("f1+l1", seed=12, rank=3, tied=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def served(bundle: Bundle, home: Path) -> Iterator[Served]:
    with serving(bundle, ServeSettings(adapters=home, admin_token=ADMIN, max_upload=200_000)) as each:
        yield each


def files_of(adapter: Adapter, folder: Path) -> dict[str, bytes]:
    save_adapter(adapter, folder)
    return {name: (folder / name).read_bytes() for name in FILES}


def put(served: Served, name: str, files: dict[str, bytes], **query: Any) -> httpx.Response:
    return served.http(ADMIN).put(f"/v1/adapters/{name}", files={n: (n, io.BytesIO(c)) for n, c in files.items()}, params=query)


def text(served: Served, model: str) -> str:
    return served.client().completions.create(model=model, **ASK).choices[0].text


def alone(bundle: Bundle, tokenizer: Tokenizer, folder: Path) -> str:
    """What the adapter says where the bundle holds it itself."""
    from toy_bundle import write_toy_bundle

    from runtimes.edits.adapter import load_adapter

    own = write_toy_bundle(folder.parent / f"{folder.name}-bundle", in_place=True, adapters={**ADAPTERS, "own": load_adapter(folder)})
    session = OrtSession(own, threads=1)
    session.set_adapter("own")
    return generate(session, tokenizer, [ASK["prompt"]], GenerationSettings(max_new_tokens=8))[0].text


def test_an_upload_answers_at_once_and_after_a_restart(
    served: Served, bundle: Bundle, tokenizer: Tokenizer, home: Path, tmp_path: Path
) -> None:
    answer = put(served, "mine", files_of(NEW, tmp_path / "new"))
    assert answer.status_code == 201, answer.text
    assert answer.json() == {
        "id": "mine", "object": "adapter", "bytes": answer.json()["bytes"], "source": "folder", "resident": True,
    }  # fmt: skip
    want = alone(bundle, tokenizer, tmp_path / "new")
    assert text(served, "mine") == text(served, "base:mine") == want != text(served, "base")
    assert "base:mine" in [model.id for model in served.client().models.list()]
    listed = served.http().get("/v1/adapters").json()["data"]
    assert {each["id"]: each["source"] for each in listed} == {**dict.fromkeys(ADAPTERS, "bundle"), "mine": "folder"}
    with serving(bundle, ServeSettings(adapters=home)) as again:
        assert text(again, "mine") == want
    assert os.listdir(home) == ["mine"]


def test_a_name_that_is_taken_is_replaced_only_when_asked(
    served: Served, bundle: Bundle, tokenizer: Tokenizer, home: Path, tmp_path: Path
) -> None:
    old, new = files_of(NEW, tmp_path / "old"), files_of(NEWER, tmp_path / "new")
    assert put(served, "mine", old).status_code == 201
    before = text(served, "mine")
    assert put(served, "mine", new).json()["error"]["code"] == "adapter_exists"
    assert text(served, "mine") == before
    assert put(served, "mine", new, replace=True).status_code == 200
    assert text(served, "mine") == alone(bundle, tokenizer, tmp_path / "new") != before
    assert put(served, "all", new, replace=True).json()["error"]["code"] == "adapter_of_bundle"
    assert os.listdir(home) == ["mine"]


def test_an_adapter_in_use_neither_goes_nor_changes(bundle: Bundle, home: Path, tmp_path: Path) -> None:
    old, new = files_of(NEW, tmp_path / "old"), files_of(NEWER, tmp_path / "new")
    with serving(bundle, ServeSettings(adapters=home, admin_token=ADMIN), slow=0.05) as served:
        put(served, "mine", old)
        long = {**ASK, "model": "mine", "max_tokens": 50}
        want = served.client().completions.create(**long).choices[0].text
        stream = iter(served.client().completions.create(**long, stream=True))
        said = [next(stream).choices[0].text]
        assert put(served, "mine", new, replace=True).json()["error"]["code"] == "adapter_in_use"
        assert served.http(ADMIN).delete("/v1/adapters/mine").status_code == 409
        assert "".join([*said, *(chunk.choices[0].text for chunk in stream)]) == want
        until(lambda: served.metric("reft_requests_running") == 0)
        assert served.http(ADMIN).delete("/v1/adapters/mine").status_code == 200


def test_what_is_deleted_is_no_model_any_more(served: Served, home: Path, tmp_path: Path) -> None:
    put(served, "mine", files_of(NEW, tmp_path / "new"))
    assert served.http(ADMIN).delete("/v1/adapters/mine").json() == {"id": "mine", "object": "adapter", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        text(served, "mine")
    assert served.http(ADMIN).delete("/v1/adapters/mine").status_code == 404
    assert not os.listdir(home)
    assert served.http().get("/v1/adapters/mine").status_code == 404
    assert put(served, "mine", files_of(NEWER, tmp_path / "newer")).status_code == 201


def test_what_does_not_fit_leaves_nothing(served: Served, home: Path, tmp_path: Path) -> None:
    good = files_of(NEW, tmp_path / "good")
    config = json.loads(good["adapter.json"])
    other = replace(NEW, base=replace(NEW.base, fingerprint="1" * 64, name="another"))
    wide = replace(NEW, base=replace(NEW.base, num_hidden_layers=9), sites=NEW.sites)
    elsewhere = replace(NEW, sites=(Site(layer=0, stream="mlp_output"),), tensors={
        name.replace("block_output", "mlp_output"): value for name, value in NEW.tensors.items() if name.startswith("0.")
    })  # fmt: skip
    wrong = {
        "changed": {**good, "adapter.json": good["adapter.json"].replace(b'"rank": 2', b'"rank": 1')},
        "flipped": {**good, "adapter.safetensors": good["adapter.safetensors"][:-1] + b"\x7f"},
        "cut": {**good, "adapter.safetensors": good["adapter.safetensors"][:-8]},
        "empty": dict.fromkeys(FILES, b""),
        "no JSON": {**good, "adapter.json": b"{"},
        "nested": {**good, "adapter.json": b"[" * 100_000},
        "unknown keys": {**good, "adapter.json": json.dumps({**config, "exec": "rm"}).encode()},
        "a pickle": {**good, "adapter.safetensors": b"\x80\x04cos\nsystem\n."},
        "a header of petabytes": {**good, "adapter.safetensors": b"\xff" * 64},
        "another base": files_of(other, tmp_path / "other"),
        "another size": files_of(wide, tmp_path / "wide"),
        "no node": files_of(elsewhere, tmp_path / "elsewhere"),
    }
    for case, files in wrong.items():
        answer = put(served, "mine", files)
        assert answer.status_code == 400, f"{case}: {answer.text}"
        assert answer.json()["error"]["code"] == "invalid_adapter" and str(home) not in answer.text, answer.text
        assert not os.listdir(home), case
        assert "mine" not in served.server.bank
    assert put(served, "mine", good).status_code == 201
    before = text(served, "mine")
    for case, files in wrong.items():
        assert put(served, "mine", files, replace=True).status_code == 400, case
    assert text(served, "mine") == before and os.listdir(home) == ["mine"]


NAMES = ["..", ".", ".hidden", "a%2F..%2Fb", "..%2F..%2Fetc", "%2Fetc%2Fpasswd", "a b", "base", "a" * 101, "a%00b", "-x", "a%0Ab", "%C3%A9"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_name_writes_nothing(served: Served, home: Path, tmp_path: Path, name: str) -> None:
    before = sorted(os.listdir(home.parent))
    files = files_of(NEW, tmp_path / "new")
    url = httpx.URL(served.url).copy_with(raw_path=f"/v1/adapters/{name}".encode())
    with served.http(ADMIN) as client:
        for method in ("PUT", "DELETE"):
            assert client.request(method, url, files={n: (n, c) for n, c in files.items()}).status_code in (400, 404, 405), method
    assert sorted(os.listdir(home.parent)) == sorted([*before, "new"]) and not os.listdir(home)


def test_forms_that_are_no_uploads(served: Served, home: Path, tmp_path: Path) -> None:
    good, client = files_of(NEW, tmp_path / "new"), served.http(ADMIN)
    path = "/v1/adapters/mine"
    assert client.put(path, files={"adapter.json": good["adapter.json"]}).status_code == 400
    assert client.put(path, json={"adapter.json": "x"}).status_code == 400
    assert client.put(path, data=dict.fromkeys(FILES, "x")).status_code == 400
    assert client.put(path, content=b"--x\r\nbroken", headers={"Content-Type": "multipart/form-data; boundary=x"}).status_code == 400
    assert client.put(path, content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    large = {**good, "adapter.safetensors": b"\0" * 300_000}
    assert put(served, "mine", large).status_code == 413
    assert not os.listdir(home) and served.client().models.list().data


def test_a_link_and_a_stranger_in_the_folder_stay(served: Served, home: Path, tmp_path: Path) -> None:
    files = files_of(NEW, tmp_path / "new")
    (home / "stranger").mkdir()
    (home / "stranger" / "diary.txt").write_text("dear")
    (home / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("stranger", "link"):
        for query in ({}, {"replace": True}):
            assert put(served, name, files, **query).status_code == 409, name
    assert (home / "stranger" / "diary.txt").read_text() == "dear" and (home / "link").is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_probes_that_are_listed_come_along(served: Served, home: Path, tmp_path: Path) -> None:
    probed = replace(NEW, probes=({"prompt": "Hi", "completion": "yes"},))
    files = files_of(probed, tmp_path / "new")
    answer = put(served, "mine", files)
    assert answer.status_code == 400 and "send probes.jsonl, too" in answer.json()["error"]["message"] and not os.listdir(home)
    files["probes.jsonl"] = (tmp_path / "new" / "probes.jsonl").read_bytes()
    assert put(served, "mine", files).status_code == 201 and text(served, "mine")


def test_a_damaged_adapter_of_the_folder_is_told_to_the_log(bundle: Bundle, home: Path, tmp_path: Path) -> None:
    """The client is told no place on this machine."""
    save_adapter(NEW, home / "mine")
    with (home / "mine" / "adapter.safetensors").open("ab") as damaged:
        damaged.write(b"x")
    with serving(bundle, ServeSettings(adapters=home)) as served:
        answer = served.http().post("/v1/completions", json={**ASK, "model": "mine"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "adapter_unusable"
        assert str(home) not in answer.text
        until(lambda: any("does not match its sha256" in line for line in served.lines))
        assert served.http().post("/v1/completions", json={**ASK, "model": "base"}).status_code == 200


def test_without_a_folder_nothing_is_uploaded(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, ServeSettings(admin_token=ADMIN)) as served:
        answer = put(served, "mine", files_of(NEW, tmp_path / "new"))
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "no_folder"


def test_an_adapter_that_was_trained_without_the_template_is_asked_without(
    served: Served, bundle: Bundle, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    plain = replace(NEW, training={"data": {"chat_template": False}})
    put(served, "plain", files_of(plain, tmp_path / "plain"))
    message = {"role": "user", "content": ASK["prompt"]}
    chat = served.client().chat.completions
    answer = chat.create(model="plain", messages=[message], max_tokens=8, temperature=0).choices[0].message.content
    assert answer == text(served, "plain") == alone(bundle, tokenizer, tmp_path / "plain")
    with pytest.raises(openai.BadRequestError, match="needs a chat template"):
        chat.create(model="plain", messages=[message, message])
    put(served, "plain", files_of(NEW, tmp_path / "not"), replace=True)
    assert chat.create(model="plain", messages=[message] * 2, max_tokens=2).choices

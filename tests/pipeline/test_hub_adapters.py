"""``-a owner/name``: an adapter on a hub where a folder is asked for, by huggingface_hub's own client against a test double of the hub."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from logging import ERROR
from pathlib import Path

import pytest
from fake_hub import GIT, Hub
from test_cli import cli, refused
from test_hub import adapter, contents, hub  # noqa: F401  # fixtures

from reft_export.base.hub import without_retry_warnings
from reft_export.hub.adapters import is_on_hub, local_folder, local_folders
from reft_export.hub.pull import pull_folder
from reft_export.hub.push import outgoing, push_folder
from runtimes.edits.adapter import load_adapter
from runtimes.errors import AdapterError, InputError


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def fetched(hub: Hub) -> int:  # noqa: F811
    return sum("/resolve/" in line for line in hub.asked)


def test_it_is_pulled_once_and_read_by_its_commit(hub: Hub, adapter: Path, home: Path) -> None:  # noqa: F811
    stored = hub.add("me/calm", contents(adapter))
    named = local_folders([Path("me/calm"), Path("other=me/calm@main"), adapter], quiet)
    first = named[0]
    name, _, folder = str(first).partition("=")
    assert name == "calm" and str(named[1]) == f"other={folder}" and named[2] == adapter
    assert (
        Path(folder).is_relative_to(home) and Path(folder).name == stored.branches["main"] and contents(Path(folder)) == contents(adapter)
    )
    before = fetched(hub)
    assert local_folders([Path("me/calm")], quiet) == [first] and fetched(hub) == before, "it is fetched again"
    old = stored.branches["main"]
    stored.commit("main", GIT | contents(adapter) | {"README.md": b"another commit"})
    assert local_folder(Path("me/calm"), quiet).name == stored.branches["main"] != old
    assert local_folder(Path(f"me/calm@{old}"), quiet).name == old


def test_a_folder_here_goes_first(hub: Hub, adapter: Path) -> None:  # noqa: F811
    hub.add("me/calm", contents(adapter))
    shutil.copytree(adapter, "me/calm")
    assert not is_on_hub(Path("me/calm")) and not is_on_hub(Path("calm=me/calm"))
    for path in ("calm", "a/b/c", "/a/b", "../a", "a/b/../c"):
        assert not is_on_hub(Path(path)), path
    assert local_folders([Path("me/calm")], quiet) == [Path("me/calm")] and not hub.asked


def test_offline_takes_the_commit_that_was_pulled(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from huggingface_hub import constants

    hub.add("me/calm", contents(adapter))
    commit = hub.repositories["me/calm"].branches["main"]
    online = local_folder(Path("me/calm"), quiet)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.asked)
    assert local_folder(Path("me/calm"), quiet) == local_folder(Path(f"me/calm@{commit}"), quiet) == online
    for missing in ("me/calm@v2", "me/other"):
        with pytest.raises(
            InputError, match=f"{missing} is no folder here, nor was it pulled before, and no hub is asked while HF_HUB_OFF"
        ):
            local_folder(Path(missing), quiet)
    assert len(hub.asked) == before


def test_what_cannot_be_had_is_one_line(hub: Hub, adapter: Path, base_folder, bundle_folder, home: Path) -> None:  # noqa: F811
    hub.add("me/bundle", contents(bundle_folder("llama")))
    hub.add("me/model", {"config.json": b"{}"})
    export = ("export", "-m", base_folder("llama"), "-o", "out")
    refused(
        *export, "-a", "me/nothing", code=2, match="me/nothing is no folder here, and cannot be had from a hub: me/nothing is not on http"
    )
    refused(*export, "-a", "me/bundle", code=2, match="me/bundle holds a bundle, and not an adapter; `reft-export pull` fetches it")
    refused(*export, "-a", "me/model", code=2, match="me/model holds neither adapter.json nor manifest.json")
    assert not fetched(hub)
    good = contents(adapter)
    hub.add("me/flipped", good | {"adapter.safetensors": good["adapter.safetensors"][:-1] + b"?"})
    with pytest.raises(AdapterError, match="me/flipped: adapter.safetensors is damaged"):
        local_folder(Path("me/flipped"), quiet)
    assert not list(home.rglob("adapter.safetensors"))


def test_several_at_once_pull_it_once(hub: Hub, adapter: Path) -> None:  # noqa: F811
    hub.add("me/calm", contents(adapter))
    with ThreadPoolExecutor(4) as commands:
        folders = set(commands.map(lambda _: local_folder(Path("me/calm"), quiet), range(4)))
    assert len(folders) == 1 and contents(folders.pop()) == contents(adapter)
    assert sum(line.startswith("GET") and "adapter.safetensors" in line for line in hub.asked) == 1


@pytest.mark.parametrize("sha", ["../../../elsewhere", ""])
def test_a_hub_whose_commit_is_none_names_no_folder(hub: Hub, adapter: Path, home: Path, sha: str) -> None:  # noqa: F811
    stored = hub.add("me/calm", contents(adapter))
    stored.branches["main"], stored.commits = sha, {sha: contents(adapter)}
    (home.parent / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"me/calm is no folder here, .*names no commit of it \('.*'\); check HF_ENDPOINT"):
        local_folder(Path("me/calm"), quiet)
    assert not home.exists()


@pytest.mark.parametrize("revision", ["..", ".", "a/../b", ".hidden", "/a", "a..b", "-f", "a.lock", "a\\b", "a:b", "v" * 201, "é" * 40])
def test_what_git_takes_for_no_revision_is_asked_nowhere(hub: Hub, adapter: Path, home: Path, revision: str) -> None:  # noqa: F811
    stored = hub.add("me/calm", contents(adapter))
    stored.branches[revision] = stored.branches["main"]
    for ask in (
        lambda: local_folder(Path(f"me/calm@{revision}"), quiet),
        lambda: pull_folder("me/calm", home / "got", revision=revision, report=quiet),
        lambda: push_folder(outgoing(adapter, "me/calm"), "me/calm", revision=revision, report=quiet),
    ):
        with pytest.raises(InputError, match="is no revision of a repository; name a branch, a tag or a commit"):
            ask()
    assert not hub.asked and not home.exists()


def test_a_revision_of_several_parts_is_one_file(hub: Hub, adapter: Path, home: Path) -> None:  # noqa: F811
    stored = hub.add("me/calm", contents(adapter))
    stored.branches["user/try-1.2"] = stored.branches["main"]
    assert local_folder(Path("me/calm@user/try-1.2"), quiet).name == stored.branches["main"]
    refs = home / "reft-export" / "adapters" / "me--calm" / "refs"
    assert [path.name for path in refs.iterdir()] == ["user%2Ftry-1.2"]


def test_a_ref_is_written_whole_or_not_at_all(hub: Hub, adapter: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    stored = hub.add("me/calm", contents(adapter))
    local_folder(Path("me/calm"), quiet)
    old = stored.branches["main"]
    stored.commit("main", GIT | contents(adapter) | {"README.md": b"another commit"})

    def cut(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:10])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", cut)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: cut(path, text.encode()))
    with pytest.raises(OSError, match="the disk is full"):
        local_folder(Path("me/calm"), quiet)
    refs = home / "reft-export" / "adapters" / "me--calm" / "refs"
    assert [(path.name, path.read_bytes()) for path in refs.iterdir()] == [("main", old.encode())]


def test_the_verbs_take_it(hub: Hub, adapter: Path, float_bundle, tmp_path: Path) -> None:  # noqa: F811
    hub.add("me/calm", contents(adapter))
    bundle, base = float_bundle()
    done = cli("export", "-m", base, "-a", "me/calm", "-o", "out", "--dry-run")
    assert done.returncode == 0 and "1 adapter" in done.stdout, done.stderr
    shutil.copytree(bundle, "copy")
    done = cli("add", "copy", "-a", "me/calm", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": " b"}) + "\n" for n in range(3)))
    done = cli("evaluate", "-m", base, "-a", "me/calm", "-d", lines, "--metric", "loss", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["adapter"] for row in json.loads(done.stdout)["rows"]] == [None, "calm"]
    done = cli("train", "-m", base, "-d", lines, "-o", "next", "--start", "me/calm", "--max-steps", 1, "--samples", 0)
    assert done.returncode == 0, done.stderr
    assert load_adapter(Path("next")).sites == load_adapter(adapter).sites


def test_a_file_of_another_size_is_not_fetched(hub: Hub, bundle_folder, tmp_path: Path) -> None:  # noqa: F811
    files = contents(bundle_folder("llama"))
    hub.add("me/large", files | {"model.onnx": files["model.onnx"] + b"x" * 99})
    refused(
        "pull",
        "me/large",
        "-o",
        tmp_path / "got",
        code=2,
        match=f"me/large: model.onnx is {len(files['model.onnx']) + 99} bytes, its manifest",
    )
    assert not any("model.onnx" in line for line in hub.asked)
    hub.add("me/record", {"manifest.json": b" " * (2**26 + 1)})
    refused(
        "pull",
        "me/record",
        "-o",
        tmp_path / "got",
        code=2,
        match="me/record: manifest.json is 67108865 bytes, and 67108864 at most are read",
    )
    assert not any("me/record/resolve" in line for line in hub.asked)


def test_what_is_tried_again_is_not_said() -> None:
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    with without_retry_warnings():
        assert logging.get_verbosity() == ERROR
    assert logging.get_verbosity() == before

"""``push`` and ``pull`` by huggingface_hub's own client, against a test double of the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fake_hub
import pytest
import yaml
from fake_hub import GIT, TOKEN, Hub
from reseal import reseal
from test_cli import cli, fresh, refused

from reft_export.hub import push
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.positions import PositionRule


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download

    with fake_hub.running() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.url)  # as HF_ENDPOINT says it to a process that begins
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", double.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


@pytest.fixture
def adapter(adapter_folders) -> Path:
    return adapter_folders("llama", ("untied",))[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def card_of(hub: Hub, repository: str, branch: str = "main") -> tuple[dict[str, object], str]:
    _, front, body = hub.repositories[repository].files(branch)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(front), body


def untouched(tmp_path: Path) -> None:
    """Neither an output nor what a half-written one would leave."""
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".got", "got"))]


def test_an_adapter_comes_back_bit_for_bit(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    done = cli("push", adapter, "me/calm", "--base-model", "them/llama", "--license", "apache-2.0", "--json")
    pushed = json.loads(done.stdout)
    assert pushed["url"] == f"{hub.url}/me/calm" and pushed["kind"] == "adapter" and not hub.repositories["me/calm"].private
    stored = hub.repositories["me/calm"].files()
    assert stored == contents(adapter) | GIT | {"README.md": pushed["card"].encode()}
    data, body = card_of(hub, "me/calm")
    assert data == {
        "base_model": "them/llama", "base_model_relation": "adapter", "library_name": "reft-export", "pipeline_tag": "text-generation",
        "tags": ["reft-export", "reft", "loreft"], "license": "apache-2.0",
    }  # fmt: skip
    mine = load_adapter(adapter)
    for said in ("loreft, rank 4", "block_output of layers 0, 2", "`f1+l3`, prefix and suffix", mine.digest[:16], "| probes | none |",
                 f"| parameters | {sum(t.size for t in mine.tensors.values()):,} |",
                 "    reft-export export -m them/llama -a calm -o calm-bundle"):  # fmt: skip
        assert said in body, said

    done = cli("pull", "me/calm", "-o", tmp_path / "got")
    assert done.returncode == 0 and "adapter, loreft, rank 4, positions f1+l3" in done.stdout.replace("\n", " ")
    assert contents(tmp_path / "got") == contents(adapter)
    assert not any("README" in line for line in hub.asked), "what is none of an adapter's files is not asked for"


def test_the_prompt_of_a_card_marks_what_marked_positions_edit(adapter_folders, tmp_path: Path) -> None:
    adapter = adapter_folders("llama", ("tied",))[0]
    assert '-a calm -p "Tell me about the moon."' in push.outgoing(adapter, "me/calm").card
    save_adapter(replace(load_adapter(adapter), positions=PositionRule.parse("marked")), tmp_path / "marked")
    assert '-a calm -p "Tell me about [[the moon]]."' in push.outgoing(tmp_path / "marked", "me/calm").card


def test_a_bundle_comes_back_bit_for_bit(hub: Hub, bundle_folder, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder("llama"), bundle)
    reseal(bundle, lambda manifest: manifest.update(retention={"tied": 0.93}))
    assert cli("push", bundle, "me/llama", "--private").returncode == 0
    assert hub.repositories["me/llama"].private
    data, body = card_of(hub, "me/llama")
    assert "base_model" not in data and "license" not in data and {"onnx", "loreft", "direft"} <= set(data["tags"])
    assert "| tied | loreft, rank 4 | block_output of layers 0, 2 | `f2+l2` | 0.93 | yes |" in body
    assert "    reft-export parity llama\n" in body
    assert cli("pull", "me/llama", "-o", tmp_path / "got").returncode == 0
    assert contents(tmp_path / "got") == contents(bundle)
    assert open_bundle(tmp_path / "got", verify=True).digest == open_bundle(bundle).digest


def test_revisions_and_replacing(hub: Hub, adapter: Path, adapter_folders, tmp_path: Path) -> None:
    other = adapter_folders("llama", ("last-consreft",))[0]
    probed = load_adapter(adapter)
    save_adapter(replace(probed, probes=({"prompt": "a", "completion": "b"},)), tmp_path / "probed")
    assert cli("push", tmp_path / "probed", "me/calm").returncode == 0
    first = hub.repositories["me/calm"].branches["main"]
    refused("push", other, "me/calm", code=2, match="me/calm holds files already (README.md); choose another, or pass --force")
    assert cli("push", other, "me/calm", "--force").returncode == 0
    assert set(hub.repositories["me/calm"].files()) == {*contents(other), "README.md", ".gitattributes"}, "probes.jsonl is gone"
    assert cli("push", adapter, "me/calm", "--revision", "v2", "--force").returncode == 0
    for revision, folder in ((None, other), ("v2", adapter), (first, tmp_path / "probed")):
        asked = () if revision is None else ("--revision", revision)
        assert cli("pull", "me/calm", "-o", tmp_path / "got", "--force", *asked).returncode == 0
        assert contents(tmp_path / "got") == contents(folder)
    refused("push", adapter, "me/calm", "--private", "--force", code=2, match="me/calm is there and public, and --private")
    hub.add("me/model", {"config.json": b"{}", "README.md": b""})
    refused("push", adapter, "me/model", "--force", code=2, match="me/model holds other files than ours (README.md), and --force would")


def test_what_somebody_else_pushes_meanwhile_is_kept(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = hub.add("me/calm", contents(adapter))
    check = push._check_free

    def checked(*args: object, **kwargs: bool) -> None:
        check(*args, **kwargs)
        theirs.commit("main", theirs.files() | {"adapter.json": b"theirs"})

    monkeypatch.setattr(push, "_check_free", checked)
    refused("push", adapter, "me/calm", "--force", code=2, match="me/calm was written by somebody else meanwhile")
    assert theirs.files()["adapter.json"] == b"theirs"


def test_what_others_wrote_into_an_artifact_stays_text_in_its_card(adapter: Path, bundle_folder, tmp_path: Path) -> None:
    evil = "x |\n\n# Evil\n<b>`\n---\nlicense: evil"
    mine = load_adapter(adapter)
    base = replace(mine.base, name=evil, fingerprint=evil)
    save_adapter(replace(mine, base=base, training={"data": {"examples": 3}, "steps": evil}), tmp_path / "evil")
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder("llama"), bundle)
    reseal(bundle, lambda manifest: manifest["model"].update({"model_type": evil, "name": evil}))
    for folder in (tmp_path / "evil", bundle):
        card = push.outgoing(folder, "me/evil").card
        assert "\n# Evil" not in card and "license: evil\n" not in card and "<b>" not in re.sub("`.*?`", "", card), card


def test_what_the_hub_refuses_is_one_line(hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    got = tmp_path / "got"
    hub.add("me/calm", contents(adapter))
    hub.add("me/hidden", contents(adapter), private=True)
    refused("pull", "me/nothing", "-o", got, code=2, match="me/nothing is not on http")
    refused("pull", "me/calm", "-o", got, "--revision", "v9", code=2, match="me/calm has no revision v9 on http")
    refused("push", adapter, "others/calm", code=2, match="does not let this token do that with others/calm")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    refused("pull", "me/hidden", "-o", got, code=2, match="me/hidden is not on http")
    refused("push", adapter, "me/new", code=2, match="knows no such token, or was given none; set HF_TOKEN")
    assert "me/new" not in hub.repositories
    for status, said in ((401, "knows no such token"), (403, "does not let this token"), (418, "answers 418 of me/calm")):
        hub.refuses = status
        refused("pull", "me/calm", "-o", got, code=2, match=said)
    hub.refuses = None
    hub.cuts = "adapter.safetensors"
    refused("pull", "me/calm", "-o", got, code=2, match="does not answer, or broke off")
    hub.cuts = ""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("pull", "me/calm", "-o", got, code=2, match="http://127.0.0.1:9 does not answer")
    refused("push", adapter, "me/calm", code=2, match="http://127.0.0.1:9 does not answer")
    untouched(tmp_path)


def test_what_is_pulled_is_verified_before_it_is_there(hub: Hub, adapter: Path, bundle_folder, tmp_path: Path) -> None:
    got, good = tmp_path / "got", contents(adapter)
    tensors = good["adapter.safetensors"]
    hub.add("me/flipped", good | {"adapter.safetensors": tensors[:-1] + bytes([tensors[-1] ^ 1])})
    refused("pull", "me/flipped", "-o", got, code=2, match="me/flipped: adapter.safetensors is damaged: it does not match its sha256")
    hub.add("me/lacking", {"adapter.json": good["adapter.json"]})
    refused("pull", "me/lacking", "-o", got, code=2, match="me/lacking lacks a file that its own record names")
    hub.add("me/model", {"config.json": b"{}", "model.safetensors": b""})
    refused("pull", "me/model", "-o", got, code=2, match="me/model holds neither adapter.json nor manifest.json")
    hub.add("me/both", good | {"manifest.json": b"{}"})
    refused("pull", "me/both", "-o", got, code=2, match="me/both holds both adapter.json and manifest.json")
    hub.add("me/engine", {"engine.json": b"{}", "manifest.json": b"{}"})
    refused("pull", "me/engine", "-o", got, code=2, match="me/engine holds an engine")

    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder("llama"), bundle)
    reseal(bundle, lambda manifest: manifest["files"].update({"../escaped": manifest["files"]["model.onnx"]}))
    hub.add("me/hostile", contents(bundle) | {"../escaped": b"gone", "/etc/passwd": b"gone"})
    before = len(hub.asked)
    refused("pull", "me/hostile", "-o", got, code=2, match="me/hostile: manifest.json names '../escaped', which leaves the folder; it")
    assert not any("model.onnx" in line for line in hub.asked[before:]), "refused before the large files come"
    untouched(tmp_path)

    hub.add("me/calm", good | {"../escaped": b"gone", "pytorch_model.bin": b"pickle"})
    assert cli("pull", "me/calm", "-o", got).returncode == 0 and contents(got) == good
    refused("pull", "me/calm", "-o", got, code=2, match="got exists; choose another output or pass --force")


def test_what_is_pushed_is_verified_before_the_hub_is_asked(hub: Hub, adapter: Path, bundle_folder, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(adapter, bad)
    (bad / "adapter.safetensors").write_bytes(b"x")
    refused("push", bad, "me/bad", code=2, match="does not match its sha256")
    refused("push", tmp_path / "nothing", "me/bad", code=2, match="nothing is neither an adapter nor a bundle")
    refused("push", adapter, "calm", code=2, match="'calm' is no repository of a hub, whose form is owner/name")
    refused("pull", "me/../calm", "-o", tmp_path / "got", code=2, match="'me/../calm' is no repository of a hub")
    done = cli("push", adapter, "me/calm", "--dry-run")
    assert done.stdout.startswith("---\n") and "would push 2 files" in done.stdout
    linked = tmp_path / "linked"
    shutil.copytree(bundle_folder("llama"), linked)
    (tmp_path / "secret").write_text("{}")
    (linked / "genai_config.json").unlink(missing_ok=True)
    (linked / "genai_config.json").symlink_to(tmp_path / "secret")
    refused("push", linked, "me/linked", code=2, match="genai_config.json is a link, and no digest tells whether it leads to")
    assert not hub.asked and not hub.repositories


@pytest.mark.slow
def test_a_process_that_begins_offline_says_so(tmp_path: Path) -> None:
    refused("pull", "me/calm", "-o", tmp_path / "got", code=2, match="no hub is asked while HF_HUB_OFFLINE is set", run=fresh)

"""Folders as downloads leave them: every file a link into another folder, or a second name of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tiny
from foreign_graphs import save_foreign

from reft_export.adding.add import add_adapter
from reft_export.base.load import load_base
from reft_export.folding.fold import fold_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import save_adapter
from runtimes.errors import AdapterError, GraphError, InputError
from runtimes.golden import check_golden
from runtimes.open import open_session

COMMIT = "0123456789" * 4


def in_hub_cache(folder: Path, root: Path, name: str) -> Path:
    """The snapshot that huggingface_hub would have made of ``folder``: links into one folder of blobs."""
    repository = root / f"models--somebody--{name}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot


@pytest.fixture
def style(base_folder, tmp_path) -> Path:
    save_adapter(tiny.random_adapter(load_base(base_folder("llama")).info), tmp_path / "style")
    return tmp_path / "style"


def test_a_bundle_in_the_hubs_cache(bundle_folder, tmp_path) -> None:
    snapshot = in_hub_cache(bundle_folder("llama"), tmp_path, "steered")
    bundle = open_bundle(snapshot, verify=True)
    with open_session(bundle) as session:
        assert check_golden(bundle, session).passed


def test_adapters_are_called_as_their_repository_or_as_asked(bundle_folder, style, tmp_path) -> None:
    snapshot = in_hub_cache(style, tmp_path, "pirate-reft")
    quiet = {"report": lambda _: None}
    add_adapter(bundle_folder("llama"), [snapshot, Path(f"polite={snapshot}")], output=tmp_path / "b", **quiet)
    assert open_bundle(tmp_path / "b").adapter_names[-2:] == ("pirate-reft", "polite")
    with pytest.raises(InputError, match=r"two adapters are called style.*-a NAME="):
        add_adapter(bundle_folder("llama"), [style, Path(f"style={snapshot}")], output=tmp_path / "c", **quiet)
    with pytest.raises(AdapterError, match="adapter name 'a b' cannot be used"):
        add_adapter(bundle_folder("llama"), [Path(f"a b={snapshot}")], output=tmp_path / "c", **quiet)
    with pytest.raises(InputError, match="holds the input"):
        add_adapter(bundle_folder("llama"), [Path(f"x={style}")], output=style, force=True, **quiet)
    style.rename(tmp_path / "with=sign")
    with pytest.raises(AdapterError, match="adapter name 'with=sign' cannot be used"):
        add_adapter(bundle_folder("llama"), [tmp_path / "with=sign"], output=tmp_path / "c", **quiet)


def test_a_graph_in_the_hubs_cache(bundle_folder, style, tmp_path) -> None:
    graph = save_foreign(bundle_folder("llama", target="tensorrt"), tmp_path / "graph")
    snapshot = in_hub_cache(graph.parent, tmp_path, "decoder")
    fold_bundle(snapshot / graph.name, [style], tmp_path / "out", report=lambda _: None)
    made = open_bundle(tmp_path / "out")
    assert made.adapter_names == ("style",) and made.manifest.model.name == "decoder"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_what_onnxruntime_does_not_follow_costs_one_line(bundle_folder, tmp_path) -> None:
    folder = Path(shutil.copytree(bundle_folder("llama"), tmp_path / "b"))
    os.replace(folder / "model.onnx.data", tmp_path / "data")
    (folder / "model.onnx.data").symlink_to(tmp_path / "data")
    with pytest.raises(GraphError, match=r"model.onnx.data is a link to elsewhere, .*: cp -RL .*/b COPY"):
        open_session(open_bundle(folder))

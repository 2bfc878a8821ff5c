"""The bundle format refuses whatever it did not write itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from reseal import reseal

from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.op import EXPLICIT_SLOTS, FIRST_LOGIT, RULE_DEFAULTS
from runtimes.errors import AdapterError, BundleError


@pytest.fixture
def copy(bundle_folder, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_folder("llama"), tmp_path / "bundle"))


def _edit_manifest(folder: Path, **changes: object) -> None:
    reseal(folder, **changes)


def test_contents(copy) -> None:
    """Exactly what the design lists, nothing else."""
    bundle = open_bundle(copy)
    listed = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    names = bundle.adapter_names
    assert listed == {
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(f"adapters/{n}{s}" for n in names for s in (".onnx_adapter", ".json")),
        *(f"golden/{n}.npz" for n in ("base", *names)),
    } | ({"special_tokens_map.json"} & listed)
    assert set(bundle.manifest.files) == listed - {"manifest.json", "genai_config.json"}


def test_every_adapter_file_carries_every_bank_and_rule(copy) -> None:
    bundle = open_bundle(copy)
    banks = {bank for node in bundle.nodes for bank in node.bank_names}
    for name in bundle.adapter_names:
        tensors = read_onnx_adapter(bundle.adapter(name).file)
        assert set(tensors) == banks | (set(RULE_DEFAULTS) - {"reft.prompt_length"})
        assert all(np.isfinite(t).all() for t in tensors.values())
    assert (bundle.manifest.rules, bundle.manifest.slots) == ("row", "graph")


def test_graph_is_no_edit_by_default(copy) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(copy / "model.onnx"), options, providers=["CPUExecutionProvider"])
    overridable = {v.name for v in session.get_overridable_initializers()}
    assert {*RULE_DEFAULTS, EXPLICIT_SLOTS, FIRST_LOGIT} <= overridable
    assert {v.name for v in session.get_inputs()} & overridable == set()


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "adapters/tied.onnx_adapter", "golden/base.npz", "tokenizer.json"])
def test_one_changed_byte_is_an_error(name, copy) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its sha256"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["model.onnx.data", "adapters/tied.json"])
def test_truncated_and_missing_files(name, copy) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BundleError, match="truncated"):
        open_bundle(copy)
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_bundle(copy)


def test_paths_that_leave_the_folder(copy) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    for name in ("../secret", "/etc/passwd", "adapters/../../secret"):
        _edit_manifest(copy, files=files | {name: {"sha256": "0" * 64, "size": 1}})
        with pytest.raises(BundleError, match="leaves the folder"):
            open_bundle(copy)
    _edit_manifest(copy, files=files)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="tokenizer.json has .* bytes, expected"):
        open_bundle(copy)


def test_manifest_is_strict(copy) -> None:
    for changes, message in (
        ({"mystery": 1}, "unknown keys"),
        ({"schema_version": 99}, "schema version 99"),
        ({"op_version": 2}, "op version 2"),
        ({"opset": "20"}, "opset is '20', expected int"),
        ({"adapters": ["../x"]}, "cannot be used"),
        ({"files": {}}, "no hash for"),
        ({"nodes": [{"layer": 0, "stream": "nowhere"}]}, "stream 'nowhere' is unknown"),
    ):
        original = (copy / "manifest.json").read_text()
        _edit_manifest(copy, **changes)
        with pytest.raises((BundleError, AdapterError), match=message):
            open_bundle(copy)
        (copy / "manifest.json").write_text(original)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="manifest.json is not JSON"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_files_that_would_be_used_must_be_listed(name, copy) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{{ 1 }}")
    with pytest.raises(BundleError, match="is not listed"):
        open_bundle(copy)
    (copy / name).unlink()
    files = json.loads((copy / "manifest.json").read_text())["files"]
    del files["model.onnx.data"]
    _edit_manifest(copy, files=files)
    with pytest.raises(BundleError, match=r"model\.onnx\.data is not listed"):
        open_bundle(copy)


def test_an_adapter_without_golden_arrays_is_not_passed_over(copy) -> None:
    from runtimes.golden import check_golden
    from runtimes.ort.session import OrtSession

    files = json.loads((copy / "manifest.json").read_text())["files"]
    del files["golden/tied.npz"]
    _edit_manifest(copy, files=files)
    bundle = open_bundle(copy)
    with pytest.raises(BundleError, match="no golden arrays for tied"):
        check_golden(bundle, OrtSession(bundle))


def test_genai_config_may_be_edited(copy) -> None:
    (copy / "genai_config.json").write_text("{}")
    open_bundle(copy)


def test_large_files_are_hashed_once(copy, tmp_path, monkeypatch) -> None:
    from runtimes.files import hashes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 1000)
    read: list[str] = []
    digest = hashes._digest
    monkeypatch.setattr(hashes, "_digest", lambda path: read.append(path.name) or digest(path))
    open_bundle(copy)
    assert "model.onnx.data" in read
    read.clear()
    open_bundle(copy)
    assert "model.onnx.data" not in read
    open_bundle(copy, verify=True)
    assert "model.onnx.data" in read
    # A file that was changed is hashed again, whatever the cache says.
    path = copy / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        open_bundle(copy)


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows this time is of creation")
def test_a_large_file_written_over_with_its_old_times_is_hashed_again(tmp_path, monkeypatch) -> None:
    from runtimes.files import hashes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 10)
    path = tmp_path / "base.gguf"
    path.write_bytes(bytes(100))
    times, before = path.stat(), hashes.sha256_of(path, remember=True)
    path.write_bytes(bytes([1] * 100))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hashes.sha256_of(path, remember=True) != before


@pytest.mark.parametrize(("key", "value"), [("opset", 19), ("ir_version", 9), ("kv_cache", "other")])
def test_a_host_holds_the_manifest_against_the_graph(key, value, copy) -> None:
    """What no session can see: both ways for the KV cache."""
    from graph_passes.external import load_graph
    from reft_export.bundling.recorded import check_recorded

    bundle = open_bundle(copy)
    check_recorded(bundle, load_graph(bundle.graph_path))
    if value == "other":
        value = {"appended": "in-place", "in-place": "appended"}[bundle.manifest.kv_cache]
    reseal(copy, **{key: value})
    changed = open_bundle(copy)
    with pytest.raises(BundleError, match=rf"manifest.json says {key} {value}, and model.onnx has {getattr(bundle.manifest, key)};"):
        check_recorded(changed, load_graph(changed.graph_path))

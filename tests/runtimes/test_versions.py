"""Version 2 of our files: one changed bit of any is refused, version 1 reads on, and `upgrade` loses nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from reseal import as_version_1, reseal
from toy_bundle import write_toy_bundle
from toy_engine import write_toy_engine

from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.engine import open_engine
from runtimes.artifacts.manifest import write_manifest
from runtimes.edits.adapter import BaseModel, load_adapter, save_adapter
from runtimes.errors import AdapterError, BundleError, InputError, ReftError
from runtimes.files import sealed
from runtimes.files.sealed import canonical_text, digest_of, sealed_text
from runtimes.upgrade import upgrade_folder

BASE = BaseModel(name="base", fingerprint="f" * 64, num_hidden_layers=tiny.LAYERS, hidden_size=tiny.WIDTH)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter, a bundle and an engine."""
    root = tmp_path_factory.mktemp("made")
    save_adapter(replace(tiny.random_adapter(BASE, rank=2), training={"steps": 3, "lr": 1e-3, "é": [None, True]}), root / "adapter")
    write_toy_bundle(root / "bundle")
    reseal(root / "bundle", rules="shared")  # which is what version 1 is read as
    write_toy_engine(open_bundle(root / "bundle"), root / "engine")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "own"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flips(size: int, samples: int) -> list[tuple[int, int]]:
    """(byte, bit): every byte of a small file, else so many, and both ends."""
    random = np.random.default_rng(7)
    where = range(size) if size <= samples else sorted({0, size - 1, *random.integers(0, size, samples).tolist()})
    return [(byte, int(random.integers(8))) for byte in where]


OPEN: dict[str, tuple[str, Callable[[Path], object], type[ReftError]]] = {
    "adapter.json": ("adapter", load_adapter, AdapterError),
    "adapter.safetensors": ("adapter", load_adapter, AdapterError),
    "manifest.json": ("bundle", open_bundle, BundleError),
    "adapters/ends.json": ("bundle", open_bundle, BundleError),
    "engine.json": ("engine", open_engine, BundleError),
    "engine's manifest.json": ("engine", open_engine, BundleError),
}


@pytest.mark.parametrize("file", OPEN)
def test_every_flipped_bit_is_refused(file: str, own: Path) -> None:
    folder, read, error = OPEN[file]
    path = own / folder / file.rpartition(" ")[2]
    before = path.read_bytes()
    read(own / folder)
    for byte, bit in flips(len(before), 150):
        changed = bytearray(before)
        changed[byte] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(error) as e:
            read(own / folder)
        assert len(str(e.value).splitlines()) == 1 and path.name in str(e.value), (byte, bit)
    path.write_bytes(before)
    read(own / folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("\n", "\r\n"), "from line 1 on it is spelled in another way"),
        (lambda text: text + "\n", "spelled in another way"),
        (lambda text: json.dumps(json.loads(text)), "spelled in another way"),
        (lambda text: text.replace('"lr": 0.001', '"lr": 1e-3'), "spelled in another way"),
        (lambda text: text.replace('"rank": 2', '"rank": 3'), "its digest is '"),
        (lambda text: text.replace('"rank": 2', '"rank": 2,\n "rank": 2'), "from line .* on it is spelled in another way"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "digest"}), "it has no digest"),
        (lambda text: "\ufeff" + text, "is not JSON"),
    ],
)
def test_what_an_editor_makes_of_it_is_refused(change: Callable[[str], str], said: str, own: Path) -> None:
    path = own / "adapter" / "adapter.json"
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.write_bytes(changed.encode())
    with pytest.raises(AdapterError, match=said):
        load_adapter(own / "adapter")


def test_the_canonical_text() -> None:
    """The same text from any order of the keys; its digest can be taken by any tool: sha256 of the text without the digest's line."""
    one = {"b": [1, 2.5, None], "a": {"z": "é", "y": True}}
    assert canonical_text(one) == canonical_text({"a": {"y": True, "z": "é"}, "b": [1, 2.5, None]})
    assert canonical_text(one) == '{\n "a": {\n  "y": true,\n  "z": "\\u00e9"\n },\n "b": [\n  1,\n  2.5,\n  null\n ]\n}\n'
    assert digest_of(json.loads(sealed_text(one))) == digest_of(one) == json.loads(sealed_text(one))["digest"]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Out of range"):
            canonical_text({"a": bad})
    nested: dict = {}
    for _ in range(5000):
        nested = {"a": nested}
    with pytest.raises(ValueError, match="nested too deeply"):
        canonical_text(nested)


def test_an_adapter_that_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adapter.json cannot be written"):
        save_adapter(replace(tiny.random_adapter(BASE), training={"loss": float("nan")}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- version 1 ------------------------------------------------------------------------------------


class Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def notes() -> Notes:
    handler = Notes()
    logging.getLogger(sealed.__name__).addHandler(handler)
    yield handler
    logging.getLogger(sealed.__name__).removeHandler(handler)


def test_version_1_is_read_with_one_note(own: Path, notes: Notes) -> None:
    adapter, bundle, engine = load_adapter(own / "adapter"), open_bundle(own / "bundle"), open_engine(own / "engine")
    for name in ("adapter", "bundle", "engine"):
        as_version_1(own / name)
    for _ in range(2):
        former = load_adapter(own / "adapter")
        assert former.digest == adapter.digest and former.positions == adapter.positions and former.training == adapter.training
        old = open_bundle(own / "bundle")
        assert (old.manifest.schema_version, old.manifest.rules, old.manifest.kv_cache) == (1, "shared", "appended")
        for name in bundle.adapter_names:
            assert old.adapter_record(name) == bundle.adapter_record(name)
        assert open_engine(own / "engine").engine.profiles == engine.engine.profiles
    assert len(notes.said) == 4  # an engine has two manifests
    said = f"{own}/adapter/adapter.json: version 1, without digests; `reft-export upgrade {own}/adapter` writes version 2"
    assert notes.said[0] == said


@pytest.mark.parametrize("key", ["digest", "rules"])
@pytest.mark.parametrize("name", ["adapter", "bundle"])
def test_version_1_has_no_keys_of_version_2(name: str, key: str, own: Path) -> None:
    as_version_1(own / name)
    path = next(path for path in (own / name / "adapter.json", own / name / "manifest.json") if path.is_file())
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "row"}))
    with pytest.raises(ReftError, match="unknown keys"):
        (load_adapter if name == "adapter" else open_bundle)(own / name)


def test_what_is_copied_from_version_1_is_written_as_version_2(made: Path, own: Path) -> None:
    """As quantize and build copy records of adapters."""
    as_version_1(own / "bundle")
    write_manifest(own / "bundle", open_bundle(own / "bundle").manifest)
    assert content(own / "bundle") == content(made / "bundle")


# --- upgrade --------------------------------------------------------------------------------------

READ: dict[str, Callable[[Path], object]] = {"adapter": load_adapter, "bundle": open_bundle, "engine": open_engine}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_upgrade_gives_what_is_written_today(name: str, elsewhere: bool, made: Path, own: Path, notes: Notes) -> None:
    """Byte for byte; and a file that is nobody's stays."""
    folder = own / name
    as_version_1(folder)
    (folder / "notes.txt").write_text("mine")
    former = content(folder)
    output = own / "new" if elsewhere else None
    upgraded = upgrade_folder(folder, output)
    assert (upgraded.kind, upgraded.written) == (name, output or folder) and not notes.said
    expected = content(made / name) | {"notes.txt": b"mine"}
    assert content(output or folder) == expected
    if elsewhere:
        assert content(folder) == former
    again = upgrade_folder(output or folder, own / "third")
    assert again.written is None and not (own / "third").exists()
    assert sorted(path.name for path in own.iterdir()) == sorted(["adapter", "bundle", "engine", *(["new"] if elsewhere else [])])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("bundle", lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:-1] + b"x")),
        ("bundle", lambda f: (f / "adapters" / "ends.json").unlink()),
        ("engine", lambda f: (f / "engine.plan").write_bytes(b"x")),
        ("adapter", lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-1])),
        ("adapter", lambda f: (f / "adapter.json").write_text("{")),
    ],
)
def test_what_is_damaged_is_not_upgraded(name: str, damage: Callable[[Path], object], own: Path) -> None:
    as_version_1(own / name)
    damage(own / name)
    before = content(own)
    with pytest.raises((AdapterError, BundleError)):
        upgrade_folder(own / name)
    assert content(own) == before


def test_a_failure_between_leaves_version_1(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_version_1(own / "bundle")
    before = content(own)

    def cut(source: str, target: str) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", cut)
    with pytest.raises(BundleError, match="truncated or was changed"):
        upgrade_folder(own / "bundle")
    assert content(own) == before


def test_outputs_and_inputs_that_are_refused(own: Path) -> None:
    as_version_1(own / "bundle")
    (own / "full").mkdir()
    (own / "full" / "x").write_text("mine")
    for output, said in ((own / "full", "--force"), (own / "bundle" / "in", "lies inside"), (own, "holds the input")):
        with pytest.raises(InputError, match=said):
            upgrade_folder(own / "bundle", output)
    with pytest.raises(InputError, match="is not an adapter folder"):
        upgrade_folder(own / "full")
    (own / "link").symlink_to("bundle")
    upgrade_folder(own / "link")
    assert (own / "link").is_symlink() and open_bundle(own / "link").manifest.schema_version == 2


# --- what a manifest may say ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"precision": "fp64"}, "precision is 'fp64', which is unknown; known: fp32, fp16, bf16"),
        ({"exporter": "magic"}, "exporter is 'magic', which is unknown; known: dynamo"),
        ({"logits": "first"}, "known: all, last"),
        ({"slots": "both"}, "known: graph, input"),
        ({"padding": "middle"}, "known: left, right, none"),
        ({"kv_cache": "elsewhere"}, "known: in-place, appended, none"),
        ({"kv_cache": "none"}, "kv_cache is 'none', which text-generation does not have"),
        ({"rules": "column"}, "known: row, shared"),
        ({"embeddings": "twice"}, "known: shared, separate"),
        ({"task": "translation"}, "known: text-generation, text-classification"),
        ({"task": "text-classification"}, "task text-classification with 0 labels"),
        ({"nodes": []}, "no edit nodes, and adapters that need them"),
        ({"opset": 0}, "opset is 0, expected at least 1"),
        ({"retention": {"nobody": 0.9}}, "retention of adapter 'nobody', which is not listed"),
        ({"loss": {"ends": "much"}}, "loss.ends is 'much', expected float"),
        ({"schema_version": 3}, "schema version 3; this version reads 1 and 2"),
        ({"schema_version": "2"}, "schema version '2'"),
    ],
)
def test_manifests_that_are_refused(change: dict[str, object], said: str, own: Path) -> None:
    reseal(own / "bundle", **change)
    with pytest.raises(BundleError, match=said):
        open_bundle(own / "bundle")


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "context_length", "num_attention_heads", "sliding_window"]
)
def test_sizes_that_are_none(key: str, own: Path) -> None:
    for value in (-1, 0):
        reseal(own / "bundle", lambda m, value=value: m["model"].update({key: value}))
        with pytest.raises(BundleError, match=f"model.{key} is {value}, expected at least 1"):
            open_bundle(own / "bundle")


QUANTIZATION = {"scheme": "weight-only", "bits": 4, "block_size": 32, "symmetric": True, "accuracy_level": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheme": "magic"}, "quantization.scheme is 'magic', which is unknown; known: weight-only"),
        ({"method": "magic"}, "quantization.method is 'magic', which is unknown; known: imatrix, rtn"),
        ({"block_size": -32}, "quantization.block_size is -32"),
        ({"bits": 3}, "quantization.bits is 3, expected 4 to 8"),
        ({"accuracy_level": 9}, "quantization.accuracy_level is 9"),
    ],
)
def test_quantizations_that_are_refused(change: dict[str, object], said: str, own: Path) -> None:
    reseal(own / "bundle", quantization=QUANTIZATION)
    open_bundle(own / "bundle")
    reseal(own / "bundle", quantization=QUANTIZATION | change)
    with pytest.raises(BundleError, match=said):
        open_bundle(own / "bundle")


def test_nodes_and_adapters_fit_one_another(own: Path) -> None:
    bundle = open_bundle(own / "bundle")
    reseal(own / "bundle", lambda m: m["nodes"].append(m["nodes"][0]))
    with pytest.raises(BundleError, match=r"nodes list reft\.0\.block_output twice"):
        open_bundle(own / "bundle")
    reseal(own / "bundle", lambda m: m["nodes"].pop())
    reseal(own / "bundle", lambda m: m["nodes"][0].update(layer=99))
    with pytest.raises(BundleError, match=r"node reft\.99\.block_output is beyond the model's"):
        open_bundle(own / "bundle")
    reseal(own / "bundle", nodes=[{"layer": 1, "stream": "mlp_output"}])
    with pytest.raises(BundleError, match=r"has no edit node in this artifact"):
        open_bundle(own / "bundle").adapter(bundle.adapter_names[0])


def test_engines_that_are_refused(own: Path) -> None:
    for change, said in (
        ({"target": "vulkan"}, "target is 'vulkan', which is unknown; known: tensorrt, tensorrt-rtx"),
        ({"profiles": []}, "profiles"),
        ({"frozen": "nobody"}, "frozen adapter 'nobody' is not listed"),
        ({"schema_version": 3}, "schema version 3"),
    ):
        before = (own / "engine" / "engine.json").read_bytes()
        reseal(own / "engine", **change)
        with pytest.raises(BundleError, match=said):
            open_engine(own / "engine")
        (own / "engine" / "engine.json").write_bytes(before)
    reseal(own / "engine" / "manifest.json", precision="fp8")
    with pytest.raises(BundleError, match="precision is 'fp8'"):
        open_engine(own / "engine")


# --- the manifest against the graph ---------------------------------------------------------------


def _tensor(kind: str, name: str, /, **changes: object) -> Callable[[dict], object]:
    return lambda m: next(t for t in m[kind] if t["name"] == name).update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(precision="fp16"), r"says precision fp16, and model.onnx has reft\.0\.block_output\.U of tensor\(float\)"),
        (
            lambda m: m.update(adapters=[], nodes=[], files={k: v for k, v in m["files"].items() if "/" not in k}),
            "says no such edit node, and model.onnx has reft.0.block_output.A",
        ),
        (
            lambda m: m["nodes"].append({"layer": 1, "stream": "mlp_output"}),
            "says edit node reft.1.mlp_output, and .* has no reft.1",
        ),
        (lambda m: m["model"].update(vocab_size=7), "says vocab_size 7, and model.onnx has"),
        (lambda m: m["model"].update(hidden_size=7), "says hidden_size 7, and model.onnx has reft.0.block_output.U of width"),
        (lambda m: m["model"].update(num_hidden_layers=9), "says num_hidden_layers 9, and model.onnx has a KV cache of 2"),
        (lambda m: m.update(logits="last"), r"says logits last, and model.onnx has logits of shape \['B', '"),
        (_tensor("inputs", "input_ids", dtype="int32"), r"says input input_ids int32 .*, and model.onnx has tensor\(int64\)"),
        (_tensor("inputs", "past_key_values.0.key", shape=["B", 2, "P", 8]), r"says input past_key_values.0.key float \['B', 2, 'P', 8\]"),
        (_tensor("outputs", "logits", shape=["B", "V"]), "says output logits float"),
        (_tensor("inputs", "input_ids", name="tokens"), "says input tokens, and model.onnx has none of that name"),
        (lambda m: m.update(inputs=m["inputs"][1:]), "says nothing of input input_ids, and model.onnx has it"),
    ],
)
def test_a_manifest_that_promises_another_graph_is_refused(change: Callable[[dict], object], said: str, own: Path) -> None:
    from runtimes.ort.session import OrtSession

    reseal(own / "bundle", change)
    with pytest.raises(BundleError, match=said):
        OrtSession(open_bundle(own / "bundle"), threads=1)


def test_rows_are_not_promised_of_a_graph_that_cannot(tmp_path: Path) -> None:
    from runtimes.ort.session import OrtSession

    write_toy_bundle(tmp_path / "b", slot_mode="input")
    reseal(tmp_path / "b", rules="row")
    with pytest.raises(BundleError, match=r"says rules row, and model.onnx has neither reft.slots nor reft.first_slot"):
        OrtSession(open_bundle(tmp_path / "b"), threads=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"created_by": "a\ud800"}, "created_by is 'a.ud800', which holds half of a surrogate pair"),
        ({"opset": 2**63}, "opset is a whole number of more than 64 bits"),
        ({"parity_budget": {"logits": 10**400}}, "parity_budget.logits is a number that no float holds"),
    ],
)
def test_values_that_no_file_of_ours_holds(changes, said, tmp_path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", adapters={})
    reseal(bundle.folder, **changes)
    with pytest.raises(BundleError, match=said):
        open_bundle(bundle.folder)

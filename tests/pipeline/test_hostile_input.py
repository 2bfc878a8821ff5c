"""Every verb against damaged, hostile and unfit files: one line that names them, exit code 2, and nothing on the disk is changed.

Each case runs through the command line with ``--force`` over an output of an earlier run, which must stay as it was, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from foreign_graphs import save_foreign
from reseal import reseal
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.cli.main import app
from runtimes.edits.adapter import save_adapter

GRAPH, DATA = "decoder.onnx", "decoder.data"
slow = partial(pytest.param, marks=pytest.mark.slow)
"""Of the verbs that read one kind of file, one tells what is refused at every commit."""


class Hostile:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Fresh copies of a graph, an adapter and a base, and a bundle that is only read; cases damage what they need."""

    root: Path
    graph: Path
    adapter: Path
    base: Path
    bundle: Path

    def own_bundle(self) -> Path:
        return Path(shutil.copytree(self.bundle, self.root / "bundle"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory, bundle_folder, base_folder) -> Stage:
    root = tmp_path_factory.mktemp("hostile")
    graph = save_foreign(bundle_folder("llama", target="tensorrt"), root / "graph")
    save_adapter(tiny.random_adapter(load_base(base_folder("llama")).info), root / "style")
    return Stage(root=root, graph=graph, adapter=root / "style", base=base_folder("llama"), bundle=bundle_folder("llama"))


@pytest.fixture
def stage(originals, tmp_path) -> Stage:
    for name, source in (("graph", originals.graph.parent), ("style", originals.adapter), ("base", originals.base)):
        shutil.copytree(source, tmp_path / name)
    old = tmp_path / "out"  # what a bundle, an adapter and an engine folder may be replaced by
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    (old / "kept").write_text("of an earlier run")
    return Stage(
        root=tmp_path, graph=tmp_path / "graph" / GRAPH, adapter=tmp_path / "style", base=tmp_path / "base", bundle=originals.bundle
    )


def snapshot(root: Path) -> dict[str, str]:
    """Every path under ``root``: the digest of a file, the target of a link."""

    def state(path: Path) -> str:
        if path.is_symlink():
            return f"-> {os.readlink(path)}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(p.relative_to(root)): state(p) for p in sorted(root.rglob("*"))}


def refused(stage: Stage, arguments: list[object], match: str) -> None:
    before = snapshot(stage.root)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert re.search(match, lines[0]), lines[0]
    assert len(lines[0]) < 700, lines[0]
    assert result.stdout == "" and result.exit_code == 2
    assert snapshot(stage.root) == before


def command(stage: Stage, verb: str, **changed: object) -> list[object]:
    """The verb as a user types it, over an output of an earlier run; ``changed`` names other paths than the stage's."""
    at = {"graph": stage.graph, "adapter": stage.adapter, "base": stage.base, "bundle": stage.bundle, **changed}
    output = ["-o", stage.root / "out", "--force"]
    return {
        "inspect": ["inspect", at["graph"]],
        "fold": ["fold", at["graph"], "-a", at["adapter"], *output],
        "fold -m": ["fold", at["graph"], "-a", at["adapter"], "-m", at["base"], *output],
        "export": ["export", "-m", at["base"], "-a", at["adapter"], *output],
        "quantize": ["quantize", at["bundle"], "-m", at["base"], *output],
        "import": ["import", at["adapter"], "-m", at["base"], "--positions", "f2+l2", "--tied", "--activation", "none", *output],
    }[verb]


# --- graphs ---------------------------------------------------------------------------------------


def rewritten(change: Callable[[ir.Model], object]) -> Callable[[Stage], object]:
    def damage(stage: Stage) -> None:
        model = load_graph(stage.graph)
        change(model)
        ir.save(model, stage.graph)

    return damage


def _relocated(where: Callable[[Stage], str]) -> Callable[[Stage], object]:
    """Every external tensor says that its data lie elsewhere."""

    def damage(stage: Stage) -> None:
        import onnx

        model = onnx.load(stage.graph, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where(stage)
        onnx.save(model, stage.graph)

    return damage


def _outside(stage: Stage) -> Path:
    return Path(shutil.move(stage.graph.parent / DATA, stage.root / "elsewhere.data"))


def _link(stage: Stage) -> None:
    (stage.graph.parent / DATA).symlink_to(_outside(stage))


def _link_to_itself(stage: Stage) -> None:
    _outside(stage)
    (stage.graph.parent / DATA).symlink_to(DATA)


def _linked_folder(stage: Stage) -> str:
    outside = _outside(stage) if (stage.graph.parent / DATA).is_file() else stage.root / "elsewhere.data"
    if not (stage.graph.parent / "sub").is_symlink():
        (stage.graph.parent / "sub").symlink_to(outside.parent)
    return f"sub/{outside.name}"


def _dimensions(*shape: int) -> Callable[[Stage], object]:
    """One external weight claims another shape, and says nothing of its length."""

    def damage(stage: Stage) -> None:
        import onnx

        model = onnx.load(stage.graph, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.external_data and len(t.dims) == 2)
        tensor.dims[:] = shape
        for entry in [e for e in tensor.external_data if e.key == "length"]:
            tensor.external_data.remove(entry)
        onnx.save(model, stage.graph)

    return damage


def _rename_presents(model: ir.Model) -> None:
    for value in model.graph.outputs:
        value.name = value.name.replace("present.1.", "other.")


def _drop_caches(model: ir.Model) -> None:
    model.graph.outputs[:] = [v for v in model.graph.outputs if v.name == "logits"]


def _unknown_domain(model: ir.Model) -> None:
    next(n for n in model.graph if n.op_type == "Sigmoid").domain = "my.ops"
    model.opset_imports["my.ops"] = 1


def _swap_bytes(path: Path, start: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + count] = b"\xff" * count
    path.write_bytes(bytes(data))


def _replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


GRAPHS = {
    "no present outputs of a layer": (rewritten(_rename_presents), r"present\.1\.key"),
    "no KV cache": (rewritten(_drop_caches), r"is not a decoder with a KV cache: outputs 'present"),
    "unknown domain": (rewritten(_unknown_domain), r"is an operator of 'my\.ops'"),
    "truncated data": (lambda s: os.truncate(s.graph.parent / DATA, 1000), "has 1000 bytes, weight .* needs bytes"),
    "no data": (lambda s: (s.graph.parent / DATA).unlink(), "is missing from"),
    "data is a folder": (lambda s: _replace_by_folder(s.graph.parent / DATA), "is not a file"),
    "data outside": (_relocated(lambda s: "../style/adapter.safetensors"), "leaves the graph's folder"),
    "data outside, .. in the middle": (_relocated(lambda s: "x/../../style/adapter.safetensors"), "leaves the graph's folder|is missing"),
    "data at an absolute path": (_relocated(lambda s: str(s.adapter / "adapter.safetensors")), "leaves the graph's folder"),
    "data behind a link": (_link, "leaves the graph's folder"),
    "data behind a linked folder": (_relocated(_linked_folder), "leaves the graph's folder"),
    "a device as data": (_relocated(lambda s: "/dev/zero"), "leaves the graph's folder"),
    "a nameless file as data": (_relocated(lambda s: "de\0coder.data"), "is not a file name|cannot be read"),
    "a link to itself as data": (_link_to_itself, "leaves the graph's folder|is missing from"),
    "shape beyond int64": (_dimensions(2**62, 2**62), "takes .* bytes|needs bytes"),
    "shape of many terabytes": (_dimensions(2**31, 2**20), "takes .* bytes|needs bytes"),
    "negative shape": (_dimensions(-4, 16), r"has the shape \[-4, 16\]"),
    "zero bytes": (lambda s: s.graph.write_bytes(b""), "holds no graph"),
    "half of it": (lambda s: os.truncate(s.graph, s.graph.stat().st_size // 2), "cannot be read as an ONNX model|damaged|no graph"),
    "bytes changed": (lambda s: _swap_bytes(s.graph, 400, 60), "cannot be read as an ONNX model|damaged"),
    "not protobuf": (lambda s: s.graph.write_text("<html>not found</html>"), "cannot be read as an ONNX model|holds no graph"),
    "a folder of that name": (lambda s: _replace_by_folder(s.graph), "holds 0 graphs"),
    "missing": (lambda s: s.graph.unlink(), "does not exist"),
}


@pytest.mark.parametrize("verb", ["fold", slow("inspect")])
@pytest.mark.parametrize("case", GRAPHS)
def test_graphs(case, verb, stage) -> None:
    damage, match = GRAPHS[case]
    damage(stage)
    refused(stage, command(stage, verb), match)


def _hostile_config(text: str) -> Callable[[Stage], object]:
    return lambda s: (s.graph.parent / "genai_config.json").write_text(text)


FOLDERS = {
    "config that is not JSON": (_hostile_config("{"), "is not JSON"),
    "config of 100,000 levels": (_hostile_config("[" * 100_000), "is not JSON"),
    "config of another file": (_hostile_config('{"model": {"decoder": {"filename": "../decoder.onnx"}}}'), "names no single decoder graph"),
    "config of a missing file": (_hostile_config('{"model": {"decoder": {"filename": "other.onnx"}}}'), "is not a file"),
    "config of numbers": (_hostile_config('{"model": {"decoder": {"filename": 3}}}'), "names no single decoder graph"),
    "model that is a list": (_hostile_config('{"model": [1]}'), "names no single decoder graph"),
    "context of words": (
        _hostile_config('{"model": {"context_length": "long", "decoder": {"filename": "decoder.onnx"}}}'),
        "context_length is 'long'",
    ),
    "width of words": (lambda s: (s.graph.parent / "config.json").write_text('{"hidden_size": "x"}'), "hidden_size is 'x'"),
    "two graphs": (lambda s: shutil.copy(s.graph, s.graph.with_name("other.onnx")), "holds 2 graphs"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_graphs(case, stage) -> None:
    damage, match = FOLDERS[case]
    damage(stage)
    refused(stage, command(stage, "fold", graph=stage.graph.parent), match)


# --- adapters of ours -----------------------------------------------------------------------------


def _tensors(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Stage], object]:
    def damage(stage: Stage) -> None:
        path = stage.adapter / "adapter.safetensors"
        save_file(change(load_file(path)), path)
        reseal(stage.adapter)

    return damage


def _bytes_of_tensors(content: bytes) -> Callable[[Stage], object]:
    def damage(stage: Stage) -> None:
        (stage.adapter / "adapter.safetensors").write_bytes(content)
        reseal(stage.adapter)

    return damage


def _first(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stage], object]:
    return _tensors(lambda t: {n: np.ascontiguousarray(change(v)) if i == 0 else v for i, (n, v) in enumerate(sorted(t.items()))})


def _config(**keys: object) -> Callable[[Stage], object]:
    def damage(stage: Stage) -> None:
        reseal(stage.adapter, **keys)

    return damage


def _nan(array: np.ndarray) -> np.ndarray:
    return np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, array).astype(array.dtype)


def lying_header(length: int, header: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + header


LYING = b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
OWN = "adapter.safetensors"
ADAPTERS = {
    "no tensors": (lambda s: (s.adapter / OWN).unlink(), f"{OWN} is missing"),
    "tensors of zero bytes": (_bytes_of_tensors(b""), "is damaged"),
    "half of the tensors": (lambda s: os.truncate(s.adapter / OWN, 800), "is damaged"),
    "header longer than the file": (_bytes_of_tensors(lying_header(2**63)), "is damaged"),
    "header of other shapes": (_bytes_of_tensors(lying_header(len(LYING), LYING) + bytes(16)), "is damaged"),
    "tensors are a folder": (lambda s: _replace_by_folder(s.adapter / OWN), f"{OWN} is missing"),
    "a pickle for tensors": (lambda s: torch.save({"x": Hostile(s.root / "ran")}, s.adapter / OWN), "is damaged"),
    "NaN": (_first(_nan), "not finite"),
    "infinity": (_first(lambda a: a / 0), "not finite"),
    "float64": (_first(lambda a: a.astype(np.float64)), "float64"),
    "bfloat16": (_first(lambda a: a.astype(ml_dtypes.bfloat16)), "bfloat16"),
    "integers": (_first(lambda a: a.astype(np.int32)), "int32"),
    "another shape": (_first(lambda a: a[..., :-1]), "shape"),
    "a tensor too few": (_tensors(lambda t: dict(sorted(t.items())[1:])), "lacks|missing"),
    "a tensor too many": (_tensors(lambda t: t | {"more": np.zeros(3, np.float32)}), "more"),
    "layers out of range": (_config(sites=[{"site": "0.block_output"}, {"site": "7.block_output"}]), "layer 7|7.block_output"),
    "layers below zero": (_config(sites=[{"site": "0.block_output"}, {"site": "-1.block_output"}]), "-1"),
    "unknown key": (_config(surprise=1), "surprise"),
    "rank that lies": (_config(rank=2**40), "rank|shape"),
    "config is a list": (lambda s: (s.adapter / "adapter.json").write_text("[]"), "adapter.json"),
    "config is not JSON": (lambda s: (s.adapter / "adapter.json").write_text("{"), "is not JSON"),
    "config of 100,000 levels": (lambda s: (s.adapter / "adapter.json").write_text("[" * 100_000), "is not JSON"),
    "config is not UTF-8": (lambda s: (s.adapter / "adapter.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
}


@pytest.mark.parametrize("verb", ["fold", slow("export"), slow("inspect")])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, verb, stage) -> None:
    damage, match = ADAPTERS[case]
    damage(stage)
    refused(stage, command(stage, verb, **({"graph": stage.adapter} if verb == "inspect" else {})), match)
    assert not (stage.root / "ran").exists()


@pytest.mark.parametrize("verb", ["fold", "export"])
def test_adapters_that_are_files_or_nothing(verb, stage) -> None:
    refused(stage, command(stage, verb, adapter=stage.adapter / "adapter.json"), "is not an adapter folder")
    refused(stage, command(stage, verb, adapter=stage.root / "none"), "is not an adapter folder")


def _adapter_for(stage: Stage, **overrides: object) -> str:
    """Puts an adapter of another base in the place of the stage's; its fingerprint."""
    other = load_base(tiny.save_base(stage.root / "other", "llama", **overrides)).info
    shutil.rmtree(stage.adapter)
    save_adapter(tiny.random_adapter(other, layers=(0,)), stage.adapter)
    return other.fingerprint[:12]


@pytest.mark.parametrize("verb", ["export", "fold -m"])
def test_an_adapter_for_another_base_of_the_same_size(verb, stage) -> None:
    theirs, ours = _adapter_for(stage, rope_theta=99.0), load_base(stage.base).info.fingerprint[:12]
    refused(stage, command(stage, verb), rf"adapter style was trained on other \(fingerprint {theirs}\), this base is base \({ours}\)")


@pytest.mark.parametrize("verb", ["fold", "export"])
def test_an_adapter_for_another_size(verb, stage) -> None:
    _adapter_for(stage, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    refused(stage, command(stage, verb), r"was trained on other \(2 layers, width 32\); .* has 3 layers, width 64")


def test_sites_out_of_range(stage) -> None:
    for verb in ("fold", "export"):
        refused(stage, [*command(stage, verb), "--sites", "0;9"], r"9")
        refused(stage, [*command(stage, verb), "--sites", "99999999999999999999"], r"99999999999999999999")


# --- bases ----------------------------------------------------------------------------------------


def _weights(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Stage], object]:
    def damage(stage: Stage) -> None:
        path = stage.base / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def _pickled(stage: Stage) -> None:
    (stage.base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(stage.root / "ran")}, stage.base / "pytorch_model.bin")


def _nan_in_one(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name = "model.layers.1.mlp.down_proj.weight"
    return tensors | {name: _nan(tensors[name])}


WEIGHTS = "model.safetensors"
BASES = {
    "no config": (lambda s: (s.base / "config.json").unlink(), "config.json is missing"),
    "config of another kind": (lambda s: (s.base / "config.json").write_text('{"model_type": "t5"}'), "t5 is not a decoder"),
    "config is not JSON": (lambda s: (s.base / "config.json").write_text("{"), "is not JSON"),
    "config of 100,000 levels": (lambda s: (s.base / "config.json").write_text("[" * 100_000), "is not JSON"),
    "no weights": (lambda s: (s.base / WEIGHTS).unlink(), "holds no weights"),
    "weights of zero bytes": (lambda s: (s.base / WEIGHTS).write_bytes(b""), "is damaged or cut short"),
    "half of the weights": (lambda s: os.truncate(s.base / WEIGHTS, 200_000), "is damaged or cut short"),
    "header longer than the file": (lambda s: (s.base / WEIGHTS).write_bytes(lying_header(2**63)), "is damaged or cut short"),
    "header of other shapes": (lambda s: (s.base / WEIGHTS).write_bytes(lying_header(len(LYING), LYING) + bytes(16)), "takes .* has 16"),
    "weights are a folder": (lambda s: _replace_by_folder(s.base / WEIGHTS), "holds no weights|is damaged"),
    "hostile pickle": (_pickled, "is damaged, or holds more than weights"),
    "a parameter too few": (_weights(lambda t: dict(list(t.items())[1:])), "lacks 1 parameters|trained on"),
    "NaN": (_weights(_nan_in_one), r"parameter model\.layers\.1\.mlp\.down_proj\.weight holds values that are not finite"),
}


@pytest.mark.parametrize("verb", ["export", slow("quantize"), slow("fold -m"), slow("import")])
@pytest.mark.parametrize("case", BASES)
def test_bases(case, verb, stage) -> None:
    if verb == "import":
        if case in ("NaN", "a parameter too few"):
            pytest.skip("import reads the headers of a base, not its weights")
        np.savez(stage.root / "vectors.npz", layer_1=np.ones(64, np.float32))
    damage, match = BASES[case]
    damage(stage)
    arguments = command(stage, verb)
    if verb == "import":
        arguments = ["import", stage.root / "vectors.npz", "-m", stage.base, "--positions", "all", "-o", stage.root / "out", "--force"]
    refused(stage, arguments, match)
    assert not (stage.root / "ran").exists()


@pytest.mark.parametrize("verb", ["export", "quantize", "fold -m"])
def test_bases_that_are_files_or_nothing(verb, stage) -> None:
    refused(stage, command(stage, verb, base=stage.base / "config.json"), "is a file; a base is given by its folder")
    refused(stage, command(stage, verb, base=stage.root / "none"), "is not a folder")


# --- bundles --------------------------------------------------------------------------------------


def _manifest(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(bundle: Path) -> None:
        reseal(bundle, change)

    return damage


def _linked(bundle: Path) -> None:
    outside = Path(shutil.move(bundle / "model.onnx.data", bundle.parent / "elsewhere.data"))
    _swap_bytes(outside, 5000, 4)
    (bundle / "model.onnx.data").symlink_to(outside)


def _linked_to_itself(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to("tokenizer.json")


def _pipe(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    os.mkfifo(bundle / "tokenizer.json")


MODEL, STORED = "model.onnx", "model.onnx.data"
BUNDLES = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "is not a bundle: manifest.json is missing|holds|not an adapter"),
    "manifest is not JSON": (lambda b: (b / "manifest.json").write_text("{"), "manifest.json is not JSON"),
    "manifest is a list": (lambda b: (b / "manifest.json").write_text("[]"), "schema version None"),
    "manifest of 100,000 levels": (lambda b: (b / "manifest.json").write_text("[" * 100_000), "manifest.json is not JSON"),
    "unknown key": (_manifest(lambda m: m.update(surprise=1)), "surprise"),
    "a file outside": (_manifest(lambda m: m["files"].update({"../base/config.json": m["files"][MODEL]})), "leaves the folder"),
    "a file outside, .. inside": (_manifest(lambda m: m["files"].update({"golden/../../x": m["files"][MODEL]})), "leaves the folder"),
    "a file at an absolute path": (_manifest(lambda m: m["files"].update({"/etc/hostname": m["files"][MODEL]})), "leaves the folder"),
    "an adapter's name outside": (_manifest(lambda m: m.update(adapters=["../x"])), "cannot be used"),
    "other data behind a link": (_linked, "does not match its sha256"),
    "a link to itself": (_linked_to_itself, "tokenizer.json is missing"),
    "a pipe": (_pipe, "tokenizer.json is no regular file"),
    "truncated data": (lambda b: os.truncate(b / STORED, 1000), "has 1000 bytes, expected"),
    "changed data": (lambda b: _swap_bytes(b / STORED, 5000, 4), "does not match its sha256"),
    "changed graph": (lambda b: _swap_bytes(b / MODEL, 500, 4), "does not match its sha256"),
    "no graph": (lambda b: (b / MODEL).unlink(), "is missing"),
    "a folder for a graph": (lambda b: _replace_by_folder(b / MODEL), "is no regular file"),
    "a hash that is a number": (_manifest(lambda m: m["files"][MODEL].update(sha256=7)), "sha256 is 7, expected str"),
}


@pytest.mark.parametrize("verb", ["quantize", slow("inspect")])
@pytest.mark.parametrize("case", BUNDLES)
def test_bundles(case, verb, stage) -> None:
    bundle = stage.own_bundle()
    damage, match = BUNDLES[case]
    if case == "no manifest" and verb == "inspect":
        pytest.skip("a folder with a graph and no manifest is a graph's")
    damage(bundle)
    refused(stage, command(stage, verb, **{"graph" if verb == "inspect" else "bundle": bundle}), match)


def test_bundles_that_are_files_or_nothing(stage) -> None:
    refused(stage, command(stage, "quantize", bundle=stage.root / "none"), "is not a folder")
    refused(stage, command(stage, "quantize", bundle=stage.graph), "is not a folder")
    refused(stage, command(stage, "quantize", bundle=stage.graph.parent), "is not a bundle")
    refused(stage, command(stage, "inspect", graph=stage.root / "none"), "does not exist")
    refused(stage, command(stage, "inspect", graph=stage.root), "is not an adapter folder")


AT_POSITIONS = ("logit_positions", "logit_columns", "logits", "base_logits", "best_tokens", "best_logits", "logsumexp")


def _golden(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    """Arrays of the adapter as somebody changed them, sealed by their hash again."""

    def damage(bundle: Path) -> None:
        path = bundle / "golden" / "tied.npz"
        with np.load(path) as arrays:
            np.savez(path, **{name: changes.get(name, np.asarray)(arrays[name]) for name in arrays})
        seal = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        _manifest(lambda m: m["files"].update({"golden/tied.npz": seal}))(bundle)

    return damage


PARITY = {
    "no position": (_golden(**dict.fromkeys(AT_POSITIONS, lambda a: a[:0])), "nothing to compare"),
    "positions that are no token's": (_golden(logit_positions=lambda a: a + 1000), "logit_positions that are no token's"),
    "negative tokens": (_golden(input_ids=lambda a: -a), "values in input_ids from -"),
    "no greedy token": (_golden(greedy_tokens=lambda a: 0 * a - 1), "greedy_tokens with a row that is empty"),
    "logits of NaN": (_golden(logits=lambda a: a * np.nan), "values in logits that are not finite"),
    "a wider budget": (_manifest(lambda m: m["parity_budget"].update(logits=1.0)), "a manifest may only tighten the budget of fp32"),
    "a renamed budget": (_manifest(lambda m: m.update(parity_budget={"relative": 1.0})), "parity_budget has 'relative'; known: logits"),
    "another precision": (_manifest(lambda m: m.update(precision="bf16")), "says precision bf16, and .* has .* of tensor.float."),
    "an adapter less": (_manifest(lambda m: m["adapters"].remove("tied")), "tied.json is listed, and adapter 'tied' is not"),
}


@pytest.mark.parametrize("case", PARITY)
def test_parity_with_nothing_to_hold_against(case, stage) -> None:
    bundle = stage.own_bundle()
    damage, match = PARITY[case]
    damage(bundle)
    refused(stage, ["parity", bundle], match)


# --- adapters of others ---------------------------------------------------------------------------


def _gguf(stage: Stage) -> bytes:
    import gguf

    path = stage.root / "made.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.1", np.ones(64, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path.read_bytes()


def _stored(**arrays: np.ndarray) -> bytes:
    from safetensors.numpy import save

    return save(arrays)


def _gguf_with(count: int, *, kind: int = 4) -> bytes:
    """A key with an array of so many numbers, in a file that ends there."""
    key = b"controlvector.notes"
    return b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, len(key)) + key + struct.pack("<IIQ", 9, kind, count) + bytes(64)


def _ones() -> np.ndarray:
    return np.ones(64, np.float32)


VECTORS = {
    "an endless array.gguf": (lambda s: _gguf_with(2**60), "values; 8000000 at most are read"),
    "an array beyond the file.gguf": (lambda s: _gguf_with(10**6), "says that more than that follow"),
    "texts beyond the file.gguf": (lambda s: _gguf_with(10**6, kind=8), "says that more than that follow"),
    "arrays of arrays of arrays.gguf": (lambda s: _gguf_with(1, kind=9) + bytes(99), "is damaged, or not GGUF|a control vector holds"),
    "5,000 digits.safetensors": (lambda s: _stored(layer_1=_ones(), **{"layer_" + "9" * 5000: _ones()}), "does not name a layer"),
    "wrong magic.gguf": (lambda s: b"GGML" + _gguf(s)[4:], "is not .gguf, .npz, .safetensors or RED"),
    "magic alone.gguf": (lambda s: b"GGUF", "is damaged, or not GGUF"),
    "half.gguf": (lambda s: (d := _gguf(s))[: len(d) // 2], "is damaged, or not GGUF"),
    "less its end.gguf": (lambda s: _gguf(s)[:-100], "is damaged, or not GGUF"),
    "many tensors.gguf": (lambda s: (d := _gguf(s))[:8] + struct.pack("<Q", 2**62) + d[16:], "is damaged, or not GGUF"),
    "zero bytes.gguf": (lambda s: b"", "is not .gguf"),
    "zero bytes.npz": (lambda s: b"", "is damaged, or holds more than numbers"),
    "zero bytes.safetensors": (lambda s: b"", "is damaged"),
    "long header.safetensors": (lambda s: lying_header(2**63), "is damaged"),
    "lying header.safetensors": (lambda s: lying_header(len(LYING), LYING) + bytes(16), "is damaged"),
    "cut.safetensors": (lambda s: _stored(layer_1=np.ones(64, np.float32))[:-10], "is damaged"),
    "NaN.safetensors": (lambda s: _stored(layer_1=_nan(np.ones(64, np.float32))), "not finite"),
    "layer 9.safetensors": (lambda s: _stored(layer_9=np.ones(64, np.float32)), "layer 9 does not exist"),
    "huge layer.safetensors": (lambda s: _stored(**{"layer_" + "9" * 30: np.ones(64, np.float32)}), "does not exist"),
    "another width.safetensors": (lambda s: _stored(layer_1=np.ones(65, np.float32)), "width|65"),
    "integers.safetensors": (lambda s: _stored(layer_1=np.ones(64, np.int64)), "int64"),
    "float64 beyond float32.safetensors": (lambda s: _stored(layer_1=np.full(64, 1e300)), "not finite"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name, stage) -> None:
    make, match = VECTORS[name]
    (stage.root / name).write_bytes(make(stage))
    arguments = ["import", stage.root / name, "-m", stage.base, "--positions", "all", "-o", stage.root / "out", "--force"]
    refused(stage, arguments, match)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_vectors_of_other_float_types_are_widened(dtype, stage) -> None:
    """Not refused: every value of theirs that matters is a float32."""
    from runtimes.edits.adapter import load_adapter

    vector = np.linspace(-1, 1, 64).astype(dtype)
    save_file({"layer_1": vector}, stage.root / "v.safetensors")
    arguments = ["import", stage.root / "v.safetensors", "-m", stage.base, "--positions", "all", "-o", stage.root / "new"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    tensors = load_adapter(stage.root / "new").tensors
    product = tensors["1.block_output.R"].astype(np.float64).T @ tensors["1.block_output.s"]
    np.testing.assert_allclose(product, vector.astype(np.float64), rtol=1e-6, atol=1e-9)


def test_pipes(stage) -> None:
    """Nobody writes into them, and whoever reads them waits for ever."""
    os.mkfifo(stage.root / "v.npz")
    arguments = ["import", stage.root / "v.npz", "-m", stage.base, "--positions", "all", "-o", stage.root / "new"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2 and "is a pipe or a device" in result.stderr
    for name in ("adapter.json", "probes.jsonl"):
        copy = Path(shutil.copytree(stage.adapter, stage.root / name.partition(".")[0]))
        (copy / name).unlink(missing_ok=True)
        os.mkfifo(copy / name)
    result = CliRunner().invoke(app, ["inspect", str(stage.root / "adapter")])
    assert result.exit_code == 2 and "is not an adapter folder" in result.stderr
    (stage.graph.parent / "config.json").unlink(missing_ok=True)
    os.mkfifo(stage.graph.parent / "config.json")
    result = CliRunner().invoke(app, [str(a) for a in command(stage, "fold")])
    assert result.exit_code in (0, 2), result.stderr


def test_foreign_folders(stage) -> None:
    """pyreft's pickle that runs code, a folder that holds nothing, a link to another adapter's pickle."""
    folder = stage.root / "pyreft"
    folder.mkdir()
    refused(stage, command(stage, "import", adapter=folder), "holds neither pyreft's")
    config = {
        "representations": [[1, "block_output", "pos", 1]],
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"],
        "mode": "parallel",
        "sorted_keys": ["layer_1_comp_block_output_unit_pos_nunit_1#0"],
        "intervention_dimensions": [None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    name = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"
    torch.save({"weight": Hostile(stage.root / "ran")}, folder / name)
    refused(stage, command(stage, "import", adapter=folder), "its pickle asks for code to be run")
    assert not (stage.root / "ran").exists()
    (folder / name).write_bytes(b"")
    refused(stage, command(stage, "import", adapter=folder), "is damaged")
    _replace_by_folder(folder / name)
    refused(stage, command(stage, "import", adapter=folder), "intkey_layer_1")

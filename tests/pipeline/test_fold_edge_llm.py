"""``reft-export fold`` on a folder of TensorRT-Edge-LLM's: what is copied, what is written, what is refused. The graph is a hand-written
one of its structure (tests/graph_passes/edge_decoders.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from reft_export.cli.main import app
from runtimes.edits.adapter import Adapter, BaseModel, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule

sys.path.insert(0, str(Path(__file__).parent.parent / "graph_passes"))

from edge_decoders import LAYOUTS, WIDTH, edge_decoder  # noqa: E402


def _adapter(folder: Path, *, positions: str = "f2+l1", tied: bool = True, width: int = WIDTH, layers: int = 3, rank: int = 3) -> Path:
    random = np.random.default_rng(0)
    sites = (Site(layer=0), Site(layer=layers - 1))
    groups = ("",) if tied else ("prefix", "suffix")
    shapes = METHODS["loreft"].shapes(rank, width)
    tensors = {
        ".".join(filter(None, (str(site), group, name))): (random.standard_normal(shape) * 0.1).astype(np.float32)
        for site in sites for group in groups for name, shape in shapes.items()
    }  # fmt: skip
    base = BaseModel(name="tiny", fingerprint="0" * 64, num_hidden_layers=layers, hidden_size=width, model_type="llama")
    adapter = Adapter(
        method="loreft", rank=rank, sites=sites, positions=PositionRule.parse(positions), tied=tied, base=base, tensors=tensors
    )
    save_adapter(adapter, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _adapter(tmp_path_factory.mktemp("adapters") / "tone")


def _export(folder: Path, layout: str = "padded", **config: object) -> Path:
    """The files that its exporter writes, weights in model.onnx.data; a subfolder stands for what we do not know."""
    folder.mkdir(parents=True)
    ir.save(edge_decoder(layout, dtype=ir.DataType.FLOAT16), folder / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    declared = {"edgellm_version": "0.10.0", "engine_role": "llm", "hidden_size": WIDTH, "num_hidden_layers": 3} | config
    (folder / "config.json").write_text(json.dumps(declared))
    for name in ("embedding.safetensors", "tokenizer.json", "processed_chat_template.json"):
        (folder / name).write_bytes(np.random.default_rng(len(name)).bytes(1000))
    (folder / "more").mkdir()
    (folder / "more" / "model.onnx").write_bytes(b"another graph")
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return _export(tmp_path / "llm")


def _fold(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["fold", *map(str, arguments)])


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_graph_changes(layout, adapter, tmp_path):
    export = _export(tmp_path / "llm", layout)
    before, output = _digests(export), tmp_path / "steered"
    done = _fold(export, "-a", adapter, "-o", output, "--json")
    assert done.exit_code == 0, done.output
    assert _digests(export) == before
    after = _digests(output)
    assert {name for name in before if before[name] != after[name]} == {"model.onnx"} and set(after) - set(before) == {"reft.json"}
    printed = json.loads(done.stdout)
    assert printed["adapters"] == ["tone"] and printed["layout"] == ("padded" if layout == "padded" else "tokens")
    assert printed["build"] == [
        "export EDGELLM_PLUGIN_PATH=/path/to/libreft_trt_edgellm.so", f"llm_build --onnxDir {output} --engineDir ENGINE"
    ]  # fmt: skip
    assert "-DREFT_EDGELLM_PLUGIN=" in printed["notes"][0]
    assert any("no step of the graph was run here: its AttentionPlugin" in note for note in printed["notes"])
    assert "add_1" in printed["found"]["0.block_output"] and "last tokens: leave KV reuse" in printed["notes"][-1]
    record = json.loads((output / "reft.json").read_text())
    assert record["adapters"]["tone"]["positions"] == "f2+l1" and record["folded_from"] == {"model.onnx": before["model.onnx"]}
    assert record["edgellm_version"] == "0.10.0" and record["banks"] == "constants"

    folded, plain = (onnx.load(folder / "model.onnx", load_external_data=False).graph for folder in (output, export))
    assert list(folded.input) == list(plain.input) and list(folded.output) == list(plain.output)
    assert sum(node.op_type == "LoReFT" for node in folded.node) == 2
    # The exporter's weights stay references into its own data file; ours are in the graph.
    external = {value.name for value in plain.initializer if value.external_data}
    assert external == {value.name for value in folded.initializer if value.external_data}
    onnx.checker.check_model(str(output / "model.onnx"))
    again = _fold(output, "-a", adapter, "-o", tmp_path / "twice")
    assert again.exit_code == 2 and "carries edits already" in again.output and not (tmp_path / "twice").exists()


def test_the_lora_graph_is_folded_too(export, adapter, tmp_path):
    # Its builder reads lora_model.onnx in place of model.onnx where LoRA is asked for: left alone, it would be a base without the edit.
    shutil.copyfile(export / "model.onnx", export / "lora_model.onnx")
    done = _fold(export, "-a", adapter, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["build"][-1].endswith("[--maxLoraRank N]")
    for name in ("model.onnx", "lora_model.onnx"):
        assert any(node.op_type == "LoReFT" for node in onnx.load(tmp_path / "out" / name, load_external_data=False).graph.node)


def test_adapters_as_lora(export, tmp_path):
    first, second = (_adapter(tmp_path / name, tied=False, rank=rank) for name, rank in (("calm", 3), ("loud", 5)))
    done = _fold(export, "-a", first, "-a", second, "-o", tmp_path / "out", "--as-lora", "--json")
    assert done.exit_code == 0, done.output
    printed, output = json.loads(done.stdout), tmp_path / "out"
    assert printed["adapters"] == ["calm", "loud"] and printed["build"][-1].endswith("--maxLoraRank 5")
    assert f'"calm": "{output}/reft_adapters/calm.safetensors"' in printed["notes"][1]
    before, after = _digests(export), _digests(output)
    assert all(after[name] == digest for name, digest in before.items())
    assert set(after) - set(before) == {"reft.json", "lora_model.onnx", "reft_adapters/calm.safetensors", "reft_adapters/loud.safetensors"}
    inputs = [value.name for value in onnx.load(output / "lora_model.onnx", load_external_data=False).graph.input]
    files = {name: load_file(output / "reft_adapters" / f"{name}.safetensors") for name in ("calm", "loud")}
    assert set(files["calm"]) == set(files["loud"]) == {name for name in inputs if "lora_" in name}
    shapes = {name: tensors["reft.0.block_output.1.lora_A.weight"].shape for name, tensors in files.items()}
    assert shapes == {"calm": (WIDTH + 1, 3), "loud": (WIDTH + 1, 5)}


def test_an_output_is_replaced_only_by_force(export, adapter, tmp_path):
    output = tmp_path / "out"
    assert _fold(export, "-a", adapter, "-o", output).exit_code == 0
    refused = _fold(export, "-a", adapter, "-o", output)
    assert refused.exit_code == 2 and "pass --force to replace it" in refused.output
    (output / "config.json").write_text("{}")
    assert _fold(export, "-a", adapter, "-o", output, "--force").exit_code == 0
    assert json.loads((output / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_failure_leaves_nothing(export, adapter, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("reft_export.folding.edge_llm.ir.save", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert _fold(export, "-a", adapter, "-o", tmp_path / "out").exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def _config(export: Path, **changed: object) -> None:
    path = export / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda export: (export / "config.json").unlink(), "config.json is missing: TensorRT-Edge-LLM's builder reads it"),
        (lambda export: (export / "config.json").write_text("{"), "is not JSON"),
        (lambda export: (export / "config.json").write_text("[]"), "config.json holds a JSON list, expected an object"),
        (lambda export: (export / "model.onnx.data").write_bytes(b""), "the file is cut short"),
        (lambda export: (export / "model.onnx").rename(export / "model_tp2_rank0.onnx"), "builds model.onnx or lora_model.onnx"),
        (lambda export: _config(export, engine_role="draft"), "engine_role is 'draft'; only plain decoders"),
        (lambda export: _config(export, model_type="qwen2"), "on tiny, a llama; .*config.json says that the graph is a qwen2"),
        (lambda export: _config(export, num_hidden_layers=4), "3 present_key_values outputs, its config.json 4 layers"),
        (lambda export: _config(export, hidden_size=99), r"layers, width 16\); .* has 3 layers, width 99"),
    ],
)
def test_folders_that_are_refused(damage, message, export, adapter, tmp_path):
    damage(export)
    _refused(_fold(export, "-a", adapter, "-o", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def _refused(done: Result, message: str) -> None:
    import re

    assert done.exit_code == 2, done.output
    line = " ".join(done.output.split())
    assert re.search(message, line), line
    assert "Traceback" not in done.output


def test_adapters_that_are_refused(export, adapter, tmp_path):
    out = tmp_path / "out"
    other = _adapter(tmp_path / "other", positions="f2+l2")
    _refused(_fold(export, "-o", out), "0 adapters for a TensorRT-Edge-LLM folder")
    _refused(_fold(export, "-a", adapter, "-a", other, "-o", out), "2 adapters for .*; run fold once per adapter, or pass --as-lora")
    _refused(_fold(export, "-a", adapter, "-a", other, "-o", out, "--as-lora"), "tone and other have different positions")
    _refused(_fold(export, "-a", _adapter(tmp_path / "wide", width=32), "-o", out), r"tiny \(3 layers, width 32\); .* width 16; pass the")
    twice = _export(tmp_path / "twice", hidden_size=2 * WIDTH)
    _refused(_fold(twice, "-a", tmp_path / "wide", "-o", out), r"tiny \(width 32\); the streams that it edits in .* are 16 wide, whatever")
    _refused(_fold(export, "-a", _adapter(tmp_path / "deep", layers=4), "-o", out), r"\(4 layers, width 16\); .* has 3 layers")
    _refused(_fold(export, "-a", adapter, "-o", out, "--sites", "1"), "which TensorRT-Edge-LLM's runtime refuses; leave them out")
    _refused(_fold(export, "-a", adapter, "-o", out, "--sites", "1"), "which TensorRT-Edge-LLM's runtime refuses; leave it out")
    _refused(_fold(export, "-a", adapter, "-o", export / "out"), "lies inside .*, which is copied whole")
    assert not out.exists() and sorted(path.name for path in export.iterdir())[-1] == "tokenizer.json"


def test_as_lora_is_for_that_runtime_only(adapter, tmp_path):
    from small_decoders import small_decoder

    ir.save(small_decoder(), tmp_path / "model.onnx")
    _refused(_fold(tmp_path / "model.onnx", "-a", adapter, "-o", tmp_path / "out", "--as-lora"), "is not a TensorRT-Edge-LLM export")

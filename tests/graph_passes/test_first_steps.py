"""``fold`` opens what it wrote in onnxruntime and takes its first steps there, and looks at the family that the files beside it name."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models.adapters import random_adapter
from small_decoders import VOCABULARY, WIDTH, small_decoder
from test_cache_contract import with_values
from typer.testing import CliRunner

from reft_export.cli.main import app
from reft_export.folding.family import check_family
from reft_export.folding.fold import FoldResult, fold_bundle
from runtimes import first_steps
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import BaseModel, load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError, GraphError, ReftError
from runtimes.ort.session import OrtSession

QUIET = {"sites": (), "force": False, "report": lambda _: None}


def _save(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.data", size_threshold_bytes=1)
    return folder


def _adapter(folder: Path, family: str = "", name: str = "toy") -> Path:
    base = BaseModel(name=name, fingerprint="f" * 64, num_hidden_layers=3, hidden_size=WIDTH, model_type=family)
    save_adapter(random_adapter(base, (Site(layer=1),), rank=2), folder)
    return folder


def _refused(source: Path, tmp_path: Path, match: str, kind: type[ReftError] = GraphError, adapters: tuple[Path, ...] = ()) -> None:
    with pytest.raises(kind, match=match) as caught:
        fold_bundle(source, list(adapters), tmp_path / "out", **QUIET)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.exit_code == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


def _opset(model: onnx.ModelProto) -> None:
    next(o for o in model.opset_import if o.domain == "").version = 2**60


def _ir_version(model: onnx.ModelProto) -> None:
    model.ir_version = 999


def _negative_head(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[1].dim_value = -1


def _two_dimensions(model: onnx.ModelProto) -> None:
    """Weights of another size than what they are multiplied by: read by no pass, by onnxruntime's first step."""
    weight = next(t for t in model.graph.initializer if t.name == "layers.1.mlp.up.weight")
    weight.dims[:] = [WIDTH // 2, 4 * WIDTH]


def _nan(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "layers.0.mlp.down.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(WIDTH, np.nan, np.float32), weight.name))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_opset, "out/model.onnx does not load in onnxruntime"),
        (_ir_version, "out/model.onnx does not load in onnxruntime .* 999"),
        (_negative_head, r"past_key_values.0.key is tensor\(float\)|does not load"),
        (_two_dimensions, "onnxruntime"),
        (_nan, "logits are not finite in fp32"),
    ],
)
def test_what_onnxruntime_refuses_is_not_left_behind(change: Callable[[onnx.ModelProto], None], match: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = ir.to_proto(with_values())
    change(model)
    onnx.save(model, source / "model.onnx")
    _refused(source, tmp_path, match)


def test_a_cache_that_is_read_and_not_used_is_refused(tmp_path: Path) -> None:
    """Its wires are whole: what came before is multiplied by zero in every layer, as a mask over all of the past does."""
    model = with_values()
    value = ir.tensor(np.float32(0), name="zero")
    zero = ir.Value(name="zero", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=value)
    model.graph.register_initializer(zero)
    for node in [node for node in model.graph if node.op_type == "Concat"]:
        silent = ir.node("Mul", [node.inputs[0], zero])
        silent.outputs[0].name = f"{node.name}.silent"
        model.graph.insert_before(node, silent)
        node.replace_input_with(0, silent.outputs[0])
    _refused(_save(model, tmp_path / "source"), tmp_path, "a decode step says the same to the bit whatever came before it")


def test_other_names_of_the_cache_become_the_bundles(tmp_path: Path) -> None:
    """As folded before, the bundle had names that no session of ours feeds."""
    model = with_values()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = value.name.replace("past_key_values.", "past_").replace("present.", "present_").replace(".", "_")
    assert _folded(_save(model, tmp_path / "source"), tmp_path / "out").not_run == ""
    _folded(_save(with_values(), tmp_path / "same"), tmp_path / "plain")
    ids = np.array([[1, 2, 3]])
    got, wanted = (OrtSession(open_bundle(tmp_path / name)).step(ids, np.ones_like(ids)).logits for name in ("out", "plain"))
    np.testing.assert_array_equal(got, wanted)


def _folded(source: Path, output: Path, adapters: tuple[Path, ...] = (), **options: object) -> FoldResult:
    return fold_bundle(source, list(adapters), output, **{**QUIET, **options})


def test_what_cannot_run_here_is_folded_and_said(tmp_path: Path) -> None:
    """bfloat16, inputs that only the graph's own runtime feeds, no mask; a damaged one of them is refused all the same."""
    half = _save(small_decoder(dtype=ir.DataType.BFLOAT16), tmp_path / "half")
    assert "bfloat16" in _folded(half, tmp_path / "a").not_run
    other = small_decoder()
    other.graph.inputs.append(ir.Value(name="beam", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["batch"])))
    assert "the graph takes beam, which no session" in _folded(_save(other, tmp_path / "beam"), tmp_path / "b").not_run
    maskless = small_decoder()
    del maskless.graph.inputs[1]
    source = _save(maskless, tmp_path / "maskless")
    assert "and takes reft.slots, which no session" in _folded(source, tmp_path / "c").not_run
    done = CliRunner().invoke(app, ["fold", str(source), "-o", str(tmp_path / "d")])
    assert done.exit_code == 0 and "no step of it was run here: the graph has no attention_mask" in " ".join(done.output.split())
    said = CliRunner().invoke(app, ["fold", str(half), "-o", str(tmp_path / "e"), "--json"])
    assert "bfloat16" in json.loads(said.stdout)["not_run"]
    for source in (half, tmp_path / "maskless"):
        model = onnx.load(source / "model.onnx", load_external_data=False)
        _ir_version(model)
        onnx.save(model, source / "model.onnx")
        with pytest.raises(GraphError, match="does not load in onnxruntime"):
            _folded(source, tmp_path / "f")


def test_every_adapter_takes_a_step(tmp_path: Path) -> None:
    """An edit that is finite and drives the logits out of float16 is found where the bundle is made."""
    source = _save(small_decoder(dtype=ir.DataType.FLOAT16), tmp_path / "source")
    strong = load_adapter(_adapter(tmp_path / "right"))
    tensors = {name: np.full_like(value, 6e4) if name.endswith(".W") else value for name, value in strong.tensors.items()}
    save_adapter(replace(strong, tensors=tensors), tmp_path / "strong")
    _folded(source, tmp_path / "fine", (tmp_path / "right",))
    _refused(source, tmp_path, "logits are not finite in fp16", adapters=(tmp_path / "right", tmp_path / "strong"))


def test_an_onnxruntime_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, -11, "", "a line\nand more")

    monkeypatch.setattr(first_steps.subprocess, "run", dies)
    _refused(_save(small_decoder(), tmp_path / "source"), tmp_path, r"onnxruntime died of .*out \(exit -11; a line and more\)")


CONFIGS = {
    "model_type": {"model_type": "llama"},
    "text model": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
    "classes": {"architectures": ["GPTNeoXForCausalLM"]},
    "gpt2 class": {"architectures": ["GPT2LMHeadModel"]},
}


@pytest.mark.parametrize(
    ("config", "family", "fits"),
    [
        ("model_type", "llama", True),
        ("model_type", "qwen2", False),
        ("model_type", "", True),
        ("text model", "gemma3_text", True),
        ("text model", "gemma2", False),
        ("classes", "gpt_neox", True),
        ("classes", "gpt2", False),
        ("gpt2 class", "gpt2", True),
        ("gpt2 class", "opt", False),
    ],
)
def test_the_family_of_the_config_beside_the_graph(config: str, family: str, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[config]))
    adapters = {"tone": load_adapter(_adapter(tmp_path / "tone", family))}
    if fits:
        check_family(adapters, tmp_path / "model.onnx")
    else:
        with pytest.raises(AdapterError, match=f"adapter tone was trained on toy, a {family}; .*config.json says that the graph is a"):
            check_family(adapters, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("kind", "family", "fits"),
    [
        ("llama", "llama", True),
        ("llama", "gpt2", False),
        ("gptoss", "gpt_oss", True),
        ("llama", "olmo2", True),  # which onnxruntime-genai runs under another's name
        ("decoder", "llama", True),
    ],
)
def test_the_family_of_a_genai_config(kind: str, family: str, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"type": kind, "decoder": {"filename": "model.onnx"}}}))
    adapters = {"tone": load_adapter(_adapter(tmp_path / "tone", family))}
    if fits:
        check_family(adapters, tmp_path / "model.onnx")
    else:
        with pytest.raises(AdapterError, match="genai_config.json says that the graph is a llama"):
            check_family(adapters, tmp_path / "model.onnx")


def test_a_fold_of_another_family_is_refused(tmp_path: Path) -> None:
    source = _save(small_decoder(), tmp_path / "source")
    llama, gpt2 = _adapter(tmp_path / "a", "llama", "one"), _adapter(tmp_path / "b", "gpt2", "two")
    unnamed = _adapter(tmp_path / "c")
    _refused(source, tmp_path, "adapter a was trained on one, a llama, and adapter b on two, a gpt2", AdapterError, (llama, unnamed, gpt2))
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    _refused(source, tmp_path, "adapter a was trained on one, a llama; .* says that the graph is a gpt2; pass", AdapterError, (llama,))
    _folded(source, tmp_path / "out", (gpt2, unnamed))
    assert open_bundle(tmp_path / "out").manifest.model.vocab_size == VOCABULARY

"""int4 bundles of bases that GPTQ, AWQ or compressed-tensors quantized: they hold the base's integers, and say at level 1 what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny
from models.packed_checkpoints import quantize_folder

from calibration.products import dequantized_weights
from calibration.quantize import quantize_graph
from calibration.settings import BlockFormat, settings_for
from calibration.weight_only import Blocks, GivenBlocks, WeightBlocks, dequantize, dequantize_nbits, quantize_blocks
from graph_passes.accessors import input_of, int_of, name_of
from graph_passes.external import load_graph
from reft_export.base.checkpoint import open_checkpoint
from reft_export.base.load import outline_base
from reft_export.base.packed.blocks import check_given, packed_blocks
from reft_export.cli.inspect import quantization
from reft_export.exporting.export import export_bundle
from reft_export.exporting.plan import plan_export
from reft_export.exporting.settings import ExportSettings
from reft_export.forecast import forecast_export
from reft_export.quantizing.given import given_blocks
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import WeightSource
from runtimes.edits.adapter import save_adapter
from runtimes.errors import CalibrationError

INT4 = settings_for("weight-only", bits=4)
UP, GATE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _folder(tmp_path: Path, format: str, family: str = "llama", **how) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tiny.save_base(tmp_path / "small", family)
    return folder, quantize_folder(folder, format, **how)


def _products(bundle: Bundle) -> dict[str, ir.Node]:
    nodes = [node for node in load_graph(bundle.graph_path).graph if node.op_type == "MatMulNBits"]
    return {name_of(input_of(node, 1)).removesuffix("_Q4"): node for node in nodes if int_of(node, "bits") == 4}


def _hold(bundle: Bundle, means: dict[str, np.ndarray], group: int) -> None:
    """Every weight [N, K] of ``means`` is one product of blocks of ``group``, to the bit."""
    held = {}
    for name, node in _products(bundle).items():
        source = bundle.manifest.weights[name]
        if source.parameter in means:
            assert int_of(node, "block_size") == group
            rows, restored = 0, dequantize_nbits(node).T
            for part in (source, *source.joined):
                weight = means[part.parameter][part.start : part.stop]
                assert (restored[rows : rows + len(weight)] == weight).all()
                held[part.parameter] = held.get(part.parameter, 0) + len(weight)
                rows += len(weight)
    assert held == {name: len(weight) for name, weight in means.items()}


@pytest.mark.slow
def test_an_export_keeps_the_integers_and_is_held_to_the_base(tmp_path) -> None:
    folder, means = _folder(tmp_path, "gptq")
    save_adapter(tiny.random_adapter(outline_base(folder).info), tmp_path / "style")
    said: list[str] = []
    result = export_bundle(folder, [tmp_path / "style"], tmp_path / "bundle", ExportSettings(precision="int4"), report=said.append)
    bundle = open_bundle(tmp_path / "bundle")
    _hold(bundle, means, 32)
    assert result.parity is not None and result.parity.passed
    assert any("(21 of 30 tensors quantized by GPTQ, 4 bits, groups of 32)" in line for line in said)
    # Beside the head and the embedding, which were floats, nothing is lost.
    assert {error.name for error in result.weight_errors if error.relative} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert "21 of 23 weights as GPTQ, 4 bits, groups of 32: taken over, not quantized again" in result.note
    assert "21 of 23 weights as GPTQ" in quantization(bundle.manifest.quantization)
    # What eager PyTorch carries when it is held against the bundle are the base's own weights.
    for name, weight in dequantized_weights(load_graph(bundle.graph_path)):
        parameter = bundle.manifest.weights[name].parameter
        assert parameter not in means or (means[parameter] == weight.T).all()


@pytest.mark.slow
def test_a_float_bundle_is_quantized_to_the_base_s_own_integers(tmp_path) -> None:
    folder, means = _folder(tmp_path, "awq", group=64)
    export_bundle(folder, [], tmp_path / "float", ExportSettings(sites=()))
    result = quantize_bundle(tmp_path / "float", str(folder), tmp_path / "small4", INT4, mixed=True)
    bundle = open_bundle(tmp_path / "small4")
    assert set(bundle.manifest.quantization.int8) <= {"lm_head.weight"}, "what loses nothing has no use for 8 bits"
    _hold(bundle, means, 64)
    assert result.parity is not None and result.parity.passed


@pytest.mark.slow
def test_weights_that_an_exporter_joins_keep_their_integers(tmp_path) -> None:
    """phi3 stores q, k and v as one weight, and gate and up."""
    folder, means = _folder(tmp_path, "gptq", "phi3")
    export_bundle(folder, [], tmp_path / "bundle", ExportSettings(precision="int4"))
    _hold(open_bundle(tmp_path / "bundle"), means, 32)


def test_a_method_quantizes_them_again(tmp_path) -> None:
    folder, _ = _folder(tmp_path, "awq")
    made = open_checkpoint(folder).folder
    sources = {"up": WeightSource(parameter=UP, transpose=True)}
    assert set(given_blocks(made, sources, INT4).blocks) == {"up"}
    for how in ({"method": "rtn"}, {"block_size": 64}, {"symmetric": False}, {"bits": 8}):
        assert not given_blocks(made, sources, settings_for("weight-only", **{"bits": 4, **how})).blocks
    assert not given_blocks(made, sources, settings_for("qdq-int4")).blocks, "whose blocks have no zero points"


def test_rows_and_joined_weights_are_read_in_their_order(tmp_path) -> None:
    folder, means = _folder(tmp_path, "awq")
    made = open_checkpoint(folder).folder
    packed = packed_blocks(made)
    rows = WeightSource(parameter=UP, transpose=True, axis=0, start=16, stop=48)
    joined = WeightSource(parameter=UP, transpose=True, joined=(WeightSource(parameter=GATE, transpose=True),))
    other = [WeightSource(parameter=UP, transpose=False), WeightSource(parameter="lm_head.weight", transpose=True)]
    given = given_blocks(made, {"rows": rows, "joined": joined, "a": other[0], "b": other[1]}, INT4).blocks
    assert packed is not None and set(given) == {"rows", "joined"}
    blocks = WeightBlocks(given=given)
    for name, weight in {"rows": means[UP][16:48], "joined": np.concatenate([means[UP], means[GATE]])}.items():
        format = blocks.format_of(name, INT4.format)
        assert format == given[name].format and blocks.of(name, weight.T, format).scales.shape == (len(weight), 2)
        with pytest.raises(CalibrationError, match=f"weight {name} is not what its integers in the base mean"):
            blocks.of(name, weight.T * 2, format)


def test_symmetric_weights_take_zero_points_where_they_are_joined_to_others(tmp_path, monkeypatch) -> None:
    folder, means = _folder(tmp_path, "compressed-tensors", symmetric=True)
    made = open_checkpoint(folder).folder
    packed = packed_blocks(made)
    assert packed is not None
    points = np.full((128, 1), 0x88, np.uint8)
    formats = {**packed.formats, GATE: BlockFormat(bits=4, block_size=32, symmetric=False)}

    def read(self, parameter: str) -> Blocks:
        plain = packed.read(parameter)
        return Blocks(packed=plain.packed, scales=plain.scales, zero_points=points) if parameter == GATE else plain

    mixed = type("Mixed", (), {"formats": formats, "read": read, "label": "", "without": ()})()
    monkeypatch.setattr("reft_export.quantizing.given.packed_blocks", lambda _: mixed)
    source = WeightSource(parameter=UP, transpose=True, joined=(WeightSource(parameter=GATE, transpose=True),))
    blocks = WeightBlocks(given=given_blocks(made, {"w": source}, INT4).blocks)
    format = blocks.format_of("w", INT4.format)
    assert not format.symmetric and blocks.of("w", np.concatenate([means[UP], means[GATE]]).T, format).zero_points.shape == (256, 1)


def test_groups_that_no_blocks_hold_are_refused_before_any_work(tmp_path) -> None:
    folder, _ = _folder(tmp_path, "gptq", ordered=True)
    match = r"21 of 21 weights of GPTQ, 4 bits, groups of 32 are in groups that int4 blocks cannot hold, .*desc_act.* --method imatrix"
    with pytest.raises(CalibrationError, match=match):
        plan_export(folder, [], tmp_path / "bundle", ExportSettings(precision="int4"))
    assert not (tmp_path / "bundle").exists()
    for settings in (ExportSettings(), ExportSettings(precision="int8"), ExportSettings(precision="int4", method="imatrix")):
        plan_export(folder, [], tmp_path / "bundle", settings)
    check_given(tiny.save_base(tmp_path / "float"), INT4)


def test_a_product_keeps_its_integers_and_multiplies_by_them() -> None:
    """Of two products with blocks of 32 asked for, the one that is given has blocks of 16, and says x W to float32's own rounding."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((64, 48)).astype(np.float32) for name in ("kept", "other")}
    format = BlockFormat(bits=4, block_size=16, symmetric=False)
    blocks = quantize_blocks(weights["kept"], format)
    weights["kept"] = dequantize(blocks.packed, blocks.scales, blocks.zero_points, 4, 16, 64, 48)
    x = ir.Value(name="x", shape=ir.Shape([2, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    values = [ir.Value(name=n, const_value=ir.tensor(w, name=n), shape=ir.Shape(w.shape), type=x.type) for n, w in weights.items()]
    nodes = [ir.node("MatMul", [x, value], name=value.name) for value in values]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"y_{node.name}", x.type, ir.Shape([2, 48])
    model = ir.Model(
        ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=values, opset_imports={"": 20}), ir_version=10
    )
    settings = settings_for("weight-only", method="rtn", accuracy_level=1, lm_head=True)
    given = {"kept": GivenBlocks(format=format, read=lambda: blocks)}
    done = quantize_graph(model, settings, blocks=WeightBlocks(given=given))
    assert done.given == ("kept",) and {error.name: error.relative > 0 for error in done.errors} == {"kept": False, "other": True}
    kept, other = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert (int_of(kept, "block_size"), int_of(other, "block_size")) == (16, 32) and (dequantize_nbits(kept) == weights["kept"]).all()
    given_x = random.standard_normal((2, 64)).astype(np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y_kept"], {"x": given_x})
    assert np.abs(y - given_x @ weights["kept"]).max() < 64 * np.finfo(np.float32).eps * np.abs(y).max()


def test_a_dry_run_tells_what_is_kept(tmp_path) -> None:
    folder, _ = _folder(tmp_path, "compressed-tensors", group=-1)
    settings = {"int4": ExportSettings(precision="int4"), "again": ExportSettings(precision="int4", method="rtn")}
    steps = {name: forecast_export(plan_export(folder, [], tmp_path / "out", each), each).steps for name, each in settings.items()}
    kept = "keep the integers of 21 weights of compressed-tensors, 4 bits, a scale for each output, and quantize the other weights to int4"
    assert f"{kept}, blocks of 32" in steps["int4"] and "quantize weights to int4, blocks of 32" in steps["again"]


def test_int8_weights_are_counted_as_what_they_are() -> None:
    kept = GivenBlocks(format=BlockFormat(bits=4, block_size=128), read=lambda: pytest.fail("not asked for"))
    blocks = WeightBlocks(given={"w": kept})
    assert blocks.format_of("w", INT4.format).block_size == 128 and blocks.format_of("w", INT4.int8_format) == INT4.int8_format
    assert blocks.format_of("other", INT4.format) == INT4.format

"""Mixed precision: what each weight costs is what its error does to the loss, and the budget is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from models.bases import save_base

from calibration.mixed import AUTO_SHARE, TABLE_SHARE, check_budget, choose_int8, outweighed_by_table, sizes
from calibration.quantize import quantize_graph
from calibration.settings import settings_for
from calibration.weight_only import WeightBlocks, dequantize, quantize_blocks
from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.exporting.export import export_bundle
from reft_export.exporting.settings import ExportSettings
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.sensitivity import Row, sensitivities
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import CalibrationError

QUIET = {"report": lambda _: None}
SETTINGS = settings_for("weight-only")


@pytest.fixture(scope="module")
def measured(float_bundle):
    source, base = float_bundle()
    bundle, graph, model = open_bundle(source), load_graph(source / "model.onnx"), load_base(base).model
    generator = np.random.default_rng(0)
    rows = [Row(ids=generator.integers(0, 250, 12), prompt_length=1) for _ in range(3)]
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    nats = sensitivities(model, graph.graph, bundle.manifest.weights, SETTINGS, rows, WeightBlocks())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    return bundle, graph, model, rows, nats


def test_every_quantized_weight_has_its_nats(measured) -> None:
    _, graph, _, _, nats = measured
    known = sizes(graph.graph, SETTINGS)
    assert set(nats) == set(known.extra) and len(nats) == 22 and min(nats.values()) > 0


def test_nats_are_half_the_fisher_information_in_the_direction_of_the_error(measured) -> None:
    """In expectation over signs: against a sum over tokens of their own gradients, one backward each."""
    bundle, graph, model, rows, _ = measured
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    array = np.ascontiguousarray(weight.detach().numpy().T)
    blocks = quantize_blocks(array, SETTINGS.format)
    error = torch.from_numpy(dequantize(blocks.packed, blocks.scales, blocks.zero_points, 4, 32, *array.shape) - array)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids)[None]
        weight.requires_grad_(True)
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        for loss in losses:
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            total += float((gradient.T * error).sum()) ** 2
            count += 1
        weight.requires_grad_(False)
    many = sensitivities(
        model, graph.graph, bundle.manifest.weights, replace(SETTINGS, keep_high=("0", "2", "lm_head")), rows * 8, WeightBlocks()
    )
    # 24 rows, a draw of signs each: the square of one varies as a chi-squared of one degree does, sqrt(2) of itself.
    assert many[name] == pytest.approx(total / (2 * count), rel=3 * (2 / 24) ** 0.5)


def test_what_costs_most_for_its_bytes_comes_first() -> None:
    from calibration.mixed import Sizes

    known = Sizes(smallest=1000, extra={"large": 100, "small": 10, "free": 0, "cheap": 10})
    nats = {"large": 5.0, "small": 1.0, "free": 9.0, "cheap": 0.1}
    assert choose_int8(nats, known, 1000) == ()
    assert choose_int8(nats, known, 1010) == ("small",)
    assert choose_int8(nats, known, 1020) == ("small", "cheap")  # the large one is passed over
    assert choose_int8(nats, known, 1110) == ("small", "large")
    assert choose_int8(nats, known) == ("small", "large", "cheap") and AUTO_SHARE * 1000 == 150
    with pytest.raises(CalibrationError, match=r"leaves 0\.0 MB for the weights.*take 0\.0 MB.*or leave it out"):
        check_budget(known, 999)


def test_sizes_are_those_of_the_file(measured) -> None:
    """Forecast to the byte, with int8 weights among the others and without."""
    for patterns in ((), ("*.mlp.down_proj", "1")):
        settings = replace(SETTINGS, int8=patterns)
        graph = load_graph(measured[0].graph_path)
        forecast = sizes(graph.graph, settings).smallest
        done = quantize_graph(graph, settings)
        stored = sum(int(value.const_value.nbytes) for value in graph.graph.initializers.values())
        assert forecast == stored
        assert len(done.int8) == (0 if not patterns else 7 + 2)
        bits = {node.attributes.get_int("bits") for node in graph.graph if node.op_type == "MatMulNBits"}
        assert bits == ({4, 8} if patterns else {4})


def test_a_mixed_bundle(float_bundle, tmp_path) -> None:
    source, base = float_bundle()
    result = quantize_bundle(source, base, tmp_path / "q", SETTINGS, mixed=True, **QUIET)
    assert result.parity.passed
    chosen = result.manifest.quantization.int8
    assert chosen and f"{len(chosen)} of 22 weights in int8" in result.note
    graph = load_graph(tmp_path / "q" / "model.onnx")
    wide = {node.inputs[1].name for node in graph.graph if node.op_type == "MatMulNBits" and node.attributes.get_int("bits") == 8}
    assert wide == {f"{name}_Q8" for name in chosen}
    with pytest.raises(CalibrationError, match="leaves .* MB for the weights, and in int4 alone"):
        quantize_bundle(source, base, tmp_path / "small", SETTINGS, budget_mb=0.01, **QUIET)
    with pytest.raises(CalibrationError, match="use --scheme weight-only -p int4"):
        quantize_bundle(source, base, tmp_path / "int8", settings_for("weight-only", 8), mixed=True, **QUIET)
    assert not (tmp_path / "small").exists() and not (tmp_path / "int8").exists()


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_an_embedding_that_takes_most_of_the_bytes_goes_to_int4_and_others_to_int8(precision, tmp_path) -> None:
    """By export, and by quantize on the float bundle; unless --embeddings says otherwise, and of no smaller embedding."""
    base = str(save_base(tmp_path / "base", "gemma3_text", overrides={"vocab_size": 4096, "tie_word_embeddings": True}))

    def made(name: str, **options):
        settings = ExportSettings(precision=precision, **(options if precision == "int4" else {}))
        result = export_bundle(base, [], tmp_path / name, settings, **QUIET)
        if precision == "fp32":
            result = quantize_bundle(tmp_path / name, base, tmp_path / f"{name}-int4", settings_for("weight-only", **options), **QUIET)
        assert result.parity.passed
        return result.manifest.quantization, result

    small, result = made("small")
    assert small.embeddings == 4 and 0 < len(small.int8) < 14 and "the embedding takes most of the bytes" in result.note
    asked, result = made("asked", embeddings=8)
    assert asked.embeddings == 8 and not asked.int8 and "most of the bytes" not in (result.note or "")


def test_which_embedding_takes_most_of_the_bytes(measured) -> None:
    bundle, graph, *_ = measured
    known = sizes(graph.graph, SETTINGS, (), bundle.manifest.weights)
    assert 0 < known.table < TABLE_SHARE * known.smallest
    assert not outweighed_by_table(graph.graph, SETTINGS, bundle.manifest.weights)


def test_int8_weights_stand_among_int4_ones() -> None:
    with pytest.raises(CalibrationError, match="int8 weights stand among int4 ones"):
        settings_for("weight-only", 8, int8=("*",))
    graph = ir.Model(ir.Graph([], [], nodes=[], name="g"), ir_version=10)
    with pytest.raises(CalibrationError, match="no MatMul"):
        quantize_graph(graph, settings_for("weight-only", int8=("nothing",)))

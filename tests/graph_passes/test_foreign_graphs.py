"""What ``fold`` refuses of graphs that other tools made, each in one line and with nothing written; what ``inspect`` says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from models.adapters import random_adapter
from small_decoders import WIDTH, small_decoder
from typer.testing import CliRunner

from reft_export.cli.inspect import inspect_graph
from reft_export.cli.main import app
from reft_export.folding.fold import fold_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import BaseModel, save_adapter
from runtimes.edits.edit import STREAMS, Site
from runtimes.errors import AdapterError, GraphError, SiteAmbiguous

QUIET = {"sites": (), "force": False, "report": lambda _: None}


def _save(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.data", size_threshold_bytes=1)
    return folder


def _no_present_outputs(folder: Path, model: ir.Model) -> None:
    del model.graph.outputs[2:]


def _no_cache(folder: Path, model: ir.Model) -> None:
    del model.graph.outputs[1:]


def _cache_left_out(folder: Path, model: ir.Model) -> None:
    """Logits of the last token alone, [batch, vocabulary], and no cache: inputs and outputs of a classifier."""
    del model.graph.outputs[1:]
    model.graph.inputs[:] = [value for value in model.graph.inputs if not value.name.startswith("past")]
    for node in (node for node in model.graph if node.name.startswith("present")):
        node.replace_input_with(0, node.inputs[1])
        node.resize_inputs(1)
    logits = model.graph.outputs[0]
    logits.shape = ir.Shape(["batch", logits.shape[-1]])


def _unknown_operator(folder: Path, model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Add").domain = "trained.on.mars"
    model.opset_imports["trained.on.mars"] = 1


def _unknown_name(folder: Path, model: ir.Model) -> None:
    next(node for node in model.graph if node.op_type == "Relu").op_type = "Frobnicate"


def _unknown_operator_in_a_function(folder: Path, model: ir.Model) -> None:
    """Called through another function, as exporters nest them; a third, which nothing calls, is of no concern."""
    for domain, name, inner in (("own", "Outer", "own"), ("own", "Inner", "trained.on.mars"), ("own", "Unused", "venus")):
        x = ir.Value(name="x")
        node = ir.node("Inner", [x], domain=inner)
        node.outputs[0].name = f"{name}.y"
        body = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 18, inner: 1}, name=name)
        function = ir.Function(domain, name, graph=body, attributes=[])
        model.functions[function.identifier()] = function
    relu = next(node for node in model.graph if node.op_type == "Relu")
    relu.op_type, relu.domain = "Outer", "own"
    model.opset_imports["own"] = 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_no_present_outputs, r"not a decoder with a KV cache: output 'present.1.key', output 'present.2.key' missing"),
        (_no_cache, r"not a decoder with a KV cache.*outputs 'present.<layer>.key' missing"),
        (_unknown_operator, r"Add\(.*\) is an operator of 'trained.on.mars'"),
        (_unknown_name, r"Frobnicate\(.*\) is an operator that neither ONNX's own domain nor the graph defines"),
        (_unknown_operator_in_a_function, r"Inner\('Inner.y'\) in the function 'Inner' is an operator of 'trained.on.mars'"),
        (_cache_left_out, r"logits \[batch, 11\], one for every token of its vocabulary.* export the decoder with its cache"),
    ],
    ids=["present", "cache", "domain", "name", "function", "no_cache_at_all"],
)
def test_graphs_that_are_refused(change: Callable[[Path, ir.Model], None], match: str, tmp_path) -> None:
    model = small_decoder()
    change(tmp_path, model)
    _refused(_save(model, tmp_path / "source"), tmp_path, match)


def test_truncated_weights_are_refused(tmp_path) -> None:
    source = _save(small_decoder(), tmp_path / "source")
    (source / "model.data").write_bytes((source / "model.data").read_bytes()[:-8])
    _refused(source, tmp_path, "the file is cut short")


def test_weights_outside_the_folder_are_refused(tmp_path) -> None:
    source = _save(small_decoder(), tmp_path / "source")
    (source / "model.data").rename(tmp_path / "model.data")
    graph = (source / "model.onnx").read_bytes()
    # The same length, so that protobuf's own lengths still hold.
    (tmp_path / "source" / "model.onnx").write_bytes(graph.replace(b"model.data", b"../mo.data"))
    (tmp_path / "model.data").rename(tmp_path / "mo.data")
    _refused(source, tmp_path, "which leaves the graph's folder")


def _refused(source: Path, tmp_path: Path, match: str) -> None:
    with pytest.raises(GraphError, match=match) as caught:
        fold_bundle(source, [], tmp_path / "out", **QUIET)
    assert len(str(caught.value).splitlines()) == 1 and caught.value.exit_code == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


def test_inspect_lists_every_site_of_every_layer(tmp_path) -> None:
    content = inspect_graph(_save(small_decoder(), tmp_path / "source"))
    assert [row["site"] for row in content["sites"]] == sorted(str(Site(layer=i, stream=s)) for i in range(3) for s in STREAMS)
    assert content["layers"] == 3 and content["not found"] == []
    assert next(row for row in content["sites"] if row["site"] == "1.block_output") == {
        "site": "1.block_output",
        "value": "layers.1.output",
        "how": "Add('layers.1.output'): nearest value upstream of present.2.key that all of logits depends on",
    }


def test_names_that_read_as_rich_markup_are_shown(tmp_path) -> None:
    model = small_decoder()
    ends = [value for node in model.graph for value in node.outputs if node.op_type == "Add"]
    for i, value in enumerate(ends):
        value.name = rf"\[/x]{i} [b]"
    source = _save(model, tmp_path / "source")
    for arguments in (["inspect", str(source)], ["fold", str(source), "--sites", "0.block_output", "-o", str(tmp_path / "[/out]")]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.exception
        assert r"\[/x]" in done.output and " [b]" in done.output


def test_inspect_shows_the_candidates_of_what_it_cannot_tell(tmp_path) -> None:
    source = _save(small_decoder(block="post_norm", layers=1), tmp_path / "source")
    (why,) = [row["why"] for row in inspect_graph(source)["not found"] if row["site"] == "0.block_output"]
    assert "layers.0.add_2" in why and "or the norm behind it" in why
    with pytest.raises(SiteAmbiguous, match="or the norm behind it"):
        fold_bundle(source, [], tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_the_width_is_the_graphs_own(tmp_path) -> None:
    """Without a configuration beside it, or with that of another model."""
    source = _save(small_decoder(), tmp_path / "source")
    for name, config in (("alone", {}), ("beside", {"hidden_size": 2 * WIDTH})):
        (source / "config.json").write_text(json.dumps(config))
        fold_bundle(source, [], tmp_path / name, **QUIET)
        assert open_bundle(tmp_path / name).manifest.model.hidden_size == WIDTH


def _adapter(folder: Path, width: int) -> Path:
    base = BaseModel(name="toy", fingerprint="f" * 64, num_hidden_layers=3, hidden_size=width)
    save_adapter(random_adapter(base, (Site(layer=1),), rank=2), folder)
    return folder


@pytest.mark.parametrize("config", [{}, {"hidden_size": 2 * WIDTH}], ids=["no_config", "config_of_another_model"])
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("block", ["pre_norm", "pre_norm_fused"])
def test_an_adapter_of_another_width_is_refused(block, typed, config, tmp_path) -> None:
    """Whatever order adapters come in, and whether shapes, weights or a configuration tell the width."""
    source = _save(small_decoder(block=block, typed=typed), tmp_path / "source")
    (source / "config.json").write_text(json.dumps(config))
    right, wide = _adapter(tmp_path / "right", WIDTH), _adapter(tmp_path / "wide", 2 * WIDTH)
    for adapters in ([wide], [wide, right], [right, wide]):
        with pytest.raises(AdapterError, match=rf"adapter wide was trained on toy \(3 layers, width {2 * WIDTH}\).* width {WIDTH}; pass"):
            fold_bundle(source, adapters, tmp_path / "out", **QUIET)
        assert not (tmp_path / "out").exists()
    assert fold_bundle(source, [right], tmp_path / "out", **QUIET).adapters == ("right",)


def test_labels_of_a_graph_that_names_none_are_not_all_listed(tmp_path) -> None:
    model = small_decoder()
    _cache_left_out(tmp_path, model)
    source = _save(model, tmp_path / "source")
    (source / "config.json").write_text('{"vocab_size": 4000}')
    with pytest.raises(AdapterError, match="with labels none; .* has 11: LABEL_0, .*, LABEL_7 and 3 more; pass"):
        fold_bundle(source, [_adapter(tmp_path / "right", WIDTH)], tmp_path / "out", **QUIET)

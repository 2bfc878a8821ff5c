"""Encoder classifiers that another tool exported: sites and heads found by structure, whatever the graph calls things."""

from __future__ import annotations

import json
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import tiny_encoders
import torch
from typer.testing import CliRunner

from graph_passes.external import load_graph
from graph_passes.find.sites import survey_sites
from reft_export.base.classifiers import takes_token_types
from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.eager.steering import steered
from reft_export.exporting.dynamo_classifier import LogitsOnly
from reft_export.folding.fold import fold_bundle
from reft_export.folding.graph_record import foreign_record, task_of
from reft_export.parity.ladder import host_ladder
from reft_export.tasks.classification import classifier_inputs
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import STREAMS, Site
from runtimes.errors import AdapterError, GraphError
from runtimes.golden import check_golden
from runtimes.ort.classifier import OrtClassifier

OPSETS = (16, 17)
"""From 17 on LayerNormalization is one node; before, it is nine."""


def foreign_graph(base_folder: Path, folder: Path, opset: int) -> Path:
    """TorchScript's exporter, which optimum uses, without our rearranged weights; every node and value renamed."""
    model = load_base(base_folder).model
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if takes_token_types(model) else [])]
    arguments = {name: torch.full((2, 5), {"input_ids": 7, "attention_mask": 1, "token_type_ids": 0}[name]) for name in names}
    folder.mkdir(parents=True)
    dynamic = {name: {0: "batch", 1: "sequence"} for name in names} | {"logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LogitsOnly(model).eval(), tuple(arguments.values()), folder / "raw.onnx",
            dynamo=False, opset_version=opset, input_names=names, output_names=["logits"], dynamic_axes=dynamic,
        )  # fmt: skip
    graph = ir.load(folder / "raw.onnx")
    kept = {*names, "logits"}
    for i, node in enumerate(graph.graph.all_nodes()):
        node.name = f"n{i}"
        for j, value in enumerate(node.outputs):
            value.name = value.name if value.name in kept else f"v{i}.{j}"
    for i, value in enumerate(list(graph.graph.initializers.values())):
        value.name = f"w{i}"
    ir.save(graph, folder / "model.onnx")
    (folder / "raw.onnx").unlink()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(base_folder / name, folder / name)
    return folder / "model.onnx"


def check(family: str, opset: int, root: Path) -> None:
    base_folder = tiny_encoders.save_base(root / "base", family)
    graph = foreign_graph(base_folder, root / "graph", opset)
    base = load_base(base_folder)
    folders = []
    for stream in STREAMS:
        adapter = tiny.random_adapter(base.info, tied=False, positions="f1+l3", stream=stream, layers=(0, 1, tiny.LAYERS - 1))
        head = tiny_encoders.random_head(base.model) if stream == "block_output" else {}
        save_adapter(replace(adapter, head=head), root / stream)
        folders.append(root / stream)
    fold_bundle(graph, folders, root / "bundle", sites=(), force=False, report=lambda _: None)
    bundle = open_bundle(root / "bundle")
    assert bundle.manifest.labels == tiny_encoders.LABELS and bundle.manifest.model.context_length == (64 if "roberta" in family else 66)
    inputs = classifier_inputs(base.model, base.tokenizer)
    session = OrtClassifier(bundle, threads=1)
    for stream in (None, *STREAMS):
        with steered(base.model, load_adapter(root / stream)) if stream else nullcontext():
            wanted = inputs.logits(base.model)
        session.set_adapter(stream)
        got = session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits
        assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max(), stream
    assert host_ladder(bundle, str(base_folder), report=lambda _: None).passed


def test_a_renamed_graph_of_another_exporter(tmp_path: Path) -> None:
    check("roberta", 17, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("family", ["bert", "electra", "distilbert"])
def test_every_family_and_opset(tmp_path: Path, family: str, opset: int) -> None:
    check(family, opset, tmp_path)


def _bundle(*arguments: object) -> Bundle:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.stderr
    return open_bundle(Path(arguments[arguments.index("-o") + 1]))


@pytest.mark.slow
def test_fold_and_quantize_against_the_base(tmp_path: Path) -> None:
    """RED and LoReFT with heads of their own, in a renamed graph: folded with the base, or quantized with it after a fold without."""
    base_folder = tiny_encoders.save_base(tmp_path / "base")
    graph, base = foreign_graph(base_folder, tmp_path / "graph", 17), load_base(base_folder)
    adapters = {"loreft": tiny.random_adapter(base.info), "red": tiny.random_adapter(base.info, method="red", positions="prompt", seed=1)}
    given = []
    for seed, (name, adapter) in enumerate(adapters.items()):
        save_adapter(replace(adapter, head=tiny_encoders.random_head(base.model, seed)), tmp_path / name)
        given += ["-a", tmp_path / name]
    known = _bundle("fold", graph, *given, "-m", base_folder, "-o", tmp_path / "known")
    _bundle("fold", graph, *given, "-o", tmp_path / "alone")
    for source, bits in (("known", 4), ("alone", 8)):
        target = tmp_path / f"{source}-int{bits}"
        quantized = _bundle("quantize", tmp_path / source, "-m", base_folder, "-o", target, "-p", f"int{bits}")
        assert (quantized.manifest.labels, quantized.manifest.head) == (tiny_encoders.LABELS, known.manifest.head)
        assert not set(quantized.manifest.head) & set(quantized.manifest.weights), "heads stay in float"
    for bundle in (known, quantized):
        assert check_golden(bundle, OrtClassifier(bundle, threads=1)).passed
        assert host_ladder(bundle, str(base_folder), report=lambda _: None).passed
    # A fold that took another head for the base's would not have come this far.
    other = tiny_encoders.build()
    with torch.no_grad():
        next(reversed(list(other.parameters()))).add_(0.1)
    other.save_pretrained(tmp_path / "other")
    done = CliRunner().invoke(app, ["fold", str(graph), "-m", str(tmp_path / "other"), "-o", str(tmp_path / "no")])
    assert done.exit_code == 3 and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_labels_are_the_bases_where_it_is_known(tmp_path: Path) -> None:
    """What stands beside a graph may name them by number, or in another order; the base's order is what parity was shown of."""
    base_folder = tiny_encoders.save_base(tmp_path / "base")
    graph = foreign_graph(base_folder, tmp_path / "graph", 17)
    path = graph.parent / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}))
    assert _bundle("fold", graph, "-o", tmp_path / "alone").manifest.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert _bundle("fold", graph, "-m", base_folder, "-o", tmp_path / "known").manifest.labels == tiny_encoders.LABELS


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_without_a_config_the_graph_says_how_long_a_text_may_be(tmp_path: Path, family: str) -> None:
    """RoBERTa's table has two rows that no token is looked up in; with the base at hand the texts are as long as the base takes."""
    base_folder = tiny_encoders.save_base(tmp_path / "base", family)
    graph = foreign_graph(base_folder, tmp_path / "graph", 17)
    (graph.parent / "config.json").unlink()
    save_adapter(tiny.random_adapter(load_base(base_folder).info), tmp_path / "style")
    done = CliRunner().invoke(app, ["fold", str(graph), "-a", str(tmp_path / "style"), "-o", str(tmp_path / "alone")])
    assert done.exit_code == 0, done.stderr
    bundle = open_bundle(tmp_path / "alone")
    assert bundle.manifest.model.context_length == tiny_encoders.POSITIONS
    assert host_ladder(bundle, str(base_folder), report=lambda _: None).passed


def test_a_config_that_says_it_all_spares_the_look_for_tables(tmp_path: Path, monkeypatch) -> None:
    """A graph whose lookups are fused into one operator has no table to look at."""
    graph = foreign_graph(tiny_encoders.save_base(tmp_path / "base", "bert"), tmp_path / "graph", 17)
    monkeypatch.setattr("reft_export.folding.graph_record.token_embedding", lambda _: pytest.fail("the graph was asked"))
    model = load_graph(graph)
    assert foreign_record(model, graph, task_of(model.graph)).context_length == tiny_encoders.POSITIONS


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    base_folder = tiny_encoders.save_base(tmp_path / "base", "bert", num_hidden_layers=1)
    graph = foreign_graph(base_folder, tmp_path / "graph", 17)
    base = load_base(base_folder)
    survey = survey_sites(load_graph(graph))
    assert set(survey.found) == {Site(layer=0, stream="block_input")}
    assert "a post-norm cannot be told from a final norm; use a base of two layers or more" in str(
        survey.refused[Site(layer=0, stream="block_output")]
    )
    adapter = tiny.random_adapter(base.info, layers=(0,), stream="block_input")
    two = replace(adapter, base=replace(base.info, labels=("no", "yes")))
    save_adapter(two, tmp_path / "two")
    with pytest.raises(AdapterError, match="adapter two was trained on base with labels no, yes; .* has 3: sad, calm, happy"):
        fold_bundle(graph, [tmp_path / "two"], tmp_path / "out", sites=(), force=False, report=lambda _: None)
    decoder = replace(adapter, base=replace(base.info, labels=()))
    save_adapter(decoder, tmp_path / "decoder")
    with pytest.raises(AdapterError, match="with labels none"):
        fold_bundle(graph, [tmp_path / "decoder"], tmp_path / "out", sites=(), force=False, report=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_head_of_other_layers_is_refused(tmp_path: Path) -> None:
    base_folder = tiny_encoders.save_base(tmp_path / "base", "bert")
    graph = foreign_graph(base_folder, tmp_path / "graph", 17)
    base = load_base(base_folder)
    wide = {"classifier.weight": np.zeros((3, 65), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    save_adapter(replace(tiny.random_adapter(base.info), head=wide), tmp_path / "wide")
    with pytest.raises(GraphError, match=r"are \[out, in\] \[3, 64\] and \[3\], the adapter's classifier.weight is \[3, 65\]"):
        fold_bundle(graph, [tmp_path / "wide"], tmp_path / "out", sites=(), force=False, report=lambda _: None)
    assert not (tmp_path / "out").exists()

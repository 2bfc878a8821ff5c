"""Encoder classifiers that another tool exported: sites and heads found by structure, whatever the graph calls things."""

from __future__ import annotations

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

from graph_passes.external import load_graph
from graph_passes.sites import survey_sites
from reft_export.base import load_base
from reft_export.classifiers import takes_token_types
from reft_export.eager import steered
from reft_export.exporters.dynamo_classifier import LogitsOnly
from reft_export.fold import fold_bundle
from reft_export.golden_classifier import classifier_inputs, classifier_logits
from reft_export.parity import host_ladder
from runtimes.adapter import load_adapter, save_adapter
from runtimes.bundle import open_bundle
from runtimes.edit import STREAMS, Site
from runtimes.errors import AdapterError, GraphError
from runtimes.ort_classifier import OrtClassifier

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
    fold_bundle(graph, folders, root / "bundle", slots="graph", sites=(), force=False, report=lambda _: None)
    bundle = open_bundle(root / "bundle")
    assert bundle.manifest.labels == tiny_encoders.LABELS and bundle.manifest.model.context_length == (64 if "roberta" in family else 66)
    inputs = classifier_inputs(base.model, base.tokenizer)
    session = OrtClassifier(bundle, threads=1)
    for stream in (None, *STREAMS):
        with steered(base.model, load_adapter(root / stream)) if stream else nullcontext():
            wanted = classifier_logits(base.model, inputs)
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
        fold_bundle(graph, [tmp_path / "two"], tmp_path / "out", slots="graph", sites=(), force=False, report=lambda _: None)
    decoder = replace(adapter, base=replace(base.info, labels=()))
    save_adapter(decoder, tmp_path / "decoder")
    with pytest.raises(AdapterError, match="with labels none"):
        fold_bundle(graph, [tmp_path / "decoder"], tmp_path / "out", slots="graph", sites=(), force=False, report=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_head_of_other_layers_is_refused(tmp_path: Path) -> None:
    base_folder = tiny_encoders.save_base(tmp_path / "base", "bert")
    graph = foreign_graph(base_folder, tmp_path / "graph", 17)
    base = load_base(base_folder)
    wide = {"classifier.weight": np.zeros((3, 65), np.float32), "classifier.bias": np.zeros(3, np.float32)}
    save_adapter(replace(tiny.random_adapter(base.info), head=wide), tmp_path / "wide")
    with pytest.raises(GraphError, match=r"are \[out, in\] \[3, 64\] and \[3\], the adapter's classifier.weight is \[3, 65\]"):
        fold_bundle(graph, [tmp_path / "wide"], tmp_path / "out", slots="graph", sites=(), force=False, report=lambda _: None)
    assert not (tmp_path / "out").exists()

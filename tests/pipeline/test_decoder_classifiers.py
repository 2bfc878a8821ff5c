"""A decoder that classifies: a row of logits for the last token that is no pad, trained with its head, exported, quantized and run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models.classifiers import DECODERS, LABELS, PAD, build_classifier, save_classifier
from shared_folders import shared_folder
from typer.testing import CliRunner, Result

from graph_passes.find.sites import find_sites
from reft_export.base import classifiers
from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.eager.steering import steered
from reft_export.exporting.dynamo_classifier import export_classifier
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import Site
from runtimes.golden import check_golden
from runtimes.ort.classifier import OrtClassifier

WORDS = {"bad": "sad", "so": "calm", "good": "happy"}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def folder() -> Path:
    """With a base, an adapter with its head, and their bundle."""

    def make(output: Path) -> None:
        output.mkdir()
        base, data = save_classifier(output / "base", "qwen2"), output / "data.jsonl"
        lines = [{"text": f"it is {word} {i}", "label": label} for i in range(4) for word, label in WORDS.items()]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = ("--positions", "l2", "--layers", "0;1", "--rank", 2, "--max-steps", 12, "--lr", 0.02)
        done = invoke("train", "-m", base, "-d", data, "-o", output / "mood", *options)
        assert done.exit_code == 0 and "steered 100.0%" in " ".join(done.stdout.split()), done.output
        done = invoke("export", "-m", base, "-a", output / "mood", "-o", output / "bundle")
        assert done.exit_code == 0, done.output

    return shared_folder("bundles/decoder-classifier", make)


def test_the_bundle_is_the_eager_model(folder: Path) -> None:
    bundle = open_bundle(folder / "bundle")
    report = check_golden(bundle, OrtClassifier(bundle, threads=1))
    assert report.passed and min(r.delta.cosine for r in report.rungs if r.delta is not None) > 0.99999
    assert list(bundle.manifest.head) == ["reft.head.score.weight"]


def test_run_gives_the_label(folder: Path) -> None:
    """Texts of other lengths in one batch are as each alone, and as eager PyTorch says."""
    base, adapter = load_base(folder / "base"), load_adapter(folder / "mood")
    texts = ["it is good 2", "it is so 1, and a little longer", "it is bad 3"]
    done = invoke("run", folder / "bundle", "-a", "mood", *(each for text in texts for each in ("-p", text)), "--json")
    assert done.exit_code == 0, done.output
    for text, line in zip(texts, done.stdout.splitlines(), strict=True):
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        with torch.no_grad(), steered(base.model, adapter):
            wanted = base.model(input_ids=ids).logits.softmax(-1)[0].tolist()
        said = json.loads(line)["probabilities"]
        np.testing.assert_allclose([said[label] for label in LABELS], wanted, rtol=0, atol=1e-5)
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()][::2] == ["happy", "sad"]


def test_a_planted_fault_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads that are another token than the model's: the row picked is a pad's."""
    bundle = open_bundle(folder / "bundle")
    plain = OrtClassifier.classify

    def other_pads(self: OrtClassifier, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None):
        assert (ids[mask == 0] == PAD).all()
        return plain(self, np.where(mask > 0, ids, PAD + 5), mask, types)

    monkeypatch.setattr(OrtClassifier, "classify", other_pads)
    assert not check_golden(bundle, OrtClassifier(bundle, threads=1)).passed


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized(scheme: str, folder: Path, tmp_path: Path) -> None:
    done = invoke("quantize", folder / "bundle", "-m", folder / "base", "-o", tmp_path / "small", "-p", scheme, "--min-retention", 0.1)
    assert done.exit_code == 0, done.output
    bundle = open_bundle(tmp_path / "small")
    assert check_golden(bundle, OrtClassifier(bundle, threads=1)).passed


@pytest.mark.slow
def test_an_edit_behind_what_is_read_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of a tokenizer that ends texts with the pad token: the label comes of the token before."""
    base = shutil.copytree(folder / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    for positions, code in (("l1", 2), ("l2", 0)):
        options = ("--positions", positions, "--layers", "0", "--rank", 2, "--dry-run")
        done = invoke("train", "-m", base, "-d", folder / "data.jsonl", "-o", tmp_path / "mood", *options)
        assert done.exit_code == code, done.output
        assert code == 0 or "ends texts with the pad token; use l2" in " ".join(done.stderr.split())


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_shows_its_sites(family: str) -> None:
    found = find_sites(export_classifier(build_classifier(family)).model)
    streams = ("block_input", "block_output", "attention_output", "mlp_output")
    assert set(found) == {Site(layer=layer, stream=stream) for layer in (0, 1) for stream in streams}


def test_the_list_is_what_is_tested() -> None:
    assert set(DECODERS) == set(classifiers.DECODERS)

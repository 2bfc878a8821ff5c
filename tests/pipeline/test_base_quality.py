"""What quantization costs a base without any adapter: it is measured on passages, and accuracy level 4 is held to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_folders import shared_folder

from calibration.settings import settings_for
from graph_passes.external import load_graph
from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.tasks import generation
from reft_export.tasks.passages import PASSAGES, passage_rows
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import write_manifest
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession
from runtimes.parity import retention

QUIET = {"report": lambda _: None}
INT4 = settings_for("weight-only", bits=4)


@pytest.fixture(scope="module")
def floats(base_folder) -> Bundle:
    """The base alone."""

    def make(output: Path) -> None:
        export_bundle(str(base_folder()), [], output, ExportSettings(), **QUIET)

    return open_bundle(shared_folder("base-quality/fp32", make))


@pytest.fixture(scope="module")
def int4(floats, base_folder) -> Bundle:
    def make(output: Path) -> None:
        quantize_bundle(floats.folder, str(base_folder()), output, INT4, **QUIET)

    return open_bundle(shared_folder("base-quality/int4", make))


def quality_of(bundle: Bundle) -> retention.Quality:
    with OrtSession(bundle, threads=1) as session:
        (found,) = check_golden(bundle, session).quality
    return found


def test_passages_are_recorded_where_a_base_is_quantized(floats, int4, base_folder) -> None:
    before, arrays, base = floats.golden(BASE_GOLDEN), int4.golden(BASE_GOLDEN), load_base(base_folder())
    continued = len(before["input_ids"])
    rows = [ids[mask > 0].tolist() for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]
    assert rows[continued:] == passage_rows(base.tokenizer, int4.manifest.model.context_length) and len(rows) == continued + len(PASSAGES)
    assert "log_probabilities" not in before and np.array_equal(arrays["logit_positions"], before["logit_positions"])
    wanted = []
    for row, prompt in zip(rows, arrays["prompt_length"].tolist(), strict=True):
        with torch.no_grad():
            said = torch.log_softmax(base.model(input_ids=torch.tensor([row])).logits[0].double(), -1)
        wanted += [float(said[c, row[c + 1]]) for c in range(prompt - 1, len(row) - 1)]
    np.testing.assert_allclose(arrays["fp32_log_probabilities"], wanted, atol=2e-4)
    assert np.abs(arrays["log_probabilities"] - arrays["fp32_log_probabilities"]).max() > 1e-3


def test_the_report_tells_of_the_base(int4, base_folder) -> None:
    found = quality_of(int4)
    assert found.name == BASE_GOLDEN and found.tokens == len(int4.golden(BASE_GOLDEN)["log_probabilities"]) > 700
    assert found.loss == pytest.approx(found.here - found.float_own) and not found.rounded_away
    assert str(found).startswith("base: perplexity ")
    host_ladder(int4, str(base_folder()), **QUIET).require()


def test_level_4_of_a_base_that_costs_too_much_is_seen(int4, tmp_path) -> None:
    """Planted: at level 1 every token was likelier by 0.05 nats."""
    arrays = int4.golden(BASE_GOLDEN)
    arrays["log_probabilities"] = np.minimum(arrays["log_probabilities"] + np.float32(0.05), 0)
    shutil.copytree(int4.folder, tmp_path / "b")
    np.savez(tmp_path / "b" / "golden" / "base.npz", **arrays)
    write_manifest(tmp_path / "b", int4.manifest)
    assert quality_of(open_bundle(tmp_path / "b")).rounded_away


@pytest.mark.parametrize("scheme", ["weight-only", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_a_base_alone_gets_level_1_where_level_4_costs_too_much(scheme, floats, base_folder, tmp_path, monkeypatch) -> None:
    """Planted: any rounding is too much. What rounds activations by a formula that the gate follows has no levels to choose from."""
    monkeypatch.setattr(retention, "MOST_ROUNDING", -10.0)
    settings = INT4 if scheme == "weight-only" else settings_for(scheme)
    made = quantize_bundle(floats.folder, str(base_folder()), tmp_path / "made", settings, **QUIET)
    assert made.parity.passed
    if scheme == "dynamic":
        assert not made.parity.notes
        return
    assert made.manifest.quantization.accuracy_level == 1 and made.parity.notes[0].startswith("accuracy level 1: level 4 costs base ")
    levels = {n.attributes.get_int("accuracy_level") for n in load_graph(tmp_path / "made/model.onnx").graph if n.op_type == "MatMulNBits"}
    assert levels == {1}


def test_a_base_without_a_tokenizer_has_no_passages() -> None:
    assert passage_rows(None, 64) == []


def test_adapters_without_probes_are_recorded_on_the_continued_rows_alone(int4, base_folder) -> None:
    stored = generation.Generation().stored_inputs(int4.golden(BASE_GOLDEN))
    shared = stored.for_adapters(load_base(base_folder()).model)
    assert stored.likelihoods and not shared.likelihoods
    assert len(shared.input_ids) == shared.continued < len(stored.input_ids)
    assert shared.input_ids.shape[1] == shared.attention_mask.sum(1).max()

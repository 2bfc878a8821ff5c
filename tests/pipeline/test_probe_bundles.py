"""Bundles of adapters with probes: what is recorded of them, what a fault does to it, and what is measured on them by default."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from shared_folders import shared_folder

from calibration.settings import settings_for
from graph_passes.external import load_graph
from reft_export.adding.add import add_adapter
from reft_export.base.load import Base, load_base
from reft_export.eager.steering import steered
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.golden import inputs_key
from reft_export.parity.ladder import host_ladder
from reft_export.parity.quality import QualityGate
from reft_export.quantizing import assemble, weights
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import CalibrationRequest, RefitSettings
from reft_export.quantizing.swap import swap_bundle
from reft_export.tasks import generation
from reft_export.tasks.probe_rows import probe_rows
from reft_export.tasks.task import GENERATION
from reft_export.training.probes import probe_examples
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import write_manifest
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.errors import AdapterError, CalibrationError, ParityError
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession
from runtimes.parity import retention
from runtimes.parity.figures import ParityReport

QUIET = {"report": lambda _: None}
PROBES = tuple({"prompt": f"Number {i}" + " of many" * (i % 5), "completion": f"the answer is {i}" + "!" * (i % 3)} for i in range(9))


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory) -> list[Path]:
    """One with probes, and one without."""
    root, info = tmp_path_factory.mktemp("probed"), load_base(base_folder()).info
    save_adapter(replace(tiny.random_adapter(info, positions="f2+l2"), probes=PROBES), root / "probed")
    save_adapter(tiny.random_adapter(info, positions="l1", seed=1), root / "bare")
    return [root / "probed", root / "bare"]


@pytest.fixture(scope="module")
def bundle(base_folder, adapters) -> Bundle:
    def make(output: Path) -> None:
        export_bundle(str(base_folder()), adapters, output, ExportSettings(), **QUIET)

    return open_bundle(shared_folder("probes/fp32", make))


def answers(base: Base, folder: Path | None, examples: list) -> np.ndarray:
    """log p of every token of the completions, one example after the other."""
    said = []
    for example in examples:
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            if folder is None:
                logits = base.model(input_ids=ids).logits
            else:
                with steered(base.model, load_adapter(folder)) as handle:
                    handle.prompt_length = [example.prompt_length]
                    logits = base.model(input_ids=ids).logits
        log_p = torch.log_softmax(logits[0].double(), -1)
        said.append([float(log_p[c, ids[0, c + 1]]) for c in range(example.prompt_length - 1, ids.shape[1] - 1)])
    return np.concatenate(said)


def test_rows_are_the_probes_and_tell_how_probable_their_completions_are(bundle, base_folder, adapters) -> None:
    base, golden = load_base(base_folder()), bundle.golden("probed")
    examples = {e.input_ids: e for e in probe_examples(base, load_adapter(adapters[0]))}
    rows = probe_rows(bundle, "probed")
    assert len(rows) == len(PROBES) == len(examples)
    found = [examples[tuple(row.ids.tolist())] for row in rows]
    assert [row.prompt_length for row in rows] == [e.prompt_length for e in found]
    for kind, folder in (("", adapters[0]), ("base_", None)):
        wanted = answers(base, folder, found)
        np.testing.assert_allclose(golden[f"{kind}log_probabilities"], wanted, atol=2e-4)
    assert np.abs(golden["log_probabilities"] - golden["base_log_probabilities"]).max() > 0.01
    assert len(golden["greedy_tokens"]) == 4 and golden["logit_positions"][:, 0].max() == 3


def test_an_adapter_without_probes_is_recorded_as_the_base(bundle) -> None:
    base, bare = bundle.golden("base"), bundle.golden("bare")
    for name in ("input_ids", "prompt_length", "logit_positions"):
        assert np.array_equal(base[name], bare[name])
    assert "log_probabilities" not in bare and "log_probabilities" not in base and probe_rows(bundle, "bare") == []


def test_every_rung_passes_and_completions_are_one(bundle, base_folder) -> None:
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    report.require()
    tokens = len(bundle.golden("probed")["log_probabilities"])
    assert {r.name: r.figures.compared for r in report.rungs if r.name.endswith("completions")} == {"probed: completions": tokens}
    host_ladder(bundle, str(base_folder()), **QUIET).require()


def missed(bundle: Bundle, folder: Path, change: dict[str, np.ndarray]) -> set[str]:
    """The rungs that a changed array of the adapter's makes fail."""
    shutil.copytree(bundle.folder, folder)
    np.savez(folder / "golden" / "probed.npz", **bundle.golden("probed") | change)
    write_manifest(folder, bundle.manifest)
    changed = open_bundle(folder)
    report: ParityReport = check_golden(changed, OrtSession(changed, threads=1))
    return {r.name for r in report.rungs if not r.passed}


def test_one_log_probability_that_is_off_fails(bundle, tmp_path) -> None:
    said = bundle.golden("probed")["log_probabilities"].copy()
    said[-1] -= 1e-2
    assert missed(bundle, tmp_path / "b", {"log_probabilities": said}) == {"probed: completions"}


def test_the_bases_log_probabilities_under_the_adapters_name_fail(bundle, tmp_path) -> None:
    said = {"log_probabilities": bundle.golden("probed")["base_log_probabilities"]}
    assert missed(bundle, tmp_path / "b", said) == {"probed: completions"}


def test_a_logit_of_one_column_that_is_off_fails(bundle, tmp_path) -> None:
    logits = bundle.golden("probed")["logits"].copy()
    logits[5, logits[5].argmin()] -= 1e-3 * np.abs(logits).max()
    names = missed(bundle, tmp_path / "b", {"logits": logits})
    assert "probed: full forward" in names and all(name.startswith("probed: ") for name in names)


def test_quantizing_keeps_the_probes_and_calibrates_on_them(bundle, base_folder, tmp_path) -> None:
    model = str(base_folder())
    result = quantize_bundle(bundle.folder, model, tmp_path / "static", settings_for("static"), **QUIET)
    assert result.parity.passed
    record, made = result.manifest.quantization.calibration, open_bundle(tmp_path / "static")
    assert record.prompts == len(PROBES)
    for name in ("input_ids", "prompt_length", "logit_columns"):
        assert np.array_equal(made.golden("probed")[name], bundle.golden("probed")[name])
    arrays = made.golden("probed")
    assert {f"{kind}log_probabilities" for kind in ("", "base_", "fp32_", "fp32_base_")} <= set(arrays)
    np.testing.assert_allclose(arrays["fp32_log_probabilities"], bundle.golden("probed")["log_probabilities"], atol=2e-4)
    prompts = tmp_path / "same.jsonl"  # the probes' own prompts, in the order of the rows
    base, rows = load_base(base_folder()), probe_rows(bundle, "probed")
    texts = {e.input_ids[: e.prompt_length]: p for e, p in zip(probe_examples(base, load_base_adapter(bundle)), PROBES, strict=True)}
    prompts.write_text("".join(json.dumps(texts[tuple(row.prompt)]) + "\n" for row in rows))
    given = CalibrationRequest(data=prompts)
    quantize_bundle(bundle.folder, model, tmp_path / "given", settings_for("static"), calibration=given, **QUIET)
    assert open_bundle(tmp_path / "given").digest == made.digest


def load_base_adapter(bundle: Bundle):
    """An adapter whose probes are those of this module, whatever it edits."""
    record = bundle.adapter_record("probed")
    adapter = tiny.random_adapter(record.base)
    return replace(adapter, probes=PROBES)


def test_without_probes_static_ranges_need_a_file(bundle_folder, base_folder, tmp_path) -> None:
    with pytest.raises(CalibrationError, match="has no adapter with probes to measure them on; pass --calibrate DATA.jsonl"):
        quantize_bundle(bundle_folder(), str(base_folder()), tmp_path / "o", settings_for("static"), **QUIET)
    assert not (tmp_path / "o").exists()


def test_a_refit_on_the_probes(bundle, base_folder, adapters, tmp_path) -> None:
    model = str(base_folder())
    settings = RefitSettings(data=None, sources=(adapters[0],), steps=3, lr=5e-3, output=tmp_path / "refitted")
    quantize_bundle(bundle.folder, model, tmp_path / "q", settings_for("weight-only", 4), **QUIET)
    result = swap_bundle(tmp_path / "q", model, tmp_path / "o", refit=settings, **QUIET)
    assert result.parity.passed
    old, new = open_bundle(tmp_path / "q").golden("probed"), open_bundle(tmp_path / "o").golden("probed")
    assert np.array_equal(old["input_ids"], new["input_ids"])
    assert np.array_equal(old["fp32_log_probabilities"], new["fp32_log_probabilities"])
    if result.refitted:
        assert load_adapter(tmp_path / "refitted" / "probed").probes == PROBES
    with pytest.raises(AdapterError, match="adapter bare has no probes to refit it on"):
        swap_bundle(tmp_path / "q", model, tmp_path / "no", refit=replace(settings, sources=(adapters[1],)), **QUIET)


def test_an_added_adapter_is_recorded_on_its_own_probes(bundle, base_folder, adapters, tmp_path) -> None:
    folder = tmp_path / "late"
    save_adapter(replace(load_adapter(adapters[1]), probes=PROBES[:3]), folder)
    result = add_adapter(bundle.folder, [folder], model=str(base_folder()), output=tmp_path / "b", **QUIET)
    assert result.parity.passed and len(probe_rows(open_bundle(tmp_path / "b"), "late")) == 3
    save_adapter(replace(load_adapter(adapters[1]), probes=({"prompt": "x" * 5000, "completion": "y"},)), tmp_path / "long")
    with pytest.raises(AdapterError, match=r"the adapter's probes do not fit this base: data\[0\]: the prompt has"):
        add_adapter(bundle.folder, [tmp_path / "long"], model=str(base_folder()), output=tmp_path / "c", **QUIET)
    assert not (tmp_path / "c").exists()


def test_what_the_base_said_of_known_probes_is_taken_over(bundle, base_folder, adapters, tmp_path, monkeypatch) -> None:
    """As of an adapter that is trained again on the same data; a probe that differs in one letter is another one."""
    said, asked = generation.GoldenInputs.said, []

    def counted(inputs, model, steerer=None):
        asked.append("base" if steerer is None else "steered")
        return said(inputs, model, steerer)

    monkeypatch.setattr(generation.GoldenInputs, "said", counted)
    other = (*PROBES[:-1], {**PROBES[-1], "completion": PROBES[-1]["completion"].replace("a", "e")})
    for name, probes, expected in (("same", PROBES, ["steered"]), ("other", other, ["steered", "base"])):
        save_adapter(replace(load_adapter(adapters[1]), probes=probes), tmp_path / name)
        asked.clear()
        add_adapter(bundle.folder, [tmp_path / name], model=str(base_folder()), output=tmp_path / f"with-{name}", **QUIET)
        assert asked == expected
        golden, base = open_bundle(tmp_path / f"with-{name}").golden(name), load_base(base_folder())
        order = [golden["input_ids"][row][golden["attention_mask"][row] > 0].tolist() for row in range(len(PROBES))]
        examples = sorted(probe_examples(base, load_adapter(tmp_path / name)), key=lambda each: order.index(list(each.input_ids)))
        assert np.abs(golden["base_log_probabilities"] - answers(base, None, examples)).max() < 1e-5


def test_inputs_are_equal_where_every_value_is(bundle) -> None:
    arrays = bundle.golden("probed")
    key = inputs_key(GENERATION.stored_inputs(arrays))
    assert inputs_key(GENERATION.stored_inputs({name: array.copy() for name, array in arrays.items()})) == key
    for name in ("input_ids", "attention_mask", "prompt_length", "logit_positions", "logit_columns"):
        changed = arrays[name].copy()
        changed.flat[-1] += 1
        assert inputs_key(GENERATION.stored_inputs({**arrays, name: changed})) != key, name
    unscored = {name: array for name, array in arrays.items() if name != "log_probabilities"}
    assert inputs_key(GENERATION.stored_inputs(unscored)) != key


class OfSize:
    """As much of a model as rows and columns are chosen by."""

    def __init__(self, vocabulary: int) -> None:
        self._rows = np.empty((vocabulary, 0))

    def get_output_embeddings(self):
        from types import SimpleNamespace

        return SimpleNamespace(get_parameter=lambda _: self._rows)


@pytest.mark.parametrize("vocabulary", [300, 49152, 262144, 10**6])
def test_files_stay_below_2_mb(vocabulary: int, tmp_path) -> None:
    random = np.random.default_rng(0)
    probes = [(random.integers(0, vocabulary, n + 200).tolist(), n) for n in random.integers(5, 60, 32).tolist()]
    inputs = generation.probe_inputs(OfSize(vocabulary), probes)
    count, (positions, columns) = len(inputs.input_ids), inputs.logit_columns.shape
    assert count == 32 and inputs.attention_mask.sum(1).tolist() == (inputs.prompt_length + generation.COMPLETION).tolist()
    arrays = dict(inputs.arrays)
    for kind in ("", "base_", "fp32_", "fp32_base_"):
        arrays[f"{kind}logits"] = random.standard_normal((positions, columns)).astype(np.float32)
        arrays[f"{kind}log_probabilities"] = random.standard_normal(32 * generation.COMPLETION).astype(np.float32)
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    assert (tmp_path / "x.npz").stat().st_size < 2e6
    assert len(np.unique(inputs.logit_columns)) >= min(vocabulary, 60_000)
    for row in inputs.logit_columns:
        assert (np.diff(row) > 0).all()


def test_the_bases_columns_are_the_whole_vocabulary(monkeypatch) -> None:
    monkeypatch.setattr(generation, "_greedy", lambda model, prompts, count: np.ones((len(prompts), count), np.int64))
    for vocabulary in (300, 49152, 262144):
        inputs = generation.golden_inputs(OfSize(vocabulary), [[1] * n for n in (3, 8, 13, 21)])
        assert len(np.unique(inputs.logit_columns)) == vocabulary
        assert inputs.for_adapters(OfSize(vocabulary)).logit_columns.shape[1] <= inputs.logit_columns.shape[1]


def test_probes_of_long_prompts_are_fewer_rows(monkeypatch) -> None:
    probes = [([1] * (n + 3), n) for n in (900, 10, 1500, 20, 1000, 800, 30, 40)]
    inputs = generation.probe_inputs(OfSize(300), probes)
    lengths = inputs.attention_mask.sum(1).tolist()
    assert lengths[:4] == [13, 23, 33, 43] and sum(lengths) <= generation.PROBE_TOKENS
    one = generation.probe_inputs(OfSize(300), [([1, 2, 3], 2)])
    assert one.continued == 1 and one.logit_positions.tolist() == [[0, 0], [0, 1], [0, 2]]


def test_level_4_gives_way_where_it_costs_too_much(bundle, base_folder, tmp_path, monkeypatch) -> None:
    """Planted: any rounding is too much."""
    taken = QualityGate(accept_loss=True)
    settings = settings_for("weight-only", bits=4)
    kept = quantize_bundle(bundle.folder, str(base_folder()), tmp_path / "kept", settings, quality=taken, **QUIET)
    assert kept.manifest.quantization.accuracy_level == 4 and not kept.parity.notes
    monkeypatch.setattr(retention, "MOST_ROUNDING", -10.0)
    made = quantize_bundle(bundle.folder, str(base_folder()), tmp_path / "made", settings, quality=taken, **QUIET)
    assert made.manifest.quantization.accuracy_level == 1 and made.parity.notes[0].startswith("accuracy level 1: level 4 costs probed")
    opened = open_bundle(tmp_path / "made")
    levels = {n.attributes.get_int("accuracy_level") for n in load_graph(opened.graph_path).graph if n.op_type == "MatMulNBits"}
    assert levels == {1}
    check_golden(opened, OrtSession(opened)).require()


def test_int4_aims_higher_than_it_refuses() -> None:
    """Unless less than the default was asked for."""
    assert [QualityGate(min_retention=least).aim for least in (0.8, 0.95, 0.5)] == [0.9, 0.95, 0.5]


@pytest.mark.parametrize(("kept", "mixed"), [(0.85, True), pytest.param(0.95, False, marks=pytest.mark.slow)])
def test_what_is_below_the_aim_is_given_bytes(kept, mixed, bundle, base_folder, tmp_path, monkeypatch) -> None:
    """Measured shares are planted."""
    measured = weights.eager_retention
    monkeypatch.setattr(weights, "eager_retention", lambda model, of: ({"probed": kept}, measured(model, of)[1]))
    monkeypatch.setattr(assemble, "keep_steering", lambda work, output, model, parity, *_, **__: (open_bundle(work).manifest, parity, {}))
    quantize_bundle(bundle.folder, str(base_folder()), tmp_path / "q", settings_for("weight-only", bits=4), **QUIET)
    assert bool(open_bundle(tmp_path / "q").manifest.quantization.int8) == mixed


@pytest.mark.slow
def test_what_loses_too_much_is_mended_or_refused(bundle, base_folder, adapters, tmp_path, monkeypatch) -> None:
    """A share that nothing reaches: every remedy is tried and told of, and nothing is left; accepted, the loss is in the manifest."""
    monkeypatch.setattr(retention, "LEAST_GAIN", -np.inf)
    never, model, settings = QualityGate(), str(base_folder()), settings_for("weight-only", bits=4)
    object.__setattr__(never, "min_retention", 1e6)
    said = (
        r"probed: retention .*tried: int4: probed .*weights in int8: probed .*-p int8: probed .*refit on its probes: probed .*--accept-loss"
    )
    with pytest.raises(ParityError, match=said) as refused:
        quantize_bundle(bundle.folder, model, tmp_path / "no", settings, quality=never, adapters=adapters[:1], **QUIET)
    assert refused.value.report.passed and [p.name for p in tmp_path.iterdir()] == ["no.parity.json"]
    object.__setattr__(never, "accept_loss", True)
    quantize_bundle(bundle.folder, model, tmp_path / "yes", settings, quality=never, **QUIET)
    manifest = open_bundle(tmp_path / "yes").manifest
    assert set(manifest.loss) == {"probed"} == set(manifest.retention)


@pytest.mark.slow
def test_an_adapter_that_lost_more_tokens_than_it_gained_is_refitted(bundle, base_folder, adapters, tmp_path, monkeypatch) -> None:
    """Planted: any difference is more than chance shows. Only what was handed over with its probes can be trained."""
    monkeypatch.setattr(retention, "LEAST_CHANCE", 2.0)
    model, settings = str(base_folder()), settings_for("weight-only", bits=4)
    made = quantize_bundle(bundle.folder, model, tmp_path / "made", settings, adapters=adapters[:1], **QUIET)
    (note,) = made.parity.notes
    assert re.fullmatch(
        r"probed: \d+ of \d+ tokens lost their even odds, and \d+ gained them; after \d+ s of training on the bundle's "
        r"weights: \d+ of \d+ tokens lost their even odds, and \d+ gained them",
        note,
    )
    assert made.refitted == {"probed": tmp_path / "made.adapters" / "probed"}
    assert load_adapter(made.refitted["probed"]).trained_on == open_bundle(tmp_path / "made").digest
    shutil.copytree(adapters[0], tmp_path / "taken.adapters" / "probed")  # a refit's place, without force
    taken = quantize_bundle(bundle.folder, model, tmp_path / "taken", settings, adapters=adapters[:1], **QUIET)
    assert not taken.refitted and "it was not trained on the bundle's weights: " in taken.parity.notes[0]
    alone = quantize_bundle(bundle.folder, model, tmp_path / "alone", settings, **QUIET)
    assert not alone.parity.notes and not alone.refitted and "`reft-export quantize --refit`" in str(alone.parity.quality[1])

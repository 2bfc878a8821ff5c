"""Figures, budgets, reports, and check_golden: what is right passes, and every planted fault is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_bundle import ADAPTERS, ToyDecoder, change_manifest, golden_arrays, write_toy_bundle

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import Quantization, write_manifest
from runtimes.errors import BundleError, InputError, ParityError
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession
from runtimes.parity.figures import BUDGETS, REPORTED, Budget, Delta, Figures, ParityReport, budget_for, compare, compare_deltas, judge

DECODER = ToyDecoder.random()
FP32 = BUDGETS["fp32"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def test_figures_are_what_they_say() -> None:
    reference = np.array([[1.0, 2.0, -4.0], [0.0, 1.0, 0.5]], np.float32)
    candidate = reference + np.array([[0.25, 0, 0], [0, 0, 1.0]], np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (reference, candidate))
    figures = compare(candidate, reference)
    assert (figures.max_abs, figures.max_relative, figures.top1) == (1.0, 0.25, 0.5)
    assert figures.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-12)
    assert compare(reference, reference) == Figures(compared=2, max_abs=0.0, max_relative=0.0, kl=0.0, top1=1.0)


def test_only_the_references_ties_excuse_another_top_token() -> None:
    reference = np.array([[1.0, 1.0 + 5e-7, 0.0]])
    assert compare(reference[:, [1, 0, 2]], reference).top1 == 1.0
    clear = np.array([[1.0, 1.0 + 5e-6, 0.0]])
    assert compare(clear[:, [1, 0, 2]], clear).top1 == 0.0
    # A candidate that is itself undecided between a right and a wrong token is judged by what it would choose.
    assert compare(np.array([[1.0, 1.0, 0.0]]), np.array([[0.0, 1.0, 0.0]])).top1 == 0.0


def test_values_that_are_not_finite() -> None:
    reference = np.ones((2, 3))
    bad = reference.copy()
    bad[0, 0] = np.nan
    figures = compare(bad, reference)
    assert (figures.max_relative, figures.kl, figures.top1) == (np.inf, np.inf, 0.0)
    assert not judge("x", "y", figures, BUDGETS["bf16"]).passed
    with pytest.raises(InputError, match="reference logits are not finite"):
        compare(reference, bad)
    with pytest.raises(InputError, match="alike and not empty"):
        compare(reference, reference[:1])
    with pytest.raises(InputError, match="alike and not empty"):
        compare(reference[:0], reference[:0])


def test_deltas() -> None:
    random = np.random.default_rng(0)
    base, other, move = (random.standard_normal((3, 5)) for _ in range(3))
    same = compare_deltas(other + 2 * move, other, base + move, base)
    assert same.cosine == pytest.approx(1) and same.norm_ratio == pytest.approx(2)
    assert compare_deltas(other - move, other, base + move, base).cosine == pytest.approx(-1)
    assert compare_deltas(other, other, base + move, base) == Delta(cosine=0.0, norm_ratio=0.0)
    assert compare_deltas(other + move, other, base, base) == Delta(cosine=0.0, norm_ratio=np.inf)
    assert compare_deltas(other, other, base, base) == Delta(cosine=1.0, norm_ratio=1.0, moved=False)
    assert compare_deltas(other * np.nan, other, base + move, base).cosine == 0.0


def test_the_table_is_the_designs() -> None:
    assert {name: (b.logits, b.top1, b.delta) for name, b in BUDGETS.items()} == {
        "fp32": (2e-5, 1.0, 0.99999),
        "fp16": (1e-2, 0.99, 0.999),
        "bf16": (5e-2, 0.97, 0.99),
        "weight-only int8": (1e-4, 1.0, REPORTED),
        "weight-only int4": (1e-4, 1.0, REPORTED),
        "activation-quantized": (2e-2, 0.98, REPORTED),
        "accuracy level 4": (0.25, 0.5, REPORTED),
    }


def quantized(scheme: str, bits: int, level: int) -> Quantization:
    return Quantization(scheme=scheme, bits=bits, block_size=32, symmetric=True, accuracy_level=level)


@pytest.mark.parametrize(
    ("precision", "quantization", "expected"),
    [
        ("fp32", None, BUDGETS["fp32"]),
        ("fp16", None, BUDGETS["fp16"]),
        ("bf16", None, BUDGETS["bf16"]),
        ("fp32", quantized("weight-only", 4, 0), BUDGETS["weight-only int4"]),
        ("fp32", quantized("weight-only", 4, 1), BUDGETS["weight-only int4"]),
        ("fp32", quantized("weight-only", 8, 1), BUDGETS["weight-only int8"]),
        ("fp32", quantized("weight-only", 4, 4), BUDGETS["accuracy level 4"]),
        ("fp32", quantized("weight-only", 8, 4), BUDGETS["accuracy level 4"]),
        ("fp32", quantized("qdq-int4", 4, 0), BUDGETS["weight-only int4"]),
        ("fp32", quantized("dynamic", 8, 0), BUDGETS["activation-quantized"]),
        ("fp32", quantized("qdq-int8", 8, 0), BUDGETS["activation-quantized"]),
        ("fp16", quantized("weight-only", 4, 1), Budget(name="weight-only int4, fp16", logits=1e-2, top1=0.99, delta=REPORTED)),
        ("fp16", quantized("weight-only", 4, 4), Budget(name="accuracy level 4, fp16", logits=0.25, top1=0.5, delta=REPORTED)),
    ],
    ids=str,
)
def test_which_budget_applies(precision: str, quantization: Quantization | None, expected: Budget) -> None:
    assert budget_for(SimpleNamespace(precision=precision, quantization=quantization, parity_budget={})) == expected


def test_every_figure_is_judged() -> None:
    good = Figures(compared=2, max_abs=0.1, max_relative=2e-5, kl=0.0, top1=1.0, greedy_equal=True)
    steering = Delta(cosine=0.99999, norm_ratio=1.0)
    assert judge("x", "y", good, FP32, delta=steering).passed
    assert judge("x", "y", replace(good, greedy_equal=None), FP32).passed
    for bad in (replace(good, max_relative=2.1e-5), replace(good, top1=0.999), replace(good, greedy_equal=False)):
        assert not judge("x", "y", bad, FP32, delta=steering).passed
    assert not judge("x", "y", good, FP32, delta=replace(steering, cosine=0.9999)).passed
    # Where the budget lets single tokens differ, the greedy text may differ from there on.
    assert judge("x", "y", replace(good, greedy_equal=False), BUDGETS["fp16"]).passed


def test_reports_survive_json_and_raise_with_the_figures() -> None:
    right = Figures(compared=2, max_abs=0.0, max_relative=0.0, kl=0.0, top1=1.0)
    good = judge("a", "eager", right, FP32, delta=Delta(cosine=1.0, norm_ratio=1.0))
    bad = judge("b", "eager", Figures(compared=2, max_abs=np.inf, max_relative=np.inf, kl=np.inf, top1=0.0), FP32, note="a note")
    report = ParityReport(rungs=(good, bad))
    assert ParityReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["passed"] is False
    assert [len(row) for row in report.rows()] == [len(ParityReport.HEADER)] * 2
    with pytest.raises(ParityError, match="1 of 2 comparisons miss their budget; b against eager: relative logit error inf") as caught:
        report.require()
    assert caught.value.report is report and caught.value.exit_code == 3
    ParityReport(rungs=(good,)).require()
    assert not ParityReport(rungs=()).passed
    with pytest.raises(ParityError, match="nothing was compared"):
        ParityReport(rungs=()).require()
    for text in ("", "{}", '{"rungs": [{}]}', '{"rungs": 3}'):
        with pytest.raises(InputError, match="not a parity report"):
            ParityReport.from_json(text)


@pytest.mark.parametrize("position_ids", [True, False])
@pytest.mark.parametrize("slot_mode", ["graph", "input"])
@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_right_bundle_passes(tmp_path: Path, precision: str, logits: str, slot_mode: str, position_ids: bool) -> None:
    bundle = write_toy_bundle(tmp_path / "b", precision=precision, logits=logits, slot_mode=slot_mode, position_ids=position_ids)
    session = OrtSession(bundle, threads=1, adapter="all")
    report = check_golden(bundle, session)
    report.require()
    assert session.adapter == "all"
    names = [rung.name for rung in report.rungs]
    assert {n.split(":")[0] for n in names} == {"base", *ADAPTERS}
    kinds = {n.split(": ")[1] for n in names}
    assert [n for n in names if n.endswith("completions")] == [f"{name}: completions" for name in ADAPTERS]
    kinds.remove("completions")
    padded = {"left padding", "right padding"} if position_ids else set()
    assert kinds == {"full forward" if logits == "all" else "token by token"} | {
        "prefill and decode", "chunked prefill", "single rows", *padded,
    }  # fmt: skip
    assert [r.delta is not None for r in report.rungs if r.figures.greedy_equal is not None] == [False, True, True, True]


def regolden(bundle: Bundle, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Bundle:
    arrays = change(dict(bundle.golden(name)))
    np.savez(bundle.folder / "golden" / f"{name}.npz", **arrays)
    write_manifest(bundle.folder, bundle.manifest)
    return open_bundle(bundle.folder)


def failed(report: ParityReport) -> set[str]:
    with pytest.raises(ParityError):
        report.require()
    return {rung.name for rung in report.rungs if not rung.passed}


def test_a_planted_perturbation_of_one_logit_fails(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = arrays["logits"].copy()
        logits[3, 7] += 5e-5 * np.abs(logits).max()
        return arrays | {"logits": logits}

    bundle = regolden(write_toy_bundle(tmp_path / "b"), "prompt", change)
    names = failed(check_golden(bundle, OrtSession(bundle, threads=1)))
    assert len(names) == 6 and all(name.startswith("prompt: ") for name in names)


def test_a_planted_greedy_token_fails(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = arrays["greedy_tokens"].copy()
        tokens[1, 4] += 1
        tokens[0, 2:] = -1  # the end of that row's text: nothing to compare
        return arrays | {"greedy_tokens": tokens}

    bundle = regolden(write_toy_bundle(tmp_path / "b"), "base", change)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert failed(report) == {"base: full forward"}
    assert report.rungs[0].note == "greedy tokens differ from row 1, token 4 on"


def test_another_adapters_banks_fail_on_the_delta_too(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b")
    bundle.adapter("prompt").file.write_bytes(bundle.adapter("all").file.read_bytes())
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert len(failed(report)) == 7
    assert next(r for r in report.rungs if r.name == "prompt: full forward").delta.cosine < 0.9


class Wrapped:
    """A session with a fault: the runtime forgets or confuses something in some calls only."""

    def __init__(self, session: OrtSession, change: Callable[[dict], dict]) -> None:
        self._session, self._change = session, change

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def step(self, ids: np.ndarray, mask: np.ndarray, **options: object) -> object:
        return self._session.step(**self._change(dict(input_ids=ids, attention_mask=mask, **options)))


FAULTS = {
    # Without the prompt's length the first call is taken for the prompt, completion and all.
    "no prompt length": (
        lambda call: call | {"prompt_length": np.full(len(call["input_ids"]), -1)},
        {"full forward", "chunked prefill", "single rows", "left padding", "right padding"},
    ),
    "pads are attended to": (lambda call: call | {"attention_mask": np.ones_like(call["attention_mask"])}, {"left padding"}),
    "positions count columns": (
        lambda call: (
            call
            | {
                "position_ids": np.tile(np.arange(call["attention_mask"].shape[1]), (len(call["input_ids"]), 1))[
                    :, -call["input_ids"].shape[1] :
                ]
            }
        ),
        {"prefill and decode", "left padding", "chunked prefill"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_cache_and_of_padding_are_found(bundle: Bundle, fault: str) -> None:
    change, expected = FAULTS[fault]
    names = failed(check_golden(bundle, Wrapped(OrtSession(bundle, threads=1), change)))
    assert {name.split(": ")[1] for name in names} >= expected


def test_deltas_are_held_to_the_float32_model_where_there_is_one(tmp_path: Path) -> None:
    other = golden_arrays(ToyDecoder.random(5), "ends", ADAPTERS, float32_arrays=True)

    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        fp32 = {n: a for n, a in other.items() if n.startswith("fp32_")}
        return arrays | fp32 | {"fp32_base_logits": arrays["base_logits"]}

    bundle = regolden(write_toy_bundle(tmp_path / "b"), "ends", change)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert failed(report) == {"ends: full forward"}
    assert next(r for r in report.rungs if r.name == "ends: full forward").figures.max_relative < FP32.logits


def test_a_quantized_bundle_is_held_to_its_own_row(tmp_path: Path) -> None:
    bundle = change_manifest(write_toy_bundle(tmp_path / "b", float32_arrays=True), quantization=quantized("weight-only", 4, 4))
    assert {r.budget.name for r in check_golden(bundle, OrtSession(bundle, threads=1)).rungs} == {"accuracy level 4"}


def test_golden_arrays_that_are_missing(tmp_path: Path) -> None:
    bundle = regolden(write_toy_bundle(tmp_path / "b"), "ends", lambda arrays: {k: v for k, v in arrays.items() if k != "base_logits"})
    with pytest.raises(BundleError, match=r"golden/ends.npz lacks \['base_logits'\]"):
        check_golden(bundle, OrtSession(bundle, threads=1))
    for path in (bundle.folder / "golden").iterdir():
        path.unlink()
    write_manifest(bundle.folder, bundle.manifest)
    bundle = open_bundle(bundle.folder)
    with pytest.raises(BundleError, match="no golden arrays"):
        check_golden(bundle, OrtSession(bundle, threads=1))

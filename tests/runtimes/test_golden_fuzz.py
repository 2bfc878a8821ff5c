"""2,000 changes to golden arrays and manifests, re-sealed by their hashes: refused in one line, or missed, or right and something compared.

What passes is held to the truth here: to the toy decoder in float64 numpy, which knows nothing of the code under test, and to budgets that
are written down once more.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from golden_mutations import Mutator
from reseal import reseal
from toy_bundle import ADAPTERS, VOCABULARY, ToyDecoder, golden_arrays, write_toy_bundle

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.errors import ReftError
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession
from runtimes.parity.figures import ParityReport

DECODER = ToyDecoder.random()
NAMES = ("base", "ends")
CASES, FAST = 2000, 120


def _right(manifest: dict, arrays: dict[str, np.ndarray]) -> tuple[float, float]:
    """(largest relative error, lowest delta cosine) that any row of the design's table would let this float32 graph have."""
    q = manifest["quantization"]
    if q is None:
        return 2e-5, 0.99999
    noise = min(0.1, float(arrays.get("noise", [0])[0]))
    if q["scheme"] == "weight-only":
        return (0.25 + noise if q["accuracy_level"] == 4 else 1e-4), -1
    return 2e-2 + noise, -1


def _hold(candidate: np.ndarray, reference: np.ndarray, bound: float) -> None:
    assert reference.size and np.isfinite(reference).all()
    assert np.abs(candidate - reference).max() <= 1.01 * bound * np.abs(reference).max()


def _hold_delta(candidate: np.ndarray, reference: np.ndarray, lowest: float) -> None:
    d, r = (np.asarray(x, np.float64).ravel() for x in (candidate, reference))
    assert np.linalg.norm(r) > 0 and d @ r / (np.linalg.norm(d) * np.linalg.norm(r)) >= lowest - 1e-6


def _arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / "golden" / f"{name}.npz") as stored:
        return dict(stored)


def _steering(arrays: dict[str, np.ndarray]) -> np.ndarray:
    prefix = "fp32_" if "fp32_logits" in arrays else ""
    return arrays[f"{prefix}logits"].astype(np.float64) - arrays[f"{prefix}base_logits"]


def _spoken(logits: np.ndarray, tokens: list[int], prompt: int) -> np.ndarray:
    """log p of the tokens behind the prompt."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return log_p[np.arange(prompt - 1, len(tokens) - 1), tokens[prompt:]]


def _hold_decoder(folder: Path, report: ParityReport) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in NAMES:
        arrays = _arrays(folder, name)
        adapter = ADAPTERS.get(name)
        given = (arrays[a] for a in ("input_ids", "attention_mask", "prompt_length"))
        rows = [(r[m > 0].tolist(), int(n)) for r, m, n in zip(*given, strict=True)]
        positions = arrays["logit_positions"]

        def true(steered_by: object, rows: list = rows, positions: np.ndarray = positions) -> np.ndarray:
            whole = [DECODER.logits(tokens, steered_by, prompt) for tokens, prompt in rows]
            return np.stack([whole[row][column] for row, column in positions])

        bound, lowest = _right(manifest, arrays)
        said = true(adapter)
        _hold(np.take_along_axis(said, arrays["logit_columns"], 1), arrays["logits"], bound)
        _hold(np.take_along_axis(said, arrays["best_tokens"], 1), arrays["best_logits"], bound)
        assert np.abs(np.log(np.exp(said).sum(1)) - arrays["logsumexp"]).max() <= 1.01 * bound * np.abs(arrays["best_logits"]).max()
        if "log_probabilities" in arrays:
            scale = max(np.abs(arrays["logits"]).max(), np.abs(arrays["best_logits"]).max())
            spoken = [_spoken(DECODER.logits(tokens, adapter, prompt), tokens, prompt) for tokens, prompt in rows]
            assert np.abs(np.concatenate(spoken) - arrays["log_probabilities"]).max() <= 2.02 * bound * scale
        if adapter is not None:
            moved = np.take_along_axis(said - true(None), arrays["logit_columns"], 1)
            _hold_delta(moved, _steering(arrays), lowest)
        greedy = arrays["greedy_tokens"]
        assert (greedy >= 0).any(1).all()
        if bound <= 1e-4:
            for (tokens, prompt), said in zip(rows, greedy, strict=True):
                said = said[said >= 0].tolist()
                assert DECODER.greedy(tokens[:prompt], len(said), adapter) == said
        layouts = {"prefill and decode", "chunked prefill", "single rows"}
        assert layouts < {r.name.partition(": ")[2] for r in report.rungs if r.name.startswith(f"{name}: ")}


class ClassifierDouble:
    """A classifier's session in numpy: logits [B, 3] are a sum over the row's tokens, and an adapter adds to each."""

    TOKENS, TYPES, ENDS = np.split(np.random.default_rng(5).standard_normal((2 * VOCABULARY + 2, 3)), [VOCABULARY, VOCABULARY + 2])

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.adapter = bundle, None

    def set_adapter(self, name: str | None) -> None:
        self.adapter = name

    def classify(self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(logits=self.true(ids, mask, types, self.adapter is not None).astype(np.float32))

    @classmethod
    def true(cls, ids: np.ndarray, mask: np.ndarray, types: np.ndarray, steered: bool) -> np.ndarray:
        values = cls.TOKENS[ids] + cls.TYPES[types] + (0.3 * cls.ENDS[ids] if steered else 0)
        return np.einsum("bsl,bs->bl", values, mask.astype(np.float64))


def _classifier_bundle(folder: Path) -> None:
    write_toy_bundle(folder, adapters={"ends": ADAPTERS["ends"]})
    random = np.random.default_rng(3)
    lengths = np.array([1, 5, 9, 4])
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    inputs = (random.integers(0, VOCABULARY, mask.shape) * mask, mask, random.integers(0, 2, mask.shape) * mask)
    arrays = dict(zip(("input_ids", "attention_mask", "token_type_ids"), inputs, strict=True))
    base, steered = (ClassifierDouble.true(*inputs, steered).astype(np.float32) for steered in (False, True))
    np.savez(folder / "golden" / "base.npz", **arrays, logits=base)
    np.savez(folder / "golden" / "ends.npz", **arrays, logits=steered, base_logits=base)
    reseal(folder, task="text-classification", labels=["a", "b", "c"], padding="right", kv_cache="none")


def _hold_classifier(folder: Path, report: ParityReport) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in NAMES:
        arrays = _arrays(folder, name)
        mask = arrays["attention_mask"]
        inputs = [arrays["input_ids"] * mask, mask, arrays["token_type_ids"]]  # what stands at pads is never read
        bound, lowest = _right(manifest, arrays)
        _hold(ClassifierDouble.true(*inputs, name != "base"), arrays["logits"], bound)
        if name != "base":
            _hold_delta(ClassifierDouble.true(*inputs, True) - ClassifierDouble.true(*inputs, False), _steering(arrays), lowest)
        assert sum(r.name.startswith(f"{name}: ") for r in report.rungs) == 3


def _decoder_bundle(folder: Path) -> None:
    """One adapter and four greedy tokens, so that thousands of cases take minutes."""
    write_toy_bundle(folder, adapters={"ends": ADAPTERS["ends"]})
    for name in NAMES:
        arrays = golden_arrays(DECODER, name, ADAPTERS)
        np.savez(folder / "golden" / f"{name}.npz", **arrays | {"greedy_tokens": arrays["greedy_tokens"][:, :4]})


KINDS = {
    "decoder": (_decoder_bundle, lambda bundle: OrtSession(bundle, threads=1), _hold_decoder),
    "classifier": (_classifier_bundle, ClassifierDouble, _hold_classifier),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")  # what a mutation writes on purpose
@pytest.mark.parametrize(("first", "last"), [(0, FAST), pytest.param(FAST, CASES, marks=pytest.mark.long)], ids=["some", "others"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_passes_that_compared_nothing(tmp_path: Path, kind: str, first: int, last: int) -> None:
    make, session_of, hold = KINDS[kind]
    make(tmp_path / "b")
    mutator = Mutator(tmp_path / "b", NAMES)
    outcomes = {"refused": 0, "missed": 0, "passed": 0}
    for case in range(first, last):
        mutator.mutate(case)
        try:
            bundle = open_bundle(tmp_path / "b")
            report = check_golden(bundle, session_of(bundle))
            ParityReport.from_json(report.to_json())
        except ReftError as e:
            refusal = str(e)
            outcomes["refused"] += 1
        else:
            refusal = ""
            outcomes["passed" if report.passed else "missed"] += 1
        assert "\n" not in refusal and len(refusal) < 700, case
        if not refusal and report.passed:
            assert all(r.figures.compared > 0 and r.budget.logits <= 0.35 for r in report.rungs), case
            hold(tmp_path / "b", report)
    assert min(outcomes.values()) >= (last - first) // 50, outcomes

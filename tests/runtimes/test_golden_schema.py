"""What golden arrays must be before anything is compared with them, what a manifest may ask for, and rungs that would compare nothing."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reseal import reseal
from toy_bundle import ADAPTERS, ToyDecoder, change_manifest, golden_arrays, toy_adapter, write_toy_bundle

from runtimes.artifacts import golden_schema
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.golden_schema import CLASSIFIER, DECODER, GoldenSchema, read_golden, write_golden
from runtimes.artifacts.manifest import NOT_HASHED, Quantization, hash_files, write_manifest
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.errors import BundleError, InputError, ParityError, ReftError
from runtimes.golden import check_golden, steering_figures
from runtimes.ort.session import OrtSession
from runtimes.parity.figures import BUDGETS, NOTHING, Delta, Figures, ParityReport, judge
from runtimes.parity.perplexity import perplexity, predictions
from runtimes.session import StepOutput

Arrays = dict[str, np.ndarray]
TOY = ToyDecoder.random()
FP32 = BUDGETS["fp32"]
LEVEL_4 = Quantization(scheme="weight-only", bits=4, block_size=32, symmetric=True, accuracy_level=4)
DYNAMIC = Quantization(scheme="dynamic", bits=8, block_size=0, symmetric=True, accuracy_level=0)


def schema(**changes: object) -> GoldenSchema:
    given = {"task": TEXT_GENERATION, "vocabulary": 299, "context": 64, "adapter": True, "float32": True, "noisy": True}
    return GoldenSchema(**given | changes)


@pytest.fixture(scope="module")
def recorded() -> Arrays:
    arrays = golden_arrays(TOY, "ends", ADAPTERS)
    return arrays | {"noise": np.array([0.02, 0.99], np.float32)}


def vocabulary(arrays: Arrays) -> int:
    """Of the toy, all of whose columns are recorded."""
    return arrays["logits"].shape[1]


AT_POSITIONS = ("logit_positions", "logit_columns", "logits", "base_logits", "best_tokens", "best_logits", "logsumexp")


def put(name: str, at: object, value: object) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        changed = arrays[name].copy()
        changed[at] = value
        return arrays | {name: changed}

    return change


def each(change: Callable[[np.ndarray], np.ndarray], *names: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: change(arrays[name]) for name in names}


WRONG = {
    "no positions": (each(lambda a: a[:0], *AT_POSITIONS), "logit_positions of shape .*nothing to compare"),
    "no rows": (each(lambda a: a[:0], "input_ids", "attention_mask", "prompt_length", "greedy_tokens"), "nothing to compare"),
    "no greedy tokens": (each(lambda a: a[:, :0], "greedy_tokens"), "greedy_tokens of shape .*nothing to compare"),
    "no vocabulary": (each(lambda a: a[:, :0], "logits", "base_logits", "logit_columns"), "nothing to compare"),
    "positions outside the row": (put("logit_positions", 0, (0, 10)), "logit_positions that are no token's"),
    "positions in no row": (put("logit_positions", 0, (9, 0)), "logit_positions that are no token's"),
    "positions below zero": (put("logit_positions", 0, (0, -1)), "values in logit_positions from -1"),
    "positions twice": (put("logit_positions", 1, (0, 0)), "logit_positions twice"),
    "positions in prompts alone": (each(lambda a: a[:1], *AT_POSITIONS), "no decode step"),
    "positions as floats": (each(lambda a: a.astype(np.float64), "logit_positions"), r"as float64 .*expected int64 \[K, 2\]"),
    "a column too many": (each(lambda a: np.pad(a, ((0, 0), (0, 1))), "logit_positions"), r"expected \[K, 2\] with 2 = 2"),
    "negative tokens": (put("input_ids", (0, 1), -1), "values in input_ids from -1"),
    "tokens beyond the vocabulary": (put("input_ids", (2, 3), 2**40), "values in input_ids from .* to 1099511627776"),
    "negative greedy tokens": (put("greedy_tokens", (0, 3), -2), "values in greedy_tokens from -2"),
    "a greedy row of nothing": (put("greedy_tokens", 1, -1), "a row that is empty"),
    "greedy tokens behind the end": (put("greedy_tokens", (1, 3), -1), "goes on after its end"),
    "pads on the left": (each(lambda a: a[:, ::-1], "attention_mask"), "other rows than tokens followed by pads"),
    "a hole in the mask": (put("attention_mask", (2, 1), 0), "other rows than tokens followed by pads"),
    "an empty row": (put("attention_mask", 1, 0), "other rows than tokens followed by pads"),
    "a mask of 2": (put("attention_mask", (0, 0), 2), "values in attention_mask from 0 to 2"),
    "an empty prompt": (put("prompt_length", 0, 0), "values in prompt_length from 0"),
    "a prompt without continuation": (each(lambda a: a + 5, "prompt_length"), "prompt_length"),
    "logits of NaN": (put("logits", (0, 0), np.nan), "values in logits that are not finite"),
    "logits of the base, infinite": (put("base_logits", (0, 0), np.inf), "values in base_logits that are not finite"),
    "infinite noise": (put("noise", 0, np.inf), "values in noise that are not finite"),
    "noise of NaN": (put("noise", 1, np.nan), "values in noise that are not finite"),
    "negative noise": (put("noise", 0, -0.1), "values in noise from -0.1"),
    "more noise than logits": (put("noise", 0, 1.5), "values in noise from 0.99.* to 1.5"),
    "double precision": (each(lambda a: a.astype(np.float64), "logits"), "logits as float64"),
    "a logit too few": (each(lambda a: a[:, 1:], "logits"), "logits of shape .* with C = "),
    "a position too few": (each(lambda a: a[1:], "base_logits"), "base_logits of shape .* with K = "),
    "columns that do not ascend": (each(lambda a: a[:, ::-1], "logit_columns"), "logit_columns that do not ascend"),
    "columns beyond the vocabulary": (put("logit_columns", (0, -1), 2**20), "values in logit_columns from 0 to 1048576"),
    "more continued rows than rows": (each(lambda a: np.repeat(a, 2, 0), "greedy_tokens"), "greedy_tokens of 6 rows, and there are 3"),
    "positions of rows that are not continued": (each(lambda a: a[:1], "greedy_tokens"), "no token's of a row with greedy_tokens"),
    "a likeliest token twice": (each(lambda a: a[:, [0, *range(7)]], "best_tokens"), "best_tokens with one twice"),
    "likeliest tokens in another order": (each(lambda a: a[:, ::-1], "best_logits"), "best_logits that ascend"),
    "a logit above the likeliest": (put("logits", (0, 0), 1e3), "logits above those of its likeliest token"),
    "less than the likeliest token in all": (each(lambda a: a - 50, "logsumexp"), "logsumexp below the logit"),
    "log-probabilities of other completions": (each(lambda a: a[1:], "log_probabilities", "base_log_probabilities"), "completions are 15"),
    "log-probabilities above 0": (put("log_probabilities", 2, 0.5), "values in log_probabilities from .* to 0.5"),
    "log-probabilities that are not finite": (put("base_log_probabilities", 0, -np.inf), "base_log_probabilities that are not finite"),
    "log-probabilities of the base missing": (
        lambda a: {n: v for n, v in a.items() if n != "base_log_probabilities"},
        r"lacks \['base_log_probabilities'\]",
    ),
    "the logits of an older version": (
        lambda a: {n: v for n, v in a.items() if n != "logit_columns"},
        "is of an older version, which held the logits of the whole vocabulary",
    ),
    "an unknown name": (lambda a: a | {"more": a["noise"]}, r"holds \['more'\]"),
    "half of the float32 pair": (lambda a: a | {"fp32_logits": a["logits"]}, r"lacks \['fp32_base_logits', 'fp32_best_logits'"),
    "no mask": (lambda a: {n: v for n, v in a.items() if n != "attention_mask"}, r"lacks \['attention_mask'\]"),
    "objects": (lambda a: a | {"logits": np.array([{}, None], object)}, "logits as Python objects"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_are_refused(case: str, recorded: Arrays, tmp_path: Path) -> None:
    change, match = WRONG[case]
    expected = schema(vocabulary=vocabulary(recorded))
    write_golden(tmp_path / "right.npz", recorded, expected)
    assert read_golden(tmp_path / "right.npz", expected).keys() == recorded.keys()
    np.savez(tmp_path / "ends.npz", **change(dict(recorded)))
    with pytest.raises(BundleError, match=f"ends.npz .*{match}.*; export the bundle again") as caught:
        read_golden(tmp_path / "ends.npz", expected)
    assert "\n" not in str(caught.value)
    if case != "objects":
        with pytest.raises(InputError, match=match):
            write_golden(tmp_path / "again.npz", change(dict(recorded)), expected)
        assert not (tmp_path / "again.npz").exists()


def test_what_is_there_depends_on_the_bundle(recorded: Arrays) -> None:
    width = vocabulary(recorded)
    without = {name: array for name, array in recorded.items() if name != "noise"}
    schema(vocabulary=width, noisy=False).check(without)
    schema(vocabulary=width).check(without)
    for arrays, changes, match in (
        (recorded, {"noisy": False}, "holds .*noise"),
        (without, {"float32": False}, "lacks .*fp32_base_logits.*fp32_logits"),
        (without, {"adapter": False}, "holds .*base_logits"),
        (without, {"context": 10}, "rows of .* tokens, more than the model's context"),
        (without, {"vocabulary": width - 1}, "values in input_ids from .* to 290, expected"),
        (without, {"task": TEXT_CLASSIFICATION}, "lacks .*token_type_ids"),
    ):
        with pytest.raises(ValueError, match=match):
            schema(**{"vocabulary": width} | changes).check(arrays)


def test_a_classifiers_arrays() -> None:
    random, mask = np.random.default_rng(0), np.array([[1, 1, 0], [1, 1, 1]])
    arrays = {"input_ids": mask * 7, "attention_mask": mask, "token_type_ids": mask * 0}
    arrays |= {name: random.standard_normal((2, 4)).astype(np.float32) for name in ("logits", "base_logits")}
    right = schema(task=TEXT_CLASSIFICATION, labels=4, vocabulary=8)
    right.check(arrays)
    right.check(arrays | {"input_ids": np.where(mask > 0, 7, 9)})  # a pad token of the tokenizer's that the model does not have
    for change, match in (
        (put("token_type_ids", (0, 0), 2), "values in token_type_ids"),
        (put("input_ids", (0, 0), -1), "values in input_ids"),
        (put("logits", (0, 0), np.nan), "not finite"),
        (each(lambda a: a[:, :3], "logits"), "with L = 4"),
        (each(lambda a: a[:1], "logits", "base_logits"), "with B = 2"),
        (each(lambda a: a[:0], *arrays), "nothing to compare"),
        (lambda a: a | {"greedy_tokens": mask}, "greedy_tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            right.check(change(dict(arrays)))


def test_the_table_names_every_array_once() -> None:
    for table in (DECODER, CLASSIFIER):
        assert len({array.name for array in table}) == len(table) and all(array.holds for array in table)


def test_nothing_is_unpacked_before_its_size_is_known(recorded: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that declares more than the file holds, one that declares too much, and a compression of others."""
    expected = schema(vocabulary=vocabulary(recorded))
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **recorded)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def refused(match: str, kind: int = zipfile.ZIP_DEFLATED, **changed: bytes) -> None:
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in {**members, **{f"{n}.npy": c for n, c in changed.items()}}.items():
                archive.writestr(name, content)
        with monkeypatch.context() as patched:
            patched.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("values were read"))
            with pytest.raises(BundleError, match=match):
                read_golden(path, expected)

    logits = members["logits.npy"]
    start = logits.index(b"'shape': (") + len(b"'shape': (")
    refused("not what its header declares", logits=logits[:start] + b"9" + logits[start:].replace(b" ", b"", 1))
    refused("not what its header declares", logits=logits[:-4])
    refused("in a compression that numpy does not write", kind=zipfile.ZIP_BZIP2)
    refused("cannot be read as golden arrays", logits=b"\x93NUMPY\x01\x00\x04\x00((((")
    refused("version .* of the npy format", logits=logits.replace(b"NUMPY\x01", b"NUMPY\x03"))
    monkeypatch.setattr(golden_schema, "LARGEST", 1000)
    refused("unpacks to .* bytes, more than 1000")


def resealed(bundle: Bundle, change: Callable[[dict], object]) -> Bundle:
    """The manifest as somebody edits it."""
    reseal(bundle.folder, change)
    return open_bundle(bundle.folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "b", adapters={"ends": ADAPTERS["ends"]})


def own(folder: Path, **options: object) -> Bundle:
    return write_toy_bundle(folder / "b", adapters={"ends": ADAPTERS["ends"]}, **options)


@pytest.mark.parametrize(
    ("stated", "match"),
    [
        ({"logits": 1.0}, "parity_budget.logits is 1, expected 0 to 2e-05: a manifest may only tighten the budget of fp32"),
        ({"logits": float("inf")}, "parity_budget.logits is inf"),
        ({"logits": float("nan")}, "parity_budget.logits is nan"),
        ({"logits": -1.0}, "parity_budget.logits is -1"),
        ({"top1": 0.5}, "parity_budget.top1 is 0.5, expected 1 to 1"),
        ({"delta": 0.0}, "parity_budget.delta is 0, expected 0.99999 to 1"),
        ({"delta": 1.5}, "parity_budget.delta is 1.5"),
        ({"Logits": 1e-5}, "parity_budget has 'Logits'; known: logits, top1, delta"),
        ({"logits": 2e-5, "relative": 1.0}, "parity_budget has 'relative'"),
    ],
    ids=str,
)
def test_a_manifest_may_only_tighten_its_budget(bundle: Bundle, stated: dict[str, float], match: str) -> None:
    changed = replace(bundle, manifest=replace(bundle.manifest, parity_budget=stated))
    with pytest.raises(BundleError, match=match) as caught:
        check_golden(changed, OrtSession(changed, threads=1))
    assert caught.value.exit_code == 2


def test_a_tighter_budget_is_the_one_that_counts(bundle: Bundle) -> None:
    for stated, passes in (({}, True), ({"logits": 2e-5, "top1": 1.0, "delta": 0.99999}, True), ({"logits": 0.0}, False)):
        changed = replace(bundle, manifest=replace(bundle.manifest, parity_budget=stated))
        report = check_golden(changed, OrtSession(changed, threads=1))
        assert report.passed == passes
        assert {r.budget.logits for r in report.rungs} == {stated.get("logits", 2e-5)}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"precision": "bf16"}, "says precision bf16, and model.onnx has reft.0.block_output.* of tensor"),
        ({"precision": "fp64"}, "says precision fp64"),
        ({"quantization": replace(LEVEL_4, scheme="anything")}, "quantization 'anything' of 4 bits is unknown"),
        ({"quantization": replace(LEVEL_4, bits=3, accuracy_level=1)}, "quantization 'weight-only' of 3 bits is unknown"),
    ],
    ids=str,
)
def test_a_row_that_the_manifest_has_no_right_to(bundle: Bundle, changes: dict, match: str) -> None:
    changed = replace(bundle, manifest=replace(bundle.manifest, **changes))
    with pytest.raises(BundleError, match=match):
        check_golden(changed, OrtSession(changed, threads=1))


def test_an_unknown_precision_has_no_row(bundle: Bundle) -> None:
    changed = replace(bundle, manifest=replace(bundle.manifest, precision="fp64"))
    with pytest.raises(BundleError, match="precision 'fp64' is unknown; known: fp32, fp16, bf16"):
        check_golden(changed, OrtSession(bundle, threads=1))


@pytest.mark.parametrize(("noise", "bounds"), [([0.05, 0.98], (0.07, 0.96)), ([1.0, 0.0], (0.12, 0.78)), (None, (0.02, 0.98))])
def test_noise_widens_a_row_so_far_and_no_further(tmp_path: Path, noise: list[float] | None, bounds: tuple[float, float]) -> None:
    """The share of tokens that differ is that of a sample: three standard deviations of it are allowed, down to 80 %."""
    bundle = own(tmp_path, float32_arrays=True)
    for name in bundle.golden_names:
        arrays = bundle.golden(name) | ({} if noise is None else {"noise": np.array(noise, np.float32)})
        np.savez(bundle.golden_file(name), **arrays)
    bundle = change_manifest(bundle, quantization=DYNAMIC)
    for rung in check_golden(bundle, OrtSession(bundle, threads=1)).rungs:
        chance = 3 * math.sqrt(0.02 / rung.figures.compared) if noise and noise[1] else 0
        assert (rung.budget.logits, rung.budget.top1) == pytest.approx((bounds[0], max(bounds[1] - chance, 0.78)))


def test_a_quantized_bundle_may_not_drop_what_its_delta_is_held_to(tmp_path: Path) -> None:
    bundle = change_manifest(own(tmp_path), quantization=replace(LEVEL_4, accuracy_level=1))
    with pytest.raises(BundleError, match=r"ends.npz lacks \['fp32_base_log_probabilities', 'fp32_base_logits'"):
        check_golden(bundle, OrtSession(bundle, threads=1))
    with pytest.raises(BundleError, match="lacks"):
        steering_figures(bundle, OrtSession(bundle, threads=1), "ends")


def test_a_quantized_base_has_both_likelihoods_or_none(recorded: Arrays) -> None:
    scored = {n: a for n, a in recorded.items() if not n.startswith("base_") and n != "noise"}
    both = scored | {"fp32_log_probabilities": scored["log_probabilities"]}
    neither = {n: a for n, a in scored.items() if n != "log_probabilities"}
    base = schema(adapter=False, float32=False, vocabulary=vocabulary(recorded))
    base.check(both)
    base.check(neither)
    for arrays in (scored, neither | {"fp32_log_probabilities": both["fp32_log_probabilities"]}):
        with pytest.raises(golden_schema.GoldenError, match=r"lacks \['(fp32_)?log_probabilities'\]"):
            base.check(arrays)
    with pytest.raises(golden_schema.GoldenError, match=r"holds \['base_log_probabilities'\]"):
        base.check(both | {"base_log_probabilities": both["log_probabilities"]})


def test_arrays_of_an_adapter_that_is_not_listed(tmp_path: Path) -> None:
    bundle = own(tmp_path)
    with pytest.raises(BundleError, match="adapters/ends.json is listed, and adapter 'ends' is not"):
        resealed(bundle, lambda m: m.update(adapters=[]))
    with pytest.raises(BundleError, match="an adapter is listed twice"):
        resealed(bundle, lambda m: m.update(adapters=["ends", "ends"]))
    for path in (bundle.folder / "adapters").iterdir():
        path.unlink()
    with pytest.raises(BundleError, match="golden/ends.npz is listed, and adapter 'ends' is not"):
        resealed(bundle, lambda m: m.update(adapters=[], files=hashes(bundle.folder)))


def hashes(folder: Path) -> dict:
    return {name: {"sha256": f.sha256, "size": f.size} for name, f in hash_files(folder, NOT_HASHED).items()}


def test_what_compared_nothing_does_not_pass() -> None:
    right = Figures(compared=1, max_abs=0.0, max_relative=0.0, kl=0.0, top1=1.0, greedy_equal=True)
    still = Delta(cosine=1.0, norm_ratio=1.0, moved=False)
    assert judge("x", "y", right, FP32).passed and judge("x", "y", right, FP32, delta=replace(still, moved=True)).passed
    for figures, delta, note in (
        (replace(right, compared=0), None, "nothing was compared; more"),
        (NOTHING, None, "nothing was compared; more"),
        (right, still, "its steering changes no logit; more"),
    ):
        rung = judge("x", "y", figures, FP32, delta=delta, note="more")
        assert not rung.passed and rung.note == note
        report = ParityReport(rungs=(rung,))
        assert ParityReport.from_json(report.to_json()) == report
        with pytest.raises(ParityError, match=f"x against y: {note}"):
            report.require()


def test_a_graph_with_the_last_logits_at_other_positions_only(tmp_path: Path) -> None:
    """One position, in the middle of an answer: every layout compares it."""
    bundle = own(tmp_path, logits="last")
    for name in bundle.golden_names:
        arrays = bundle.golden(name)
        behind = int(np.flatnonzero(arrays["logit_positions"][:, 1] == arrays["prompt_length"][0] + 1)[0])
        of = {n: a[behind : behind + 1] for n, a in arrays.items() if n in AT_POSITIONS}
        np.savez(bundle.golden_file(name), **arrays | of)
    write_manifest(bundle.folder, bundle.manifest)
    bundle = open_bundle(bundle.folder)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    report.require()  # rows are fed as far as their logits are recorded, so every layout ends a call there
    assert {r.figures.compared for r in report.rungs if not r.name.endswith("completions")} == {1}


class Fewer:
    """A session that gives one column's logits fewer than it should in every call of several."""

    def __init__(self, session: OrtSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def step(self, *args: object, **options: object) -> StepOutput:
        output = self._session.step(*args, **options)
        return replace(output, logits=output.logits[:, 1:]) if output.logits.shape[1] > 1 else output


def test_logits_that_do_not_come_are_missed(bundle: Bundle) -> None:
    report = check_golden(bundle, Fewer(OrtSession(bundle, threads=1)))
    full = next(r for r in report.rungs if r.name == "base: full forward")
    assert not full.passed and full.figures.max_relative == np.inf and "positions have logits" in full.note


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_steering_that_changes_no_logit(tmp_path: Path, strength: float) -> None:
    """An adapter that edits nothing passes and says so; one that edits, and shows in no logit, was not compared."""
    idle = toy_adapter("f1", strength=strength)
    still = replace(idle, tensors={n: a * 0 if n.endswith((".W", ".b")) else a for n, a in idle.tensors.items()})
    still = replace(still, tensors={n: a * 0 if n.endswith(".R") else a for n, a in still.tensors.items()})
    bundle = write_toy_bundle(tmp_path / "b", adapters={"idle": still if strength == 0 else idle})
    if strength:
        # The edit's own position and everything behind it see it, so that the fault is planted on both sides.
        arrays = bundle.golden("idle")
        np.savez(bundle.golden_file("idle"), **bundle.golden("base") | {"base_logits": arrays["base_logits"]})
        write_manifest(bundle.folder, bundle.manifest)
        bundle = open_bundle(bundle.folder)

    class Unsteered(Fewer):
        def step(self, *args: object, **options: object) -> StepOutput:
            self._session.set_adapter(None)
            return self._session.step(*args, **options)

    report = check_golden(bundle, Unsteered(OrtSession(bundle, threads=1)))
    first = next(r for r in report.rungs if r.name == "idle: full forward")
    if strength:
        assert not first.passed and first.note.startswith("its steering changes no logit")
    else:
        assert report.passed and first.delta is None and first.note == "the adapter edits nothing: there is no steering to compare"


def test_perplexity_of_nothing(bundle: Bundle) -> None:
    class Tokens:
        bos_token_id = None

        def encode(self, text: str) -> list[int]:
            return [5, 6, 7, 8]

    session = OrtSession(bundle, threads=1)
    session.bundle = replace(bundle, manifest=replace(bundle.manifest, model=replace(bundle.manifest.model, context_length=2)))
    with pytest.raises(InputError, match="context of three tokens or more, toy has 2"):
        perplexity(session, Tokens(), "a text")

    class Broken(Fewer):
        def step(self, *args: object, **options: object) -> StepOutput:
            output = self._session.step(*args, **options)
            return replace(output, logits=output.logits * np.nan)

    with pytest.raises(ReftError, match="logits are not finite"):
        list(predictions(Broken(OrtSession(bundle, threads=1)), [5, 6, 7, 8], 2))

"""Adapters mixed in one batch, in stock onnxruntime: every row as if it were alone with its own adapter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rounding
from mixed_rows import expected, prefill, rules, stacked
from other_onnxruntime import python_with
from toy_bundle import ADAPTERS, ROUNDING, ToyDecoder, write_toy_bundle

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.op import FIRST_LOGIT
from runtimes.native_library import find_op_library

ROWS = [ADAPTERS["ends"], None, ADAPTERS["all"], ADAPTERS["prompt"], ADAPTERS["ends"]]
PROMPTS = [[11, 40, 7, 99, 120], [3, 9], [8, 13, 21, 34, 55], [60, 61, 62], [11, 40, 7, 99, 120]]
"""As many rows as columns: a rule that is read along the columns fits without a word."""
IN_THE_CHILD = """
import sys, numpy, onnxruntime
graph, folder, *kernels = sys.argv[1:]
for number, kernel in enumerate(kernels):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if kernel != "function":
        options.register_custom_ops_library(kernel)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    numpy.save(f"{folder}/{number}.npy", session.run(["logits"], dict(numpy.load(f"{folder}/feeds.npz")))[0])
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("mixed") / "b")


def _session(bundle: Bundle, kernel: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if kernel == "fused":
        library = find_op_library()
        if library is None:
            pytest.skip("no C++ compiler was there to build the op library")
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(bundle.graph_path, options, providers=["CPUExecutionProvider"])


def _mixed(bundle: Bundle) -> dict[str, np.ndarray]:
    names = list(ADAPTERS)
    banks, first_slots = stacked([ADAPTERS[name] for name in names], bundle.nodes)
    begins = [0 if row is None else first_slots[[ADAPTERS[name] for name in names].index(row)] for row in ROWS]
    return banks | rules(ROWS, begins)


def _assert_rows(logits: np.ndarray, mask: np.ndarray, want: list[np.ndarray]) -> None:
    for row, whole in enumerate(want):
        rounding.check(logits[row][mask[row] > 0], whole[-int(mask[row].sum()) :], ROUNDING)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kernel", ["fused", "function"])
def test_every_row_as_alone(bundle: Bundle, kernel: str, left: bool) -> None:
    session, mixed = _session(bundle, kernel), _mixed(bundle)
    feeds = prefill(PROMPTS, left=left)
    assert feeds["input_ids"].shape == (5, 5)
    outputs = session.run(None, feeds | mixed)
    names = [output.name for output in session.get_outputs()]
    want = expected(ToyDecoder.random(), PROMPTS, ROWS)
    _assert_rows(outputs[0], feeds["attention_mask"], want)
    # A decode step of all rows, and the same with the last column's logits only.
    tokens = [[7], [8], [9], [10], [11]]
    longer = [[*prompt, *token] for prompt, token in zip(PROMPTS, tokens, strict=True)]
    mask = np.concatenate([feeds["attention_mask"], np.ones((5, 1), np.int64)], 1)
    step = {
        "input_ids": np.array(tokens), "attention_mask": mask, "position_ids": mask.sum(1, keepdims=True) - 1,
        "reft.prompt_length": np.array([len(prompt) for prompt in PROMPTS]),
        **{name.replace("present", "past_key_values"): value for name, value in zip(names[1:], outputs[1:], strict=True)},
    }  # fmt: skip
    decoder = ToyDecoder.random()
    for row, logits in enumerate(session.run(["logits"], step | mixed)[0][:, -1]):
        rounding.check(logits, decoder.logits(longer[row], ROWS[row], len(PROMPTS[row]))[-1], ROUNDING)
    if left:
        last = session.run(["logits"], {**feeds, **mixed, FIRST_LOGIT: np.array([4])})[0]
        assert last.shape[1] == 1
        for row, logits in enumerate(last[:, 0]):
            rounding.check(logits, want[row][-1], ROUNDING)


@pytest.mark.slow
def test_the_oldest_onnxruntime(bundle: Bundle, tmp_path: Path) -> None:
    """Banks and rules by row without the container of adapters, which came with 1.20."""
    library = find_op_library()
    feeds = prefill(PROMPTS, left=True)
    np.savez(tmp_path / "feeds.npz", **feeds, **_mixed(bundle))
    kernels = ["function", *([str(library)] if library else [])]
    done = subprocess.run(
        [python_with("1.18.1"), "-c", IN_THE_CHILD, bundle.graph_path, tmp_path, *kernels], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for number in range(len(kernels)):
        _assert_rows(np.load(tmp_path / f"{number}.npy"), feeds["attention_mask"], expected(ToyDecoder.random(), PROMPTS, ROWS))


def test_explicit_slots_are_every_rows_own(bundle: Bundle) -> None:
    """``reft.slots`` [B, 1] that names an edit for whole rows, -1 for a row of the base, -2 for a row by its rule."""
    session, mixed = _session(bundle, "function"), _mixed(bundle)
    feeds = prefill([PROMPTS[0]] * 4, left=True)
    at = {"all": 3, "none": -1, "rule": -2}
    slots = np.array([[at["all"]], [at["none"]], [at["rule"]], [at["all"]]], np.int32)
    by_rule = {name: value if name.endswith((".U", ".A", ".b")) else value[:1] for name, value in mixed.items()}
    logits = session.run(["logits"], {**feeds, **by_rule, "reft.slots": slots})[0]
    want = expected(ToyDecoder.random(), [PROMPTS[0]] * 4, [ADAPTERS["all"], None, ADAPTERS["ends"], ADAPTERS["all"]])
    _assert_rows(logits, feeds["attention_mask"], want)


def test_rules_of_other_rows_are_seen(bundle: Bundle) -> None:
    """The faults that the tests above are about: another row's rule, and another adapter's place in the banks."""
    session, mixed = _session(bundle, "function"), _mixed(bundle)
    feeds = prefill(PROMPTS, left=True)
    want = expected(ToyDecoder.random(), PROMPTS, ROWS)
    rolled = {name: np.roll(value, 1) if value.dtype == np.int64 else value for name, value in mixed.items()}
    for wrong in (rolled, mixed | {"reft.first_slot": np.zeros(5, np.int64)}):
        with pytest.raises(AssertionError):
            _assert_rows(session.run(["logits"], feeds | wrong)[0], feeds["attention_mask"], want)

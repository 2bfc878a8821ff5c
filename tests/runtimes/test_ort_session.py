"""OrtSession against the numpy decoder, and everything it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import rounding
from toy_bundle import ADAPTERS, CONTEXT, ROUNDING, VOCABULARY, ToyDecoder, change_manifest, write_toy_bundle

from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.errors import BackendUnavailable, BundleError, GraphError, InputError
from runtimes.ort import session as ort_session
from runtimes.ort.session import OrtSession

DECODER = ToyDecoder.random()
TOKENS = [5, 17, 40, 9, 77, 120, 3, 61]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


def forward(session: OrtSession, tokens: list[int] = TOKENS) -> np.ndarray:
    return session.step(np.array([tokens]), np.ones((1, len(tokens)), np.int64)).logits[0]


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("slot_mode", ["graph", "input"])
def test_base_and_adapters_equal_the_numpy_decoder(tmp_path: Path, slot_mode: str, bound: bool) -> None:
    session = OrtSession(write_toy_bundle(tmp_path / "b", slot_mode=slot_mode), threads=1)
    session._bound = bound  # how a session off the CPU runs: outputs bound, adapters as inputs
    base = DECODER.logits(TOKENS)
    for name in (None, *ADAPTERS, None, "ends"):
        session.set_adapter(name)
        expected = DECODER.logits(TOKENS, ADAPTERS.get(name))
        rounding.check(forward(session), expected, ROUNDING)
        assert (name is None) == (rounding.distance(expected, base) <= ROUNDING)  # the adapters do steer
        assert session.adapter == name


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_steps_equal_one_forward(bundle: Bundle, name: str | None, bound: bool) -> None:
    session = OrtSession(bundle, threads=1)
    session._bound = bound
    session.set_adapter(name)
    expected = DECODER.logits(TOKENS, ADAPTERS.get(name), prompt_length=6)
    past, start, length = None, 0, np.array([6])
    for width in (2, 3, 1, 1, 1):
        stop = start + width
        out = session.step(np.array([TOKENS[start:stop]]), np.ones((1, stop)), past=past, prompt_length=length)
        rounding.check(out.logits[0], expected[start:stop], ROUNDING)
        past, start, length = out.past, stop, None  # remembered in past
    assert past.width == len(TOKENS)


def test_logits_outlive_their_session_and_later_steps(bundle: Bundle) -> None:
    session = OrtSession(bundle, threads=1)
    first = forward(session)
    kept = first.copy()
    for seed in range(20):
        forward(session, [seed, seed + 1])
    del session
    np.testing.assert_array_equal(first, kept)


def test_position_ids_can_be_given(session: OrtSession) -> None:
    ids, mask = np.array([TOKENS]), np.ones((1, len(TOKENS)))
    shifted = session.step(ids, mask, position_ids=np.arange(len(TOKENS))[None] + 3).logits
    assert rounding.distance(shifted, session.step(ids, mask).logits) > ROUNDING


def test_last_logits_are_one_column(tmp_path: Path) -> None:
    session = OrtSession(write_toy_bundle(tmp_path / "b", logits="last"), threads=1)
    logits = forward(session)
    assert logits.shape == (1, VOCABULARY) and logits.dtype == np.float32
    rounding.check(logits[0], DECODER.logits(TOKENS)[-1], ROUNDING)


@pytest.mark.parametrize("bound", [False, True])
def test_last_logits_of_a_step(bundle: Bundle, bound: bool) -> None:
    """The graph makes no others; the step after it has all of its own again."""
    session = OrtSession(bundle, threads=1)
    session._bound = bound
    session.set_adapter("ends")
    expected = DECODER.logits(TOKENS, ADAPTERS["ends"])
    ids, mask = np.array([TOKENS]), np.ones((1, len(TOKENS)), np.int64)
    for last in (99, len(TOKENS), 3, 1):
        output = session.step(ids, mask, last_logits=last)
        rounding.check(output.logits[0], expected[-last:], ROUNDING)
        assert output.outputs["logits"].shape()[1] == min(last, len(TOKENS))
    rounding.check(forward(session), expected, ROUNDING)


def test_a_version_1_graph_with_one_rule_for_all_rows(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", one_rule=True)
    assert bundle.manifest.rules == "shared"
    assert "reft.first_slot" not in read_onnx_adapter(bundle.adapter("ends").file)
    session = OrtSession(bundle, threads=1)
    for name in (None, *ADAPTERS):
        session.set_adapter(name)
        rounding.check(forward(session), DECODER.logits(TOKENS, ADAPTERS.get(name)), ROUNDING)
    ids, mask = np.array([TOKENS]), np.ones((1, len(TOKENS)), np.int64)
    assert session.step(ids, mask, last_logits=1).logits.shape[1] == 1


def test_half_precision_comes_back_as_float32(tmp_path: Path) -> None:
    session = OrtSession(write_toy_bundle(tmp_path / "b", precision="fp16"), threads=1, adapter="ends")
    logits = forward(session)
    assert logits.dtype == np.float32
    assert np.abs(logits - DECODER.logits(TOKENS, ADAPTERS["ends"])).max() < 0.2


def test_bfloat16_words_become_float32() -> None:
    import ml_dtypes

    values = np.array([[1.5, -2.0, 3e38]], ml_dtypes.bfloat16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), ort_session.BFLOAT16)
    np.testing.assert_array_equal(ort_session.to_float32(value), values.astype(np.float32))


def test_a_bfloat16_graph_on_the_cpu_names_the_way_out(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b", precision="bf16")
    with pytest.raises(BackendUnavailable, match="run it on cuda, or export fp32"):
        OrtSession(bundle)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[VOCABULARY]], [[1]], f"{VOCABULARY}"),
        ([[-1]], [[1]], "token ids reach from -1"),
        ([[1, 2]], [[1]], r"got \[1, 2\] and \[1, 1\]"),
        ([1, 2], [[1, 1]], r"got \[2\]"),
        ([[]], [[]], r"got \[1, 0\]"),
        ([[1] * (CONTEXT + 1)], [[1] * (CONTEXT + 1)], f"{CONTEXT + 1} tokens do not fit the context of toy \\({CONTEXT}\\)"),
    ],
)
def test_inputs_are_checked(session: OrtSession, ids: list, mask: list, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        session.step(np.array(ids, np.int64), np.array(mask, np.int64))
    assert "\n" not in str(caught.value)


def test_pads_do_not_count_towards_the_context(session: OrtSession) -> None:
    width = CONTEXT + 4
    mask = np.array([[1] * CONTEXT + [0] * 4])
    assert session.step(np.ones((1, width), np.int64), mask).logits.shape == (1, width, VOCABULARY)


def test_an_overflow_while_decoding_is_refused(session: OrtSession) -> None:
    past = session.step(np.ones((1, CONTEXT), np.int64), np.ones((1, CONTEXT))).past
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens do not fit"):
        session.step(np.ones((1, 1), np.int64), np.ones((1, CONTEXT + 1)), past=past)


def test_loading_and_running_print_nothing(bundle: Bundle) -> None:
    code = (
        "import sys, numpy as np; from runtimes.artifacts.bundle import open_bundle; from runtimes.ort.session import OrtSession;"
        "s = OrtSession(open_bundle(sys.argv[1]), threads=1, adapter='ends'); s.step(np.array([[1, 2]]), np.ones((1, 2)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(bundle.folder)], capture_output=True, text=True, check=True, timeout=120)
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_here_names_its_install(bundle: Bundle, provider: str) -> None:
    if ort_session.PROVIDERS[provider][0] in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has {provider}")
    with pytest.raises(BackendUnavailable, match="pip install 'onnxruntime-gpu"):
        OrtSession(without_edits(bundle), provider=provider)


def without_edits(bundle: Bundle) -> Bundle:
    """The manifest of a plain decoder."""
    return replace(bundle, manifest=replace(bundle.manifest, nodes=(), adapters=()))


@pytest.mark.parametrize("slot_mode", ["graph", "input"])
@pytest.mark.parametrize("adapters", [{}, {"ends": ADAPTERS["ends"]}], ids=["sites-only", "adapter"])
def test_edits_are_refused_in_tensorrts_provider(adapters: dict, slot_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before onnxruntime is asked for anything, so that a machine that has the provider refuses too; cuda and cpu are named or left."""
    opened = write_toy_bundle(tmp_path / "toy", adapters=adapters, slot_mode=slot_mode)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: pytest.fail("the graph must not be loaded"))
    with pytest.raises(BackendUnavailable, match="answer unsteered; use --provider cuda, or .* reft-export build .*toy --target tensorrt$"):
        OrtSession(opened, provider="tensorrt")
    monkeypatch.undo()
    assert OrtSession(opened, threads=1).provider == "cpu"


def test_a_silent_fallback_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setitem(ort_session.PROVIDERS, "cuda", _FirstOfTwo(("CUDAExecutionProvider", "CPUExecutionProvider")))
    with pytest.raises(BackendUnavailable, match="fell back to CPUExecutionProvider"):
        OrtSession(bundle, provider="cuda")


def test_a_provider_that_does_not_start_says_so_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """As onnxruntime-gpu does without TensorRT's libraries; its own fallback would print a banner on stdout."""

    def session(*_: object, enable_fallback: int, **__: object) -> None:
        assert enable_fallback == 0
        raise RuntimeError("RegisterTensorRTPluginsAsCustomOps\nPlease install TensorRT libraries")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(BackendUnavailable, match="TensorrtExecutionProvider did not start: Please install TensorRT libraries; check"):
        OrtSession(without_edits(bundle), provider="tensorrt")
    assert capfd.readouterr().out == ""


class _FirstOfTwo(tuple):
    """Names CUDA as wanted and hands onnxruntime the CPU only: what a missing CUDA library leaves."""

    def __iter__(self):
        return iter(("CPUExecutionProvider",))


def test_unknown_choices_are_refused(bundle: Bundle) -> None:
    for options in ({"provider": "npu"}, {"kernel": "slow"}, {"threads": 0}, {"kernel": "function", "library": Path("x.so")}):
        with pytest.raises(InputError):
            OrtSession(bundle, **options)


def test_kernels_without_a_library(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort_session, "find_op_library", lambda: None)
    assert OrtSession(bundle, threads=1).kernel == "function"
    with pytest.raises(BackendUnavailable, match="the fused kernel needs"):
        OrtSession(bundle, kernel="fused")
    with pytest.raises(BackendUnavailable, match="does not exist"):
        OrtSession(bundle, library=tmp_path / "none.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(BackendUnavailable, match="does not load in onnxruntime") as caught:
        OrtSession(bundle, library=tmp_path / "text.so")
    assert "\n" not in str(caught.value)


def test_adapters_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "b")
    session = OrtSession(bundle, threads=1)
    with pytest.raises(BundleError, match="no adapter 'other'; it has: ends, prompt, all"):
        session.set_adapter("other")
    bundle.adapter("ends").file.write_bytes(b"not an adapter")
    with pytest.raises(BundleError, match="ends.onnx_adapter cannot be loaded"):
        session.set_adapter("ends")
    assert session.adapter is None
    rounding.check(forward(session), DECODER.logits(TOKENS), ROUNDING)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_adapter_of_another_graph_is_one_line(tmp_path: Path, in_place: bool) -> None:
    """Where they are bound, and where onnxruntime takes an active adapter itself."""
    from runtimes.artifacts.ort_adapter_file import write_onnx_adapter

    bundle = write_toy_bundle(tmp_path / "b", in_place=in_place)
    file = bundle.adapter("ends").file
    right = read_onnx_adapter(file)
    bank = next(name for name, value in right.items() if value.ndim == 3)
    wide = np.concatenate([right[bank], right[bank]], 2)
    others = {
        rf"{bank} is tensor\(float\) \[.*\], and the graph takes": right | {bank: wide},
        rf"{bank} is tensor\(int64\) \[.*\], and the graph takes tensor\(float\)": right | {bank: right[bank].astype(np.int64)},
        "holds 'reft.7.block_output.U', which the graph does not take": right | {"reft.7.block_output.U": right[bank]},
        f"does not hold {bank}, which the graph takes of every adapter": {name: right[name] for name in right if name != bank},
        f"{bank} holds values that are not finite": right | {bank: np.full_like(right[bank], np.nan)},
    }
    for said, tensors in others.items():
        write_onnx_adapter(file, tensors)
        with pytest.raises(BundleError, match=said) as caught:
            OrtSession(bundle, threads=1, adapter="ends")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dim", [1 << 31, 1 << 62, -1])
def test_an_adapter_that_claims_more_than_its_file_holds(tmp_path: Path, dim: int) -> None:
    """onnxruntime makes a tensor of whatever a file says, and would read beyond its end."""
    bundle = write_toy_bundle(tmp_path / "b")
    file = bundle.adapter("ends").file
    data = file.read_bytes()
    width = (16).to_bytes(8, "little", signed=True)
    assert width in data
    file.write_bytes(data.replace(width, dim.to_bytes(8, "little", signed=True)))
    with pytest.raises(BundleError, match="claim more bytes than the file has|cannot be loaded as an adapter"):
        OrtSession(bundle, threads=1, adapter="ends")


def test_graphs_that_are_not_decoders(tmp_path: Path) -> None:
    import onnx.parser

    bundle = write_toy_bundle(tmp_path / "b")
    bundle.graph_path.write_bytes(b"not a graph")
    with pytest.raises(GraphError, match="does not load in onnxruntime"):
        OrtSession(bundle)
    other = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (int64[B, S] tokens) => (int64[B, S] y) { y = Neg(tokens) }'
    )
    bundle.graph_path.write_bytes(other.SerializeToString())
    with pytest.raises(GraphError, match=r"unknown inputs \['tokens'\], missing \['attention_mask', 'input_ids', 'logits'\]"):
        OrtSession(bundle)


def test_a_graph_without_position_ids_counts_columns(tmp_path: Path) -> None:
    bundle = change_manifest(write_toy_bundle(tmp_path / "b", position_ids=False), exporter="optimum")
    session = OrtSession(bundle, threads=1)
    assert not session.takes_position_ids
    rounding.check(forward(session), DECODER.logits(TOKENS), ROUNDING)
    with pytest.raises(InputError, match="do not fit the context"):
        session.step(np.ones((1, CONTEXT + 1), np.int64), np.array([[0] + [1] * CONTEXT]))

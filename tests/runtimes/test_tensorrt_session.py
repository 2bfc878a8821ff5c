"""TensorRTSession on doubles of TensorRT and CUDA, against onnxruntime on the bundle that the engine was made from.

The doubles run what was queued when it is waited for, poison what is not written, and refuse stale graphs and addresses
(tensorrt_double.py); so these tests are about buffers, bindings and shapes. No test here has run on a GPU.
"""

from __future__ import annotations

import gc
import mmap
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import rounding
from tensorrt_double import ContextDouble, CudaDouble, DeviceFault, TensorRTDouble
from toy_bundle import ADAPTERS, CONTEXT, PROMPTS, ROUNDING, VOCABULARY, ToyDecoder, toy_adapter, toy_tokenizer, write_toy_bundle
from toy_engine import REBUILD, install_doubles, write_toy_engine

from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.engine import Engine
from runtimes.artifacts.engine_adapter import read_engine_adapter, write_engine_adapter
from runtimes.bench import bench
from runtimes.errors import BackendUnavailable, BundleError, InputError, ReftError
from runtimes.generation import DecodeBatch, GenerationSettings, generate, greedy_tokens
from runtimes.golden import check_golden
from runtimes.open import open_bank
from runtimes.ort.session import OrtSession
from runtimes.rows import AdapterRows
from runtimes.session import Session
from runtimes.tensorrt import column_cache, device_cache
from runtimes.tensorrt import session as tensorrt_session
from runtimes.tensorrt.cuda_device import CudaDevice
from runtimes.tensorrt.session import TensorRTSession
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
IDS = [toy_tokenizer().encode(p).ids for p in PROMPTS]
TOKENS = [5, 17, 40, 9, 77, 120, 3, 61]
VARIANTS = [("all", "graph", True), ("all", "input", True), ("last", "graph", True), ("all", "graph", False)]
"""logits, slots, position_ids"""
TARGETS = ["tensorrt", "tensorrt-rtx"]
KINDS = ["columns", "whole"]
"""What a step gives out of the KV cache."""
CASES = [*((variant, "columns") for variant in VARIANTS if variant[2]), (VARIANTS[0], "whole"), (VARIANTS[3], "whole")]
Doubles = tuple[CudaDouble, TensorRTDouble]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Bundle]:
    folder = tmp_path_factory.mktemp("toy")
    return {v: write_toy_bundle(folder / f"{i}", logits=v[0], slot_mode=v[1], position_ids=v[2]) for i, v in enumerate(VARIANTS)}


@pytest.fixture(scope="module")
def engines(bundles: dict[tuple, Bundle]) -> dict[tuple, Engine]:
    """By variant and kind."""
    return {
        (v, kind): write_toy_engine(b, b.folder.parent / f"{b.folder.name}-{kind}", columns=kind == "columns")
        for v, b in bundles.items()
        for kind in KINDS
    }


@pytest.fixture
def engine(engines: dict[tuple, Engine]) -> Engine:
    return engines[VARIANTS[0], "columns"]


@pytest.fixture
def whole(engines: dict[tuple, Engine]) -> Engine:
    return engines[VARIANTS[0], "whole"]


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Doubles:
    return install_doubles(monkeypatch)


@pytest.fixture
def cuda(doubles: Doubles) -> CudaDouble:
    return doubles[0]


@pytest.fixture(params=[8, 64], ids=lambda n: f"bucket {n}")
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tensorrt_session, "BUCKET", request.param)
    monkeypatch.setattr(device_cache, "GRANULE", 16)
    return request.param


def forward(session: Session, tokens: list[int] = TOKENS) -> np.ndarray:
    return session.step(np.array([tokens]), np.ones((1, len(tokens)), np.int64)).logits[0]


@pytest.mark.parametrize("chunk", [None, 1, 5])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
@pytest.mark.parametrize(("variant", "kind"), CASES, ids=str)
def test_greedy_generation_is_onnxruntimes_token_for_token(
    bundles: dict, engines: dict, cuda: CudaDouble, bucket: int, variant: tuple, graphs: bool, chunk: int | None, kind: str
) -> None:
    """Padded batches, chunked prefill, several buckets, and one adapter after the other in one session."""
    expected = OrtSession(bundles[variant], threads=1)
    settings = GenerationSettings(max_new_tokens=24)
    with TensorRTSession(engines[variant, kind], cuda_graphs=graphs) as session:
        tokenizer = Tokenizer.load(session.bundle.folder)
        for name in (None, "ends", "prompt", None, "all", "ends"):
            expected.set_adapter(name)
            session.set_adapter(name)
            mine, theirs = (generate(s, tokenizer, IDS, settings, prefill_chunk=chunk) for s in (session, expected))
            assert [g.tokens for g in mine] == [g.tokens for g in theirs]
            assert session.adapter == name
        captured = graphs and variant[2]  # a graph that counts columns itself cannot be padded into a bucket
        assert (cuda.counts["launches"] > 0) == (cuda.counts["captures"] > 0) == captured
    assert cuda.is_empty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_steps_equal_the_numpy_decoder(
    bundles: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int, name: str | None, graphs: bool, target: str, kind: str
) -> None:
    cuda, _ = install_doubles(monkeypatch, target)
    expected = DECODER.logits(TOKENS * 3, ADAPTERS.get(name), prompt_length=6)
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", target=target, columns=kind == "columns")
    with TensorRTSession(engine, cuda_graphs=graphs, adapter=name) as session:
        past, start, length = None, 0, np.array([6])
        for width in (2, 3, *[1] * 12, 4, 1, 1, 1):  # a chunk after decode steps: a second turn
            stop = start + width
            ids = np.array([(TOKENS * 3)[start:stop]])
            out = session.step(ids, np.ones((1, stop)), past=past, prompt_length=length)
            rounding.check(out.logits[0], expected[start:stop], ROUNDING)
            past, start, length = out.past, stop, None
        assert past.width == stop == 24
    assert cuda.is_empty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
def test_rows_that_end_become_pads(engines: dict, cuda: CudaDouble, bucket: int, graphs: bool, kind: str) -> None:
    with TensorRTSession(engines[VARIANTS[0], kind], cuda_graphs=graphs) as session:
        batch = DecodeBatch(session, IDS)
        for logits, prompt in zip(batch.prefill(4), IDS, strict=True):
            rounding.check(logits, DECODER.logits(prompt)[-1], ROUNDING)
        added = [4, 6, 9, 3, 8, 7, 5, 2, 11, 13]
        for token in added:
            logits = batch.append([token, None, token])
        for row in (0, 2):
            rounding.check(logits[row], DECODER.logits(IDS[row] + added)[-1], ROUNDING)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("variant", "kind"), CASES, ids=str)
def test_every_rung_of_the_golden_arrays_passes(
    bundles: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int, variant: tuple, target: str, graphs: bool, kind: str
) -> None:
    cuda, _ = install_doubles(monkeypatch, target)
    engine = write_toy_engine(bundles[variant], tmp_path / "e", target=target, columns=kind == "columns")
    with TensorRTSession(engine, cuda_graphs=graphs) as session:
        report = check_golden(engine, session)
        report.require()
        assert (session.adapter, session.kernel, session.provider) == (None, "expanded", target)
    of_bundle = check_golden(bundles[variant], OrtSession(bundles[variant], threads=1))
    assert [rung.name for rung in report.rungs] == [rung.name for rung in of_bundle.rungs]
    assert cuda.is_empty


def test_activations_and_nodes_that_an_adapter_lacks(tmp_path: Path, cuda: CudaDouble) -> None:
    """An untied adapter with an activation and a linear one share the graph: each carries zeros where the other acts."""
    adapters = {"gelu": toy_adapter("f2+l2", tied=False, activation="gelu", seed=5), "all": ADAPTERS["all"]}
    bundle = write_toy_bundle(tmp_path / "b", adapters=adapters)
    engine = write_toy_engine(bundle, tmp_path / "e", plugin=True)
    expected = OrtSession(bundle, threads=1)
    with TensorRTSession(engine) as session:
        check_golden(engine, session).require()
        for name in (None, *bundle.adapter_names, *bundle.adapter_names):
            expected.set_adapter(name)
            session.set_adapter(name)
            np.testing.assert_array_equal(greedy_tokens(session, IDS, 20), greedy_tokens(expected, IDS, 20))
            rounding.check(forward(session), forward(expected), ROUNDING)
        assert session.kernel == "plugin"


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
def test_half_precision(tmp_path: Path, cuda: CudaDouble, graphs: bool) -> None:
    bundle = write_toy_bundle(tmp_path / "b", precision="fp16")
    with TensorRTSession(write_toy_engine(bundle, tmp_path / "e"), cuda_graphs=graphs, adapter="ends") as session:
        logits = forward(session)
        assert logits.dtype == np.float32
        assert 1e-5 < np.abs(logits - DECODER.logits(TOKENS, ADAPTERS["ends"])).max() < 0.2
        check_golden(session.bundle, session).require()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "growing"])
def test_bfloat16_in_and_out(bundles: dict, tmp_path: Path, cuda: CudaDouble, graphs: bool) -> None:
    """The engine's types are bfloat16, also the banks'; the double computes in float32 and rounds what it reads and writes."""
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", bfloat16=True)
    with TensorRTSession(engine, cuda_graphs=graphs, adapter="all") as session:
        batch = DecodeBatch(session, [TOKENS])
        logits = [batch.prefill()[0], *(batch.append([t])[0] for t in (9, 8, 7))]
        assert logits[0].dtype == np.float32
        assert (logits[0] == logits[0].astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    expected = DECODER.logits([*TOKENS, 9, 8, 7], ADAPTERS["all"])[7:]
    assert 0 < np.abs(logits - expected).max() < 0.2


def test_one_graph_serves_a_bucket(engine: Engine, cuda: CudaDouble) -> None:
    """One ordinary run, one capture, then replays; the engine itself is not called again until something changes."""
    with TensorRTSession(engine) as session:
        batch = DecodeBatch(session, [TOKENS])
        batch.prefill()
        for _ in range(30):
            batch.append([1])
        assert (cuda.counts["captures"], cuda.counts["launches"]) == (1, 29)
        assert cuda.counts["enqueues"] == 1 + 1 + 1  # prefill, ordinary decode, captured decode
        blocks = cuda.counts["malloc"]
        again = DecodeBatch(session, [TOKENS])
        again.prefill()
        again.append([1])
        assert (cuda.counts["captures"], cuda.counts["launches"]) == (1, 30), "the same shapes and buffers, the same graph"
        assert cuda.counts["malloc"] == blocks
        session.set_adapter("ends")
        swapped = DecodeBatch(session, [TOKENS])
        swapped.prefill()
        for _ in range(3):
            swapped.append([1])
        assert (cuda.counts["captures"], len(cuda.graphs)) == (2, 1), "an old graph does not outlive the bindings it was made of"


def test_new_columns_are_copied_to_behind_the_cache(engine: Engine, cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy a step for all tensors, whose rows lie alike, and one more where the cache moves to the next bucket."""
    monkeypatch.setattr(tensorrt_session, "BUCKET", 8)
    monkeypatch.setattr(column_cache, "ALIGNMENT", 1)
    copied: list[int] = []
    original = cuda.cudaMemcpy2DAsync
    cuda.cudaMemcpy2DAsync = lambda *a: copied.append(a[4] * a[5]) or original(*a)
    column = 2 * 2 * 16 * 4  # keys and values of two layers, one head of 16 float32
    with TensorRTSession(engine) as session:
        batch = DecodeBatch(session, [TOKENS[:5]])
        batch.prefill()
        assert copied == [5 * column]
        columns = []
        for _ in range(12):
            batch.append([1])
            columns.append(session._cache.columns)
    assert columns == [8, 8, 8, *[16] * 8, 24]
    assert copied[1:] == [*[column] * 3, 8 * column, *[column] * 8, 16 * column, column]
    assert cuda.counts["captures"] == 2
    assert cuda.is_empty


def test_rows_that_do_not_lie_alike_are_copied_by_themselves(engine: Engine, cuda: CudaDouble) -> None:
    """A column of 64 bytes a tensor is not what TensorRT aligns addresses to."""
    copies: list[int] = []
    original = cuda.cudaMemcpy2DAsync
    cuda.cudaMemcpy2DAsync = lambda *a: copies.append(a[0]) or original(*a)
    with TensorRTSession(engine) as session:
        session.step(np.array([TOKENS[:3]]), np.ones((1, 3)))
        addresses = [*session._cache.past_addresses().values(), *session._cache.present_addresses(3).values()]
    assert len(copies) == 4
    assert all(address % column_cache.ALIGNMENT == addresses[0] % column_cache.ALIGNMENT for address in addresses[:4])


def test_a_full_bucket_moves_to_the_next(whole: Engine, cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_session, "BUCKET", 8)
    with TensorRTSession(whole) as session:
        batch = DecodeBatch(session, [TOKENS[:5]])
        batch.prefill()
        columns = [batch.append([1]) is not None and session._cache.columns for _ in range(20)]
    # From 5 columns on. A full bucket has no pad to drop: what its last step wrote, 9 columns, goes into the next one.
    assert columns == [8, 8, 8, 9, *[16] * 7, 17, *[24] * 7, 25]
    assert cuda.counts["captures"] == 3


def test_the_first_side_is_the_next_past_without_a_copy(whole: Engine, cuda: CudaDouble) -> None:
    with TensorRTSession(whole, cuda_graphs=False) as session:
        batch = DecodeBatch(session, [TOKENS])
        batch.prefill()
        blocks = cuda.counts["malloc"]
        copies = [0]
        original = cuda.cudaMemcpy2DAsync
        cuda.cudaMemcpy2DAsync = lambda *a: copies.__setitem__(0, copies[0] + 1) or original(*a)
        for _ in range(20):
            batch.append([1])
        assert copies == [0] and cuda.counts["malloc"] == blocks
        assert session._engine.cuda_engine.contexts[1].addresses["present.0.key"] in cuda.live


def test_last_logits_are_all_that_leaves_the_device(engine: Engine, cuda: CudaDouble) -> None:
    ids, mask = np.array([TOKENS, TOKENS]), np.ones((2, len(TOKENS)), np.int64)
    with TensorRTSession(engine) as session:
        every = session.step(ids, mask).logits
        last = session.step(ids, mask, last_logits=2).logits
        assert (every.shape, last.shape) == ((2, 8, VOCABULARY), (2, 2, VOCABULARY))
        np.testing.assert_array_equal(last, every[:, -2:])


def test_an_older_cache_is_refused(engine: Engine, cuda: CudaDouble) -> None:
    ids, one = np.array([TOKENS]), np.array([[1]])
    with TensorRTSession(engine) as session, TensorRTSession(engine) as other:
        first = session.step(ids, np.ones((1, 8))).past
        second = session.step(one, np.ones((1, 9)), past=first).past
        for owner, past in ((session, first), (other, second)):
            with pytest.raises(InputError, match="keeps that of its newest step only; feed the tokens again"):
                owner.step(one, np.ones((1, past.width + 1)), past=past)
        with pytest.raises(InputError, match="the KV cache has 1 rows, the new tokens 2"):
            session.step(np.array([[1], [1]]), np.ones((2, 10)), past=second)
        session.step(one, np.ones((1, 10)), past=second)  # a refusal costs nothing


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[VOCABULARY]], [[1]], f"{VOCABULARY}"),
        ([[1, 2]], [[1]], r"got \[1, 2\] and \[1, 1\]"),
        ([[1] * (CONTEXT + 1)], [[1] * (CONTEXT + 1)], f"{CONTEXT + 1} tokens do not fit the context of toy \\({CONTEXT}\\)"),
    ],
)
def test_inputs_are_checked_as_onnxruntimes(engine: Engine, cuda: CudaDouble, ids: list, mask: list, message: str) -> None:
    with TensorRTSession(engine) as session, pytest.raises(InputError, match=message):
        session.step(np.array(ids, np.int64), np.array(mask, np.int64))


def test_shapes_beyond_the_profiles_name_the_option_that_raises_them(bundles: dict, tmp_path: Path, cuda: CudaDouble) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", batch=2, sequence=6, context=9, slots=1, rank=2)
    ones = lambda *shape: np.ones(shape, np.int64)  # noqa: E731
    with TensorRTSession(engine) as session:
        for ids, match in ((ones(3, 2), "3 rows at once .* --max-batch 3"), (ones(1, 7), "7 new tokens in one call .* --max-sequence 7")):
            with pytest.raises(InputError, match=match) as caught:
                session.step(ids, ones(*ids.shape))
            assert "\n" not in str(caught.value) and REBUILD in str(caught.value)
        past = session.step(ones(1, 6), ones(1, 6)).past
        for width in (7, 8, 9):
            past = session.step(ones(1, 1), ones(1, width), past=past).past
        with pytest.raises(InputError, match="9 columns of the KV cache do not fit .* 0 to 8 .* --context 10"):
            session.step(ones(1, 1), ones(1, 10), past=past)
        with pytest.raises(InputError, match="2 position groups of the adapter .* --max-slots 2"):
            session.set_adapter("ends")
        with pytest.raises(InputError, match="rank 3 .* --max-rank 3"):
            session.set_adapter("prompt")
        assert session.adapter is None
        session.set_adapter("all")


def test_adapters_are_uploaded_once(engine: Engine, cuda: CudaDouble) -> None:
    with TensorRTSession(engine) as session:
        session.set_adapter("ends")
        blocks = cuda.counts["malloc"]
        for name in (None, "ends", None, "ends"):
            session.set_adapter(name)
        assert cuda.counts["malloc"] == blocks


@pytest.mark.parametrize("slot_mode", ["graph", "input"])
@pytest.mark.parametrize("freeze", ["base", "ends"])
def test_frozen_engines_run_what_is_frozen(tmp_path: Path, cuda: CudaDouble, freeze: str, slot_mode: str) -> None:
    bundle = write_toy_bundle(tmp_path / "b", slot_mode=slot_mode)
    engine = write_toy_engine(bundle, tmp_path / "e", freeze=freeze)
    own = None if freeze == "base" else freeze
    with TensorRTSession(engine) as session:
        assert session.adapter == own
        expected = OrtSession(bundle, threads=1, adapter=own)
        np.testing.assert_array_equal(greedy_tokens(session, IDS, 12), greedy_tokens(expected, IDS, 12))
        report = check_golden(engine, session)
        report.require()
        assert {r.name.partition(":")[0] for r in report.rungs} == {freeze}
        with pytest.raises(InputError, match="never takes adapter 'all': .*build it without --freeze"):
            session.set_adapter("all")
        if freeze == "ends" and slot_mode == "graph":
            with pytest.raises(InputError, match="never runs without an adapter: adapter 'ends' is frozen into it; use -a ends"):
                session.set_adapter(None)
        else:
            session.set_adapter(None)
            rounding.check(forward(session), DECODER.logits(TOKENS), ROUNDING)


def test_bench_runs(engine: Engine, tmp_path: Path, bundles: dict, cuda: CudaDouble) -> None:
    result = bench(lambda: TensorRTSession(engine), prompt_tokens=20, new_tokens=4, repeats=2)
    assert [m.name for m in result.measurements] == ["base", *ADAPTERS]
    assert (result.provider, result.kernel) == ("tensorrt", "expanded")
    frozen = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", freeze="ends")
    result = bench(lambda: TensorRTSession(frozen), prompt_tokens=20, new_tokens=4, repeats=2, base="ends", adapters=[])
    assert [m.name for m in result.measurements] == ["ends"]


def test_tensorrt_rtx_captures_by_itself(bundles: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", target="tensorrt-rtx", columns=False)
    for graphs in (True, False):
        cuda, tensorrt = install_doubles(monkeypatch, "tensorrt-rtx")
        with TensorRTSession(engine, cuda_graphs=graphs) as session:
            greedy_tokens(session, IDS, 5)
            assert [c.cuda_graph_strategy for c in tensorrt.configs] == [0, int(graphs)]  # prefill, decode
            assert cuda.counts["captures"] == 0
            assert session._cache.columns == (64 if graphs else session._cache.width)


def test_an_engine_that_cannot_be_captured_decodes_without(engine: Engine, cuda: CudaDouble, bundles: dict) -> None:
    cuda.capture_fails = True
    expected = greedy_tokens(OrtSession(bundles[VARIANTS[0]], threads=1), IDS, 8)
    with TensorRTSession(engine) as session:
        with pytest.warns(RuntimeWarning, match="without CUDA graphs.*cudaErrorStreamCaptureUnsupported"):
            tokens = greedy_tokens(session, IDS, 8)
        np.testing.assert_array_equal(tokens, expected)
        assert not session.cuda_graphs


def test_shapes_that_a_layer_refuses_are_one_line(engine: Engine, cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's Python package raises there, where it returns False or names elsewhere."""

    def infer_shapes(context: ContextDouble) -> list[str]:
        raise RuntimeError("Shape inference\nfailed")

    with TensorRTSession(engine) as session:
        monkeypatch.setattr(ContextDouble, "infer_shapes", infer_shapes)
        with pytest.raises(ReftError, match=r"refuses these shapes \(Shape inference failed\)"):
            forward(session)


def test_the_plugin_is_loaded_before_the_plan(bundles: dict, tmp_path: Path, doubles: Doubles) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", plugin=True)
    other = tmp_path / "other.so"
    other.write_bytes(b"")
    for plugin, loaded in ((None, engine.plugin_path), (other, other)):
        doubles[1].plugins.clear()
        with TensorRTSession(engine, plugin=plugin) as session:
            assert doubles[1].plugins == [str(loaded.resolve())] and session.kernel == "plugin"
    with pytest.raises(BackendUnavailable, match="no.so is not a file"):
        TensorRTSession(engine, plugin=tmp_path / "no.so")


def test_the_plan_is_mapped_and_let_go(engine: Engine, doubles: Doubles) -> None:
    with TensorRTSession(engine):
        assert isinstance(doubles[1].mapped, mmap.mmap) and doubles[1].mapped.closed


def test_weight_streaming_gets_a_budget(bundles: dict, tmp_path: Path, doubles: Doubles) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e", weight_streaming=True)
    with TensorRTSession(engine):
        assert doubles[1].engines[-1].weight_streaming_budget_v2 == 12345


def test_engines_that_do_not_fit_are_refused_before_they_run(engine: Engine, doubles: Doubles, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, tensorrt = doubles
    tensorrt.__version__ = "10.13.2"
    with pytest.raises(BackendUnavailable, match=f"does not load in tensorrt 10.13.2.*{REBUILD}"):
        TensorRTSession(engine)
    tensorrt.__version__ = "10.3.0.26"
    monkeypatch.setattr(tensorrt_session, "present_compute_capability", lambda: None)
    with pytest.raises(BackendUnavailable, match="needs a GPU"):
        TensorRTSession(engine)
    monkeypatch.setattr(tensorrt_session, "present_compute_capability", lambda: "9.0")
    with pytest.raises(BackendUnavailable, match="compute capability 9.0"):
        TensorRTSession(engine)
    monkeypatch.setattr(tensorrt_session, "present_compute_capability", lambda: "8.7")
    cuda.devices = 0
    with pytest.raises(BackendUnavailable, match="no usable CUDA GPU: cudaErrorNoDevice") as caught:
        TensorRTSession(engine)
    assert caught.value.exit_code == 4

    def without_a_driver() -> tuple[int, int]:
        raise RuntimeError("Failed to dlopen libcuda.so.1")  # as cuda-python 12 does

    cuda.cudaGetDeviceCount = without_a_driver
    with pytest.raises(BackendUnavailable, match="no usable CUDA GPU: Failed to dlopen libcuda.so.1; check"):
        TensorRTSession(engine)
    assert cuda.is_empty


def test_a_damaged_plan_is_one_line(bundles: dict, tmp_path: Path, cuda: CudaDouble) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e")
    engine.plan_path.write_bytes(b"not a plan")
    with pytest.raises(BackendUnavailable, match="engine.plan does not load in tensorrt 10.3.0: the plan has no magic tag") as caught:
        TensorRTSession(engine)
    assert "\n" not in str(caught.value) and cuda.is_empty
    engine.plan_path.write_bytes(b"")
    with pytest.raises(BackendUnavailable, match="the plan has no magic tag"):
        TensorRTSession(engine)


@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "profiles", "range"])
def test_a_plan_that_its_manifest_does_not_describe_is_refused(engine: Engine, cuda: CudaDouble, change: str) -> None:
    built = engine.engine
    first, decode = built.inputs[0], built.profiles[1]
    ids = decode.shapes["input_ids"]
    other = {
        "missing": replace(built, inputs=built.inputs[1:]),
        "dtype": replace(built, inputs=(replace(first, dtype="int32"), *built.inputs[1:])),
        "shape": replace(built, outputs=(replace(built.outputs[0], shape=("B", "S", 7)), *built.outputs[1:])),
        "profiles": replace(built, profiles=(built.profiles[0],)),
        "range": replace(
            built, profiles=(built.profiles[0], replace(decode, shapes={**decode.shapes, "input_ids": replace(ids, max=(9, 1))}))
        ),
    }[change]
    with pytest.raises(BundleError, match=f"its plan is not the one of its manifest: .*{REBUILD}"):
        TensorRTSession(replace(engine, engine=other))
    assert cuda.is_empty


def test_adapter_files_that_do_not_fit_the_engine(bundles: dict, tmp_path: Path, cuda: CudaDouble) -> None:
    engine = write_toy_engine(bundles[VARIANTS[0]], tmp_path / "e")
    path = engine.adapter_file("ends")
    right = read_engine_adapter(path)
    bank = "reft.1.block_output.U"
    with TensorRTSession(engine) as session:
        for wrong, match in (
            ({n: t for n, t in right.items() if n != bank}, f"the engine has {bank}, the adapter does not"),
            (right | {"reft.9.block_output.U": right[bank]}, "the adapter has reft.9.block_output.U"),
            (right | {bank: right[bank].astype(np.float16)}, f"{bank} is float16"),
            (right | {bank: right[bank][:, :, :8]}, r"the engine takes float \['reft.1.block_output.N', 'reft.1.block_output.r', 16\]"),
        ):
            write_engine_adapter(path, {n: np.ascontiguousarray(t) for n, t in wrong.items()})
            with pytest.raises(BundleError, match=match):
                session.set_adapter("ends")
            assert session.adapter is None
        with pytest.raises(BundleError, match="no adapter 'other'"):
            session.set_adapter("other")
        rounding.check(forward(session), DECODER.logits(TOKENS), ROUNDING)


def test_memory_that_does_not_suffice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, _ = install_doubles(monkeypatch, capacity=100_000)
    with pytest.raises(ReftError, match="the GPU's memory does not suffice: .* MB more are needed"), TensorRTSession(engine) as session:
        forward(session, [1] * 40)
    assert cuda.is_empty


def test_everything_is_freed_once(engine: Engine, cuda: CudaDouble) -> None:
    session = TensorRTSession(engine, adapter="ends")
    greedy_tokens(session, IDS, 4)
    assert cuda.live and cuda.graphs
    session.close()
    session.close()
    assert cuda.is_empty


def test_logits_outlive_their_session(engine: Engine, cuda: CudaDouble) -> None:
    session = TensorRTSession(engine)
    first = forward(session)
    kept = first.copy()
    forward(session, [1, 2])
    session.close()
    del session
    gc.collect()
    np.testing.assert_array_equal(first, kept)


def test_a_failing_capture_leaves_the_stream_usable(cuda: CudaDouble) -> None:
    with CudaDevice() as device:
        address = device.allocate(8)

        def work() -> None:
            device.zero(address, 8)
            raise ReftError("no")

        with pytest.raises(ReftError, match="no"):
            device.capture(work)
        values = np.ones(8, np.uint8)
        device.zero(address, 8)
        device.copy_to_host(values, address)
        assert (values == 255).all()
        device.synchronize()
        assert not values.any() and not cuda.graphs


def test_the_double_finds_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rely on: an access outside an allocation, freed memory, and a free under queued work."""
    install_doubles(monkeypatch)
    device = CudaDevice()
    address = device.allocate(16)
    device.zero(address, 17)
    with pytest.raises(DeviceFault, match="illegal address"):
        device.synchronize()
    device.zero(address, 16)
    with pytest.raises(DeviceFault, match="freed while"):
        device.free(address)
    install_doubles(monkeypatch)
    device = CudaDevice()
    address = device.allocate(16)
    device.free(address)
    device.zero(address, 16)
    with pytest.raises(DeviceFault, match="illegal address"):
        device.synchronize()


def test_an_engine_has_no_rows_of_their_own(bundles: dict, engine: Engine, cuda: CudaDouble) -> None:
    with pytest.raises(InputError, match="is an engine, whose rows share one adapter; make a bank of the bundle that it was built from"):
        open_bank(engine)
    with TensorRTSession(engine) as session:
        rows = AdapterRows(open_bank(bundles[VARIANTS[0]]), ["all", None])
        with pytest.raises(InputError, match="is an engine, whose rows share one adapter; run rows that differ on the bundle"):
            session.set_rows(rows)

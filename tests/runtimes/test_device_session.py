"""What run, parity and bench open: a bundle or an engine; and CUDA's real binding on a machine without a GPU."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorrt_double import CudaDouble
from toy_bundle import ADAPTERS, CONTEXT, PROMPTS, write_toy_bundle
from toy_engine import install_doubles, write_toy_engine
from typer.testing import CliRunner, Result

from reft_export.cli.main import app
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.engine import Engine
from runtimes.artifacts.golden_schema import LAYOUTS
from runtimes.errors import BundleError, InputError
from runtimes.open import open_artifact, open_session
from runtimes.ort.session import OrtSession
from runtimes.session import as_classifier, as_decoder
from runtimes.tasks.task import TASKS
from runtimes.tensorrt.session import TensorRTSession

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return write_toy_engine(bundle, bundle.folder.parent / "engine", target="tensorrt-rtx", batch=3, sequence=24)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    return install_doubles(monkeypatch, "tensorrt-rtx")[0]


@pytest.fixture
def cli(cuda: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: object) -> Result:
        # In this process, where the doubles are.
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


def refused(result: Result, code: int, match: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert result.stdout == "" and len(lines) == 1 and re.search(match, lines[0]), result.stderr


def test_an_engine_is_no_bundle(engine: Engine) -> None:
    """For the verbs that need the graph: `quantize`, `train --base`."""
    with pytest.raises(BundleError, match="is an engine, which run, parity, bench and inspect take; pass the bundle"):
        open_bundle(engine.folder)


def test_an_artifact_is_a_bundle_or_an_engine(bundle: Bundle, engine: Engine, cuda: CudaDouble, tmp_path: Path) -> None:
    opened = open_artifact(bundle.folder)
    assert type(opened) is Bundle and isinstance(open_artifact(engine.folder, verify=True), Engine)
    with open_session(opened, threads=1, adapter="ends") as session:
        assert isinstance(session, OrtSession) and (session.provider, session.adapter) == ("cpu", "ends")
    with open_session(engine, provider="tensorrt-rtx", kernel="expanded", adapter="ends") as session:
        assert isinstance(session, TensorRTSession) and (session.provider, session.adapter) == ("tensorrt-rtx", "ends")
    assert cuda.is_empty
    with pytest.raises(BundleError, match="is not a folder"):
        open_artifact(tmp_path / "no")


@pytest.mark.parametrize("kind", ["bundle", "engine"])
def test_a_closed_session_says_so(kind: str, bundle: Bundle, engine: Engine, cuda: CudaDouble) -> None:
    ids = np.array([[1, 2, 3]])
    with open_session({"bundle": bundle, "engine": engine}[kind], adapter="ends") as session:
        logits = as_decoder(session).step(ids, np.ones_like(ids)).logits
    kept = logits.copy()
    session.close()
    gc.collect()
    np.testing.assert_array_equal(logits, kept)
    for again in (lambda: as_decoder(session).step(ids, np.ones_like(ids)), lambda: session.set_adapter("all")):
        with pytest.raises(InputError, match=f"the session of .*{kind} is closed; open another"):
            again()
    assert cuda.is_empty


def test_a_closed_session_is_freed(bundle: Bundle) -> None:
    """onnxruntime's own session, and with it the graph's weights, go although the object that wrapped it stays."""
    session = OrtSession(bundle, threads=1, adapter="ends")
    native = weakref.ref(session._session)
    session.step(np.array([[1]]), np.array([[1]]))
    session.close()
    gc.collect()
    assert native() is None


def test_a_cache_of_another_kind_of_session_is_refused(bundle: Bundle, engine: Engine, cuda: CudaDouble) -> None:
    ids = np.array([[1, 2, 3]])
    with open_session(bundle, threads=1) as first, open_session(engine) as second:
        for here, there in ((as_decoder(first), as_decoder(second)), (as_decoder(second), as_decoder(first))):
            past = there.step(ids, np.ones_like(ids)).past
            with pytest.raises(InputError, match="this KV cache is of another kind of session"):
                here.step(ids[:, :1], np.ones((1, 4)), past=past)


def test_a_session_of_the_other_task_is_refused(bundle: Bundle) -> None:
    with open_session(bundle, threads=1) as session, pytest.raises(InputError, match="is no classifier: its session takes steps"):
        as_classifier(session)


def test_every_task_has_its_golden_arrays() -> None:
    assert set(TASKS) == set(LAYOUTS) == {"text-generation", "text-classification"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"provider": "cuda"}, "--provider cuda does not run .* an engine of tensorrt-rtx"),
        ({"provider": "tensorrt"}, "an engine of tensorrt-rtx; leave it out"),
        ({"kernel": "plugin"}, "was built with kernel expanded"),
        ({"kernel": "fused"}, "--kernel fused is not in"),
        ({"threads": 2}, "--threads are onnxruntime's"),
    ],
)
def test_options_that_an_engine_cannot_have(engine: Engine, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match), open_session(engine, **options):
        pass


@pytest.mark.parametrize("options", [{"provider": "tensorrt-rtx"}, {"kernel": "plugin"}, {"kernel": "expanded"}])
def test_options_that_a_bundle_cannot_have(bundle: Bundle, options: dict) -> None:
    with (
        pytest.raises(InputError, match="is an engine's; .* is a bundle: make one of it with `reft-export build`"),
        open_session(bundle, **options),
    ):
        pass


def test_limits(bundle: Bundle, engine: Engine, tmp_path: Path) -> None:
    assert (bundle.limits.tokens, bundle.limits.rows, bundle.limits.columns) == (CONTEXT, None, None)
    assert (engine.limits.tokens, engine.limits.rows, engine.limits.columns) == (CONTEXT, 3, 24)
    small = write_toy_engine(bundle, tmp_path / "e", context=20, sequence=8)
    assert small.limits.tokens == 20 and "--context" in small.limits.reason


def test_run_answers_as_the_bundle_does(bundle: Bundle, engine: Engine, cli: Cli, cuda: CudaDouble, tmp_path: Path) -> None:
    for adapter in ([], ["-a", "ends"]):
        for prompt in PROMPTS:
            same = [cli("run", where, "-p", prompt, "-n", 12, *adapter) for where in (bundle.folder, engine.folder)]
            assert same[0].exit_code == same[1].exit_code == 0, same[1].output
            assert same[0].stdout == same[1].stdout
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 2)
    (tmp_path / "prompts.jsonl").write_text(lines)
    # Six prompts, of which an engine of three rows and 24 columns takes a part at a time.
    batches = [
        cli("run", where, "--prompts", tmp_path / "prompts.jsonl", "-n", 8, "-a", "prompt") for where in (bundle.folder, engine.folder)
    ]
    assert batches[0].stdout == batches[1].stdout and len(batches[1].stdout.splitlines()) == 6
    long = "a lazy dog jumps over the quick brown fox " * 2
    same = [cli("run", where, "-p", long[:28], "-n", 4) for where in (bundle.folder, engine.folder)]
    assert same[0].stdout == same[1].stdout and same[1].exit_code == 0, same[1].output
    assert cuda.is_empty


def test_run_refusals(bundle: Bundle, engine: Engine, cli: Cli, tmp_path: Path, cuda: CudaDouble) -> None:
    refused(cli("run", engine.folder, "-p", "x", "-n", 4, "--provider", "cpu"), 2, "--provider cpu does not run")
    refused(
        cli("run", engine.folder, "-p", "x", "--kernel", "magic"),
        2,
        "--kernel 'magic' is unknown; known: fused, function, plugin, expanded",
    )
    small = write_toy_engine(bundle, tmp_path / "e", target="tensorrt-rtx", context=20, sequence=8)
    refused(cli("run", small.folder, "-p", "x", "-n", 30), 2, r"do not fit the context that .* was built for \(20; --context raises it\)")
    frozen = write_toy_engine(bundle, tmp_path / "f", target="tensorrt-rtx", freeze="ends")
    refused(
        cli("run", frozen.folder, "-p", "x", "-n", 4), 2, "never runs without an adapter: adapter 'ends' is frozen into it; use -a ends"
    )
    assert cli("run", frozen.folder, "-p", "x", "-n", 4, "-a", "ends").exit_code == 0
    cuda.devices = 0
    refused(cli("run", engine.folder, "-p", "x", "-n", 4), 4, "no usable CUDA GPU")


def test_parity_of_an_engine(engine: Engine, cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    passed = cli("parity", engine.folder, "--json")
    assert passed.exit_code == 0, passed.output
    assert {r["name"].partition(":")[0] for r in json.loads(passed.stdout)["rungs"]} == {"base", *ADAPTERS}
    refused(cli("parity", engine.folder, "-m", "x"), 2, "--model goes through the rungs of a bundle")
    wrong = write_toy_engine(bundle, tmp_path / "e", target="tensorrt-rtx", perturbed=True)
    missed = cli("parity", wrong.folder, "--json")
    assert missed.exit_code == 3 and json.loads(missed.stdout)["passed"] is False


def test_bench_of_an_engine(engine: Engine, cli: Cli, bundle: Bundle, tmp_path: Path, cuda: CudaDouble) -> None:
    options = ("--prompt-tokens", 16, "--new-tokens", 3, "--repeats", 1, "--json")
    result = json.loads(cli("bench", engine.folder, "-a", "all", *options).stdout)
    assert (result["provider"], result["kernel"], [m["name"] for m in result["measurements"]]) == (
        "tensorrt-rtx",
        "expanded",
        ["base", "all"],
    )
    for freeze, names in (("ends", ["ends"]), ("base", ["base"])):
        frozen = write_toy_engine(bundle, tmp_path / freeze, target="tensorrt-rtx", freeze=freeze)
        result = cli("bench", frozen.folder, *options)
        assert [m["name"] for m in json.loads(result.stdout)["measurements"]] == names
    refused(cli("bench", engine.folder, "--op"), 2, "--op measures the op in onnxruntime")
    assert cuda.is_empty


def test_a_damaged_engine_is_refused_before_it_is_loaded(bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    engine = write_toy_engine(bundle, tmp_path / "e", target="tensorrt-rtx")
    engine.plan_path.write_bytes(engine.plan_path.read_bytes()[:-1])
    refused(cli("run", engine.folder, "-p", "x"), 2, "engine.plan has .* truncated")


@pytest.mark.slow
def test_cudas_own_binding_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    """The real cuda-python, in a process: its refusal is our one line; and it has every function of the double, with the same arguments."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--target", str(packages), "cuda-python"]
    subprocess.run(install, check=True, capture_output=True)
    code = f"""
import inspect, json, sys
sys.path[:0] = [{str(packages)!r}, {str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from runtimes.tensorrt.cuda_device import CudaDevice, load_cuda
from runtimes.errors import BackendUnavailable
from tensorrt_double import CudaDouble
cuda, different = load_cuda(), []
for name, function in inspect.getmembers(CudaDouble, inspect.isfunction):
    if name.startswith("cuda"):
        stated = getattr(cuda, name).__doc__.splitlines()[0].partition("(")[2].rpartition(")")[0]
        count = len([part for part in stated.split(",") if part.strip()])
        if count != len(inspect.signature(function).parameters) - 1:
            different.append([name, stated])
kinds = [int(cuda.cudaMemcpyKind.__members__[k]) == getattr(CudaDouble.cudaMemcpyKind, k) for k in vars(CudaDouble.cudaMemcpyKind)]
mode = int(cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
try:
    CudaDevice()
    said = "a GPU"
except BackendUnavailable as e:
    said = f"{{e.exit_code}} {{e}}"
print(json.dumps([different, kinds, mode, said]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    different, kinds, mode, said = json.loads(done.stdout)
    assert not different and all(kinds) and mode == 1
    if said != "a GPU":
        assert said.startswith("4 no usable CUDA GPU: cudaError") and "\n" not in said


@pytest.mark.slow
def test_the_real_tensorrt_has_what_its_double_pretends(tensorrt_rtx: dict[str, str], engine: Engine) -> None:
    """Names of methods, attributes and enumerations; and the real runtime's refusal through our logger, without a GPU."""
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
import tensorrt_rtx
from tensorrt_double import ContextDouble, EngineDouble, TensorRTDouble
from runtimes.artifacts.engine import open_engine
from runtimes.errors import BackendUnavailable
from runtimes.tensorrt.loaded_engine import LoadedEngine
from runtimes.tensorrt.library import present_compute_capability
helpers = {{"record"}}
pairs = ((ContextDouble, tensorrt_rtx.IExecutionContext), (EngineDouble, tensorrt_rtx.ICudaEngine))
for double, real in pairs:
    public = {{name for name in vars(double) if not name.startswith("_")}} - helpers
    assert public <= set(dir(real)), public - set(dir(real))
for name in ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy", "CudaGraphStrategy"):
    assert set(vars(getattr(TensorRTDouble, name))) <= set(getattr(tensorrt_rtx, name).__members__), name
assert set(vars(TensorRTDouble.ILogger.Severity)) <= set(tensorrt_rtx.ILogger.Severity.__members__)
assert {{"cuda_graph_strategy", "set_execution_context_allocation_strategy"}} <= set(dir(tensorrt_rtx.IRuntimeConfig))
assert {{"weight_streaming_budget_v2"}} <= set(dir(tensorrt_rtx.ICudaEngine))
try:
    LoadedEngine(open_engine({str(engine.folder)!r}), tensorrt_rtx)
except BackendUnavailable as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=tensorrt_rtx)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1 and "engine.plan does not load in tensorrt-rtx" in lines[0] and "no reason" not in lines[0], done.stdout

"""The programs of ``examples/cpp``, compiled against onnxruntime's headers and linked to its wheel: their tokens are the session's."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import tiny
from native.op_library import compiler, run
from onnxruntime_headers import onnxruntime_headers
from other_onnxruntime import python_with

from calibration.settings import settings_for
from graph_passes.external import load_graph
from graph_passes.first_logit import remove_first_logit
from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import save_adapter
from runtimes.edits.op import FIRST_LOGIT
from runtimes.generation import GenerationSettings, generate
from runtimes.native_library import find_op_library
from runtimes.ort.session import OrtSession
from runtimes.text.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "cpp"
LANGUAGES = {"steer.cc": ("-x", "c++", "-std=c++17"), "steer.c": ("-x", "c", "-std=c11")}
BASE = "-"
SWAPS = (BASE, "tied", "all-direft", "untied", BASE)
"""The base before and after its adapters; their positions are f2+l2, all, and f1+l3 with edits of their own."""
ADAPTERS = {
    "tied": {},
    "untied": {"tied": False, "positions": "f1+l3", "seed": 1},
    "all-direft": {"positions": "all", "method": "direft", "seed": 3},
}
COUNT = 12
PROMPT = [5, 17, 40, 9, 77]
LONG_PROMPT = [i * 37 % 250 for i in range(515)]
"""Two calls: its first tokens are edited in the one, its last ones in the other."""
OLDER = """
#include <onnxruntime_c_api.h>
static const OrtApi* api(uint32_t version) { return version > 18 ? NULL : (const OrtApi*)1; }
static const char* version(void) { return "1.18.0"; }
static const OrtApiBase base = {api, version};
const OrtApiBase* OrtGetApiBase(void) { return &base; }
"""
"""A library that serves no headers after 1.18."""


def test_every_program_is_short_and_is_run_here() -> None:
    sources = {path.name: path.read_text(encoding="utf-8").splitlines() for path in EXAMPLES.iterdir()}
    assert set(sources) == set(LANGUAGES)
    assert all(len(lines) < 200 and max(map(len, lines)) <= 140 for lines in sources.values())


@pytest.fixture(scope="module")
def headers() -> Path:
    return onnxruntime_headers(int(onnxruntime.__version__.split(".")[1]))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The wheel's onnxruntime, under the name by which programs that are linked to it look for it."""
    found = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if found is None:
        pytest.skip(f"the wheel of onnxruntime {onnxruntime.__version__} has no libonnxruntime.so to link to")
    link = tmp_path_factory.mktemp("onnxruntime") / "libonnxruntime.so.1"
    link.symlink_to(found)
    return link


@pytest.fixture(scope="module", params=LANGUAGES)
def program(request, headers: Path, library: Path, tmp_path_factory) -> Path:
    return build(request.param, headers, library, tmp_path_factory.mktemp("program") / "steer")


def build(source: str, headers: Path, library: Path, output: Path) -> Path:
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-isystem", headers)
    linked = ("-x", "none", library, "-lm", f"-Wl,-rpath,{library.parent}")
    run(compiler(), *LANGUAGES[source], *flags, EXAMPLES / source, *linked, "-o", output)
    return output


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """Its context is longer than the longest prompt of one call."""
    root = tmp_path_factory.mktemp("steered")
    base = tiny.save_base(root / "base", max_position_embeddings=640)
    info = load_base(base).info
    for name, settings in ADAPTERS.items():
        save_adapter(tiny.random_adapter(info, **settings), root / name)
    export_bundle(str(base), [root / name for name in ADAPTERS], root / "bundle", ExportSettings(), report=lambda _: None)
    return root / "bundle"


def answers(bundle: Path, prompt: list[int], count: int, names: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    """What the session says, adapter by adapter."""
    opened = open_bundle(bundle)
    tokenizer = Tokenizer.load(opened.folder, opened.manifest.model)
    session = OrtSession(opened)
    said = []
    for name in names:
        session.set_adapter(None if name == BASE else name)
        (answer,) = generate(session, tokenizer, [prompt], GenerationSettings(max_new_tokens=count))
        said.append((name, list(answer.tokens)))
    return said


def command(program: Path, bundle: Path, names: tuple[str, ...], count: object, prompt: list[int], *, op_library: object) -> list[str]:
    return [str(argument) for argument in (program, bundle, op_library, ",".join(names), count, *prompt)]


def printed(text: str, names: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    """The program's lines, each a name or a token id."""
    said: list[tuple[str, list[int]]] = []
    for line in text.splitlines():
        if line in names:
            said.append((line, []))
        else:
            said[-1][1].append(int(line))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["fused", "function"])
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT], ids=["one call", "two calls"])
def test_the_tokens_are_those_of_the_session(program: Path, bundle: Path, prompt: list[int], kernel: str) -> None:
    op_library = find_op_library() if kernel == "fused" else "-"
    if op_library is None:
        pytest.skip("this installation has no op library: no C++ compiler was there")
    expected = answers(bundle, prompt, COUNT, SWAPS)
    assert len({tuple(tokens) for _, tokens in expected}) == len(ADAPTERS) + 1, "an adapter does not steer"
    done = run(*command(program, bundle, SWAPS, COUNT, prompt, op_library=op_library))
    assert printed(done.stdout, SWAPS) == expected
    assert not done.stderr


@pytest.mark.slow
def test_a_graph_with_logits_of_every_token(program: Path, bundle: Path, tmp_path: Path) -> None:
    """As one whose head was not found."""
    shutil.copytree(bundle, tmp_path / "bundle")
    model = load_graph(tmp_path / "bundle" / "model.onnx")
    remove_first_logit(model.graph)
    model.graph.inputs.remove(next(value for value in model.graph.inputs if value.name == FIRST_LOGIT))
    del model.graph.initializers[FIRST_LOGIT]
    ir.save(model, tmp_path / "bundle" / "model.onnx")
    done = run(*command(program, tmp_path / "bundle", SWAPS, COUNT, PROMPT, op_library="-"))
    assert printed(done.stdout, SWAPS) == answers(bundle, PROMPT, COUNT, SWAPS)


@pytest.mark.slow
def test_an_int8_cache(program: Path, float_bundle, tmp_path: Path) -> None:
    source, base = float_bundle()
    quantize_bundle(source, base, tmp_path / "q", settings_for("weight-only", 8, cache="int8"), report=lambda _: None)
    names = (BASE, "untied", "prompt-relu")
    done = run(*command(program, tmp_path / "q", names, COUNT, PROMPT, op_library="-"))
    assert printed(done.stdout, names) == answers(tmp_path / "q", PROMPT, COUNT, names)


def changed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest says otherwise; the programs do not look at its digest."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_an_answer_ends_at_each_eos_token(program: Path, bundle: Path, tmp_path: Path) -> None:
    whole = [tokens for _, tokens in answers(bundle, PROMPT, COUNT, (BASE, "tied"))]
    stops = [tokens[3] for tokens in whole]
    for i, eos in enumerate([stops, []]):
        folder = changed(bundle, tmp_path / str(i), lambda manifest, eos=eos: manifest["model"].update(eos_token_ids=eos))
        done = run(*command(program, folder, (BASE, "tied"), COUNT, PROMPT, op_library="-"))
        ends = [next((n for n, token in enumerate(tokens, 1) if token in eos), COUNT) for tokens in whole]
        assert [tokens for _, tokens in printed(done.stdout, (BASE, "tied"))] == [t[:n] for t, n in zip(whole, ends, strict=True)]


@pytest.mark.slow
def test_tokens_leave_as_they_come(program: Path, bundle: Path) -> None:
    """Over a socket that keeps what one write sent apart from what the next did."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, subprocess.Popen(command(program, bundle, (BASE,), COUNT, PROMPT, op_library="-"), stdout=there):
        there.close()
        writes = list(iter(lambda: here.recv(1 << 16).decode(), ""))
    assert len(writes) == 1 + COUNT and all(text.count("\n") == 1 and text.endswith("\n") for text in writes)


@pytest.mark.slow
def test_refusals_are_one_line(program: Path, bundle: Path, tmp_path: Path) -> None:
    copying = changed(bundle, tmp_path / "copying", lambda manifest: manifest.update(kv_cache="appended"))
    unknown = (BASE, "unknown")
    cases = [
        (command(program, bundle, unknown, 1, PROMPT, op_library="-"), "unknown.onnx_adapter; expected an adapter of the bundle, or -"),
        (command(program, bundle, (BASE,), 640 - len(PROMPT) + 1, PROMPT, op_library="-"), "exceed the context of 640 tokens"),
        (command(program, bundle, (BASE,), "9" * 18, PROMPT, op_library="-"), "exceed the context of 640 tokens"),
        (command(program, bundle, (BASE,), "9" * 19, PROMPT, op_library="-"), "usage: steer BUNDLE LIBRARY ADAPTERS COUNT ID..."),
        (command(program, bundle, (BASE,), 1, [-1], op_library="-"), "usage: "),
        (command(program, bundle, (BASE,), 1, [], op_library="-"), "usage: "),
        (command(program, bundle, (BASE,), 1, PROMPT, op_library=tmp_path / "none.so"), "none.so"),
        (command(program, tmp_path, (BASE,), 1, PROMPT, op_library="-"), "manifest.json has no kv_cache; expected a bundle"),
        (command(program, copying, (BASE,), 1, PROMPT, op_library="-"), "copies its KV cache; export it with --target onnxruntime"),
    ]
    for arguments, message in cases:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("steer: ") and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_the_first_onnxruntime_with_adapters(headers: Path, bundle: Path, tmp_path: Path) -> None:
    """The C program asks for no function that 1.20 does not have; the C++ headers are of one release each."""
    shutil.copytree(headers, tmp_path / "include")
    declared = tmp_path / "include" / "onnxruntime_c_api.h"
    declared.write_text(re.sub(r"(#define ORT_API_VERSION) \d+", r"\1 20", declared.read_text(encoding="utf-8")), encoding="utf-8")
    found = next((python_with("1.20.1").parent.parent / "lib").glob("python*/site-packages/onnxruntime/capi/libonnxruntime.so*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(found)
    program = build("steer.c", tmp_path / "include", tmp_path / "libonnxruntime.so.1", tmp_path / "steer")
    done = run(*command(program, bundle, SWAPS, COUNT, LONG_PROMPT, op_library=find_op_library() or "-"))
    assert printed(done.stdout, SWAPS) == answers(bundle, LONG_PROMPT, COUNT, SWAPS)


@pytest.mark.slow
@pytest.mark.parametrize("source", LANGUAGES)
def test_an_older_onnxruntime_is_refused(source: str, headers: Path, tmp_path: Path) -> None:
    (tmp_path / "older.c").write_text(OLDER)
    library = tmp_path / "libonnxruntime.so"
    run(compiler(), "-x", "c", "-shared", "-fPIC", "-isystem", headers, tmp_path / "older.c", "-o", library)
    program = build(source, headers, library, tmp_path / "steer")
    done = subprocess.run(command(program, tmp_path, (BASE,), 1, PROMPT, op_library="-"), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "steer: onnxruntime is older than the headers; expected 1." in done.stderr

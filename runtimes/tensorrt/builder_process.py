"""Runs the builder of a TensorRT in a process of its own, and turns whatever becomes of it into a result or one line of error."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtimes.artifacts.engine import Profile
from runtimes.bound_process import bound
from runtimes.errors import BackendUnavailable, BuildError
from runtimes.files.records import from_json, to_json
from runtimes.tensorrt.builder import BuildResult, BuildSpec
from runtimes.tensorrt.library import builder_environment

LOG_LINES = 3
"""How much of the log goes into the one line of an error."""


def run_builder(spec: BuildSpec, folder: Path, *, update: Callable[[str], None]) -> BuildResult:
    """Builds with the Python package of ``spec.target``; ``folder`` takes the specification and the log, ``update`` is told each step.

    Raises BuildError where the builder refuses or dies, BackendUnavailable where TensorRT or the plugin does not load. Whatever ends this
    call ends the process too.
    """
    specification = folder / "spec.json"
    specification.write_text(json.dumps(to_json(spec)), encoding="utf-8")
    command = [sys.executable, "-m", "runtimes.tensorrt.builder", str(specification)]
    environment = builder_environment(spec.target, folder)
    answer: dict[str, object] = {}
    # The working directory is where this very package lies, so that the process imports it and no other.
    with _process(command, folder, environment, cwd=Path(__file__).parents[2]) as (process, log):
        for line in process.stdout or ():
            event = _event(line)
            if "step" in event:
                update(f"building the engine: {event['step']}")
            answer |= event
        code = process.wait()
    if "error" in answer:
        kind = BackendUnavailable if code == BackendUnavailable.exit_code else BuildError
        raise kind(str(answer["error"]))
    if code or "result" not in answer:
        raise BuildError(f"the builder of {spec.target} {_ending(code)}; it said last: {last_lines(log)}")
    return from_json(BuildResult, answer["result"])


def trtexec_command(spec: BuildSpec, program: str = "trtexec") -> list[str]:
    """The command that builds the engine of ``spec`` with TensorRT's own tool, one --profile with its shapes after the other."""
    command = [program, f"--onnx={spec.graph}", f"--saveEngine={spec.plan}", "--skipInference", "--stronglyTyped", "--noTF32"]
    if spec.plugin is not None:
        command.append(f"--dynamicPlugins={spec.plugin}")
    for index, profile in enumerate(spec.profiles):
        command += [f"--profile={index}", *_shapes(profile)]
    if spec.workspace is not None:
        command.append(f"--memPoolSize=workspace:{spec.workspace}")
    if spec.weight_streaming:
        command.append("--allowWeightStreaming")
    if spec.timing_cache is not None:
        command.append(f"--timingCacheFile={spec.timing_cache}")
    return command


def run_trtexec(spec: BuildSpec, folder: Path, *, update: Callable[[str], None]) -> BuildResult:
    """Builds with trtexec, where TensorRT came without its Python package (JetPack).

    trtexec shows no parsed network. What is held against the graph: it refuses shapes for an input that the network lacks, and the
    graph carries no function that could stand in for a missing plugin.
    """
    started = time.monotonic()
    command = trtexec_command(spec, shutil.which("trtexec") or "trtexec")
    version = "unknown"
    with _process(command, folder, None, cwd=folder) as (process, log):
        output: list[str] = []
        for line in process.stdout or ():
            output = [*output[-40:], line.strip()]
            version = _stated_version(line) or version
            if found := re.search(r"\] \[I\] (\S.*)", line):
                update(f"building the engine: {found[1][:60]}")
        code = process.wait()
    if code or not Path(spec.plan).is_file():
        wrong = [line for line in output if "[E]" in line] or [last_lines(log)]
        raise BuildError(f"trtexec {_ending(code)}: {' '.join(wrong[:LOG_LINES])}; its command was: {shlex.join(command)}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return BuildResult(tensorrt_version=version, seconds=time.monotonic() - started, peak_memory=peak)


def _shapes(profile: Profile) -> Iterator[str]:
    for option, limit in (("--minShapes", "min"), ("--optShapes", "opt"), ("--maxShapes", "max")):
        shapes = (f"{name}:{'x'.join(map(str, getattr(shape, limit)))}" for name, shape in profile.shapes.items())
        yield f"{option}={','.join(shapes)}"


def _stated_version(line: str) -> str | None:
    if stated := re.search(r"TensorRT version: (\d+(?:\.\d+)+)", line):
        return stated[1]
    if number := re.search(r"\[TensorRT v(\d{5,6})\]", line):
        value = int(number[1])  # 100300 is 10.3.0
        return f"{value // 10000}.{value // 100 % 100}.{value % 100}"
    return None


@contextmanager
def _process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None, *, cwd: Path
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in a session of its own, so that Ctrl-C reaches this one alone, which then ends it; stderr goes to a file. It does not
    outlive this one: it may have an hour's work before it."""
    log = folder / "builder.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            bound(command),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _event(line: str) -> dict[str, object]:
    """One line of the builder's stdout; TensorRT itself may write there too."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _ending(code: int) -> str:
    if code < 0:
        return f"died ({signal.Signals(-code).name})"
    return f"failed (exit code {code})"


def last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-LOG_LINES:]) or "nothing"

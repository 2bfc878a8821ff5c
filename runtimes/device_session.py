"""Bundle or engine: what the device's verbs open, and the session that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtimes.bundle import Bundle, open_bundle
from runtimes.engine import Engine, is_engine, open_engine
from runtimes.errors import InputError
from runtimes.generate import Session


def open_artifact(path: Path | str, *, verify: bool = False) -> Bundle:
    """The bundle or the engine in a folder, checked as ``open_bundle`` and ``open_engine`` say."""
    return open_engine(path, verify=verify) if is_engine(path) else open_bundle(path, verify=verify)


@contextmanager
def open_session(
    artifact: Bundle,
    *,
    provider: str | None = None,
    kernel: str | None = None,
    threads: int | None = None,
    adapter: str | None = None,
) -> Iterator[Session]:
    """A bundle in onnxruntime (``provider`` cpu by default), an engine in the TensorRT that it was built for; closed at the end.

    Raises InputError where ``provider``, ``kernel`` or ``threads`` are none that the artifact can have.
    """
    if isinstance(artifact, Engine):
        _check_engine_options(artifact, provider, kernel, threads)
        from runtimes.tensorrt_session import TensorRTSession

        with TensorRTSession(artifact, adapter=adapter) as session:
            yield session
        return
    if provider == "tensorrt-rtx" or kernel in ("plugin", "expanded"):
        option = "--provider tensorrt-rtx" if provider == "tensorrt-rtx" else f"--kernel {kernel}"
        raise InputError(f"{option} is an engine's; {artifact.folder} is a bundle: make one of it with `reft-export build`")
    from runtimes.ort_session import OrtSession

    yield OrtSession(artifact, provider=provider or "cpu", threads=threads, adapter=adapter, kernel=kernel)


def token_limit(artifact: Bundle) -> tuple[int, str]:
    """The most tokens of one row, prompt and answer, that an artifact runs, and what sets this limit."""
    model = artifact.manifest.model
    limits = [(model.context_length, f"the context of {model.name} ({model.context_length})")]
    if isinstance(artifact, Engine):
        decode = next(p for p in artifact.engine.profiles if p.name == "decode")
        columns = min(shapes.max[2] for name, shapes in decode.shapes.items() if name.startswith("past_key_values."))
        # A step of one token has the whole past beside it.
        limits.append((columns + 1, f"the KV cache that {artifact.folder} was built for ({columns} columns and one; --max-past raises it)"))
    return min(limits)


def _check_engine_options(engine: Engine, provider: str | None, kernel: str | None, threads: int | None) -> None:
    built = engine.engine
    if provider not in (None, built.target):
        raise InputError(
            f"--provider {provider} does not run {engine.folder}, an engine of {built.target}; leave it out, or use the bundle"
        )
    made = "expanded" if built.plugin is None else "plugin"
    if kernel not in (None, made):
        raise InputError(
            f"--kernel {kernel} is not in {engine.folder}, which was built with kernel {made}; leave it out, or build it again"
        )
    if threads is not None:
        raise InputError(f"--threads are onnxruntime's; {engine.folder} is an engine and runs on the GPU; leave it out")

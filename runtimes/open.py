"""Bundle or engine: what the device's verbs open, and the session that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.engine import Engine, is_engine, open_engine
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.errors import InputError
from runtimes.session import Session


def open_artifact(path: Path | str, *, verify: bool = False) -> Bundle:
    """The bundle or the engine in a folder, checked as ``open_bundle`` and ``open_engine`` say.

    ``verify``: large files are hashed again, too, which takes seconds per gigabyte.
    Raises BundleError for a folder that is neither, or whose files are missing, damaged or of another version.

    Example::

        artifact = open_artifact("pirate-bundle")
        print(artifact.adapter_names, artifact.manifest.model.context_length)  # names, and tokens
    """
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

    ``adapter`` steers, None is the base; ``session.set_adapter`` changes it between steps. A decoder's session is stepped with
    ``step(input_ids [B, S], attention_mask [B, past + S])``, int64, and answers float32 logits [B, S, V]; a classifier's has ``classify``.

    Raises InputError where ``provider``, ``kernel`` or ``threads`` are none that the artifact can have; BundleError for an adapter that it
    does not hold; BackendUnavailable where the runtime or its device is not there.

    Example::

        with open_session(open_artifact("pirate-bundle"), threads=2, adapter="pirate") as session:
            ids = np.array([[1, 5, 9]])
            logits = session.step(ids, np.ones_like(ids)).logits  # [1, 3, V]
    """
    if isinstance(artifact, Engine):
        _check_engine_options(artifact, provider, kernel, threads)
        from runtimes.tensorrt.session import TensorRTSession

        with TensorRTSession(artifact, adapter=adapter) as session:
            yield session
        return
    if provider == "tensorrt-rtx" or kernel in ("plugin", "expanded"):
        option = "--provider tensorrt-rtx" if provider == "tensorrt-rtx" else f"--kernel {kernel}"
        raise InputError(f"{option} is an engine's; {artifact.folder} is a bundle: make one of it with `reft-export build`")
    yield ort_session(artifact, provider=provider or "cpu", threads=threads, adapter=adapter, kernel=kernel)


def ort_session(bundle: Bundle, **options: Any) -> Any:
    """An OrtSession over a decoder's bundle, an OrtClassifier over a classifier's; ``options`` as theirs."""
    if bundle.manifest.task == TEXT_CLASSIFICATION:
        from runtimes.ort.classifier import OrtClassifier

        return OrtClassifier(bundle, **options)
    from runtimes.ort.session import OrtSession

    return OrtSession(bundle, **options)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an artifact runs at once; None is no limit of its own."""

    tokens: int
    """Of one row, prompt and answer."""
    reason: str
    """What limits ``tokens``."""
    rows: int | None = None
    columns: int | None = None
    """Of a prompt, in one call."""


def limits_of(artifact: Bundle) -> Limits:
    model = artifact.manifest.model
    whole = Limits(tokens=model.context_length, reason=f"the context of {model.name} ({model.context_length})")
    if not isinstance(artifact, Engine):
        return whole
    profiles = {profile.name: profile.shapes for profile in artifact.engine.profiles}
    rows, columns = profiles["prefill"]["input_ids"].max
    past = min(shapes.max[2] for name, shapes in profiles["decode"].items() if name.startswith("past_key_values."))
    built = Limits(
        tokens=past + 1,
        reason=f"the context that {artifact.folder} was built for ({past + 1}; --context raises it)",
        rows=rows,
        columns=columns,
    )
    return built if built.tokens < whole.tokens else replace(whole, rows=rows, columns=columns)


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

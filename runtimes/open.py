"""Bundle or engine: what the device's verbs open, and the session that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.engine import Engine, is_engine, open_engine
from runtimes.bank import AdapterBank
from runtimes.errors import InputError
from runtimes.session import Session
from runtimes.tasks.task import task_of
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from runtimes.batching import Batcher


def open_artifact(path: Path | str, *, verify: bool = False) -> Artifact:
    """The bundle or the engine in a folder, checked as ``open_bundle`` and ``open_engine`` say.

    ``verify``: large files are hashed again, too, which takes seconds per gigabyte.
    Raises BundleError for a folder that is neither, or whose files are missing, damaged or of another version.

    Example::

        artifact = open_artifact("pirate-bundle")
        print(artifact.adapter_names, artifact.manifest.model.context_length)  # names, and tokens
    """
    return open_engine(path, verify=verify) if is_engine(path) else open_bundle(path, verify=verify)


def open_session(
    artifact: Artifact,
    *,
    provider: str | None = None,
    kernel: str | None = None,
    threads: int | None = None,
    adapter: str | None = None,
) -> Session:
    """A bundle in onnxruntime (``provider`` cpu by default), an engine in the TensorRT that it was built for.

    ``with`` closes it at the end, and so does ``close``; then its memory is free.

    ``adapter`` steers, None is the base; ``session.set_adapter`` changes it between steps. A decoder's session is stepped with
    ``step(input_ids [B, S], attention_mask [B, past + S])``, int64, and answers float32 logits [B, S, V]; a classifier's has ``classify``.
    (To a type checker ``runtimes.session.as_decoder`` and ``as_classifier`` say which it is.)

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

        return TensorRTSession(artifact, adapter=adapter)
    if not isinstance(artifact, Bundle):
        raise InputError(f"{artifact.folder} is neither a bundle nor an engine; open it with `open_artifact`")
    if provider == "tensorrt-rtx" or kernel in ("plugin", "expanded"):
        option = "--provider tensorrt-rtx" if provider == "tensorrt-rtx" else f"--kernel {kernel}"
        raise InputError(f"{option} is an engine's; {artifact.folder} is a bundle: make one of it with `reft-export build`")
    return ort_session(artifact, provider=provider or "cpu", threads=threads, adapter=adapter, kernel=kernel)


def open_bank(artifact: Artifact, *, max_bytes: int | None = None) -> AdapterBank:
    """The adapters of a bundle, and of folders beside it, for batches whose rows have adapters of their own; nothing is loaded yet.

    ``max_bytes``: of the adapters in memory, stacked; beyond it those go that were used longest ago and steer no row. None: no bound.
    ``runtimes.rows.AdapterRows`` names the adapters of a batch's rows, which a session takes by ``set_rows``.

    Raises InputError for an engine and for a bundle of version 1, whose rows share one adapter, for a classifier's, whose rows share one
    head, and for ``max_bytes`` below 1.

    Example::

        artifact = open_artifact("pirate-bundle")
        bank = open_bank(artifact, max_bytes=64 << 20)
        bank.scan("adapters")  # every adapter's folder in there, by name and size
        with open_session(artifact) as session, AdapterRows(bank, ["pirate", None, "polite"]) as rows:
            session.set_rows(rows)
            logits = session.step(ids, np.ones_like(ids)).logits  # [3, S, V]; ids [3, S], None is the base
    """
    if not isinstance(artifact, Bundle):
        raise InputError(f"{artifact.folder} is an engine, whose rows share one adapter; make a bank of the bundle that it was built from")
    return AdapterBank(artifact, max_bytes=max_bytes)


def open_batcher(
    session: Session,
    tokenizer: Tokenizer,
    bank: AdapterBank | None = None,
    *,
    most_rows: int = 16,
    cache_bytes: int | None = None,
    prefix_bytes: int | None = None,
    queue: int = 256,
    prefill_chunk: int | None = None,
    speculate: int = 0,
) -> Batcher:
    """A batch that requests join and leave while it runs, each with its own adapter of ``bank``, or none; closed at the end of a ``with``.

    The session is the batcher's from now on. ``most_rows``: requests that run at once; ``queue``: that wait. ``cache_bytes``: of their KV
    caches, by default half of the memory that is left; ``prefix_bytes``: of answered prompts, for those that begin alike, by default a
    quarter of that more, up to 512 MB. ``prefill_chunk``: prompt columns of a step, by default 128; 0: a prompt at once. ``speculate``:
    tokens at most that a row which runs alone is fed ahead.

    Raises InputError for a session whose KV cache is not written in place, BackendUnavailable on a GPU.

    Example::

        artifact = open_artifact("pirate-bundle")
        tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
        with open_session(artifact) as session, open_batcher(session, tokenizer, open_bank(artifact)) as batcher:
            asked = [batcher.submit("Once upon a time", adapter=name) for name in ("pirate", None)]
            print([each.result().text for each in asked])
    """
    from runtimes.batching import Batcher, batchable

    return Batcher(
        batchable(session),
        *(tokenizer, bank),
        most_rows=most_rows,
        cache_bytes=cache_bytes,
        prefix_bytes=prefix_bytes,
        queue=queue,
        prefill_chunk=prefill_chunk,
        speculate=speculate,
    )


def ort_session(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    adapter: str | None = None,
    kernel: str | None = None,
    mapped: bool = False,
) -> Session:
    """A bundle's session in onnxruntime; options as of ``runtimes.ort.session.OrtGraph``."""
    session = task_of(bundle).ort_session()
    return session(bundle, provider=provider, threads=threads, adapter=adapter, kernel=kernel, mapped=mapped)


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

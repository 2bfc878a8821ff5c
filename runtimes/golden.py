"""Holds a bundle against its golden arrays on this device: logits, greedy tokens, steering, and the KV cache fed in every way.

The arrays are those of runtimes/artifacts/golden_schema.py. Logits are held to the eager model with the bundle's own weights, so that
export errors show alone; deltas to the float32 model, so that they say what quantization left of the steering. A classifier is held by
runtimes/tasks/classification.py.
"""

from __future__ import annotations

from collections.abc import Collection

from runtimes.artifacts.artifact import Artifact, not_held
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.errors import BundleError
from runtimes.parity.figures import Delta, Figures, ParityReport, Rung, budget_for
from runtimes.parity.retention import Quality
from runtimes.session import Session
from runtimes.tasks.task import task_of


def check_golden(artifact: Artifact, session: Session, *, names: Collection[str] | None = None, with_quality: bool = True) -> ParityReport:
    """Runs the base and every adapter over the golden inputs on this device and holds them to the bundle's budget.

    For each: a full forward with greedy tokens and, for adapters, delta parity; then cache continuity: prefill and decode steps,
    chunked prefill, single rows, left and right padding, all against the same eager full forward; of a classifier, single texts and
    padded batches. A graph that cannot share a batch
    between rows of unequal length is fed row by row. An engine with a frozen adapter has that one only, and no base to take a delta from.
    Logits are float32 [K, V] over the K golden tokens; figures are relative to the largest reference logit, KL is in nats. A missed budget
    is in the report, whose ``require`` raises ParityError.
    An adapter with probes of a float bundle is held to the log-probabilities of all their completions, too. Of a quantized bundle the
    report also says what is left of its quality (runtimes/parity/retention.py), to which no rung is held; not without ``with_quality``.
    Leaves the session's adapter as it was. ``names``: of base and adapters those to hold; None is all. Adapters that were added without
    their base cannot be held, and the report's ``notes`` name them.
    Raises BundleError where there are no golden arrays, and for a frozen adapter that cannot be held.

    Example::

        artifact = open_artifact("pirate-bundle")
        with open_session(artifact) as session:
            check_golden(artifact, session).require()
    """
    frozen = artifact.frozen
    wanted = (BASE_GOLDEN, *artifact.adapter_names) if frozen is None else (frozen,)
    if names is not None:
        wanted = tuple(name for name in wanted if name in names)
    notes = tuple(not_held(artifact.folder, name) for name in wanted if name in artifact.manifest.not_held)
    wanted = tuple(name for name in wanted if name not in artifact.manifest.not_held)
    if notes and not wanted:
        raise BundleError(notes[0])
    if not artifact.golden_names:
        raise BundleError(f"{artifact.folder} has no golden arrays to compare with; export it again, or pass the model with -m")
    if unchecked := [name for name in wanted if name not in artifact.golden_names]:
        raise BundleError(f"{artifact.folder} has no golden arrays for {unchecked[-1]}; export it again, or pass the model with -m")
    budget, active = budget_for(artifact.manifest), session.adapter
    rungs: list[Rung] = []
    quality: list[Quality | None] = []
    try:
        for name in wanted:
            rungs += task_of(artifact).check_golden(artifact, session, name, budget, steering=frozen is None)
            if with_quality and artifact.manifest.quantization is not None:
                quality.append(task_of(artifact).quality(artifact, session, name))
    finally:
        session.set_adapter(active)
    return ParityReport(rungs=tuple(rungs), notes=notes, quality=tuple(each for each in quality if each is not None))


def steering_figures(artifact: Artifact, session: Session, name: str) -> tuple[Figures, Delta]:
    """What is left of an adapter's steering: its logits here, and (steered - base), against the float32 eager model's.

    For an adapter that was refitted, the float32 model is steered by the one it was refitted from. Leaves the session on ``name``.
    """
    return task_of(artifact).steering_figures(artifact, session, name)

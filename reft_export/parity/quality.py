"""The gate of quality: what a quantized bundle kept of its adapters, once it is known to be the model that it claims to be.

Exactness (reft_export/parity/gate.py) is never bargained over. This is: a bundle whose adapters lost too much is refused with the figures
and what was measured to help, or written with the loss in its manifest where that was accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import Manifest, seal_manifest
from runtimes.errors import InputError, ParityError
from runtimes.files.placed import place
from runtimes.parity.figures import ParityReport
from runtimes.parity.retention import shortfall

MIN_RETENTION = 0.8
AIM = 0.9
"""Share that an adapter should keep: below it int4 spends bytes on the weights that lose most, though a bundle is refused only below the
least share."""


@dataclass(frozen=True, kw_only=True)
class QualityGate:
    """``min_retention``: the least share of its training that an adapter keeps (runtimes/parity/retention.py). ``accept_loss``: a bundle
    whose adapters keep less is written, with the loss in its manifest; one that is not exact never is."""

    min_retention: float = MIN_RETENTION
    accept_loss: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_retention <= 1:
            raise InputError(f"--min-retention {self.min_retention:g}: expected a share from 0 to 1; the default is {MIN_RETENTION:g}")

    @property
    def aim(self) -> float:
        """What is enough without any more bytes: less than the default was asked for on purpose."""
        return self.min_retention if self.min_retention < MIN_RETENTION else max(self.min_retention, AIM)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to quantize, tried: ``retention`` by adapter, as eager PyTorch measured it with the weights that would ship."""

    how: str
    retention: dict[str, float]
    added: int = 0
    """Bytes over the plain way."""
    seconds: float = 0

    @property
    def lowest(self) -> float:
        return min(self.retention.values(), default=1.0)

    def __str__(self) -> str:
        kept = ", ".join(f"{name} {value:.2f}" for name, value in self.retention.items()) or "nothing measurable"
        cost = [f"{self.added / 1e6:+.1f} MB"] if self.added else []
        cost += [f"{self.seconds:.0f} s"] if self.seconds else []
        return f"{self.how}: {kept}" + (f" ({', '.join(cost)})" if cost else "")


def shortfalls(report: ParityReport, bundle: Bundle, least: float) -> dict[str, str]:
    """By adapter, why it lost too much; adapters that kept enough are not there."""
    q = bundle.manifest.quantization
    if q is None:
        return {}
    measured = {each.name: each for each in report.quality}
    # The rung's name begins with the quantization's label, and ends with how the tokens were fed.
    deltas = {name: r.delta for name in bundle.adapter_names for r in report.rungs if r.delta and f"{q.label}, {name}:" in r.name}
    found = {
        name: shortfall(measured.get(name), deltas[name].cosine if name in deltas else None, q, least) for name in bundle.adapter_names
    }
    return {name: why for name, why in found.items() if why}


def hold_quality(
    folder: Path, output: Path, report: ParityReport, gate: QualityGate, *, tried: Sequence[Attempt] = (), remedy: str = ""
) -> Manifest:
    """Records retention, and loss where it is accepted, in the manifest of the bundle that is being made in ``folder``.

    Raises ParityError for adapters that lost more than ``gate`` lets them, with what was ``tried`` and ``remedy``; the figures are in
    <output>.parity.json.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    if manifest.quantization is None:
        return manifest
    short = shortfalls(report, bundle, gate.min_retention)
    if short and not gate.accept_loss:
        figures = output.with_name(f"{output.name}.parity.json")
        place(figures, f"{report.to_json()}\n".encode())
        lost = "; ".join(f"{name}: {why}" for name, why in short.items())
        steps = f"; tried: {'; '.join(map(str, tried))}" if tried else ""
        weak = "" if any("retention" in why for why in short.values()) else "train it further, or leave it out"
        advice = "; ".join(filter(None, (remedy, weak, "--accept-loss writes it as it is, with the loss in its manifest")))
        raise ParityError(
            f"quantization leaves too little of the steering: {lost}{steps}; no bundle was written, the figures are in {figures}; {advice}",
            report,
        )
    measured = {each.name: each for each in report.quality if each.name in manifest.adapters}
    others = [name for name in manifest.adapters if name not in measured]
    kept = {name: share for name, share in (manifest.retention or {}).items() if name in others}
    loss = {name: nats for name, nats in (manifest.loss or {}).items() if name in others}
    kept |= {name: round(each.retention, 4) for name, each in measured.items() if each.retention is not None}
    loss |= {name: round(measured[name].loss, 4) for name in short if name in measured}
    manifest = replace(manifest, retention=kept or None, loss=loss or None)
    seal_manifest(folder, manifest)
    return manifest

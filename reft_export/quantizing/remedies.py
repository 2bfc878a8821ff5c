"""What is done for adapters that lost too much to quantization, once the bundle is complete: a refit on their own probes.

Which weights stay in int8 was decided before (weights.py); a refit costs no bytes, and is what is left then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reft_export.bundling.files import Report
from reft_export.parity.gate import gate
from reft_export.parity.quality import Attempt, QualityGate, hold_quality, shortfalls
from reft_export.quantizing.adapters import refit_in
from reft_export.quantizing.refit import RefitPlan, Refitted, plan_refit
from reft_export.quantizing.settings import RefitSettings
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import Manifest
from runtimes.edits.adapter import PROBES_FILE
from runtimes.errors import ReftError
from runtimes.parity.figures import ParityReport

Refits = list[tuple[RefitPlan, Mapping[str, Refitted]]]


def keep_steering(
    work: Path,
    output: Path,
    model: str,
    parity: ParityReport,
    quality: QualityGate,
    folders: Sequence[Path],
    proof: Path,
    report: Report,
    *,
    tried: Sequence[Attempt] = (),
    force: bool = False,
) -> tuple[Manifest, ParityReport, dict[str, Path]]:
    """(manifest, what was held, folders of refitted adapters) of the exact bundle in ``work``, whose ``parity`` is known.

    Adapters that keep too little, or lost tokens that decide an answer (runtimes/parity/retention.py), are trained on the bundle's weights
    for a few steps, where ``folders`` has them with their probes; the refitted ones are saved beside ``output``, and the report's notes say
    what it gave back. Raises ParityError where too little is left even so, and nothing is saved then.
    """
    refits: Refits = []
    if not quality.accept_loss:
        short = shortfalls(parity, open_bundle(work), quality.min_retention)
        lost = {each.name: each.turned for each in parity.quality if each.lopsided} | short
        for folder in folders:
            if folder.name not in lost or not (folder / PROBES_FILE).is_file():
                continue
            try:
                plan = plan_refit(open_bundle(work), model, RefitSettings(data=None, sources=(folder,)), output, force=force)
            except ReftError as e:
                if folder.name in short:
                    raise
                # It keeps enough: what cannot be trained, or has no place beside the output, is no reason to refuse the bundle.
                why = f"{folder.name}: {lost[folder.name]}; it was not trained on the bundle's weights: {e}"
                parity = replace(parity, notes=(*parity.notes, why))
                continue
            report(f"{folder.name}: {lost[folder.name]}; training it on the bundle's weights")
            parity, attempt = _refitted(work, output, model, parity, folder.name, plan, proof, refits, report)
            tried = (*tried, attempt)
            parity = replace(parity, notes=(*parity.notes, _told(folder.name, lost[folder.name], parity, attempt)))
    manifest = hold_quality(work, output, parity, quality, tried=tried)
    saved: dict[str, Path] = {}
    for plan, refitted in refits:
        saved |= plan.save(refitted, force=force)
    return manifest, parity, saved


def _told(name: str, before: str, parity: ParityReport, attempt: Attempt) -> str:
    now = next((each for each in parity.quality if each.name == name), None)
    kept = "" if now is None or now.retention is None else f", retention {now.retention:.2f}"
    turned = "" if now is None else f": {now.turned}"
    return f"{name}: {before}; after {attempt.seconds:.0f} s of training on the bundle's weights{kept}{turned}"


def _refitted(
    work: Path,
    output: Path,
    model: str,
    parity: ParityReport,
    name: str,
    plan: RefitPlan,
    proof: Path,
    refits: Refits,
    report: Report,
) -> tuple[ParityReport, Attempt]:
    started = time.monotonic()
    refitted, _ = refit_in(work, model, plan, proof, report)
    refits.append((plan, refitted))
    report("holding the bundle against the eager model")
    again = gate(work, output, proof=proof, names=(name,))
    new = {each.name: each for each in again.quality}
    known = tuple(new.pop(each.name, each) for each in parity.quality)
    label = f", {name}: "
    rungs = tuple(rung for rung in parity.rungs if label not in rung.name)
    share = next((each.retention for each in again.quality if each.name == name), None)
    attempt = Attempt(how="refit on its probes", retention={} if share is None else {name: share}, seconds=time.monotonic() - started)
    return replace(parity, rungs=(*rungs, *again.rungs), quality=known), attempt

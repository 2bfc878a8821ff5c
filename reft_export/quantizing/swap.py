"""Other adapters in a quantized bundle that stays as it is: hot-swap.

The graph, its weights, its quantization and every other file keep their bytes; adapters/<name>.* and golden/<name>.npz are written
anew, and the manifest with their hashes. The bundle is then held against the eager model again, as when it was made.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from graph_passes.external import load_graph
from graph_passes.head import head_defaults
from reft_export.base.adapters import check_fit, load_adapters
from reft_export.base.load import DTYPES, Base, load_base
from reft_export.base.same_base import comparable, require_same
from reft_export.bundling.files import Report, head_tensors, write_adapter
from reft_export.bundling.result import ExportResult
from reft_export.eager.banks import bank_steerer
from reft_export.eager.steering import steered
from reft_export.evaluation.quantization_report import Measurements, Yardsticks, variant_name
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import fp32_logits, record_quantized
from reft_export.parity.ladder import check_same_base, made_from, stored_inputs
from reft_export.quantizing.refit import REMEDY, RefitPlan, RefitSettings, Refitted, check_task, plan_refit, refit_adapters
from runtimes.artifacts.bundle import BASE_GOLDEN, NOT_HASHED, Bundle, Manifest, check_adapter_name, open_bundle, write_manifest
from runtimes.edits.adapter import Adapter
from runtimes.errors import AdapterError, CalibrationError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.precision import NUMPY_DTYPES, TORCH_DTYPES


def swap_bundle(
    source: Path,
    model: str,
    output: Path,
    *,
    adapters: Sequence[Path] = (),
    refit: RefitSettings | None = None,
    yardsticks: Yardsticks = Yardsticks(),
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Writes to ``output`` the quantized bundle ``source`` with other adapters: those of ``adapters``, or its own refitted.

    Raises CalibrationError for a float bundle, AdapterError for adapters of another base, of other sites, or trained on another bundle's
    weights, ParityError for a missed budget.
    """
    folders = refit.sources if refit else adapters
    check_destination(output, force=force, inputs=[source, Path(model), *folders])
    bundle = open_bundle(source)
    if bundle.manifest.quantization is None:
        raise CalibrationError(
            f"{source} is a float bundle: adapters get into it with `reft-export export`, and are trained with `reft-export train`"
        )
    check_task(bundle, refit=refit is not None, generates=yardsticks != Yardsticks())
    if accept_base:
        bundle = made_from(bundle, model)
    plan = plan_refit(bundle, model, refit, output, force=force) if refit else None
    given = {} if refit else load_adapters(list(adapters))
    for name, adapter in given.items():
        check_swap(bundle, name, adapter, accept_base=accept_base)
    figures = Measurements(yardsticks)
    with atomic_folder(output, force=force) as work, tempfile.TemporaryDirectory() as proof:
        copy_bundle(bundle, work)
        write_manifest(work, bundle.manifest)
        runs = bundle.manifest.precision != "bf16"
        if runs:
            report("measuring the bundle as it is")
            figures.add(variant_name(bundle), bundle)
        if plan:
            refitted, manifest = refit_in(work, model, plan, Path(proof), report)
        else:
            refitted, manifest = {}, put_in(work, model, given, Path(proof), report, accept_base=accept_base)
        parity, note = None, "" if runs else check_structure(work)
        if runs:
            report("holding the bundle against the eager model")
            parity = gate(work, output, exact=Path(proof) if any(Path(proof).iterdir()) else None, remedy=REMEDY if refit else "")
            figures.add(f"{variant_name(bundle)} + {'refit' if refit else 'swap'}", open_bundle(work))
        saved = plan.save(refitted, force=force) if plan else {}
    told = figures.report(output, refits=tuple(each.figures for each in refitted.values()), parity=parity)
    return ExportResult(manifest=manifest, parity=parity, weight_errors=(), note=note, report=told, refitted=saved)


def refit_in(work: Path, model: str, plan: RefitPlan, proof: Path, report: Report) -> tuple[dict[str, Refitted], Manifest]:
    """Refits the adapters of the bundle that is being made in ``work``, and puts them into it. Eager models are gone when this returns."""
    bundle = open_bundle(work)
    refitted = refit_adapters(bundle, model, plan, report)
    report("recording what the eager model says with the refitted adapters")
    new = {name: each.adapter for name, each in refitted.items() if not each.figures.kept}
    manifest = replace_adapters(work, load_base(model), new, stored_exact(bundle), proof)
    gc.collect()  # the runtime is about to load the weights
    return refitted, manifest


def put_in(work: Path, model: str, adapters: Mapping[str, Adapter], proof: Path, report: Report, *, accept_base: bool = False) -> Manifest:
    """Puts adapters that were trained elsewhere into the bundle that is being made in ``work``."""
    bundle = open_bundle(work)
    report("recording what the eager model says with the new adapters")
    base = load_base(model)
    check_same_base(bundle, base, model)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    steerers = {name: partial(steered, adapter=adapter) for name, adapter in adapters.items()}
    exact = stored_exact(bundle) | fp32_logits(base.model, stored_inputs(bundle), steerers)
    manifest = replace_adapters(work, base, adapters, exact, proof)
    gc.collect()
    return manifest


def check_swap(bundle: Bundle, name: str, adapter: Adapter, *, accept_base: bool = False) -> None:
    """Raises AdapterError for an adapter of another base, for other sites, or trained on the weights of another bundle."""
    check_adapter_name(name)
    of = bundle.manifest.model
    if of.fingerprint and comparable(adapter.base, of):  # else the base tells, which ``put_in`` loads
        require_same(
            f"adapter {name} was trained on",
            adapter.base,
            f"{bundle.folder} was made from",
            of,
            "use the base it was trained on",
            accept=accept_base,
        )
    if adapter.trained_on not in (None, bundle.digest):
        raise AdapterError(
            f"adapter {name} was trained on the weights of a bundle with digest {adapter.trained_on[:12]}, {bundle.folder} has "
            f"{bundle.digest[:12]}; train it on this one with --base"
        )
    adapter.banks(bundle.nodes, NUMPY_DTYPES[bundle.manifest.precision])


def copy_bundle(bundle: Bundle, work: Path) -> None:
    """Every file of the bundle, session configs that its user may have edited among them."""
    for name in (*bundle.manifest.files, *NOT_HASHED):
        if (bundle.folder / name).is_file():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, work / name)


def replace_adapters(work: Path, base: Base, adapters: Mapping[str, Adapter], exact: Mapping[str, np.ndarray], proof: Path) -> Manifest:
    """Puts ``adapters`` into the bundle that is being made in ``work``, those of the same name being replaced.

    ``base`` is fresh from disk; its weights are replaced by the bundle's. ``exact``: the float32 model's logits by name, for the base and
    every adapter, new and old: what delta parity is held to. ``proof`` takes arrays recorded with float activations, where the bundle
    quantizes them. Raises AdapterError for an adapter that needs an edit node which the graph lacks.
    """
    bundle = open_bundle(work)
    m, graph = bundle.manifest, load_graph(bundle.graph_path)
    for name, adapter in adapters.items():
        head = head_tensors(adapter, m.head, head_defaults(graph, m.head))
        write_adapter(work, name, adapter, bundle.nodes, precision=m.precision, slots=m.slots, head=head)
    steerers = {name: bank_steerer(bundle, name) for name in m.adapters if name not in adapters}
    steerers |= {name: partial(steered, adapter=adapter) for name, adapter in adapters.items()}
    base.model.to(DTYPES[TORCH_DTYPES[m.precision]])
    with tempfile.TemporaryDirectory() as recorded:
        record_quantized(Path(recorded), proof, base.model, graph, m.weights, stored_inputs(bundle), steerers, exact)
        for name in adapters:
            shutil.copyfile(Path(recorded) / f"{name}.npz", work / "golden" / f"{name}.npz")
    manifest = replace(m, adapters=tuple(dict.fromkeys((*m.adapters, *adapters))))
    write_manifest(work, manifest)
    return manifest


def stored_exact(bundle: Bundle) -> dict[str, np.ndarray]:
    """The float32 model's logits that a quantized bundle was made with: of the base, and of every adapter as it was before any refit."""
    golden = {name: bundle.golden(name) for name in bundle.adapter_names}
    exact = {name: arrays["fp32_logits"] for name, arrays in golden.items()}
    for arrays in golden.values():
        exact[BASE_GOLDEN] = arrays["fp32_base_logits"]
    return exact

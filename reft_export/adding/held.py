"""Adapters in a bundle that is being made, held against eager PyTorch carrying the bundle's own weights."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graph_passes.external import load_graph
from reft_export.adding.files import held
from reft_export.base.adapters import check_fit
from reft_export.base.load import Base, load_base, set_precision
from reft_export.base.memory import give_back
from reft_export.base.origin import described
from reft_export.bundling.files import Report
from reft_export.bundling.result import ExportResult
from reft_export.eager.steering import Steerer, steerers_of
from reft_export.parity.gate import check_structure, gate
from reft_export.parity.golden import (
    Arrays,
    BaseAnswers,
    InputsByName,
    adapter_inputs,
    fp32_answers,
    inputs_key,
    record_golden,
    record_quantized,
)
from reft_export.parity.ladder import check_same_base
from reft_export.parity.quality import QualityGate, hold_quality
from reft_export.tasks.task import TASKS, Inputs
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import write_manifest
from runtimes.edits.adapter import Adapter
from runtimes.files.claims import temporary_folder

REFIT = "nothing was added; `reft-export quantize BUNDLE -m MODEL --refit DATA.jsonl -a ADAPTER` trains it on the bundle's weights"


def held_to_eager(
    bundle: Bundle,
    adapters: Mapping[str, Adapter],
    model: str,
    shown: Path,
    quality: QualityGate,
    report: Report,
    *,
    before: Bundle,
    accept_base: bool,
) -> ExportResult:
    """Records what eager PyTorch says with ``adapters``, whose files are in the bundle that is being made, and holds the bundle to it.

    ``shown``: the folder that it will be; ``before``: the bundle that it is made from, of the same graph. No model is in memory when the
    runtime loads the weights.
    """
    m = bundle.manifest
    report(f"loading {described(model)}")
    base = load_base(model)
    check_same_base(bundle, base, model, accept_base=accept_base)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    report("recording what the eager model says")
    steerers, floats = steerers_of(adapters), m.quantization is None and m.precision == "fp32"
    task = TASKS[m.task]
    of_base = task.stored_inputs(bundle.golden(BASE_GOLDEN)) if BASE_GOLDEN in bundle.golden_names else task.inputs(base)
    inputs = {BASE_GOLDEN: of_base, **adapter_inputs(base, adapters, of_base)}
    known = stored_base(before, [inputs[name] for name in adapters]) if base.info.fingerprint == m.model.fingerprint else StoredBase()
    fp32 = {} if floats else fp32_answers(base.model, inputs, steerers, of_base=False, base_known=known.fp32)
    with temporary_folder() as proof:
        record_adapters(bundle, base, inputs, steerers, fp32, proof, base_known=known.shipped)
        del base
        give_back()
        bundle = held(bundle, tuple(adapters))
        write_manifest(bundle.folder, bundle.manifest)
        if m.precision == "bf16":
            return ExportResult(manifest=bundle.manifest, parity=None, weight_errors=(), note=check_structure(bundle.folder))
        report("holding the bundle against the eager model")
        parity = gate(bundle.folder, shown, proof=proof, names=tuple(adapters), remedy="nothing was added")
        manifest = hold_quality(bundle.folder, shown, parity, quality, remedy=REFIT)
    return ExportResult(manifest=manifest, parity=parity, weight_errors=())


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredBase:
    """What a bundle's golden arrays say of its base on some inputs: of the model that it ships, and of the float32 one."""

    shipped: BaseAnswers = field(default_factory=dict)
    fp32: BaseAnswers = field(default_factory=dict)


def stored_base(bundle: Bundle, wanted: Sequence[Inputs]) -> StoredBase:
    """Of those ``wanted`` that one of the bundle's adapters was recorded on, as of an adapter that is trained again on the same data: the
    base says of equal tokens what it said then."""
    keys = {inputs_key(inputs) for inputs in wanted}
    shipped: dict[bytes, Arrays] = {}
    fp32: dict[bytes, Arrays] = {}
    for name in bundle.golden_names:
        if name == BASE_GOLDEN or not keys - shipped.keys():
            continue
        arrays = bundle.golden(name)
        if (key := inputs_key(TASKS[bundle.manifest.task].stored_inputs(arrays))) in keys:
            shipped[key] = {kind.removeprefix("base_"): array for kind, array in arrays.items() if kind.startswith("base_")}
            if said := {kind.removeprefix("fp32_base_"): array for kind, array in arrays.items() if kind.startswith("fp32_base_")}:
                fp32[key] = said
    return StoredBase(shipped=shipped, fp32=fp32)


def record_adapters(
    bundle: Bundle,
    base: Base,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    fp32: Mapping[str, Arrays],
    proof: Path,
    *,
    again: Mapping[str, Steerer] | None = None,
    base_known: BaseAnswers | None = None,
) -> None:
    """golden/<name>.npz of every steerer, by the base with the bundle's own weights, in its float type.

    ``base`` is fresh from disk; its weights are replaced by the bundle's. ``inputs``: of the base and every steerer. ``fp32``: what the
    float32 model says, by steerer: what delta parity is held to; empty of a bundle that is float32. ``proof`` takes arrays recorded with
    float activations, where the bundle quantizes them. ``again``: the bundle's other adapters, whose arrays and the base's ``proof`` is
    to hold, too. ``base_known``: as of ``record_quantized``; without ``again``.
    """
    m = bundle.manifest
    set_precision(base.model, m.precision)
    every = {**(again or {}), **steerers}
    with temporary_folder() as folder:
        recorded = folder
        if m.quantization is None:
            record_golden(recorded, base.model, inputs, every, fp32=fp32 or None, of_base=again is not None, base_known=base_known)
        else:
            graph = load_graph(bundle.graph_path)
            record_quantized(
                *(recorded, proof, base.model, graph, m.weights, inputs, every, fp32), of_base=again is not None, base_known=base_known
            )
        for name in steerers:
            shutil.copyfile(recorded / f"{name}.npz", bundle.folder / "golden" / f"{name}.npz")
    gc.collect()  # the graph's arrays

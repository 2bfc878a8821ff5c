"""Refit: an adapter is re-trained for a few steps on the exact weights that a quantized bundle ships, and takes its old place there.

The bundle holds folded banks only, which cannot be trained (R and W are folded into one), so the adapter's folder is needed. It is
the bundle's adapter by name, and by content: its fold is the bank that the bundle holds, or the bundle's was refitted from it.

The loss is one of

    teacher   KL(float32 model steered by the adapter as it was || quantized model steered by the new one) at the data's completions:
              nothing but what quantization took away is learned. Holds the base twice in memory.
    data      cross entropy of the completions, as in training; for data that the adapter was trained on, or better.

Weights are the shipped ones to the bit, and where the bundle quantizes activations, so does the model that is trained; their rounding
passes gradients straight through. A refit whose loss over the data did not fall is thrown away, and the adapter stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from graph_passes.external import load_graph
from reft_export.base.adapters import folders_of, load_adapters
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import Base, base_folder, check_device, load_base, load_tokenizer, load_without_weights, move
from reft_export.base.token_rules import context_of, stop_tokens
from reft_export.bundling.files import Report
from reft_export.console import count
from reft_export.eager.steering import steer
from reft_export.evaluation.quantization_report import RefitFigures
from reft_export.folding.foreign_base import refuse_quantized
from reft_export.parity.ladder import check_same_base
from reft_export.quantizing.settings import RefitSettings
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, collate, iter_examples, load_data
from reft_export.training.interventions import Interventions
from reft_export.training.objective import tokenizer_of
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.sources import Data
from reft_export.training.teacher import teaching
from reft_export.training.ways import Ways, loss_of
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.positions import needs_marks
from runtimes.errors import AdapterError, CalibrationError
from runtimes.files.claims import temporary_folder
from runtimes.files.folders import check_destination
from runtimes.precision import NUMPY_DTYPES


@dataclass(frozen=True, kw_only=True)
class Refitted:
    adapter: Adapter
    figures: RefitFigures


def load_on_bundle(bundle: Bundle, model: str, *, device: str = "cpu", weights: bool = True) -> Base:
    """The base in float32, carrying exactly the dequantized weights of ``bundle``; its fingerprint stays the base's.

    Without ``weights`` it is checked alone, and its model lies on torch's meta device. Raises CalibrationError for a float bundle,
    AdapterError for another base, GraphError for weights that another tool quantized.
    """
    if bundle.manifest.quantization is None:
        if bundle.manifest.exporter == "foreign":
            refuse_quantized(load_graph(bundle.graph_path), str(bundle.folder), "they cannot be told from the checkpoint's")
        raise CalibrationError(
            f"{bundle.folder} is a float bundle, whose weights are the base's own: train without --base, or quantize the bundle first"
        )
    check_device(device)
    base = (load_base if weights else load_without_weights)(model, require_tokenizer=True)
    check_same_base(bundle, base, model)
    if not weights:
        return base
    load_dequantized(base.model, load_graph(bundle.graph_path), bundle.manifest.weights)
    move(base.model.requires_grad_(False), device)
    return base


@dataclass(frozen=True, kw_only=True)
class RefitPlan:
    """A refit that was checked before any work: what it starts from, and where the results go."""

    settings: RefitSettings
    sources: Mapping[str, Adapter]
    folders: Mapping[str, Path]

    def save(self, refitted: Mapping[str, Refitted], *, force: bool) -> dict[str, Path]:
        """Writes the adapters that changed; returns their folders by name."""
        changed = {name: each.adapter for name, each in refitted.items() if not each.figures.kept}
        for name, adapter in changed.items():
            save_adapter(adapter, self.folders[name], force=force)
        return {name: self.folders[name] for name in changed}


def plan_refit(bundle: Bundle, model: str, settings: RefitSettings, output: Path, *, force: bool) -> RefitPlan:
    """Everything that can be refused before anything is loaded or quantized: adapters, data, and folders that are in the way."""
    sources = load_sources(bundle, settings)
    beside = output.with_name(f"{output.name}.adapters") if settings.output is None else settings.output
    folders = {name: beside / name for name in sources}
    inputs = [*folders_of(settings.sources), *([settings.data] if settings.data else []), bundle.folder]
    for folder in folders.values():
        check_destination(folder, force=force, inputs=inputs)
    if settings.data is None:
        if without := [name for name, adapter in sources.items() if not adapter.probes]:
            raise AdapterError(
                f"adapter {without[0]} has no probes to refit it on; give it some (`reft-export import --probes`), or a file to --refit"
            )
        return RefitPlan(settings=settings, sources=sources, folders=folders)
    known = bundle.manifest.model
    tokenizer = load_tokenizer(base_folder(model))
    for marks in {needs_marks(adapter.where) for adapter in sources.values()}:
        for _ in iter_examples(settings.data, tokenizer, max_length=known.context_length, stop_tokens=known.eos_token_ids, marks=marks):
            pass
    return RefitPlan(settings=settings, sources=sources, folders=folders)


def load_sources(bundle: Bundle, settings: RefitSettings) -> dict[str, Adapter]:
    """The adapters to refit, by name, each the one that the bundle holds.

    Raises BundleError or AdapterError for one that the bundle lacks or holds otherwise, and, with a teacher, for one that knows no float
    weights.
    """
    sources = load_adapters(list(settings.sources))
    for name, adapter in sources.items():
        record = bundle.adapter_record(name)
        if adapter.digest != record.training.get("start") and not _same_banks(bundle, name, adapter):
            raise AdapterError(
                f"adapter {name}: its folder does not fold to the banks that {bundle.folder} holds under that name; pass the folder "
                "that the bundle was exported with"
            )
        stored = bundle.adapter(name)
        if (adapter.where, adapter.tied) != (stored.positions, stored.tied):
            raise AdapterError(
                f"adapter {name}: its folder edits at {adapter.where}, and {bundle.folder} holds it at {stored.positions}; pass the folder "
                "that the bundle was exported with"
            )
        if settings.objective == "teacher" and adapter.trained_on is not None:
            raise AdapterError(
                f"adapter {name} was trained on the weights of a quantized bundle ({adapter.trained_on[:12]}), so the float model steered "
                "by it is no teacher; pass the adapter it was refitted from, or --refit-objective data"
            )
        settings_like(adapter)
    return sources


def refit_adapters(bundle: Bundle, model: str, plan: RefitPlan, report: Report) -> dict[str, Refitted]:
    """Every source re-trained on the bundle's weights. The base is loaded, twice for a teacher, and gone afterwards."""
    settings = plan.settings
    report(f"loading {model} with the bundle's weights")
    base = load_on_bundle(bundle, model)
    teacher = load_base(model).model if settings.objective == "teacher" else None
    with activations_quantized(base.model, load_graph(bundle.graph_path), bundle.manifest.weights, straight_through=True):
        return {name: _refit(bundle, base, teacher, name, adapter, settings, report) for name, adapter in plan.sources.items()}


def _refit(
    bundle: Bundle,
    base: Base,
    teacher: PreTrainedModel | None,
    name: str,
    adapter: Adapter,
    settings: RefitSettings,
    report: Report,
) -> Refitted:
    # transformers' Trainer brings what else is installed, datasets among it: whoever refits nothing goes without.
    from reft_export.training.endings import TrainingInterrupted
    from reft_export.training.trainer import train

    report(f"refitting {name}, {settings.steps} steps")
    run = settings_like(
        adapter,
        lr=settings.lr,
        max_steps=settings.steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        samples=0,
        probes=0,
        dtype="float32",
        device="cpu",
        max_length=min(context_of(base), bundle.manifest.model.context_length),
    )
    data = [dict(probe) for probe in adapter.probes] if settings.data is None else settings.data
    examples = read_examples(base, data, run)
    with temporary_folder() as folder:
        try:
            trained = train(
                base,
                data,
                run,
                folder / name,
                start=adapter,
                trained_on=bundle.digest,
                teacher=teacher,
                on_step=partial(_show_step, report, name),
            )
        except TrainingInterrupted:
            raise KeyboardInterrupt("interrupted while refitting; nothing was written") from None
    new = replace(trained.adapter, probes=adapter.probes)  # its task is what it was
    lesson = None if teacher is None else (teacher, adapter)
    before, after = (adapter_loss(base, each, examples, teacher=lesson) for each in (adapter, new))
    figures = RefitFigures(
        adapter=name, objective=settings.objective, before=before, after=after, steps=settings.steps, kept=after >= before
    )
    return Refitted(adapter=adapter if figures.kept else new, figures=figures)


def _show_step(report: Report, name: str, step: int, total: int, loss: float, _: float | None) -> None:
    count(report, f"refitting {name}, step {step}/{total}, loss {loss:.3f}", step, total)


def read_examples(base: Base, data: Data, run: TrainSettings = TrainSettings()) -> Sequence[Example]:
    """The data as training with the settings ``run`` reads it; InputError for a file without a usable line."""
    length = run.max_length or context_of(base)
    tokenizer, stop = tokenizer_of(base), stop_tokens(base)
    read = load_data(data, tokenizer, max_length=length, chat_template=run.chat_template, stop_tokens=stop, marks=run.marks)
    return read.examples


@torch.no_grad()
def adapter_loss(
    base: Base,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    teacher: tuple[PreTrainedModel, Adapter] | None = None,
    batch_size: int = 8,
) -> float:
    """Mean over the completions' tokens of -log p(token), or of KL(teacher || base steered by ``adapter``), in nats; ``teacher``: the
    float32 model and the adapter that steers it."""
    from reft_export.training.generation import EditedModel

    interventions = Interventions(
        adapter.site_forms, width=base.info.hidden_size, tied=adapter.tied, rules=adapter.site_rules if adapter.rules else None
    )
    interventions.start_from(adapter)
    total, count = 0.0, 0
    with (
        steer(base.model, interventions.edits(), rule=adapter.where, tied=adapter.tied) as steering,
        nullcontext() if teacher is None else teaching(*teacher) as lesson,
    ):
        ways = Ways(head=CountedHead(base.model), steering=steering, rule=adapter.where)
        model = EditedModel(interventions, ways.counted, loss_of if lesson is None else lesson.divergence).eval()
        for start in range(0, len(examples), batch_size):
            chosen = examples[start : start + batch_size]
            total += float(model(**collate(chosen, pad_token_id=0), num_items_in_batch=1)["loss"])
            count += sum(e.trained_tokens for e in chosen)
    return total / count


def _same_banks(bundle: Bundle, name: str, adapter: Adapter) -> bool:
    """Bit for bit: both were rounded once from the same float64 fold."""
    held = read_onnx_adapter(bundle.adapter(name).file)
    mine = adapter.banks(bundle.nodes, NUMPY_DTYPES[bundle.manifest.precision])
    return all(n in held and held[n].shape == bank.shape and np.array_equal(held[n], bank) for n, bank in mine.items())

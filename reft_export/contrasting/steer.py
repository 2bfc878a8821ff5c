"""``reft-export steer``: an adapter from a contrast, without training.

    add      h + s                 s = strength * (mean(h+) - mean(h-)), of every edited site its own; a lobireft of rank 1, with
                                   R = s / |s| up to its sign and s = +-|s|
    ablate   h - v v^T h           v = (mean(h+) - mean(h-)) / |..| of one layer, at every edited site; a consreft of rank 1, R = v, s = 0

Source: Turner et al. 2023, "Steering Language Models With Activation Engineering" (ActAdd); Rimsky et al. 2024, "Steering Llama 2 via
Contrastive Activation Addition"; Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.load import Base, base_from_memory
from reft_export.base.token_rules import context_of, stop_tokens, vocabulary_of
from reft_export.contrasting.activations import read_activations
from reft_export.contrasting.passages import Contrast, Passage, Reader
from reft_export.contrasting.separability import Separation, chosen_layer, separations
from reft_export.contrasting.settings import SteerSettings
from reft_export.contrasting.strengths import AROUND, StrengthFigures, chosen_strength, measure, prompt_of, strengths_of, yardstick
from reft_export.eager.steering import site_module, steered
from reft_export.training.generation import greedy_samples
from reft_export.training.objective import Phase, Sample, tokenizer_of
from reft_export.training.sources import Data
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.probes import Probe, spread
from runtimes.errors import AdapterError, InputError
from runtimes.files.folders import check_destination, claimed
from runtimes.version import VERSION

ALIKE = 1e-6
"""|difference| over the stream's norm, up to which it is rounding: float32 carries some 6e-8, and attention adds hundreds of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteerResult:
    """What ``steer_adapter`` gives back, beside the saved adapter."""

    adapter: Adapter
    separations: tuple[Separation, ...]
    """Of every site that was read."""
    layer: int | None
    """The layer that was chosen, or given to ablate; None where ``layers`` were given to add."""
    read: str
    """The tokens that were read: last, mean, or a number."""
    strength: float | None
    """Of add."""
    strengths: tuple[StrengthFigures, ...]
    """Of the base, as strength 0, and of those that were tried."""
    samples_before: tuple[Sample, ...]
    samples_after: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SteerPlan:
    """What was checked before the base computes anything."""

    base: Base
    settings: SteerSettings
    contrast: Contrast
    read: str
    candidates: tuple[Site, ...]
    ablated: tuple[Site, ...]
    """Of ablate."""


def steer_adapter(
    base: Base | PreTrainedModel,
    positive: Data,
    negative: Data | None,
    output: Path,
    settings: SteerSettings = SteerSettings(),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trained_on: str | None = None,
    force: bool = False,
    report: Phase = lambda _: None,
) -> SteerResult:
    """Measures a direction of the residual stream between two sides of a contrast, and saves the adapter that adds it or takes it out.

    ``base``: a decoder from ``load_base``, or a transformers model in memory, which comes with its ``tokenizer``. ``positive``,
    ``negative``: a JSONL file each, or its records in memory as dicts: prompt and completion, messages, a prompt alone, or a text; the
    sides need not be of one length. With ``negative`` None the lines of ``positive`` hold both (reft_export/contrasting/passages.py).
    ``trained_on``: digest of the bundle whose weights the base carries.

    Directions are float64 means of h [D], rounded once to float32. A layer that is not given is chosen by how well its direction tells
    held-out lines apart, a strength by what it does to the completions; both are in the result, with all that was measured. The same base,
    lines and settings give the same adapter. The base stays as it is.

    Raises InputError for settings, lines or outputs that cannot be used, for a base that is no decoder, and for two sides that the base
    does not tell apart at a layer that is edited; nothing is written then.

    Example::

        base = load_base("base", require_tokenizer=True)
        settings = SteerSettings(strength=2.0, layers="14")
        result = steer_adapter(base, Path("glad.jsonl"), Path("sad.jsonl"), Path("glad"), settings)
        print(result.separations[0].accuracy, result.samples_after)
    """
    base = base if isinstance(base, Base) else base_from_memory(base, tokenizer)
    with claimed(output, force=force):
        plan = plan_steering(base, positive, negative, output, settings, force=force, report=report)
        was_training = base.model.training
        base.model.eval()
        try:
            with torch.no_grad():
                return _steer(plan, output, trained_on=trained_on, force=force, report=report)
        finally:
            base.model.train(was_training)


def plan_steering(
    base: Base,
    positive: Data,
    negative: Data | None,
    output: Path,
    settings: SteerSettings,
    *,
    force: bool = False,
    report: Phase = lambda _: None,
) -> SteerPlan:
    """Every check of ``steer_adapter`` that needs no weights; the base's model may lie on torch's meta device."""
    check_destination(output, force=force)
    if base.task != TEXT_GENERATION:
        raise InputError(f"{base.info.name} is a classifier, and steer measures what a decoder says; train an adapter for it")
    tokenizer, context = tokenizer_of(base), context_of(base)
    if (settings.max_length or 0) > context:
        raise InputError(f"max_length is {settings.max_length}; the context of {base.info.name} ends at {context}")
    layers = base.info.num_hidden_layers
    candidates, ablated = settings.candidates(layers), settings.ablated(layers) if settings.method == "ablate" else ()
    for site in (*candidates, *ablated):
        site_module(base.model, site)
    report("reading the lines")
    reader = Reader(
        tokenizer=tokenizer,
        stop=frozenset(stop_tokens(base)),
        max_length=settings.max_length or context,
        chat_template=settings.chat_template,
    )
    contrast = reader.contrast(positive, negative)
    read = contrast.reads(settings.read)
    vocabulary = vocabulary_of(base)
    for passage in contrast.both:
        passage.at(read)
        if max(passage.example.input_ids) >= vocabulary:
            raise InputError(
                f"{passage.example.where}: token id {max(passage.example.input_ids)} is outside the model's vocabulary of {vocabulary}; "
                "use the tokenizer that the base was made with"
            )
    return SteerPlan(base=base, settings=settings, contrast=contrast, read=read, candidates=candidates, ablated=ablated)


def _steer(plan: SteerPlan, output: Path, *, trained_on: str | None, force: bool, report: Phase) -> SteerResult:
    base, settings, contrast = plan.base, plan.settings, plan.contrast
    report(f"reading {len(contrast.both)} lines")
    read = read_activations(base, contrast.both, plan.candidates, plan.read, batch_size=settings.batch_size, report=report)
    found = separations(read, len(contrast.positive))
    layer = _layer(plan, found)
    edited = _edited(plan, found, layer)
    _check_apart(edited, base, plan)
    shown = _shown(contrast, settings)
    asked = [prompt_of(passage) for passage in shown[: settings.samples]]

    def made(strength: float, training: Mapping[str, Any] | None = None) -> Adapter:
        return Adapter(
            method="lobireft" if settings.method == "add" else "consreft",
            rank=1,
            sites=tuple(edited),
            positions=settings.rule,
            tied=True,
            base=base.info,
            tensors=_tensors(edited, strength, ablate=settings.method == "ablate"),
            dtype=base.dtype,
            trained_on=trained_on,
            training=training or {},
            probes=_probes(contrast, settings) if training else (),
        )

    report("trying strengths")
    tried = _tried(settings, edited)
    strengths = measure(base, made, yardstick(base, contrast), tried, report)
    strength = (settings.strength or chosen_strength(strengths)) if settings.method == "add" else 1.0
    record = _provenance(plan, found, layer, strength, strengths)
    adapter = made(strength, record)
    before = _samples(base, asked, None, report)
    after = _samples(base, asked, adapter, report)
    save_adapter(adapter, output, force=force)
    return SteerResult(
        adapter=adapter,
        separations=found,
        layer=layer,
        read=plan.read,
        strength=strength if settings.method == "add" else None,
        strengths=strengths,
        samples_before=before,
        samples_after=after,
    )


def _layer(plan: SteerPlan, found: Sequence[Separation]) -> int | None:
    """The one whose direction is used, where it is one."""
    settings = plan.settings
    if settings.from_layer is not None:
        return settings.from_layer
    if settings.method == "add" and settings.layers is not None:
        return None
    return chosen_layer(found, plan.base.info.num_hidden_layers)


def _edited(plan: SteerPlan, found: Sequence[Separation], layer: int | None) -> dict[Site, Separation]:
    """Every site of the adapter, and what its direction is of."""
    if plan.settings.method == "ablate":
        (source,) = (each for each in found if each.site.layer == layer)
        return dict.fromkeys(plan.ablated, source)
    return {each.site: each for each in found if layer is None or each.site.layer == layer}


def _check_apart(edited: Mapping[Site, Separation], base: Base, plan: SteerPlan) -> None:
    for each in edited.values():
        if not each.share > ALIKE:
            raise InputError(
                f"{base.info.name} has the same mean over both sides at {each.site} (they differ by {each.norm:.2g} of "
                f"{each.residual_norm:.3g}, reading {plan.read}): the lines hold no contrast there; give lines that differ, or another read"
            )


def _tensors(edited: Mapping[Site, Separation], strength: float, *, ablate: bool) -> dict[str, np.ndarray]:
    """R [1, D] and s [1] of every site, in float64 and rounded once."""
    tensors = {}
    for site, each in edited.items():
        s = 0.0 if ablate else strength * each.norm
        if abs(s) > float(np.finfo(np.float32).max):
            raise InputError(f"strength {strength:g} times the difference at {site}, {each.norm:.3g}, is beyond float32; lower it")
        tensors[f"{site}.R"] = (each.difference / each.norm)[None].astype(np.float32)
        tensors[f"{site}.s"] = np.array([s], np.float32)
    return tensors


def _tried(settings: SteerSettings, edited: Mapping[Site, Separation]) -> tuple[float, ...]:
    if settings.method == "ablate":
        return (1.0,)
    if settings.strength is None:
        return strengths_of(sum(each.share for each in edited.values()))
    return tuple(factor * settings.strength for factor in AROUND)


def _shown(contrast: Contrast, settings: SteerSettings) -> Sequence[Passage]:
    """The lines whose prompts show what the adapter does: those of the side that it leaves."""
    return contrast.negative if settings.method == "add" else contrast.positive


def _probes(contrast: Contrast, settings: SteerSettings) -> tuple[Probe, ...]:
    """Completions of the side that the adapter goes towards."""
    side = contrast.positive if settings.method == "add" else contrast.negative
    answered = [passage.record for passage in side if passage.record is not None]
    return tuple(answered[index] for index in spread(len(answered), settings.probes))


def _samples(base: Base, asked: Sequence[Any], adapter: Adapter | None, report: Phase) -> tuple[Sample, ...]:
    if not asked:
        return ()
    report("sampling the base" if adapter is None else "sampling the steered model")
    if adapter is None:
        return greedy_samples(base, asked)
    try:
        with steered(base.model, adapter):
            return greedy_samples(base, asked)
    except AdapterError as e:
        raise InputError(f"the adapter cannot be run: {e}; lower the strength") from None


def _provenance(
    plan: SteerPlan, found: Sequence[Separation], layer: int | None, strength: float, strengths: Sequence[StrengthFigures]
) -> dict[str, Any]:
    """What the adapter records of how it was made."""
    settings, contrast = plan.settings, plan.contrast
    return {
        "steered": "the direction of the difference of means taken out"
        if settings.method == "ablate"
        else f"{strength:g} x difference of means",
        "data": {
            "files": [{"side": side, **asdict(file)} for side, file in contrast.files.items()],
            "positive": len(contrast.positive),
            "negative": len(contrast.negative),
            "chat_template": contrast.templated,
        },
        "settings": settings.record() | {"read": plan.read, "strength": strength},
        "versions": {"reft-export": VERSION, "torch": torch.__version__},
        **({} if layer is None else {"layer": layer}),
        "figures": {
            "sites": [figures_of(each) for each in found],
            "strengths": [asdict(each) for each in strengths],
        },
    }


def figures_of(each: Separation) -> dict[str, Any]:
    """A site's figures, as JSON has them."""
    return {
        "site": str(each.site),
        "accuracy": each.accuracy,
        "margin": each.margin,
        "difference": each.norm,
        "residual": each.residual_norm,
        "share": each.share,
    }

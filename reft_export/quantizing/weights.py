"""Which weights an int4 bundle stores in int8: none where the adapters keep enough with all of them in int4, else the most sensitive ones.

Measured before anything is written, in eager PyTorch carrying the weights that would ship: that is what the bundle says, to 1e-4 (the gate
shows it), at a fraction of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from calibration.quantize import QuantizedGraph, Ranges, quantize_graph
from calibration.settings import QuantizationSettings, settings_for
from calibration.weight_only import WeightBlocks
from reft_export.base.dequantized import copy_experts, expert_matrices, load_dequantized
from reft_export.base.memory import give_back, share_weights
from reft_export.bundling.files import Report
from reft_export.eager.steering import Steerer
from reft_export.parity.quality import Attempt, QualityGate
from reft_export.quantizing.cache import quantize_cache
from reft_export.quantizing.given import Given
from reft_export.quantizing.importance import Squares, input_importance
from reft_export.quantizing.sensitivity import MixedPrecision, mixed, rows_of
from reft_export.tasks.task import Inputs
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import WeightSource
from runtimes.parity.retention import quality, recorded


class EagerModel:
    """The base in eager PyTorch, with its float weights, or with those that would ship.

    ``load``: makes the float model again, and one of the two is in memory at a time. Without it the float weights stay, beside those of a
    graph.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel] | None = None) -> None:
        self._model: PreTrainedModel | None = model
        self._load = load

    def floats(self) -> PreTrainedModel:
        if self._model is None:
            assert self._load is not None
            give_back()
            self._model = self._load()
        return self._model

    def put_away(self) -> None:
        """Until it is asked for again, which loads it again."""
        if self._load is not None:
            self._model = None
            give_back()

    def carrying(self, graph: ir.Model, sources: Mapping[str, WeightSource]) -> PreTrainedModel:
        """A model whose weights are the dequantized ones of ``graph``."""
        model = self.floats()
        if self._load is not None:
            self._model = None
        else:
            model = share_weights(model)
            copy_experts(model, sources)
        load_dequantized(model, graph, sources)
        return model


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """What is quantized. ``graph`` gives the float graph, anew at every call where ``again`` says that it may be called again. ``inputs``:
    what the weights are chosen on. The passages that the base's likelihood is measured on are none of it, so that it is no flattery."""

    graph: Callable[[], ir.Model]
    model: EagerModel
    sources: Mapping[str, WeightSource]
    inputs: Mapping[str, Inputs]
    steerers: Mapping[str, Steerer]
    fp32: Mapping[str, Mapping[str, np.ndarray]]
    """By name, as ``fp32_answers`` gives it."""
    again: bool = True
    turns: bool = False
    """Whether ``graph`` reads its weights from disk: then the model is put away while they are quantized, as both are as large."""
    ranges: Ranges | None = None
    mixed: MixedPrecision | None = None
    """Asked for by the user, whatever the adapters keep."""
    large_table: bool = False
    """As ``outweighed_by_table`` says; ``graph`` may then be called again."""
    given: Given = field(default_factory=Given)
    blocks: WeightBlocks = field(default_factory=WeightBlocks)
    """Of every attempt: what one has made, the next one knows."""
    seen: Mapping[str, Squares] = field(default_factory=dict)
    """Of ``inputs``, as ``input_importance`` takes it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The quantized ``graph``, and the eager ``model`` that carries its weights; ``said``: what that says, by adapter. ``tried``: what was
    measured where the plain way was not enough. ``note``: what was chosen, in words."""

    graph: ir.Model
    quantized: QuantizedGraph
    settings: QuantizationSettings
    model: PreTrainedModel
    said: Mapping[str, Mapping[str, np.ndarray]]
    tried: tuple[Attempt, ...] = ()
    note: str = ""


def choose_weights(of: Material, settings: QuantizationSettings, gate: QualityGate, report: Report) -> Chosen:
    """The weights that ``_enough`` chooses, and the KV cache that ``settings`` ask for."""
    importance = None
    if settings.method == "imatrix":
        report("weighing the inputs of the weights")
        searched = {name: source for name, source in of.sources.items() if name not in of.given.blocks}
        importance = input_importance(of.model.floats(), searched, of.inputs, of.steerers, of.seen)
    of = replace(of, blocks=WeightBlocks(importance, of.given.blocks))
    chosen = _enough(of, settings, gate, report)
    if kept := of.given.described(len(chosen.quantized.given), len(chosen.quantized.errors)):
        told = f"{kept}: taken over, not quantized again"
        chosen = replace(chosen, quantized=replace(chosen.quantized, origin=kept), note="; ".join(filter(None, (told, chosen.note))))
    if rounded := sorted(of.blocks.rounded):
        more = f" and {len(rounded) - 1} more weights are" if len(rounded) > 1 else " is"
        told = f"{rounded[0]}{more} rounded by rtn: no golden row reached what they multiply"
        chosen = replace(chosen, note="; ".join(filter(None, (chosen.note, told))))
    if settings.cache != "float":
        report("measuring the KV cache's scales")
        quantize_cache(chosen.graph, chosen.model, of.inputs, of.steerers)
    return chosen


def _enough(of: Material, settings: QuantizationSettings, gate: QualityGate, report: Report) -> Chosen:
    """Quantizes by ``settings``; where that leaves an adapter less than ``gate`` aims at, and the weights are of int4 without any choice
    of the user's, again with the most sensitive ones in int8. An embedding that takes most of the bytes is tried in int4 first, with int8
    for the others."""
    note = ""
    if of.large_table and of.mixed is None and may_be_mixed(settings):
        small, told = _with_int8(of, replace(settings, embeddings=4), MixedPrecision(), report)
        chosen, attempt = _attempt(of, small, "the embedding in int4", report)
        if min(attempt.retention.values(), default=1.0) >= gate.aim:
            return replace(chosen, note=f"the embedding takes most of the bytes, and is in int4: {told}")
        del chosen
    if of.mixed is not None:
        settings, note = _with_int8(of, settings, of.mixed, report)
    chosen, plain = _attempt(of, settings, f"int{settings.bits}", report)
    lowest = min(plain.retention.values(), default=1.0)
    if lowest >= gate.aim or gate.accept_loss or not of.again or not may_be_mixed(settings):
        return replace(chosen, note=note)
    started = time.monotonic()
    del chosen
    better, note = _with_int8(of, settings, MixedPrecision(), report)
    made, attempt = _attempt(of, better, how := f"{len(better.int8)} weights in int8", report)
    attempt = replace(attempt, added=attempt.added - plain.added, seconds=time.monotonic() - started)
    tried = (replace(plain, added=0), attempt)
    if attempt.lowest < gate.min_retention:  # should a refit not mend it either, this is what the message can promise
        del made
        whole = settings_for("weight-only", bits=8, keep_high=settings.keep_high, lm_head=settings.lm_head, embeddings=settings.embeddings)
        _, all_int8 = _attempt(of, whole, "-p int8", report)
        tried = (*tried, replace(all_int8, added=all_int8.added - plain.added))
        made, _ = _attempt(of, better, how, report)
    return replace(made, tried=tried, note=f"int4 keeps {lowest:.2f} of an adapter, {how} {attempt.lowest:.2f}: {note}")


def may_be_mixed(settings: QuantizationSettings) -> bool:
    return settings.scheme == "weight-only" and settings.bits == 4 and not settings.int8 and settings.method != "hqq"


def measurable(fp32: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    """Whether a decoder's adapter was recorded on probes, so that what it keeps can be measured."""
    return any("fp32_log_probabilities" in arrays for name, arrays in fp32.items() if name != BASE_GOLDEN)


def _with_int8(of: Material, settings: QuantizationSettings, asked: MixedPrecision, report: Report) -> tuple[QuantizationSettings, str]:
    report("measuring what each weight costs in int4")
    rows = rows_of({name: each.arrays for name, each in of.inputs.items()}, of.steerers)
    return mixed(of.model.floats(), of.graph(), of.sources, settings, rows, of.blocks, asked)


def _attempt(of: Material, settings: QuantizationSettings, how: str, report: Report) -> tuple[Chosen, Attempt]:
    """(the graph and the model that carries its weights, what the adapters keep; ``added`` is all bytes of the quantized weights)"""
    report(f"quantizing weights to {'E4M3' if settings.scheme == 'fp8' else f'int{settings.bits}'}")
    graph = of.graph()
    if of.turns:
        of.model.put_away()
    quantized = quantize_graph(
        graph, settings, of.ranges, float_inputs=expert_matrices(of.sources), parameters=of.sources, blocks=of.blocks
    )
    give_back()
    model = of.model.carrying(graph, of.sources)
    retention, said = eager_retention(model, of)
    chosen = Chosen(graph=graph, quantized=quantized, settings=settings, model=model, said=said)
    return chosen, Attempt(how=how, retention=retention, added=sum(each.bytes_after for each in quantized.errors))


def eager_retention(model: PreTrainedModel, of: Material) -> tuple[dict[str, float], dict[str, dict[str, np.ndarray]]]:
    """By adapter what it keeps under ``model``, and what ``model`` says with it; those that cannot be measured are not there."""
    found, said = {}, {}
    for name, steerer in of.steerers.items():
        arrays = {key.removeprefix("fp32_"): value for key, value in of.fp32.get(name, {}).items()}
        if (before := recorded(name, arrays)) is None:
            continue
        said[name] = of.inputs[name].said(model, steerer)
        if (share := quality(name, said[name]["log_probabilities"], before).retention) is not None:
            found[name] = share
    return found, said

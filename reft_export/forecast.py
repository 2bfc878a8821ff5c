"""What a run will need, before it starts: counted by the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.settings import QuantizationSettings
from reft_export.base.checkpoint import LAYER_KEYS, WIDTH_KEYS, open_checkpoint
from reft_export.base.hub import HUB_ID
from reft_export.base.origin import described
from reft_export.base.packed.blocks import packed_blocks
from reft_export.base.stored import stored_tensors, without_tables
from reft_export.base.token_rules import stated_context
from reft_export.console import size
from reft_export.exporting.plan import ExportPlan, count_parameters
from reft_export.exporting.settings import ExportSettings
from reft_export.tasks.generation import BATCH_BYTES, BATCH_ROWS, COMPLETION
from reft_export.tasks.task import TASKS
from runtimes.artifacts.bundle import Bundle
from runtimes.edits.adapter import Adapter
from runtimes.errors import InputError

if TYPE_CHECKING:  # an export is forecast without torch
    from reft_export.base.load import Base
    from reft_export.contrasting.steer import SteerPlan
    from reft_export.training.preparation import Preparation

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0 + 4 / 64, "int4": 0.5 + 4 / 32}
"""Bytes a linear weight takes in the bundle; int8 with a float32 scale for 64 weights, int4 with one for 32."""

EXPORTERS = {
    "dynamo": "torch.onnx.export(dynamo=True)",
    "builder": "onnxruntime-genai's model builder",
    "optimum": "optimum-onnx",
    "transformers": "transformers.exporters",
}
HEAD_KEYS = ("num_attention_heads", "n_head")
LIBRARIES = 0.9e9
"""Memory of torch, transformers and onnxruntime themselves, as measured on a tiny model."""
TRAINING_LIBRARIES = 0.55e9
"""Of torch and transformers, with what loading leaves behind."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """``steps``: what would be done, in order. Sizes in bytes; estimates, not promises."""

    steps: tuple[str, ...]
    parameters: int
    memory: float
    disk: float
    token: int | None = None
    """Of a decoder: the KV cache of one row's token. None where its config leaves that to its family."""
    context: int | None = None
    """Tokens that a row can have at most."""
    seconds: float | None = None
    """Of the steps of a training on this machine, as busy as it is now."""


def _cache(settings: ExportSettings) -> str:
    """How the KV cache grows, as far as the settings tell: whether an attention is the fused operator's, only the model shows."""
    if settings.exporter == "builder":
        return ", KV cache written in place"
    if settings.target == "tensorrt" or settings.exporter != "dynamo" or settings.precision == "bf16":
        return ", KV cache copied at every step"
    return ", KV cache written in place where the family's attention allows it"


def forecast_export(plan: ExportPlan, settings: ExportSettings) -> Forecast:
    """A float32 base in memory, its graph on disk; float weights are copied one at a time. Of a quantized one a second model, which carries
    the quantized weights. A decoder's logits of one forward, and a copy."""
    linear, other = plan.parameters
    task = TASKS[plan.checkpoint.task]
    total = linear + other
    weight_only = settings.weight_only
    quantized = weight_only is not None
    table = _table(plan) if weight_only is not None and weight_only.embedding_bits else 0
    disk = linear * BYTES[settings.precision] + (other - table) * BYTES[settings.float_type] + table * BYTES["int8"]
    opset = "" if settings.exporter == "builder" else f", opset {settings.opset}"
    cache = _cache(settings) if task.decodes else ""
    rounded = 4.0 * total if settings.float_type != "fp32" else 0.0
    # Other projects' exporters load the model in a process of their own, and their graph lies on the disk until the bundle is finished.
    copy = 0.0 if settings.exporter in ("dynamo", "transformers") else BYTES[settings.float_type] * total
    return Forecast(
        steps=(
            f"load {described(plan.source)} in float32 and record eager {task.recorded}, base and {len(plan.adapters)} adapters",
            f"export with {EXPORTERS[settings.exporter]}{opset}, {task.logits_shape(settings.logits)}{cache}",
            "fold the edits",
            *((_quantizing(plan, weight_only),) if weight_only is not None else ()),
            "write the bundle and hold it against the eager model",
        ),
        parameters=total,
        memory=LIBRARIES + 4.0 * total + (4.0 * total + disk if quantized else 0.1 * total) + rounded + copy + _logits(plan),
        disk=disk + copy,
        token=cache_token(plan.checkpoint.config, 1 if settings.cache == "int8" else BYTES[settings.float_type]) if task.decodes else None,
        context=stated_context(_decoder(plan.checkpoint.config)) if task.decodes else None,
    )


def _quantizing(plan: ExportPlan, settings: QuantizationSettings) -> str:
    packed = packed_blocks(plan.checkpoint.folder) if settings.keep_given else None
    kept = "" if packed is None else f"keep the integers of {len(packed.formats)} weights of {packed.label}, and "
    return f"{kept}quantize {'the other ' if kept else ''}weights to int{settings.bits}, blocks of {settings.block_size}"


def _logits(plan: ExportPlan) -> float:
    """Of the completions in one forward, twice."""
    rows = _decoder(plan.checkpoint.config).get("vocab_size")
    if type(rows) is not int or not TASKS[plan.checkpoint.task].decodes:
        return 0.0
    return 2.0 * min(BATCH_BYTES, BATCH_ROWS * COMPLETION * 4 * rows)


def _table(plan: ExportPlan) -> int:
    """Values of the token embedding, as far as the config tells."""
    config = _decoder(plan.checkpoint.config)
    rows, width = config.get("vocab_size"), plan.checkpoint.width
    return min(rows * width, plan.parameters[1]) if type(rows) is int and width is not None else 0


def cache_token(config: Mapping[str, Any], value: float) -> int | None:
    """2 x layers x KV heads x head width x ``value`` bytes: of one row's token. A head's width is by default width / heads."""
    stated = _decoder(config)
    heads = next((stated[key] for key in HEAD_KEYS if type(stated.get(key)) is int), None)
    layers, width = (next((stated[key] for key in keys if type(stated.get(key)) is int), None) for keys in (LAYER_KEYS, WIDTH_KEYS))
    if heads is None or layers is None or width is None:
        return None
    dim = stated.get("head_dim")
    return int(2 * layers * (stated.get("num_key_value_heads") or heads) * (dim or width // heads) * value)


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")  # a multimodal model's decoder
    return text if isinstance(text, dict) else config


def forecast_training(model: str, ready: Preparation) -> Forecast:
    """A frozen base, what autograd keeps of the longest batch, the store of unedited tokens, and the optimizer."""
    from reft_export.training.footprint import OVERHEAD, footprint, matmul_rate, steps_of

    base, settings, rows = ready.base, ready.settings, ready.examples.training
    total = sum(count_parameters((name, tuple(parameter.shape)) for name, parameter in base.model.named_parameters()))
    _, device = settings.placement()
    reference = ready.objective.reference_rows(ready.examples)
    computed = ready.objective.rows(ready.examples)
    sized = replace(settings, batch_size=settings.batch_size * len(computed.training) // len(rows))
    needed = footprint(base.model, ready.interventions, ready.rule, computed, sized, reference)
    plan = needed.plan
    apart: tuple[str, ...] = ()
    if plan is not None and plan.splits:
        how = f"once, kept in {size(needed.cache)}" if plan.kept else "in every step"
        apart = (f"compute the {plan.prefix} of {plan.tokens} tokens before the first edited ones without a graph, {how}",)
    if needed.layers:
        below = "layer" if needed.kept_layers == 1 else f"{needed.kept_layers} layers"
        apart += (f"compute the {below} below the first edit once, what comes out kept in {size(needed.layers)}",)
    answers: tuple[str, ...] = ()
    if ready.unanswered:
        answers = (
            f"answer {len(ready.unanswered)} prompts with the system prompt, at most {settings.max_new_tokens} tokens each, which the "
            "figures below leave out",
        )
    steps = steps_of(rows, settings)
    return Forecast(
        steps=(
            f"load {described(model)} in {base.dtype} on {device}, frozen",
            *answers,
            *apart,
            *(("compute what the base says without the edits",) if reference else ()),
            f"train {settings.described()}, positions {'; '.join(settings.all_positions)}, {len(rows)} examples, {steps} steps",
            "write the adapter",
        ),
        parameters=total,
        memory=TRAINING_LIBRARIES + total * base.model.dtype.itemsize + needed.memory,
        disk=1e6,
        seconds=OVERHEAD * 2 * needed.work / matmul_rate(base.model) if device == "cpu" else None,
    )


def forecast_steering(model: str, base: Base, plan: SteerPlan) -> Forecast:
    """The base as it is, and of every line a vector a site."""
    total = sum(count_parameters((name, tuple(parameter.shape)) for name, parameter in base.model.named_parameters()))
    settings, contrast = plan.settings, plan.contrast
    vectors = 4.0 * len(contrast.both) * len(plan.candidates) * base.info.hidden_size
    what = "add the difference of the means" if settings.method == "add" else "take its direction out"
    return Forecast(
        steps=(
            f"load {described(model)} in {base.dtype}",
            f"read {plan.read} of {len(contrast.positive)} positive and {len(contrast.negative)} negative lines at "
            f"{len(plan.candidates)} sites",
            f"{what} at positions {settings.rule}, and try strengths",
            "write the adapter",
        ),
        parameters=total,
        memory=LIBRARIES + 1.25 * total * (4.0 if base.dtype == "float32" else 2.0) + vectors,
        disk=1e6,
    )


def refuse_download(model: str) -> None:
    """Raises InputError for a base that a run would download first: a dry run does nothing."""
    if not Path(model).exists() and HUB_ID.fullmatch(model):
        raise InputError(f"--dry-run reads a local folder, and {model} is none; download the model first, or run without --dry-run")


def forecast_addition(bundle: Bundle, adapters: Mapping[str, Adapter], model: str | None) -> Forecast:
    """``parameters``: of the adapters. Without the base the graph alone is in memory; with it, first the float32 model and the graph."""
    size, names = _size(bundle), ", ".join(adapters)
    parameters, memory = sum(tensor.size for each in adapters.values() for tensor in each.stored().values()), size
    checks: tuple[str, ...] = ("take the first steps; mark the adapters as not held",)
    if model is not None:
        refuse_download(model)
        base = sum(math.prod(tensor.shape) for tensor in without_tables(stored_tensors(open_checkpoint(model).folder)).values())
        memory = LIBRARIES + 4.0 * base + size
        checks = (
            f"load {described(model)} in float32 and record eager {TASKS[bundle.manifest.task].recorded} with the bundle's weights",
            "hold the bundle against the eager model",
        )
    steps = (f"copy {bundle.folder}", f"write {names}", *checks, "put the new folder in place in one step")
    return Forecast(steps=steps, parameters=parameters, memory=memory, disk=size + 4.0 * parameters)


def forecast_removal(bundle: Bundle, names: Sequence[str]) -> Forecast:
    left = [name for name in bundle.adapter_names if name not in names]
    steps = (
        f"copy {bundle.folder} without {', '.join(names)}, to {', '.join(left) or 'its base alone'}",
        "put the new folder in place in one step",
    )
    return Forecast(steps=steps, parameters=0, memory=0.0, disk=_size(bundle))


def _size(bundle: Bundle) -> float:
    return float(sum(record.size for record in bundle.manifest.files.values()))

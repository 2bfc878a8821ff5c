"""An export that is checked before any work, and what of that needs no torch: most refusals, and most dry runs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_export.base.adapters import check_fit_to_files, check_layers, folders_of, load_adapters, union_nodes
from reft_export.base.checkpoint import Checkpoint, open_checkpoint
from reft_export.base.config import stated_alike
from reft_export.base.packed.blocks import check_given
from reft_export.base.stored import Tensor, stored_tensors, without_tables
from reft_export.base.tokenizer import has_tokenizer, is_plain_tokenizer
from reft_export.exporting.installed import check_exporter
from reft_export.exporting.settings import ExportSettings
from reft_export.tasks.task import TASKS
from runtimes.edits.adapter import Adapter
from runtimes.errors import InputError
from runtimes.files.folders import check_destination

KEYS_AND_VALUES = (
    "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Decoders all of whose layers keep keys and values, which a graph's cache is made of; of others only the model shows it."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """``parameters``: (values in matrices that become MatMul weights, all others)."""

    source: str
    """What the base was given as; the name of one in memory."""
    checkpoint: Checkpoint
    adapters: Mapping[str, Adapter]
    parameters: tuple[int, int]
    settled: bool
    """Whether the base's model would refuse nothing more, as far as the files tell; it costs torch to ask it."""


def plan_export(
    model: str | Path,
    adapter_folders: list[Path],
    output: Path,
    settings: ExportSettings,
    *,
    accept_base: bool = False,
    force: bool = False,
    name: str | None = None,
) -> ExportPlan:
    """Every refusal that needs no weights; writes nothing. ``export_bundle`` and its dry run both begin here.

    What the base's files do not settle is left to ``check_model``: a dry run asks it where ``settled`` is false, an export always.
    ``accept_base``: adapters of a base that differs from ``model`` in its config alone will do. ``name``: what the base is called.
    """
    check_destination(output, force=force, inputs=[Path(model), *folders_of(adapter_folders)])
    # By config.json alone: who asks for an exporter that a classifier has no use for is not to install it first.
    checkpoint = _checkpoint(model, settings, name) if Path(model).is_dir() else None
    check_exporter(settings.exporter)
    weight_only = settings.weight_only  # refuses a block size or an accuracy level that is none
    adapters = load_adapters(adapter_folders)
    checkpoint = checkpoint or _checkpoint(model, settings, name)
    if weight_only is not None:
        check_given(checkpoint.folder, weight_only)
    if settings.exporter == "builder" and not has_tokenizer(checkpoint.folder):
        raise InputError(
            f"{checkpoint.folder} has no tokenizer, which the builder reads; put tokenizer.json beside config.json, or use dynamo"
        )
    stored = checkpoint.files[0].suffix == ".safetensors"  # a pickle is read by torch
    tensors = stored_tensors(checkpoint.folder) if stored else {}
    for each, adapter in adapters.items():
        check_fit_to_files(each, adapter, checkpoint, tensors)
    if checkpoint.layers is not None:
        check_layers(union_nodes(list(adapters.values()), settings.sites, layers=0), checkpoint.name, checkpoint.layers)
    settled = bool(tensors) and _is_settled(checkpoint, adapters, tensors)
    return ExportPlan(
        source=name or str(model),
        checkpoint=checkpoint,
        adapters=adapters,
        parameters=_parameters(checkpoint, tensors),
        settled=settled,
    )


def _checkpoint(model: str | Path, settings: ExportSettings, name: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(model, name=name)
    TASKS[checkpoint.task].check_settings(checkpoint.name, exporter=settings.exporter, logits=settings.logits)
    return checkpoint


def _is_settled(checkpoint: Checkpoint, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> bool:
    """Whether config.json, the tokenizer and the adapters leave nothing to ask of transformers but whether a known family can be built."""
    config = checkpoint.config
    decodes = TASKS[checkpoint.task].decodes
    known = not decodes or (config["model_type"] in KEYS_AND_VALUES and None not in (checkpoint.layers, checkpoint.width))
    newer = config.get("rope_parameters") and int(importlib.metadata.version("transformers").partition(".")[0]) < 5
    tables = {tensor.digest for tensor in _tables(config, tensors).values()}
    two_heads = len(tables) > 1 and config.get("tie_word_embeddings") is not False and decodes
    merged = not any(".lora_" in name for name in tensors)
    return (
        known
        and not newer
        and not two_heads
        and merged
        and is_plain_tokenizer(checkpoint.folder)
        and all(_fits(adapter, checkpoint) for adapter in adapters.values())
    )


def _fits(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    """Whether the base that is recorded is this one as far as config.json states it; its tensors were compared before."""
    return adapter.base.parts is not None and not adapter.head and stated_alike(adapter.base.parts.config, checkpoint.config)


def _tables(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedding, and the output head where one is stored: matrices with a row for every token."""
    return {name: t for name, t in tensors.items() if len(t.shape) == 2 and t.shape[0] == config.get("vocab_size")}


def _parameters(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """By the headers of the weight files; a head that is stored beside the equal embedding is one parameter with it."""
    stored = without_tables(tensors)
    tables = _tables(checkpoint.config, stored)
    embedding = next((name for name in tables if is_embedding(name)), "")
    tied = {name for name in tables if name != embedding and embedding and tables[name] == tables[embedding]}
    return count_parameters((name, tensor.shape) for name, tensor in stored.items() if name not in tied)


def count_parameters(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int]:
    """(values in matrices that become MatMul weights, stacked ones of experts too, all others)."""
    linear = other = 0
    for name, shape in shapes:
        count = 1
        for size in shape:
            count *= size
        if len(shape) in (2, 3) and not is_embedding(name):
            linear += count
        else:
            other += count
    return linear, other


def is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))

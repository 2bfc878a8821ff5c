"""From a folded graph to a bundle folder: files, adapters and the manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import dtype_of, name_of
from graph_passes.head import head_defaults
from graph_passes.slots.add import rule_names, rules_of, slot_mode
from reft_export.bundling.genai import keep_genai_config, write_genai_config
from reft_export.bundling.tokenizer_files import without_indentation, write_as_read
from reft_export.tasks.task import TASKS
from runtimes.artifacts.adapter_record import AdapterRecord, write_adapter_record
from runtimes.artifacts.bundle import bank_file
from runtimes.artifacts.listed_files import TEMPLATE_FOLDER, TOKENIZER_FILES
from runtimes.artifacts.manifest import Manifest, ModelRecord, NodeRecord, Quantization, TensorRecord, WeightSource, write_manifest
from runtimes.artifacts.ort_adapter_file import write_onnx_adapter
from runtimes.artifacts.values import Embeddings, Exporter, KvCache, Logits, Padding, Precision, TaskName, known
from runtimes.edits.adapter import Adapter
from runtimes.edits.op import FIRST_SLOT, EditNode
from runtimes.edits.positions import needs_slots
from runtimes.errors import AdapterError, GraphError
from runtimes.parity.figures import budget_for
from runtimes.precision import NUMPY_DTYPES
from runtimes.text.tokenizer import TOKENIZER_FILE
from runtimes.version import VERSION

if TYPE_CHECKING:  # fold runs without torch, whose import takes longer than the fold
    from transformers import PreTrainedTokenizerBase

    from reft_export.base.load import Base

Report = Callable[[str], None]
"""Told what is being done; the CLI shows it."""


@dataclass(frozen=True, kw_only=True)
class BundleParts:
    """What ``write_bundle_files`` needs besides the graph."""

    model: ModelRecord
    task: str
    precision: str
    quantization: Quantization | None
    exporter: str
    logits: str
    nodes: tuple[EditNode, ...]
    adapters: tuple[str, ...]
    weights: Mapping[str, WeightSource]
    embeddings: str | None = None
    """Whether the token embedding and the head are stored once: shared, separate, or None where the graph does not show both."""
    genai_config: Mapping[str, Any] = field(default_factory=dict)
    """The graph's own genai_config.json, which is kept; empty where it has none."""
    labels: tuple[str, ...] = ()
    """A classifier's; a decoder has none."""
    head: Mapping[str, WeightSource] = field(default_factory=dict)
    """A classifier's overridable initializers and the parameters that they hold."""


def write_adapter(
    folder: Path,
    name: str,
    adapter: Adapter,
    nodes: tuple[EditNode, ...],
    *,
    precision: str,
    rules: Collection[str],
    head: Mapping[str, np.ndarray] | None = None,
) -> None:
    """The adapter's file (``bank_file``) with every bank and every number of the rule that the graph takes (``rules``); and its record.

    ``head``: of a classifier, what ``head_tensors`` gives for the adapter.
    """
    if rules and FIRST_SLOT not in rules and needs_slots(adapter.where):
        raise AdapterError(f"adapter {name} edits at {adapter.where}, which takes a graph of version 2; export the bundle again")
    write_adapter_record(folder, name, AdapterRecord.of(adapter))
    tensors = adapter.banks(nodes, NUMPY_DTYPES[precision])
    tensors |= {name: number for name, number in adapter.rule_tensors().items() if name in rules}
    tensors |= head or {}
    write_onnx_adapter(folder / bank_file(name, adapter.where), tensors)


def head_tensors(adapter: Adapter, sources: Mapping[str, WeightSource], defaults: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The head's initializers with an adapter's values, as the graph multiplies by them; the ``defaults`` where it has no head."""
    if not adapter.head:
        return dict(defaults)
    tensors = {}
    for name, source in sources.items():
        value = adapter.head[source.parameter]
        tensors[name] = np.ascontiguousarray((value.T if source.transpose else value).astype(defaults[name].dtype))
    return tensors


def copy_tokenizer(source: Path | None, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """The base's own files where it has a fast tokenizer, else the fast one that transformers converts to; tokenizer.json on one line.

    Where transformers reads the files otherwise than a device does, which takes them at their word, what transformers made of them is
    written: adapters were trained on its tokens.
    """
    if source is not None:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / TEMPLATE_FOLDER).is_dir():
            shutil.copytree(source / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
    if tokenizer is not None and not (folder / "tokenizer.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder) as converted:
            tokenizer.save_pretrained(converted)
            for name in TOKENIZER_FILES:
                if (Path(converted) / name).is_file():
                    shutil.copyfile(Path(converted) / name, folder / name)
    if tokenizer is not None:
        from transformers import PreTrainedTokenizerFast

        if isinstance(tokenizer, PreTrainedTokenizerFast):
            write_as_read(folder, tokenizer)
    if (file := folder / TOKENIZER_FILE).is_file():
        file.write_bytes(without_indentation(file.read_bytes()))


def stored_how(graph: ir.Graph, *, tied: bool) -> str | None:
    """The manifest's word for embedding and head; None of a graph without both."""
    if tied:
        return "shared"
    logits = any(value.name == "logits" for value in graph.outputs)
    return "separate" if logits and any(value.name == "input_ids" for value in graph.inputs) else None


def write_bundle(folder: Path, graph: ir.Model, parts: BundleParts, adapters: Mapping[str, Adapter], base: Base) -> Manifest:
    """Everything beside the graph and its golden arrays, which lie in ``folder`` already: adapters, tokenizer, records."""
    defaults, rules = head_defaults(graph, parts.head), rule_names(graph.graph)
    for name, adapter in adapters.items():
        head = head_tensors(adapter, parts.head, defaults)
        write_adapter(folder, name, adapter, parts.nodes, precision=parts.precision, rules=rules, head=head)
    copy_tokenizer(base.folder, base.tokenizer, folder)
    return finish_bundle(folder, graph, parts)


def finish_bundle(folder: Path, graph: ir.Model, parts: BundleParts) -> Manifest:
    """Writes genai_config.json and manifest.json over the files that already lie in ``folder``."""
    manifest = Manifest(
        created_by=f"reft-export {VERSION}",
        model=parts.model,
        precision=known(Precision, parts.precision, "precision"),
        quantization=parts.quantization,
        exporter=known(Exporter, parts.exporter, "exporter"),
        opset=graph.opset_imports[""],
        ir_version=graph.ir_version,
        logits=known(Logits, parts.logits, "logits"),
        slots=slot_mode(graph.graph),
        rules=rules_of(graph.graph),
        inputs=tuple(_tensor(v) for v in graph.graph.inputs if not v.is_initializer()),
        outputs=tuple(_tensor(v) for v in graph.graph.outputs),
        nodes=tuple(map(NodeRecord.of, parts.nodes)),
        adapters=parts.adapters,
        parity_budget={},
        weights=dict(parts.weights),
        genai=_genai(folder, graph, parts),
        padding=known(Padding, TASKS[parts.task].padding(graph.graph), "padding"),
        kv_cache=known(KvCache, TASKS[parts.task].kv_cache(graph.graph), "kv_cache"),
        embeddings=None if parts.embeddings is None else known(Embeddings, parts.embeddings, "embeddings"),
        task=known(TaskName, parts.task, "task"),
        labels=parts.labels,
        head=dict(parts.head),
    )
    manifest = replace(manifest, parity_budget=budget_for(manifest).stated)
    write_manifest(folder, manifest)
    return manifest


def _genai(folder: Path, graph: ir.Model, parts: BundleParts) -> str:
    if no_genai := TASKS[parts.task].no_genai:
        return no_genai
    if parts.genai_config:
        return keep_genai_config(folder, parts.genai_config, parts.model, slots=slot_mode(graph.graph))
    return write_genai_config(folder, graph, parts.model, slots=slot_mode(graph.graph), logits=parts.logits)


def _tensor(value: ir.Value) -> TensorRecord:
    if value.shape is None:
        raise GraphError(f"the graph does not declare the shape of {value.name}; run onnx.shape_inference over it first")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorRecord(name=name_of(value), dtype=dtype_of(value).name.lower(), shape=shape)

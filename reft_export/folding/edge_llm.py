"""``reft-export fold`` on a folder that TensorRT-Edge-LLM exported: the same folder with edits folded into its graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from graph_passes.edge_llm.fold import fold_edge_llm_graph
from graph_passes.edge_llm.lora import lora_tensors
from graph_passes.external import load_graph
from graph_passes.find.edge_llm import ATTENTION, read_edge_llm_contract
from graph_passes.find.sites import locate_sites
from graph_passes.find.streams import stream_types
from graph_passes.insert import refuse_folded
from reft_export.base.adapters import union_nodes
from reft_export.bundling.files import VERSION, Report
from reft_export.folding.family import check_family, check_same_family
from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.edits.adapter import Adapter
from runtimes.edits.methods import METHODS
from runtimes.edits.op import OP_VERSION, EditNode
from runtimes.edits.positions import needs_slots
from runtimes.errors import AdapterError, GraphError, InputError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.files.hashes import sha256_of
from runtimes.files.records import read_json_object

RECORD_FILE = "reft.json"
"""What was folded. The engine builder copies the files that it knows by name, and leaves this one where it is."""
GRAPH, LORA_GRAPH = "model.onnx", "lora_model.onnx"
"""The engine builder reads the second in place of the first where it is asked for LoRA (--maxLoraRank)."""
ADAPTER_FOLDER = "reft_adapters"
LIBRARY = "libreft_trt_edgellm.so"


@dataclass(frozen=True, kw_only=True)
class EdgeLLMFoldResult:
    """``found``: for every site, the tensor that carries its stream and how it was found. ``build``: the commands that follow."""

    adapters: tuple[str, ...]
    nodes: tuple[EditNode, ...]
    found: dict[str, str]
    layout: str
    build: tuple[str, ...]
    notes: tuple[str, ...]


def fold_edge_llm_folder(
    source: Path, adapters: Mapping[str, Adapter], output: Path, *, as_lora: bool, force: bool, report: Report
) -> EdgeLLMFoldResult:
    """Copies the folder of the graph ``source`` to ``output`` with edits in its graphs; every other file byte for byte.

    One adapter becomes constants of every graph in the folder. ``as_lora``: several that share their positions become LoRA weight
    files that the runtime switches by name; lora_model.onnx carries their inputs, and model.onnx stays the base.

    Raises AdapterError where an adapter does not fit, InputError for their number and for a folder that is not whole, GraphError and
    its kin where a graph cannot be folded. Nothing is written then.
    """
    folder = source.parent
    _check_call(source, adapters, output, as_lora=as_lora, force=force)
    config = _config(folder)
    check_same_family(adapters)
    check_family(adapters, source)
    present = [name for name in (GRAPH, LORA_GRAPH) if (folder / name).is_file()]
    # An edited LoRA graph starts from the one that has LoRA inputs already, where there is one.
    read_from = {LORA_GRAPH: present[-1]} if as_lora else {name: name for name in present}
    models = {name: load_graph(folder / read) for name, read in read_from.items()}
    nodes = union_nodes(list(adapters.values()), (), 0)
    folded = [
        _fold(model, folder / name, folder / read_from[name], adapters, nodes, config, report, as_lora=as_lora)
        for name, model in models.items()
    ]
    banks = folded[-1].banks
    report(f"copying {folder}")
    with atomic_folder(output, force=force) as work:
        _copy_all_but(folder, work, set(models))
        for name, model in models.items():
            # Weights stay references into the data files that were just copied.
            ir.save(model, work / name)
            load_graph(work / name)  # reads back whole: no runtime here takes a step of it
        if as_lora:
            (work / ADAPTER_FOLDER).mkdir()
            for name, arrays in banks.items():
                save_file(lora_tensors(nodes, arrays, slots=_slots(adapters)), work / ADAPTER_FOLDER / f"{name}.safetensors")
        origins = {name: sha256_of(folder / read) for name, read in read_from.items()}
        record = _record(adapters, config, origins, as_lora=as_lora)
        (work / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return EdgeLLMFoldResult(
        adapters=tuple(adapters),
        nodes=nodes,
        found=folded[-1].found,
        layout=folded[-1].layout,
        build=_commands(output, _lora_rank(banks) if as_lora else 0, has_lora=LORA_GRAPH in models),
        notes=_notes(adapters, output, as_lora=as_lora),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Folded:
    """What a graph shows; every graph of a folder shows the same."""

    found: dict[str, str]
    layout: str
    banks: dict[str, dict[str, np.ndarray]]
    """Of every adapter, in the float type of the graph's streams."""


def _fold(
    model: ir.Model,
    path: Path,
    read_from: Path,
    adapters: Mapping[str, Adapter],
    nodes: tuple[EditNode, ...],
    config: Mapping[str, Any],
    report: Report,
    *,
    as_lora: bool,
) -> _Folded:
    """Edits into one graph, in place, once every adapter is seen to fit it; messages call it ``path``, or what it was ``read_from``."""
    refuse_folded(model)
    layers = _check_layers(model, config, read_from)
    for name, adapter in adapters.items():
        _check_fit(name, adapter, layers, config, path.parent)
    located = locate_sites(model, {node.site for node in nodes})
    types = stream_types(located)
    first_name, first = next(iter(adapters.items()))
    _check_width(first, first_name, {kind.width for kind in types.values()}, read_from)
    kinds = {kind.dtype for kind in types.values()}
    if len(kinds) != 1:
        raise GraphError(f"{path}: the edited streams are of several types, {sorted(kind.name for kind in kinds)}")
    found = {str(site): f"{where.value.name}, {where.how}" for site, where in sorted(located.items())}
    layout = read_edge_llm_contract(model.graph).layout
    dtype = kinds.pop().numpy()
    banks = {name: adapter.banks(nodes, dtype) for name, adapter in adapters.items()}
    report(f"folding {len(nodes)} edit nodes into {path.name}")
    constants = first.rule_tensors() if as_lora else first.rule_tensors() | banks[first_name]
    fold_edge_llm_graph(model, nodes, constants, lora_slots=_slots(adapters) if as_lora else 0)
    return _Folded(found=found, layout=layout, banks=banks)


def _slots(adapters: Mapping[str, Adapter]) -> int:
    """All adapters of a fold share their positions, and so their slots."""
    return len(next(iter(adapters.values())).groups)


def _lora_rank(banks: Mapping[str, Mapping[str, np.ndarray]]) -> int:
    return max(2, *(array.shape[-1] for arrays in banks.values() for key, array in arrays.items() if key.endswith(".b")))


def _check_call(source: Path, adapters: Mapping[str, Adapter], output: Path, *, as_lora: bool, force: bool) -> None:
    folder = source.parent
    if source.name not in (GRAPH, LORA_GRAPH):
        raise InputError(f"{source}: TensorRT-Edge-LLM builds {GRAPH} or {LORA_GRAPH}; name the folder that holds them")
    if not adapters or (len(adapters) > 1 and not as_lora):
        raise InputError(
            f"{len(adapters)} adapters for a TensorRT-Edge-LLM folder: one is baked into a folder as constants; run fold once per adapter, "
            "or pass --as-lora for weight files that its runtime switches"
        )
    full_rank = [name for name, a in adapters.items() if any(METHODS[form.method].full_rank for form in a.site_forms.values())]
    if as_lora and full_rank:
        raise AdapterError(
            f"adapter {full_rank[0]} has a scale and bias (RED), which LoRA weights cannot hold; fold it without --as-lora, as constants"
        )
    if explicit := [name for name, adapter in adapters.items() if needs_slots(adapter.where)]:
        raise AdapterError(
            f"adapter {explicit[0]} edits at {adapters[explicit[0]].where}, which no graph computes, and TensorRT-Edge-LLM hands in no "
            "slots; train it at one rule of f<n>, l<n>, prompt or all"
        )
    names = list(map(check_adapter_name, adapters))
    first, *others = adapters.values()
    for name, other in zip(names[1:], others, strict=True):
        if (other.positions, other.tied) != (first.positions, first.tied):
            raise AdapterError(
                f"adapters {names[0]} and {name} have different positions ({first.positions}, {other.positions}, tied "
                f"{first.tied}, {other.tied}), which are constants of the graph; fold them into folders of their own"
            )
    check_destination(output, force=force, inputs=[folder])
    if output.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{output} lies inside {folder}, which is copied whole; choose another output")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: TensorRT-Edge-LLM's builder reads it, and so does fold; pass the folder as it was exported")
    config = read_json_object(path, InputError, "pass the folder as it was exported")
    if (role := config.get("engine_role", "llm")) != "llm":
        raise InputError(f"{path}: engine_role is {role!r}; only plain decoders (llm) can be folded, not speculative or diffusion ones")
    return config


def _check_layers(model: ir.Model, config: Mapping[str, Any], source: Path) -> int:
    layers = len(read_edge_llm_contract(model.graph).presents)
    if (declared := config.get("num_hidden_layers", layers)) != layers:
        raise GraphError(
            f"{source} has {layers} present_key_values outputs, its config.json {declared} layers; layers that share keys or have none "
            "are not supported"
        )
    return layers


def _check_fit(name: str, adapter: Adapter, layers: int, config: Mapping[str, Any], folder: Path) -> None:
    has, needs = (layers, config.get("hidden_size")), (adapter.base.num_hidden_layers, adapter.base.hidden_size)
    if has != needs:
        raise AdapterError(
            f"adapter {name} was trained on {adapter.base.name} ({needs[0]} layers, width {needs[1]}); {folder} has {has[0]} layers, "
            f"width {has[1]}; pass the export of the base it was trained on"
        )


def _check_width(adapter: Adapter, name: str, widths: set[int], source: Path) -> None:
    """config.json may be of another export than the graph beside it. Every adapter of a fold has the width of its first."""
    if widths != {adapter.base.hidden_size}:
        raise AdapterError(
            f"adapter {name} was trained on {adapter.base.name} (width {adapter.base.hidden_size}); the streams that it edits in {source} "
            f"are {', '.join(map(str, sorted(widths)))} wide, whatever config.json beside it says; pass the export of the base it was "
            "trained on"
        )


def _copy_all_but(folder: Path, work: Path, without: set[str]) -> None:
    def leave_out(at: str, names: Sequence[str]) -> set[str]:
        return without.intersection(names) if Path(at) == folder else set()

    # copyfile, as the copy of another user's read-only export must be one that can be replaced.
    shutil.copytree(folder, work, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=leave_out)


def _record(adapters: Mapping[str, Adapter], config: Mapping[str, Any], origins: dict[str, str], *, as_lora: bool) -> dict[str, Any]:
    """Provenance for a reader; ``--force`` sees by it that the folder is ours."""
    return {
        "created_by": f"reft-export {VERSION}",
        "op_version": OP_VERSION,
        "edgellm_version": config.get("edgellm_version", ""),
        "banks": "lora inputs" if as_lora else "constants",
        "adapters": {
            name: {
                "method": adapter.method,
                "rank": adapter.rank,
                "sites": [str(site) for site in adapter.sites],
                "positions": str(adapter.positions),
                "truncate": adapter.positions.truncate,
                "tied": adapter.tied,
                "activation": adapter.activation,
                **({"forms": {str(site): str(form) for site, form in adapter.forms.items()}} if adapter.forms else {}),
                "base": {"name": adapter.base.name, "fingerprint": adapter.base.fingerprint},
            }
            for name, adapter in adapters.items()
        },
        "folded_from": origins,
    }


def _commands(output: Path, rank: int, *, has_lora: bool) -> tuple[str, ...]:
    lora = f" --maxLoraRank {rank}" if rank else " [--maxLoraRank N]" if has_lora else ""
    return (
        f"export EDGELLM_PLUGIN_PATH=/path/to/{LIBRARY}",
        f"llm_build --onnxDir {output} --engineDir ENGINE{lora}",
    )


def _notes(adapters: Mapping[str, Adapter], output: Path, *, as_lora: bool) -> tuple[str, ...]:
    """What is left to the user: requests that name an adapter, and what the graph cannot see of a prompt."""
    notes = [
        f"{LIBRARY} holds TensorRT-Edge-LLM's plugins and ours, as the builder and the runtime load one library; the plugin's cmake line "
        "(`reft-export doctor`) builds it with -DREFT_EDGELLM_PLUGIN=<libNvInfer_edgellm_plugin.so> added"
    ]
    if as_lora:
        files = ", ".join(f'"{name}": "{output / ADAPTER_FOLDER / name}.safetensors"' for name in adapters)
        notes.append(f'requests: "available_lora_weights": {{{files}}}, and "lora_name" in each; without one the base answers')
    notes.append(f"no step of the graph was run here: its {ATTENTION} runs in TensorRT-Edge-LLM's own runtime only")
    positions = next(iter(adapters.values())).positions
    if positions.has_suffix:
        notes.append(
            f"positions {positions} name a prompt's last tokens: leave KV reuse (save_system_prompt_kv_cache, context cache) and chunked "
            "prefill off, since a cached prefix carries the edits at the end of the prompt that it was cached from"
        )
    return tuple(notes)

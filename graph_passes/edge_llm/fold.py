"""Folds edits into a TensorRT-Edge-LLM graph, whose runtime refuses an engine with inputs of ours: as constants, or as LoRA inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graph_passes.accessors import describe, name_of
from graph_passes.edge_llm.lora import use_lora_inputs
from graph_passes.find.edge_llm import block_of, layers_of
from graph_passes.find.sites import SiteLocation, survey_sites
from graph_passes.insert import insert_edits, refuse_folded
from runtimes.edits.edit import Site
from runtimes.edits.op import EditNode
from runtimes.errors import SiteAmbiguous


def fold_edge_llm_graph(model: ir.Model, nodes: Sequence[EditNode], constants: Mapping[str, np.ndarray], *, lora_slots: int = 0) -> None:
    """Inserts ``nodes`` with the rule and the banks in ``constants`` by name, in place; inputs and outputs stay what they were.

    ``lora_slots`` N > 0: the banks are LoRA inputs of N slots each instead (graph_passes/edge_llm/lora.py), behind the graph's own inputs.

    Function bodies take the per-token form, which TensorRT parses where our plugin is not loaded.

    Raises GraphError where the graph breaks the contract, SiteNotFound and SiteAmbiguous for the sites, the latter also where the
    structure and the exporter's scopes name different tensors. A refused model is left as it was.
    """
    refuse_folded(model)
    check_scopes(model)
    insert_edits(model, nodes, per_token=True)
    if lora_slots:
        use_lora_inputs(model.graph, slots=lora_slots)
    for value in [value for value in model.graph.inputs if value.name in constants]:
        array = np.ascontiguousarray(constants[name_of(value)])
        value.const_value = ir.tensor(array, dtype=value.dtype, name=value.name)
        value.shape = ir.Shape(array.shape)
        model.graph.inputs.remove(value)


def check_scopes(model: ir.Model) -> None:
    """Holds every block output against the scopes that the exporter left, where it left any; raises SiteAmbiguous.

    To 0.10 the last Add that stands in the block itself is its output. From 0.11 the blocks' own Adds carry no scope; what reads a
    block's output stands in the next block's norm.
    """
    survey = survey_sites(model)
    last: dict[int, ir.Node] = {}
    for node in model.graph:
        if node.op_type == "Add" and (layer := block_of(node)) is not None:
            last[layer] = node
    for layer in range(survey.layers):
        location = survey.found.get(Site(layer=layer))
        if location is None:
            continue
        if layer in last and last[layer] is not location.node:
            raise SiteAmbiguous(
                f"the output of block {layer} is {describe(location.node)} by the graph's structure and {describe(last[layer])} by the "
                "exporter's scopes; report this family with the graph's inspect output"
            )
        readers = _readers(location)
        if layer not in last and layer + 1 < survey.layers and readers and layer + 1 not in readers:
            raise SiteAmbiguous(
                f"the output of block {layer} is {describe(location.node)} by the graph's structure, but by the exporter's scopes "
                f"layers {sorted(readers)} read it, not {layer + 1}; report this family with the graph's inspect output"
            )


def _readers(location: SiteLocation) -> set[int]:
    return {layer for node in location.value.consumers() for layer in layers_of(node)}

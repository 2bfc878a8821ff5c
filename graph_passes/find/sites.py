"""Finds the residual stream and its branches in a decoder graph by structure alone; names of nodes and weights are not read.

The rule: the values that all of ``logits`` depends on, from ``input_ids`` on, are its dominator chain (Shape edges cut). From
``present.<i>.key``, the nearest of them upstream is what block i reads, so it is also what block i-1 wrote. The last block's output
follows from the shape of the blocks before it. Checked against hooks in eager models of 19 families. A TensorRT-Edge-LLM graph starts
at inputs_embeds, which is what block 0 reads, and its keys are present_key_values_<i>. In an encoder the attention's Softmax stands for
the key (graph_passes/find/encoder.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.accessors import describe
from graph_passes.find.block_ends import Step, check_inner_end, last_block_end
from graph_passes.find.branches import Branch, module_outputs
from graph_passes.find.contract import read_contract
from graph_passes.find.dominators import Dominators
from graph_passes.find.edge_llm import is_edge_llm, read_edge_llm_contract
from graph_passes.find.skip_norms import SKIP_NORM_SUM, SKIP_NORMS, written_sum
from runtimes.edits.edit import Site
from runtimes.errors import GraphError, SiteAmbiguous, SiteNotFound

# Half precision and TorchScript exports put Casts on the stream; they carry the same tensor, so the value before them is the site.
_ALIASES = frozenset({"Cast", "Identity"})
_NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"})
_STREAM_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteLocation:
    """Where one site is in the graph."""

    node: ir.Node
    """The node that computes the stream."""
    output_index: int
    """Which of its outputs carries it."""
    how: str
    """One sentence: how it was found."""

    @property
    def value(self) -> ir.Value:
        """The value that carries the stream. Reading it makes a skip norm that keeps its sum to itself write the sum out."""
        return written_sum(self.node) if self.is_skip_norm else self.node.outputs[self.output_index]

    @property
    def is_skip_norm(self) -> bool:
        """Whether the stream is the sum inside a fused Add + norm, which an edit has to take apart."""
        return self.node.op_type in SKIP_NORMS and self.output_index == SKIP_NORM_SUM


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteSurvey:
    """What a graph shows, and why it does not show the rest."""

    found: Mapping[Site, SiteLocation]
    refused: Mapping[Site, GraphError]
    layers: int


def find_sites(model: ir.Model) -> dict[Site, SiteLocation]:
    """Every site the graph shows: block_input and block_output of each layer; attention_output and mlp_output where they are plain.

    attention_output and mlp_output are what the attention and MLP modules return: before an after-norm (Gemma 2 and 3, OLMo 2,
    GLM 4) and before the residual Add. Where the structure does not tell, the site is left out; ``locate_sites`` says why.

    Raises GraphError where the graph breaks the contract, SiteNotFound and SiteAmbiguous where blocks cannot be told apart.
    """
    return dict(survey_sites(model).found)


def locate_sites(model: ir.Model, wanted: Iterable[Site]) -> dict[Site, SiteLocation]:
    """The wanted sites; raises SiteNotFound or SiteAmbiguous with the candidates for the first that the graph does not show."""
    survey = survey_sites(model)
    located: dict[Site, SiteLocation] = {}
    for site in wanted:
        if site.layer >= survey.layers:
            raise SiteNotFound(
                f"layer {site.layer} does not exist in this graph ({survey.layers} layers by its present.<layer>.key outputs); "
                "use the graph of the base that the adapter was trained on"
            )
        if site in survey.refused:
            raise survey.refused[site]
        located[site] = survey.found[site]
    return located


def survey_sites(model: ir.Model) -> SiteSurvey:
    """``find_sites`` together with the reason for every site that is missing."""
    root, logits, keys = _anchors(model.graph)
    dominators = Dominators(model.graph, root)
    chain = _chain(dominators, logits)
    starts = _block_starts(dominators, chain, keys, starts_at_root=root.dtype in _STREAM_TYPES)
    found: dict[Site, SiteLocation] = {}
    refused: dict[Site, GraphError] = {}

    for layer, start in enumerate(starts):
        site = Site(layer=layer, stream="block_input")
        if chain[start].node is None:
            refused[site] = SiteNotFound(f"{site} is the graph's input {root.name!r}, behind which nothing can be inserted")
            continue
        location = _location(chain[start], f"nearest value upstream of {keys[layer].name} that all of logits depends on")
        found[site] = location
        if layer:
            before = Site(layer=layer - 1, stream="block_output")
            try:
                check_inner_end(dominators, chain, starts, layer - 1)
                found[before] = location
            except SiteAmbiguous as error:
                refused[before] = error

    last = Site(layer=len(starts) - 1, stream="block_output")
    ends: list[int | None] = list(starts[1:])
    try:
        end, how = last_block_end(dominators, chain, starts, keys)
        found[last] = _location(chain[end], how)
        ends.append(end)
    except GraphError as error:
        refused[last] = error
        ends.append(None)

    stream_nodes = frozenset(step.node for step in chain if step.node is not None)
    for layer, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        block = None if stop is None else list(dict.fromkeys(step.computed_by for step in chain[start + 1 : stop + 1]))
        for stream, branch in module_outputs(dominators, block, keys[layer], stream_nodes).items():
            site = Site(layer=layer, stream=stream)
            if isinstance(branch, Branch):
                found[site] = SiteLocation(node=branch.node, output_index=branch.output_index, how=branch.how)
            else:
                refused[site] = SiteNotFound(f"{site} is not a tensor of this graph: {branch}")
    return SiteSurvey(found=found, refused=refused, layers=len(starts))


def _anchors(graph: ir.Graph) -> tuple[ir.Value, ir.Value, tuple[ir.Value, ...]]:
    """The input that tokens come in by, the logits, and one output per layer that its attention writes the keys to."""
    if is_edge_llm(graph):
        edge = read_edge_llm_contract(graph)
        return edge.stream, edge.logits, edge.presents
    contract = read_contract(graph)
    return contract.input_ids, contract.logits, contract.keys


def _chain(dominators: Dominators, logits: ir.Value) -> list[Step]:
    """The values that all of logits depends on, in order of computation."""
    producer = logits.producer()
    if producer is None or producer not in dominators:
        raise GraphError("logits does not depend on the tokens; the graph is not a decoder")
    chain = [Step(node=None, output_index=None, label="input")]
    for node in reversed(list(dominators.climb(producer))):
        if node.op_type in _ALIASES:
            continue
        if node.op_type in SKIP_NORMS:
            # One node, two values. Where the sum is read further down, it is the stream and the norm is a branch (pre-norm);
            # where it is not, everything downstream goes through the norm.
            chain.append(Step(node=node, output_index=SKIP_NORM_SUM, label="merge"))
            if not _is_read(node, SKIP_NORM_SUM):
                chain.append(Step(node=node, output_index=0, label="norm"))
            continue
        read = [index for index in range(len(node.outputs)) if _is_read(node, index)]
        label = "merge" if dominators.adds_branches(node) else "norm" if node.op_type in _NORMS else node.op_type
        chain.append(Step(node=node, output_index=read[0] if len(read) == 1 else None, label=label))
    return chain


def _is_read(node: ir.Node, index: int) -> bool:
    return index < len(node.outputs) and (bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output())


def _location(step: Step, how: str) -> SiteLocation:
    node = step.computed_by
    if step.output_index is None:
        raise SiteAmbiguous(
            f"{describe(node)} writes several values that are read: "
            f"{', '.join(str(value.name) for value in node.outputs if value.uses())}; which of them carries the stream cannot be told"
        )
    return SiteLocation(node=node, output_index=step.output_index, how=f"{describe(node)}: {how}")


def _block_starts(dominators: Dominators, chain: Sequence[Step], keys: Sequence[ir.Value], *, starts_at_root: bool) -> list[int]:
    """For every layer, the chain index of the value that its block reads; ``starts_at_root``: the input may be that of block 0."""
    index = {step.node: position for position, step in enumerate(chain)}
    starts: list[int] = []
    for layer, key in enumerate(keys):
        start = next(
            (index[node] for node in dominators.climb(key.producer()) if node in index), 0 if starts_at_root and not layer else None
        )
        if start is None:
            raise SiteNotFound(f"the input of block {layer} cannot be told: {key.name} and logits share no value computed from the tokens")
        if starts and start <= starts[-1]:
            same = chain[start].computed_by
            raise SiteAmbiguous(
                f"blocks {layer - 1} and {layer} lead to the same value, that of {describe(same)}; "
                + (
                    "the decoder sits inside an If, as in a merged export: export it without merging the two decoders"
                    if same.op_type == "If"
                    else "layers that reuse another layer's keys are not supported"
                )
            )
        starts.append(start)
    return starts

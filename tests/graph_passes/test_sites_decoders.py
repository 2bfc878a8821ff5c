"""Sites of real decoder graphs, held against what forward hooks see in the eager model, and edits at them against edited eager runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import rounding
import torch
from decoders import CONFIGS, ROUNDING, build_decoder, export_decoder, feeds, hidden_states, session, site_modules
from transformers import DynamicCache

from graph_passes.find.sites import SiteLocation, find_sites, locate_sites
from graph_passes.find.streams import stream_type, stream_types
from graph_passes.fold import fold_graph
from runtimes.edits.edit import STREAMS, LowRankEdit, Site
from runtimes.edits.op import EditNode, bank_of
from runtimes.edits.positions import PositionRule
from runtimes.errors import SiteAmbiguous, SiteNotFound

FAST = ("llama", "gpt2", "opt")
ELSEWHERE = ("cohere", "falcon", "glm4", "olmo2", "phi", "smollm3", "stablelm", "starcoder2")
"""CI exports these with edits at every stream, and holds them to the eager model (tests/pipeline/test_families.py)."""


def mark_of(family: str) -> Any:
    if family in FAST:
        return ()
    return pytest.mark.long if family in ELSEWHERE else pytest.mark.slow


FAMILIES = [pytest.param(family, marks=mark_of(family), id=family) for family in CONFIGS]
LAYERS = 3


def layers_of(family: str) -> int:
    """A first and a last block show what a family's blocks look like; one between two others is in the fast families' graphs. Tracing
    takes most of the time, and each block its share."""
    return LAYERS if family in FAST else 2


# A scalar multiplies each branch there, and whether it belongs to the module cannot be told.
WITHOUT_MODULE_OUTPUTS = ("granite",)


@functools.cache
def _exported(family: str, *, layers: int, opset: int = 20, half: bool = False) -> tuple[torch.nn.Module, bytes]:
    model = build_decoder(family, layers=layers)
    model = model.half() if half else model
    return model, ir.to_proto(export_decoder(model, opset=opset)).SerializeToString()


def _decoder(family: str, **options: object) -> tuple[torch.nn.Module, ir.Model]:
    """The eager model and a graph of its own for each test."""
    model, graph = _exported(family, **{"layers": layers_of(family), **options})
    return model, ir.from_proto(onnx.load_from_string(graph))


def _expose(graph: ir.Model, located: dict[Site, SiteLocation]) -> dict[Site, str]:
    """Makes every located stream a graph output, and returns the outputs' names."""
    names: dict[Site, str] = {}
    for site, location in located.items():
        location.value.dtype = stream_type(site, location).dtype
        if not location.value.is_graph_output():
            graph.graph.outputs.append(location.value)
        names[site] = location.value.name
    return names


def _assert_sites_match(model: torch.nn.Module, graph: ir.Model, tolerance: float = ROUNDING) -> set[Site]:
    located = find_sites(graph)
    for value in (value for node in graph.graph for value in node.outputs if not value.is_graph_output()):
        value.shape = None
    types = stream_types(located)
    ids = np.random.default_rng(0).integers(0, 250, (2, 7))
    _, eager = hidden_states(model, ids)
    names = _expose(graph, located)
    run = session(graph)
    values = dict(zip([value.name for value in run.get_outputs()], run.run(None, feeds(run, ids)), strict=True))
    for site, name in names.items():
        expected = eager[site]
        error = np.abs(values[name].astype(np.float32).reshape(expected.shape) - expected).max() / np.abs(expected).max()
        assert error < tolerance, f"{site} is not {name}: {error:.1e}"
        assert (types[site].rank, types[site].width) == (values[name].ndim, values[name].shape[-1]), site
    return set(located)


def _all_sites(layers: int = LAYERS, streams: tuple[str, ...] = STREAMS) -> set[Site]:
    return {Site(layer=layer, stream=stream) for layer in range(layers) for stream in streams}


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_hold_what_hooks_see(family):
    found = _assert_sites_match(*_decoder(family))
    streams = ("block_input", "block_output") if family in WITHOUT_MODULE_OUTPUTS else STREAMS
    assert found == _all_sites(layers_of(family), streams)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_sites_of_one_layer(family):
    assert _assert_sites_match(*_decoder(family, layers=1)) == _all_sites(1)


@pytest.mark.slow
def test_one_post_norm_layer_is_ambiguous():
    _, graph = _decoder("opt_post_norm", layers=1)
    with pytest.raises(SiteAmbiguous, match="or the norm behind it"):
        locate_sites(graph, [Site(layer=0)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_sites_at_opset_23(family):
    assert _assert_sites_match(*_decoder(family, opset=23)) == _all_sites()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_sites_in_float16(family):
    # Casts stand around every norm; the stream itself stays float16, rounded at other places than in eager.
    model, graph = _decoder(family, half=True)
    located = find_sites(graph)
    assert all(stream_type(site, location).dtype == ir.DataType.FLOAT16 for site, location in located.items())
    assert _assert_sites_match(model, graph, tolerance=1e-2) == _all_sites()


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_after_onnxruntime_has_optimized_the_graph(family, tmp_path):
    model, graph = _decoder(family)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = _assert_sites_match(model, ir.load(tmp_path / "optimized.onnx"))
    assert found >= _all_sites(layers_of(family), ("block_input", "block_output"))


def test_names_are_not_read():
    # Layers and nodes under names that lie, as on fused graphs and OPT.
    _, graph = _decoder("opt")
    expected = {site: id(location.node) for site, location in find_sites(graph).items()}
    for index, node in enumerate(graph.graph):
        node.name = f"/model/layers.{index % 3}/Add"
    for index, value in enumerate(list(graph.graph.initializers.values())):
        value.name = f"weight.{index}"
    assert {site: id(location.node) for site, location in find_sites(graph).items()} == expected


@contextmanager
def _steered(model: torch.nn.Module, edits: dict[Site, LowRankEdit], first: int, last: int) -> Iterator[None]:
    """The eager model with every edit applied to the first and last tokens of each call of more than one token."""

    def hook_of(edit: LowRankEdit):
        def hook(module, arguments, output):
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.ndim == 2
            h = hidden.detach().numpy()
            h = h.reshape(2, -1, h.shape[-1]) if flat else h
            if h.shape[1] == 1:
                return output
            y = h.copy()
            for token in [*range(first), *range(h.shape[1] - last, h.shape[1])]:
                y[:, token] = edit.apply(h[:, token])
            edited = torch.tensor(y.reshape(hidden.shape))
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    modules = site_modules(model)
    handles = [modules[site].register_forward_hook(hook_of(edit)) for site, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# The per-token body is the same for every family; the fast ones stand for all.
STEERED = [pytest.param(*param.values, False, marks=param.marks, id=param.values[0]) for param in FAMILIES]
STEERED += [pytest.param(family, True, id=f"{family}-per_token") for family in FAST]


@pytest.mark.parametrize(("family", "per_token"), STEERED)
def test_a_folded_decoder_says_what_the_steered_eager_model_says(family, per_token):
    model, graph = _decoder(family)
    random = np.random.default_rng(0)
    sites = [Site(layer=0), Site(layer=layers_of(family) - 1)]
    if family not in WITHOUT_MODULE_OUTPUTS:
        sites += [Site(layer=1, stream="attention_output"), Site(layer=1, stream="mlp_output")]
    width = stream_type(sites[0], find_sites(graph)[sites[0]]).width
    edits = {
        site: LowRankEdit(
            U=random.standard_normal((4, width)) * 0.3,
            A=random.standard_normal((4, width)) * 0.1,
            b=random.standard_normal(4),
            activation="gelu" if site.stream == "mlp_output" else "",
            activated="first_half" if site.stream == "mlp_output" else "all",
        )
        for site in sites
    }
    nodes = [EditNode(site=site, activation=edit.activation, activated=edit.activated) for site, edit in edits.items()]
    fold_graph(graph, nodes, per_token=per_token)
    adapter = PositionRule(first=2, last=1).tensors(tied=True)
    for node in nodes:
        adapter.update(zip(node.bank_names, bank_of([edits[node.site]], np.dtype(np.float32)), strict=True))

    run = session(graph)
    outputs = [value.name for value in run.get_outputs()]
    ids = random.integers(0, 250, (2, 9))
    past, cache = None, DynamicCache(config=model.config)
    with _steered(model, edits, first=2, last=1), torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 9)):
            eager = model(input_ids=torch.tensor(ids[:, start:end]), past_key_values=cache, use_cache=True).logits.numpy()
            step = feeds(run, ids[:, start:end], past=past)
            past = dict(zip(outputs, run.run(None, {**step, **adapter}), strict=True))
            rounding.check(past["logits"], eager, ROUNDING)
            base = run.run(["logits"], step)[0]
            if start == 0:
                assert np.abs(base - eager).max() > 1e-2 * np.abs(eager).max(), "the edits change nothing, so the test shows nothing"


@pytest.mark.slow
def test_granite_multipliers_are_not_guessed():
    _, graph = _decoder("granite")
    with pytest.raises(SiteNotFound, match="stand Mul, and whether they belong to the module cannot be told"):
        locate_sites(graph, [Site(layer=0, stream="attention_output")])

"""Folding into graphs of TensorRT-Edge-LLM's structure: sites, wiring, numbers in onnxruntime (attention a stand-in), refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edge_decoders import LAYOUTS, WIDTH, Row, attention_stand_in, checked, edge_decoder, edge_feeds, session

from graph_passes.edge_llm.fold import check_scopes, fold_edge_llm_graph
from graph_passes.edge_llm.lora import lora_tensors
from graph_passes.find.edge_llm import is_edge_llm, read_edge_llm_contract
from graph_passes.find.sites import find_sites, locate_sites
from graph_passes.insert import is_edit
from runtimes.edits.edit import Edit, LowRankEdit, ScaleBiasEdit, Site
from runtimes.edits.op import DOMAIN, EditNode, bank_of, node_of
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import GraphError, SiteAmbiguous, SiteNotFound

PREFILL = [Row(past=0, new=6), Row(past=0, new=3)]
DECODE = [Row(past=6, new=1), Row(past=3, new=1)]
OUTPUTS = [Site(layer=0), Site(layer=2)]


def _edits(site: Site, count: int, activation: str = "", scale: float = 0.3) -> list[Edit]:
    random = np.random.default_rng([site.layer, count])
    if activation == "red":
        draw = lambda: random.standard_normal(WIDTH) * scale  # noqa: E731
        return [ScaleBiasEdit(scale=1 + draw(), bias=draw()) for _ in range(count)]
    shapes = ((3, WIDTH), (3, WIDTH), (3,))
    arrays = [[random.standard_normal(shape) * scale for shape in shapes] for _ in range(count)]
    return [LowRankEdit(U=U, A=A, b=b, activation=activation) for U, A, b in arrays]


def _tensors(edits: dict[Site, list[Edit]], rule: PositionRule, *, tied: bool, dtype=np.float32) -> tuple[list[EditNode], dict]:
    nodes = [node_of(site, group[0]) for site, group in edits.items()]
    banks = {}
    for node, group in zip(nodes, edits.values(), strict=True):
        banks |= dict(zip(node.bank_names, bank_of(group, dtype), strict=True))
    return nodes, banks | rule.tensors(tied=tied)


def _signature(value: ir.Value) -> tuple[str | None, ir.DataType | None, str]:
    return value.name, value.dtype, str(value.shape)


def _numpy_after(
    model: ir.Model, feeds: dict[str, np.ndarray], rule: PositionRule, edits: dict, rows: list[Row], *, tied: bool
) -> np.ndarray:
    """logits of ``model`` with every edit applied in numpy: the graph runs once per edit, cut open behind it."""
    changed: dict[str, np.ndarray] = {}
    for site, group in edits.items():
        where = find_sites(edge_decoder(_layout(model)))[site].value.name
        stream = _run_cut(model, feeds, changed, where)
        slot = np.full((len(rows), max(row.new for row in rows)), -1)
        for index, row in enumerate(rows):
            mask = np.ones((1, row.past + row.new), np.int64)
            length = np.array([row.new if not row.past else row.past])
            slot[index, : row.new] = slots(rule, mask, row.new, tied=tied, prompt_length=length)
        slot = slot.reshape(stream.shape[:-1])
        for number, edit in enumerate(group):
            stream = np.where((slot == number)[..., None], edit.apply(stream), stream)
        changed[where] = stream.astype(np.float32)
    return _run_cut(model, feeds, changed, "logits")


def _layout(model: ir.Model) -> str:
    names = {value.name for node in model.graph for value in node.outputs}
    return "padded" if read_edge_llm_contract(model.graph).layout == "padded" else "tokens" if "unsqueeze" in names else "flat"


def _run_cut(model: ir.Model, feeds: dict[str, np.ndarray], changed: dict[str, np.ndarray], wanted: str) -> np.ndarray:
    """``wanted`` where the values in ``changed`` are handed in rather than computed."""
    model = ir.from_proto(ir.to_proto(model))
    attention_stand_in(model)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    for name in changed:
        fed = ir.Value(name=f"{name}.fed", type=by_name[name].type, shape=by_name[name].shape)
        model.graph.inputs.append(fed)
        ir.convenience.replace_all_uses_with(by_name[name], fed)
    if wanted not in {value.name for value in model.graph.outputs}:
        model.graph.outputs.append(by_name[wanted])
    return session(model).run([wanted], feeds | {f"{name}.fed": array for name, array in changed.items()})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sites_are_the_residual_adds(layout):
    model = edge_decoder(layout)
    found = find_sites(model)
    assert [found[Site(layer=layer)].value.name for layer in range(3)] == ["add_1", "add_3", "add_5"]
    assert [found[Site(layer=layer, stream="attention_output")].value.name for layer in range(3)] == [f"o_proj_{n}" for n in range(3)]
    assert [found[Site(layer=layer, stream="mlp_output")].value.name for layer in range(3)] == [f"down_proj_{n}" for n in range(3)]
    check_scopes(model)
    if layout == "tokens":
        assert found[Site(layer=0, stream="block_input")].value.name == "unsqueeze"
    else:
        with pytest.raises(SiteNotFound, match="graph's input 'inputs_embeds', behind which nothing can be inserted"):
            locate_sites(model, [Site(layer=0, stream="block_input")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_outputs_and_every_other_node_stay(layout):
    model, before = edge_decoder(layout), edge_decoder(layout)
    for graph in (model.graph, before.graph):
        # The exporter adds the branch to the stream; a stream that is the second operand has to stay the second.
        add = next(node for node in graph if node.name == "node_add_2")
        for index, value in enumerate(reversed(add.inputs)):
            add.replace_input_with(index, value)
    edits = {site: _edits(site, 1) for site in OUTPUTS}
    nodes, tensors = _tensors(edits, PositionRule.parse("f2+l1"), tied=True)
    fold_edge_llm_graph(model, nodes, tensors)
    checked(model)
    assert [*map(_signature, model.graph.inputs)] == [*map(_signature, before.graph.inputs)]
    assert [*map(_signature, model.graph.outputs)] == [*map(_signature, before.graph.outputs)]
    assert len(model.graph.inputs[0].shape) == (3 if layout == "padded" else 2)
    after = {node.name: node for node in model.graph}
    for node in before.graph:
        inputs = [value.name for value in after[node.name].inputs]
        assert [name.removesuffix(".block_output") for name in inputs] == [
            {"add_1": "reft.0", "add_5": "reft.2"}.get(value.name, value.name) for value in node.inputs
        ]
        assert [value.name for value in after[node.name].outputs] == [value.name for value in node.outputs]
    computed = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for node in model.graph:
        assert {value.name for value in node.inputs} <= computed, node
        computed |= {value.name for value in node.outputs}
    placed = [node for node in model.graph if is_edit(node)]
    assert [node.name for node in placed] == ["reft.0.block_output", "reft.2.block_output"]
    for node in placed:
        assert (node.attributes.get_string("plugin_namespace"), node.attributes.get_string("plugin_version")) == (DOMAIN, "1")
    # Without our plugin TensorRT takes the function, and of its two forms this one.
    assert list(model.functions) == [(DOMAIN, "LoReFT", "")]
    assert not any(node.op_type == "NonZero" for node in model.functions[(DOMAIN, "LoReFT", "")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_zero_adapter_changes_no_bit(layout):
    model, before = edge_decoder(layout), edge_decoder(layout)
    zero = {site: [LowRankEdit(U=np.zeros((1, WIDTH)), A=np.zeros((1, WIDTH)), b=np.zeros(1))] for site in OUTPUTS}
    fold_edge_llm_graph(model, *_tensors(zero, PositionRule(everywhere=True), tied=True))
    for rows, decode in ((PREFILL, False), (DECODE, True)):
        feeds = edge_feeds(before, layout, rows, decode=decode)
        for want, got in zip(session(before).run(None, feeds), session(model).run(None, feeds), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("positions", "tied", "activation"),
    [
        ("f2+l2", True, ""),
        ("f2+l1", False, ""),
        ("prompt", True, "relu"),
        ("all", True, "gelu_tanh"),
        ("l1", True, ""),
        ("f2+l1", False, "red"),
        ("all", True, "red"),
    ],
)
def test_an_adapter_is_the_numpy_edit(layout, positions, tied, activation):
    model, before, rule = edge_decoder(layout), edge_decoder(layout), PositionRule.parse(positions)
    edits = {site: _edits(site, 1 if tied else 2, activation) for site in OUTPUTS}
    fold_edge_llm_graph(model, *_tensors(edits, rule, tied=tied))
    steered = session(model)
    for rows, decode in ((PREFILL, False), (DECODE, True), ([Row(past=2, new=4), Row(past=0, new=2)], False)):
        feeds = edge_feeds(before, layout, rows, decode=decode)
        got = steered.run(["logits"], feeds)[0]
        base = session(before).run(["logits"], feeds)[0]
        if any(row.past for row in rows) and not decode:
            continue  # a reused prefix has its own expectation, in test_edge_slots.py; here it has to run
        want = _numpy_after(before, feeds, rule, edits, rows, tied=tied)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
        assert (np.abs(got - base).max() > 1e-3) == (not decode or positions == "all")


@pytest.mark.parametrize("layout", ["padded", "tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_lora_inputs_carry_the_same_edit(layout, tied):
    rule, slot_count = PositionRule.parse("f2+l1"), 1 if tied else 2
    edits = {site: _edits(site, slot_count) for site in OUTPUTS}
    constant, swapped = (edge_decoder(layout, dtype=ir.DataType.FLOAT16) for _ in range(2))
    nodes, tensors = _tensors(edits, rule, tied=tied, dtype=np.float16)
    before = [*map(_signature, swapped.graph.inputs)]
    fold_edge_llm_graph(constant, nodes, tensors)
    fold_edge_llm_graph(swapped, nodes, rule.tensors(tied=tied), lora_slots=slot_count)
    checked(swapped)
    added = [*map(_signature, swapped.graph.inputs)][len(before) :]
    assert [*map(_signature, swapped.graph.inputs)][: len(before)] == before
    file = lora_tensors(nodes, tensors, slots=slot_count)
    assert {name for name, *_ in added} == set(file)
    # What its builder and its runtime go by: the names, rank 2, [k, rank] and [rank, n].
    for value in swapped.graph.inputs[len(before) :]:
        kind, dims = ("lora_A" in value.name, "lora_B" in value.name), list(value.shape)
        assert kind in ((True, False), (False, True)) and len(dims) == 2 and value.dtype == ir.DataType.FLOAT16
        assert [isinstance(dim, int) for dim in dims] == [kind[0], kind[1]]
        assert all(not isinstance(want, int) or want == got for want, got in zip(dims, file[value.name].shape, strict=True))
    feeds = edge_feeds(constant, layout, PREFILL)
    want, base = session(constant).run(None, feeds), session(edge_decoder(layout, dtype=ir.DataType.FLOAT16)).run(None, feeds)
    steered = session(swapped)
    # Not to the bit: onnxruntime computes float16 on a CPU in float32 and folds the constants of one of the two graphs.
    np.testing.assert_allclose(steered.run(["logits"], feeds | file)[0], want[0], atol=1e-5)
    assert np.abs(want[0] - base[0]).max() > 1e-3
    for rank in (0, 1):
        none = {name: np.zeros([rank if not isinstance(d, int) else d for d in array_shape], np.float16) for name, array_shape in
                ((value.name, list(value.shape)) for value in swapped.graph.inputs[len(before) :])}  # fmt: skip
        np.testing.assert_allclose(steered.run(["logits"], feeds | none)[0], base[0], atol=1e-5)


def test_lora_inputs_are_float16():
    nodes, _ = _tensors({Site(layer=0): _edits(Site(layer=0), 1)}, PositionRule.parse("l1"), tied=True)
    with pytest.raises(GraphError, match="swaps float16 weights only: fold without --as-lora"):
        fold_edge_llm_graph(edge_decoder(), nodes, {}, lora_slots=1)


def test_scopes_that_disagree_with_the_structure():
    model = edge_decoder("padded")
    node = next(node for node in model.graph if node.name == "node_add_2")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', '_model.model.layers.0', 'add_2']"
    with pytest.raises(SiteAmbiguous, match=r"block 0 is Add\('add_1'\) by the graph's structure and Add\('add_2'\) by the exporter"):
        fold_edge_llm_graph(model, [EditNode(site=Site(layer=0))], {})
    model = edge_decoder("tokens")
    for node in model.graph:
        text = node.metadata_props["pkg.torch.onnx.name_scopes"]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = text.replace("layers.1.input", "layers.2.input")
    with pytest.raises(SiteAmbiguous, match=r"layers \[2\] read it, not 1"):
        fold_edge_llm_graph(model, [EditNode(site=Site(layer=0))], {})
    assert not any(map(is_edit, model.graph))


def test_scopes_may_be_missing():
    model = edge_decoder("padded")
    for node in model.graph:
        node.metadata_props.clear()
    fold_edge_llm_graph(model, [EditNode(site=Site(layer=1))], {})


def _without(model: ir.Model, name: str) -> ir.Model:
    values = model.graph.inputs if any(value.name == name for value in model.graph.inputs) else model.graph.outputs
    values.remove(next(value for value in values if value.name == name))
    return model


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("padded", "context_lengths", "input 'context_lengths' missing"),
        ("tokens", "past_lengths", "input 'past_lengths' missing"),
        ("tokens", "context_sequence_count_carrier", "input 'context_sequence_count_carrier' missing"),
        ("padded", "logits", "output 'logits' missing"),
        ("padded", "present_key_values_1", "output 'present_key_values_1' missing"),
        ("padded", "present_key_values_2", "exports: output 'present_key_values_2' missing"),
        ("padded", "past_key_values_1", "exports: input 'past_key_values_1' missing"),
        ("tokens", "past_key_values_2", "exports: input 'past_key_values_2' missing"),
    ],
)
def test_a_graph_without_part_of_the_contract(layout, name, message):
    with pytest.raises(GraphError, match=message):
        fold_edge_llm_graph(_without(edge_decoder(layout), name), [EditNode(site=Site(layer=0))], {})


@pytest.mark.parametrize("name", ["attention_pos_id", "hidden_states_input", "phase_is_encoder", "deepstack_embeds_0", "conv_state_0"])
def test_kinds_of_export_that_are_refused(name):
    model = edge_decoder()
    model.graph.inputs.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1])))
    with pytest.raises(GraphError, match=f"has the input '{name}': .*; only plain decoders can be folded"):
        read_edge_llm_contract(model.graph)


def test_folded_twice():
    model = edge_decoder()
    fold_edge_llm_graph(model, [EditNode(site=Site(layer=0))], {})
    with pytest.raises(GraphError, match="carries edits already"):
        fold_edge_llm_graph(model, [EditNode(site=Site(layer=1))], {})


def test_other_decoders_are_not_taken_for_it():
    from small_decoders import small_decoder

    assert not is_edge_llm(small_decoder().graph) and is_edge_llm(edge_decoder().graph)


@pytest.mark.parametrize("plugin", [False, True], ids=["function", "plugin"])
@pytest.mark.parametrize(
    ("layout", "lora"),
    [
        ("padded", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("padded", False), ("tokens", False), ("flat", False), ("tokens", True))
        ),
    ],
)
def test_tensorrt_parses_and_builds_it(layout, lora, plugin, tmp_path, tensorrt_rtx, request):
    """The real parser and builder of TensorRT-RTX, for SM89; a stand-in for TensorRT-Edge-LLM's attention plugin (edge_engine.py)."""
    library = request.getfixturevalue("tensorrt_plugin") if plugin else "-"
    model = edge_decoder(layout, dtype=ir.DataType.FLOAT16)
    edits = {site: _edits(site, 2) for site in OUTPUTS}
    rule = PositionRule.parse("f2+l1")
    nodes, tensors = _tensors(edits, rule, tied=False, dtype=np.float16)
    fold_edge_llm_graph(model, nodes, rule.tensors(tied=False) if lora else tensors, lora_slots=2 if lora else 0)
    ir.save(model, tmp_path / "model.onnx")
    command = [sys.executable, Path(__file__).with_name("edge_engine.py"), tmp_path / "model.onnx", library, "4"]
    done = subprocess.run(list(map(str, command)), env=tensorrt_rtx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["parsed"] and result["engine"], (result, done.stderr[-2000:])
    assert result["inputs"] == [value.name for value in model.graph.inputs]
    assert result["outputs"] == [value.name for value in model.graph.outputs]
    assert len(result["plugins"]) == 3 + (len(nodes) if plugin else 0)

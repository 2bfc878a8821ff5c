"""Exact nodes and wiring of inserted edits on small graphs, and their numbers in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rounding
from decoders import session
from small_decoders import EVERY_TOKEN, ROUNDING, WIDTH, random_banks, small_decoder, small_feeds

from graph_passes.find.sites import find_sites
from graph_passes.fold import fold_graph
from graph_passes.insert import InsertEdits, insert_edits, is_edit
from graph_passes.slots.add import rule_names, slot_mode
from runtimes.edits.edit import LowRankEdit, Site
from runtimes.edits.op import DOMAIN, RULE_DEFAULTS, EditNode
from runtimes.errors import GraphError, SiteNotFound

BLOCKS = ["pre_norm", "pre_norm_fused", "post_norm", "parallel", "parallel_late", "after_norm"]


def _edit(layer: int, stream: str = "block_output", **activation: str) -> EditNode:
    return EditNode(site=Site(layer=layer, stream=stream), **activation)


def _wires(model: ir.Model) -> set[tuple[str, int, str]]:
    return {
        (node.name, index, value.name)
        for node in model.graph
        for index, value in enumerate(node.inputs)
        if value is not None and value.name
    }


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_exact_wiring_behind_a_residual_add():
    model = small_decoder()
    before = _wires(model)
    insert_edits(model, [_edit(1)])
    edit = _node(model, "reft.1.block_output")
    assert [value.name for value in edit.inputs] == [
        "layers.1.output", "reft.slot", "reft.1.block_output.U", "reft.1.block_output.A", "reft.1.block_output.b",
    ]  # fmt: skip
    assert {name: attribute.value for name, attribute in edit.attributes.items()} == {
        "activation": "", "activated": "all", "plugin_namespace": "ai.reft", "plugin_version": "1",
    }  # fmt: skip
    # Every consumer reads the edit at the index where it read the stream; nothing else moved.
    after = _wires(model)
    assert before - after == {("layers.2.norm_1", 0, "layers.1.output"), ("layers.2.middle", 0, "layers.1.output")}
    assert {wire for wire in after - before if not wire[0].startswith("reft.")} == {
        ("layers.2.norm_1", 0, "reft.1.block_output"), ("layers.2.middle", 0, "reft.1.block_output"),
    }  # fmt: skip
    assert model.opset_imports[DOMAIN] == 1 and list(model.functions) == [(DOMAIN, "LoReFT", "")]


def test_a_consumer_that_reads_the_stream_twice():
    model = small_decoder()
    middle = _node(model, "layers.2.middle")
    middle.replace_input_with(1, middle.inputs[0])
    insert_edits(model, [_edit(1)])
    assert [value.name for value in middle.inputs] == ["reft.1.block_output", "reft.1.block_output"]


def test_nodes_of_one_site_stand_in_series_as_given():
    model = small_decoder()
    insert_edits(model, [_edit(0, activation="silu"), _edit(0), _edit(0, activation="gelu", activated="first_half")])
    names = ["reft.0.block_output.silu", "reft.0.block_output", "reft.0.block_output.gelu_first_half"]
    series = [_node(model, name) for name in names]
    assert series[0].inputs[0].name == "layers.0.output"
    assert series[1].inputs[0] is series[0].outputs[0] and series[2].inputs[0] is series[1].outputs[0]
    assert {use.node.name for use in series[2].outputs[0].uses()} == {"layers.1.norm_1", "layers.1.middle"}
    assert [node.overload for node in series] == ["silu", "", "gelu_first_half"]
    assert {identifier[2] for identifier in model.functions} == {"", "silu", "gelu_first_half"}


def test_a_blocks_output_is_edited_before_the_next_blocks_input():
    model = small_decoder()
    insert_edits(model, [_edit(1, "block_input"), _edit(0, "block_output")])
    assert _node(model, "reft.0.block_output").inputs[0].name == "layers.0.output"
    assert _node(model, "reft.1.block_input").inputs[0].name == "reft.0.block_output"


def test_a_fused_skip_norm_is_split():
    model = small_decoder(block="pre_norm_fused")
    insert_edits(model, [_edit(1), _edit(2)])
    add, norm = _node(model, "layers.1.next_norm.add"), _node(model, "layers.1.next_norm.norm")
    edit = _node(model, "reft.1.block_output")
    assert [value.name for value in add.inputs] == ["layers.1.norm_2.3", "layers.1.mlp.output"]
    assert edit.inputs[0] is add.outputs[0] and norm.inputs[0] is edit.outputs[0]
    assert norm.op_type == "SimplifiedLayerNormalization" and norm.attributes["epsilon"].value == pytest.approx(1e-5)
    # The next skip norm adds onto the edited stream, and what read the norm still reads it under its name.
    assert _node(model, "layers.2.norm_2").inputs[0] is edit.outputs[0]
    assert norm.outputs[0].name == "layers.1.next_norm"
    assert {use.node.name for use in norm.outputs[0].uses()} == {"layers.2.attention.k", "layers.2.attention.q"}
    left = [node.name for node in model.graph if node.op_type.startswith("Skip")]
    assert left == ["layers.0.norm_2", "layers.0.next_norm", "layers.1.norm_2", "layers.2.norm_2"]


@pytest.mark.parametrize("optional", ["beta", "bias", "both", "none"])
def test_splitting_a_skip_layer_norm_keeps_its_numbers(optional):
    model = small_decoder(block="pre_norm_fused")
    random = np.random.default_rng(3)
    for node in list(model.graph):
        if node.op_type != "SkipSimplifiedLayerNormalization":
            continue
        extra: list[ir.Value | None] = []
        for name in ("beta", "bias"):
            tensor = ir.tensor(random.standard_normal(WIDTH).astype(np.float32), name=f"{node.name}.{name}")
            value = ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([WIDTH]), const_value=tensor)
            extra.append(value if optional in (name, "both") else None)
        for value in filter(None, extra):
            model.graph.register_initializer(value)
        node.op_type = "SkipLayerNormalization"
        node.resize_inputs(5)
        for index, value in enumerate(extra):
            node.replace_input_with(3 + index, value)
        if optional == "none":
            node.resize_inputs(3)
            node.attributes.pop("epsilon")
    base = session(model).run(None, small_feeds(model))
    insert_edits(model, [_edit(layer) for layer in range(3)])
    for left, right in zip(base, session(model).run(None, small_feeds(model)), strict=True):
        rounding.check(left, right, ROUNDING)


@pytest.mark.parametrize("slots", ["graph", "input"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_as_folded_the_graph_computes_what_it_computed(block, per_token, slots):
    base = small_decoder(block=block)
    expected = session(base).run(None, small_feeds(base))
    model = small_decoder(block=block, mask=slots == "graph")
    fold_graph(model, [EditNode(site=site) for site in find_sites(model)], per_token=per_token)
    for left, right in zip(expected, session(model).run(None, small_feeds(model)), strict=True):
        rounding.check(left, right, ROUNDING)


def test_a_fused_graph_and_its_unfused_twin_are_steered_alike():
    results = []
    for block in ("pre_norm", "pre_norm_fused"):
        model = small_decoder(block=block)
        fold_graph(model, [_edit(layer, stream) for layer in range(3) for stream in ("block_output", "mlp_output")])
        results.append(session(model).run(None, {**small_feeds(model), **random_banks(model), **EVERY_TOKEN}))
    for left, right in zip(*results, strict=True):
        rounding.check(left, right, ROUNDING)


def test_the_edit_acts_on_the_named_stream():
    # The stream before and after the edit, read as graph outputs, against the formula.
    model = small_decoder()
    fold_graph(model, [_edit(1)])
    edit = _node(model, "reft.1.block_output")
    model.graph.outputs.extend([edit.inputs[0], edit.outputs[0]])
    banks = random_banks(model, slots=2, rank=3)
    feeds = {**small_feeds(model), **banks, "reft.slots": np.array([[0, 1, -1, 2, 1]] * 2, np.int32)}
    h, y = session(model).run(["layers.1.output", "reft.1.block_output"], feeds)
    for token, slot in enumerate([0, 1, None, None, 1]):
        if slot is None:
            assert y[:, token].tobytes() == h[:, token].tobytes()
        else:
            U, A, b = (banks[f"reft.1.block_output.{name}"][slot] for name in ("U", "A", "b"))
            rounding.check(y[:, token], LowRankEdit(U=U, A=A, b=b).apply(h[:, token]), rounding.edit(WIDTH, 3))


def test_a_stream_that_is_a_graph_output_stays_one_under_its_name():
    model = small_decoder()
    model.graph.outputs.append(_node(model, "layers.1.output").outputs[0])
    fold_graph(model, [_edit(1, activation="tanh"), _edit(1)])
    names = [value.name for value in model.graph.outputs]
    assert names[-1] == "layers.1.output"
    assert model.graph.outputs[-1].producer().name == "reft.1.block_output"
    feeds = {**small_feeds(model), **random_banks(model), **EVERY_TOKEN}
    untouched = small_decoder()
    untouched.graph.outputs.append(_node(untouched, "layers.1.output").outputs[0])
    assert not np.allclose(session(model).run(None, feeds)[-1], session(untouched).run(None, small_feeds(untouched))[-1])


@pytest.mark.parametrize("slots", ["graph", "input"])
def test_banks_and_rules_are_overridable(slots):
    model = small_decoder(dtype=ir.DataType.FLOAT16, mask=slots == "graph")
    insert_edits(model, [_edit(0), _edit(2, activation="relu")])
    inputs = {value.name: value for value in model.graph.inputs}
    expected = {*RULE_DEFAULTS, "reft.slots"} if slots == "graph" else set()
    expected |= {f"reft.0.block_output.{bank}" for bank in "UAb"} | {f"reft.2.block_output.relu.{bank}" for bank in "UAb"}
    assert {name for name, value in inputs.items() if value.is_initializer()} == expected
    bank = inputs["reft.2.block_output.relu.A"]
    assert bank.dtype == ir.DataType.FLOAT16
    assert [str(dim) for dim in bank.shape] == ["reft.2.block_output.relu.N", "reft.2.block_output.relu.r", str(WIDTH)]
    assert bank.const_value.shape == (1, 1, WIDTH) and not bank.const_value.numpy().any()
    if slots == "graph":
        for name, default in RULE_DEFAULTS.items():
            assert inputs[name].const_value.numpy().tolist() == [default] and inputs[name].dtype == ir.DataType.INT64
    slot = inputs["reft.slots"]
    assert slot.dtype == ir.DataType.INT32 and slot_mode(model.graph) == slots
    if slots == "graph":
        assert slot.const_value.numpy().tolist() == [[-2]] and not {"batch", "sequence"} & set(map(str, slot.shape))
    else:
        assert [str(dim) for dim in slot.shape] == ["batch", "sequence"] and not rule_names(model.graph)


@pytest.mark.parametrize("activation", [{}, {"activation": "gelu", "activated": "first_half"}])
def test_onnx_checker_accepts_the_folded_graph(activation):
    # SimplifiedLayerNormalization is onnxruntime's own; the checker wants a standard norm.
    model = small_decoder(opset=23)
    for node in model.graph:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
    model.ir_version = 8
    fold_graph(model, [_edit(1, **activation), _edit(0, "block_input", **activation)])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.ir_version == (10 if activation else 8)


def test_a_second_fold_is_refused_and_a_reloaded_graph_still_shows_its_sites():
    model = small_decoder()
    fold_graph(model, [_edit(1)])
    reloaded = ir.from_proto(ir.to_proto(model))
    assert find_sites(reloaded)[Site(layer=0)].node.name == "layers.0.output"
    assert find_sites(reloaded)[Site(layer=1)].node.name == "reft.1.block_output"
    with pytest.raises(GraphError, match=r"carries edits already \(1 ai\.reft nodes: reft\.1\.block_output"):
        fold_graph(reloaded, [_edit(2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": []}, "no edit to insert"),
        ({"nodes": [_edit(1), _edit(1)]}, r"reft\.1\.block_output is asked for twice"),
        ({"nodes": [_edit(9)]}, "layer 9 does not exist in this graph"),
    ],
)
def test_refused_requests_leave_the_graph_as_it_was(arguments, message):
    model = small_decoder()
    before = ir.to_proto(model)
    with pytest.raises(GraphError, match=message):
        insert_edits(model, **arguments)
    assert ir.to_proto(model) == before


def _int8_stream(model: ir.Model) -> None:
    _node(model, "layers.1.output").outputs[0].dtype = ir.DataType.UINT8


def _double_stream(model: ir.Model) -> None:
    _node(model, "layers.1.output").outputs[0].dtype = ir.DataType.DOUBLE


def _old_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 13


def _taken_name(model: ir.Model) -> None:
    _node(model, "layers.0.middle").outputs[0].name = "reft.1.block_output.U"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_int8_stream, r"stream at 1\.block_output, Add\('layers\.1\.output'\), holds UINT8.*quantize afterwards"),
        (_double_stream, "holds DOUBLE, expected FLOAT, FLOAT16, BFLOAT16"),
        (_old_opset, "opset 13, the edit needs 15"),
        (_taken_name, r"uses the name 'reft\.1\.block_output\.U' itself"),
    ],
)
def test_refused_graphs_are_left_as_they_were(damage, message):
    model = small_decoder()
    damage(model)
    before = ir.to_proto(model)
    with pytest.raises(GraphError, match=message):
        insert_edits(model, [_edit(0), _edit(1)])
    assert ir.to_proto(model) == before


def test_training_statistics_of_a_skip_norm_are_refused():
    model = small_decoder(block="pre_norm_fused")
    norm = _node(model, "layers.0.next_norm")
    norm.outputs[1].name = "mean"
    norm.outputs[1].dtype = ir.DataType.FLOAT
    model.graph.outputs.append(norm.outputs[1])
    with pytest.raises(GraphError, match=r"training statistics.*'mean'.*for inference"):
        insert_edits(model, [_edit(0)])


def test_type_and_width_are_read_off_the_weights_where_values_carry_none():
    model = small_decoder(block="pre_norm_fused", typed=False, dtype=ir.DataType.FLOAT16)
    insert_edits(model, [EditNode(site=site) for site in find_sites(model)])
    banks = [value for value in model.graph.inputs if value.name.endswith(".U")]
    assert len(banks) == 12 and all(value.dtype == ir.DataType.FLOAT16 and value.shape[-1] == WIDTH for value in banks)


def test_an_unknown_width_is_refused():
    model = small_decoder(typed=False)
    model.graph.initializers["embedding.weight"].shape = None
    with pytest.raises(GraphError, match=r"stream at 0\.block_input.*no known width.*shape inference"):
        insert_edits(model, [_edit(0, "block_input")])


def _turned(model: ir.Model) -> None:
    """The stream as [sequence, batch, width] from the embedding on."""
    source = _node(model, "embedding").outputs[0]
    readers = source.uses()
    turn = ir.node("Transpose", [source], {"perm": [1, 0, 2]}, name="turned")
    turn.outputs[0].name = turn.name
    model.graph.insert_after(source.producer(), turn)
    for reader, index in readers:
        reader.replace_input_with(index, turn.outputs[0])


def _declared_turned(model: ir.Model) -> None:
    _node(model, "layers.0.output").outputs[0].shape = ir.Shape(["sequence", "batch", WIDTH])
    _node(model, "embedding").op_type = "Lookup"  # nothing can be followed from here on


def _rank_unknown(model: ir.Model) -> None:
    """Nothing between an unknown lookup and logits of the last token tells how many axes there are."""
    _node(model, "embedding").op_type = "Lookup"
    _node(model, "logits").outputs[0].shape = None
    for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
        value.dtype = ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_turned, r"stream at 0\.block_output, .* holds \[sequence, batch, width\], expected the batch first.*export .* batch-first"),
        (_declared_turned, r"holds \[sequence, batch, width\], expected the batch first"),
        (_rank_unknown, "has no known rank, and whether .* cannot be told; run ONNX shape inference"),
    ],
)
def test_axes_that_slots_do_not_fit_are_refused(change, message):
    model = small_decoder(typed=False)
    change(model)
    before = ir.to_proto(model)
    with pytest.raises(GraphError, match=message):
        insert_edits(model, [_edit(0)])
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("typed", [True, False])
def test_a_flattened_stream_reads_flattened_slots(typed):
    model = small_decoder(typed=typed)
    # As OPT does: from the attention's residual Add to the MLP's, tokens are flattened to [batch * sequence, D].
    for name, shape in (("layers.1.middle", [-1, WIDTH]), ("layers.1.output", [2, 5, WIDTH])):
        source = _node(model, name).outputs[0]
        target = ir.Value(name=f"{name}.shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(shape)]),
                          const_value=ir.tensor(np.array(shape, np.int64), name=f"{name}.shape"))  # fmt: skip
        model.graph.register_initializer(target)
        readers = source.uses()
        reshape = ir.node("Reshape", [source, target], name=f"{name}.reshaped")
        reshape.outputs[0].name = reshape.name
        model.graph.insert_after(source.producer(), reshape)
        for reader, index in readers:
            reader.replace_input_with(index, reshape.outputs[0])
    for name in ("layers.1.norm_2", "layers.1.mlp.output", "layers.1.output") if typed else ():
        _node(model, name).outputs[0].shape = ir.Shape(["tokens", WIDTH])
    fold_graph(model, [_edit(1, "mlp_output"), _edit(2)])
    edit = _node(model, "reft.1.mlp_output")
    assert [value.name for value in edit.inputs[:2]] == ["layers.1.mlp.output", "reft.slot.flat"]
    assert _node(model, "reft.2.block_output").inputs[1].name == "reft.slot"
    # Only the flattened site is edited; the same edit on the plain graph must give the same logits.
    banks = random_banks(model)
    rule = {"reft.first": np.array([2])}
    plain = small_decoder()
    fold_graph(plain, [_edit(1, "mlp_output"), _edit(2)])
    results = [session(graph).run(None, {**small_feeds(graph), **banks, **rule})[0] for graph in (model, plain)]
    rounding.check(*results, ROUNDING)


def test_a_consumer_left_behind_is_noticed():
    class ForgetsOne(InsertEdits):
        """Plants the fault: one reader of the stream is wired back to the unedited value."""

        def call(self, model: ir.Model) -> ir.passes.PassResult:
            result = super().call(model)
            _node(model, "layers.2.middle").replace_input_with(0, _node(model, "reft.1.block_output").inputs[0])
            return result

    with pytest.raises(ir.passes.PostconditionError) as failure:
        ForgetsOne([_edit(1)])(small_decoder())
    assert "Add('layers.2.middle') still reads 'layers.1.output'" in str(failure.value.__cause__)


def test_a_site_without_a_tensor_is_refused_by_name():
    with pytest.raises(SiteNotFound, match=r"0\.attention_output"):
        insert_edits(small_decoder(block="scaled"), [_edit(0, "attention_output")])


def test_only_edits_carry_the_domain():
    model = small_decoder()
    fold_graph(model, [_edit(0), _edit(1)])
    assert [node.name for node in model.graph if is_edit(node)] == ["reft.0.block_output", "reft.1.block_output"]

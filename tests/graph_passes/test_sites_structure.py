"""Site finding on small graphs: exact values per block layout, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import rounding
from decoders import session
from small_decoders import ROUNDING, WIDTH, small_decoder, small_feeds

from graph_passes.find.dominators import Dominators
from graph_passes.find.sites import find_sites, locate_sites
from graph_passes.find.streams import StreamType, stream_type
from runtimes.edits.edit import STREAMS, Site
from runtimes.errors import GraphError, SiteAmbiguous, SiteNotFound

BLOCK_OUTPUTS = {
    "pre_norm": "layers.{}.output",
    "pre_norm_fused": "layers.{}.next_norm",
    "post_norm": "layers.{}.norm_2",
    "parallel": "layers.{}.output",
    "parallel_late": "layers.{}.output",
    "after_norm": "layers.{}.output",
    "scaled": "layers.{}.output",
    "experts": "layers.{}.output",
    "shared_experts": "layers.{}.output",
    "reshaped_experts": "layers.{}.output",
}


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("block", BLOCK_OUTPUTS)
def test_every_stream_is_the_expected_value(block, typed):
    found = find_sites(small_decoder(block=block, typed=typed))
    for layer in range(3):
        output = found[Site(layer=layer, stream="block_output")]
        assert output.node.name == BLOCK_OUTPUTS[block].format(layer)
        assert output.is_skip_norm == (block == "pre_norm_fused")
        entering = found[Site(layer=layer, stream="block_input")]
        assert entering.node.name == (BLOCK_OUTPUTS[block].format(layer - 1) if layer else "embedding")
        if block != "scaled":
            assert found[Site(layer=layer, stream="attention_output")].value.name == f"layers.{layer}.attention.output"
            # The projection's bias belongs to the module; an after-norm behind it does not.
            assert found[Site(layer=layer, stream="mlp_output")].value.name == f"layers.{layer}.mlp.output"
    assert len(found) == 3 * (2 if block == "scaled" else 4)


def test_the_last_skip_norm_writes_its_sum_once_it_is_asked_for():
    model = small_decoder(block="pre_norm_fused")
    location = find_sites(model)[Site(layer=2)]
    assert location.is_skip_norm and "repeats the blocks before it" in location.how
    assert len(_node(model, "layers.2.next_norm").outputs) == 1
    assert location.value is location.node.outputs[3] and location.value.name == "layers.2.next_norm.sum"
    assert [value.name for value in location.node.outputs[1:3]] == ["", ""]
    # It is still the same site, and what it writes is the stream of the unfused twin.
    assert find_sites(model)[Site(layer=2)].value is location.value
    twin = small_decoder(block="pre_norm")
    for graph, name in ((model, location.value.name), (twin, "layers.2.output")):
        value = next(value for node in graph.graph for value in node.outputs if value.name == name)
        value.dtype = ir.DataType.FLOAT
        graph.graph.outputs.append(value)
    left, right = (session(graph).run(None, small_feeds(graph))[-1] for graph in (model, twin))
    rounding.check(left, right, ROUNDING)


def test_a_scalar_behind_the_projection_leaves_the_module_undecided():
    with pytest.raises(SiteNotFound, match=r"1\.mlp_output.*stand Mul.*cannot be told"):
        locate_sites(small_decoder(block="scaled"), [Site(layer=1, stream="mlp_output")])


def test_a_scalar_behind_the_experts_leaves_the_module_undecided():
    # Granite's mixtures: whether the factor is the module's cannot be told.
    with pytest.raises(SiteNotFound, match=r"1\.mlp_output.*does not end in one linear projection"):
        locate_sites(small_decoder(block="scaled_experts"), [Site(layer=1, stream="mlp_output")])


def test_a_scalar_fused_into_the_projection_leaves_it_undecided_too():
    # onnxruntime turns Granite's MatMul -> Mul into FusedMatMul(alpha).
    model = small_decoder()
    projection = _node(model, "layers.1.attention.output")
    projection.op_type, projection.domain = "FusedMatMul", "com.microsoft"
    projection.attributes.add(ir.AttrFloat32("alpha", 0.22))
    with pytest.raises(SiteNotFound, match=r"1\.attention_output.*has a multiplier fused in"):
        locate_sites(model, [Site(layer=1, stream="attention_output")])


@pytest.mark.parametrize("block", ["pre_norm", "pre_norm_fused", "parallel", "after_norm"])
def test_a_single_block_ends_at_its_last_add(block):
    found = find_sites(small_decoder(block=block, layers=1))
    assert found[Site(layer=0)].node.name == BLOCK_OUTPUTS[block].format(0)


def test_a_single_post_norm_block_is_ambiguous_and_the_rest_is_still_found():
    model = small_decoder(block="post_norm", layers=1)
    assert set(find_sites(model)) == {Site(layer=0, stream="block_input")}
    with pytest.raises(SiteAmbiguous, match=r"layers\.0\.add_2.*or the norm behind it.*two layers or more"):
        locate_sites(model, [Site(layer=0)])


def test_casts_alias_the_stream():
    # TorchScript writes x.to(float32) as a Cast that everything behind it reads, the residual Add included.
    model = small_decoder(block="pre_norm")
    add = _node(model, "layers.0.output")
    cast = ir.node("Cast", [add.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="alias")
    cast.outputs[0].name = "alias"
    readers = add.outputs[0].uses()
    model.graph.insert_after(add, cast)
    for reader, index in readers:
        if reader is not cast:
            reader.replace_input_with(index, cast.outputs[0])
    found = find_sites(model)
    assert found[Site(layer=0)].node is add
    assert found[Site(layer=1, stream="attention_output")].value.name == "layers.1.attention.output"


def test_a_norm_in_float32_is_not_the_stream():
    # Half precision graphs cast the stream for the norm only; the residual Add reads it uncast.
    model = small_decoder(block="pre_norm", dtype=ir.DataType.FLOAT16)
    add, norm = _node(model, "layers.0.output"), _node(model, "layers.1.norm_1")
    cast = ir.node("Cast", [add.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="widened")
    cast.outputs[0].name = "widened"
    model.graph.insert_after(add, cast)
    norm.replace_input_with(0, cast.outputs[0])
    assert find_sites(model)[Site(layer=0)].value is add.outputs[0]


def test_shape_readers_do_not_tie_layers_to_the_input():
    model = small_decoder(block="pre_norm")
    stream = _node(model, "layers.1.output").outputs[0]
    size = ir.node("Shape", [stream], name="size")
    size.outputs[0].name = "size"
    flat = ir.node("Reshape", [_node(model, "layers.2.mlp.output").outputs[0], size.outputs[0]], name="reshaped")
    flat.outputs[0].name = "reshaped"
    consumer = _node(model, "layers.2.output")
    model.graph.insert_before(consumer, [size, flat])
    consumer.replace_input_with(0, flat.outputs[0])
    assert find_sites(model)[Site(layer=2)].node is consumer


@pytest.mark.parametrize(
    "spelling", ["present_key_values.{}.key", "present.{}.decoder.key", "present_key_{}", "present_{}_key", "present.{}.keys"]
)
def test_other_spellings_of_the_key_outputs(spelling):
    model = small_decoder()
    for layer in range(3):
        next(v for v in model.graph.outputs if v.name == f"present.{layer}.key").name = spelling.format(layer)
    assert find_sites(model)[Site(layer=1)].node.name == "layers.1.output"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"input_ids": "inputs_embeds"}, r"input 'input_ids' missing; it has inputs inputs_embeds, attention_mask"),
        ({"logits": "last_hidden_state"}, r"output 'logits' missing"),
        ({"present.1.key": "cache"}, r"output 'present\.1\.key' missing"),
        (
            {f"present.{layer}.key": f"cache.{layer}" for layer in range(3)},
            r"outputs 'present\.<layer>\.key' missing.*text-generation-with-past",
        ),
    ],
)
def test_a_broken_contract_names_what_is_missing(rename, message):
    model = small_decoder()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = rename.get(value.name, value.name)
    with pytest.raises(GraphError, match=message):
        find_sites(model)


def test_a_layer_beyond_the_graph():
    with pytest.raises(SiteNotFound, match=r"layer 31 does not exist in this graph \(3 layers"):
        locate_sites(small_decoder(), [Site(layer=31)])


def test_layers_that_share_their_keys_are_refused():
    model = small_decoder()
    shared = _node(model, "present.1.key")
    for use in _node(model, "present.2.key").outputs[0].uses():
        use.node.replace_input_with(use.idx, shared.outputs[0])
    shared_again = ir.node("Identity", [shared.outputs[0]], name="shared")
    shared_again.outputs[0].name = "present.2.key"
    model.graph.insert_after(shared, shared_again)
    model.graph.outputs[-1].name = "unused"
    model.graph.outputs[-1] = shared_again.outputs[0]
    with pytest.raises(SiteAmbiguous, match=r"blocks 1 and 2 lead to the same value.*reuse another layer's keys"):
        find_sites(model)


def test_a_last_block_unlike_the_others_is_not_guessed():
    model = small_decoder(block="pre_norm")
    tanh = ir.node("Tanh", [_node(model, "layers.2.middle").outputs[0]], name="odd")
    tanh.outputs[0].name = "odd"
    middle = _node(model, "layers.2.middle").outputs[0]
    model.graph.insert_after(middle.producer(), tanh)
    for use in middle.uses():
        if use.node is not tanh:
            use.node.replace_input_with(use.idx, tanh.outputs[0])
    with pytest.raises(SiteNotFound, match=r"last block \(layer 2\).*does not look like.*layers\.2\.middle.*layers\.2\.output"):
        locate_sites(model, [Site(layer=2)])
    assert find_sites(model)[Site(layer=1)].node.name == "layers.1.output"


def test_two_candidates_for_a_module_are_named():
    # A LoRA beside the down projection: the module's output is a sum of two branches.
    model = small_decoder(block="pre_norm")
    up, output = _node(model, "layers.1.mlp.relu").outputs[0], _node(model, "layers.1.mlp.output")
    weight = ir.Value(name="lora", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2 * WIDTH, WIDTH]),
                      const_value=ir.tensor(np.zeros((2 * WIDTH, WIDTH), np.float32), name="lora"))  # fmt: skip
    model.graph.register_initializer(weight)
    lora = ir.node("MatMul", [up, weight], name="lora")
    lora.outputs[0].name = "lora.out"
    total = ir.node("Add", [output.outputs[0], lora.outputs[0]], name="with_lora")
    total.outputs[0].name = "with_lora"
    readers = output.outputs[0].uses()
    model.graph.insert_after(output, [lora, total])
    for reader, index in readers:
        if reader is not total:
            reader.replace_input_with(index, total.outputs[0])
    with pytest.raises(SiteNotFound, match=r"2 branches of its block could be it \('layers\.1\.mlp\.output', 'lora\.out'\)"):
        locate_sites(model, [Site(layer=1, stream="mlp_output")])
    assert find_sites(model)[Site(layer=1)].node.name == "layers.1.output"


def test_an_unsorted_graph_is_refused():
    model = small_decoder()
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    with pytest.raises(GraphError, match=r"stands before Gather\('embedding'\).*topological order"):
        find_sites(model)


def test_a_merged_decoder_is_refused_with_its_remedy():
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
    embedded = ir.node("Cast", [ids], {"to": int(ir.DataType.BOOL)})
    outer = ir.node("If", [embedded.outputs[0]], {"then_branch": ir.Graph([], [], nodes=[], name="empty")}, num_outputs=3)
    for value, name in zip(outer.outputs, ("logits", "present.0.key", "present.1.key"), strict=True):
        value.name = name
    pasts = [ir.Value(name=f"past_key_values.{layer}.key", type=ir.TensorType(ir.DataType.FLOAT)) for layer in range(2)]
    model = ir.Model(ir.Graph([ids, *pasts], list(outer.outputs), nodes=[embedded, outer], opset_imports={"": 18}), ir_version=8)
    with pytest.raises(SiteAmbiguous, match="merged export"):
        find_sites(model)


def test_dominators_of_a_diamond():
    root = ir.Value(name="root")
    top = ir.node("Relu", [root])
    left, right = ir.node("Neg", [top.outputs[0]]), ir.node("Abs", [top.outputs[0]])
    bottom = ir.node("Add", [left.outputs[0], right.outputs[0]])
    graph = ir.Graph([root], [bottom.outputs[0]], nodes=[top, left, right, bottom])
    dominators = Dominators(graph, root)
    assert list(dominators.climb(bottom)) == [bottom, top]
    assert list(dominators.climb(left)) == [left, top]


def test_streams_are_those_of_the_contract():
    assert {site.stream for site in find_sites(small_decoder())} == set(STREAMS)


def _with_fused_attention(model: ir.Model) -> ir.Model:
    """As the genai builder writes it: one GroupQueryAttention node computes the context and the present keys, linears are MatMulNBits."""
    graph = model.graph
    half = ir.Value(name="scales", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([WIDTH, 1]),
                    const_value=ir.tensor(np.ones((WIDTH, 1), np.float16), name="scales"))  # fmt: skip
    graph.register_initializer(half)
    for layer in range(3):
        name = f"layers.{layer}.attention"
        query, key = (_node(model, f"{name}.{part}").outputs[0] for part in ("q", "k"))
        past = next(value for value in graph.inputs if value.name == f"past_key_values.{layer}.key")
        fused = ir.node("GroupQueryAttention", [query, key, key, past], domain="com.microsoft", num_outputs=2, name=f"{name}.gqa")
        fused.outputs[0].name = f"{name}.gqa"
        fused.outputs[1].name = f"present.{layer}.key"
        output = _node(model, f"{name}.output")
        graph.insert_before(output, fused)
        weight = output.inputs[1]
        output.op_type, output.domain = "MatMulNBits", "com.microsoft"
        output.attributes.add(ir.AttrInt64("N", WIDTH))
        output.resize_inputs(3)
        for index, value in enumerate((fused.outputs[0], weight, half)):
            output.replace_input_with(index, value)
        graph.outputs[1 + layer] = fused.outputs[1]
        for part in ("context", "context4", "softmax", "scores", "kt"):
            graph.remove(_node(model, f"{name}.{part}"), safe=True)
        for node in (_node(model, f"present.{layer}.key"), _node(model, f"{name}.q4"), _node(model, f"{name}.k4")):
            graph.remove(node, safe=True)
    return model


@pytest.mark.parametrize("block", ["pre_norm_fused", "pre_norm", "parallel", "after_norm"])
def test_fused_attention_and_quantized_projections(block):
    model = _with_fused_attention(small_decoder(block=block, typed=False, dtype=ir.DataType.FLOAT16))
    found = find_sites(model)
    assert len(found) == 12
    for layer in range(3):
        assert found[Site(layer=layer)].node.name == BLOCK_OUTPUTS[block].format(layer)
        attention = Site(layer=layer, stream="attention_output")
        assert found[attention].node.name == f"layers.{layer}.attention.output"
        assert stream_type(attention, found[attention]) == StreamType(dtype=ir.DataType.FLOAT16, width=WIDTH, rank=3)


def _vector(model: ir.Model, name: str, *shape: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    array = np.full(shape, 0.5).astype(dtype.numpy())
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _put_behind(model: ir.Model, before: str, op: str, *others: ir.Value, name: str, **attributes: int) -> ir.Value:
    """``op`` (value, *others) between the value of the node ``before`` and everything that reads it; nothing declares its shape."""
    value = _node(model, before).outputs[0]
    readers = value.uses()
    node = ir.node(op, [value, *others], attributes, name=name)
    node.outputs[0].name = name
    model.graph.insert_after(value.producer(), node)
    for reader, index in readers:
        reader.replace_input_with(index, node.outputs[0])
    return node.outputs[0]


def _written_otherwise(model: ir.Model, form: str) -> None:
    """Biases of the MLPs as other tools write them."""
    for layer in range(3):
        add = _node(model, f"layers.{layer}.mlp.output")
        bias, array = add.inputs[1], add.inputs[1].const_value.numpy()
        if form == "rank 3":
            add.replace_input_with(1, wide := _vector(model, f"{bias.name}.wide", 1, 1, WIDTH))
            wide.const_value = ir.tensor(array.reshape(1, 1, WIDTH), name=wide.name)
            continue
        attributes = {
            "Constant": {"value": ir.tensor(array)}, "floats": {"value_floats": array.tolist()}, "Cast": {"to": int(ir.DataType.FLOAT)}
        }  # fmt: skip
        op = "Constant" if form == "floats" else form
        node = ir.node(op, [] if op == "Constant" else [bias], attributes.get(form, {}), name=f"{bias.name}.other")
        node.outputs[0].name = node.name
        model.graph.insert_before(add, node)
        add.replace_input_with(1, node.outputs[0])


@pytest.mark.parametrize("block", ["pre_norm", "after_norm"])
@pytest.mark.parametrize("form", ["rank 3", "Constant", "floats", "Identity", "Cast"])
def test_a_bias_is_the_projections_in_whatever_form(block, form):
    model = small_decoder(block=block, typed=False)
    _written_otherwise(model, form)
    found = find_sites(model)
    assert all(found[Site(layer=layer, stream="mlp_output")].value.name == f"layers.{layer}.mlp.output" for layer in range(3))


@pytest.mark.parametrize(("op", "shape"), [("Add", (3, WIDTH)), ("Add", (1,)), ("Add", ()), ("Mul", (WIDTH,)), ("Div", ())])
def test_what_stands_before_an_after_norm_and_is_no_bias_is_not_the_norms(op, shape):
    model = small_decoder(block="after_norm", typed=False)
    _put_behind(model, "layers.1.attention.output", op, _vector(model, "unknown", *shape), name="odd")
    with pytest.raises(SiteNotFound, match=rf"1\.attention_output.*the residual Add stand {op}, and whether.*cannot be told"):
        locate_sites(model, [Site(layer=1, stream="attention_output")])
    assert Site(layer=0, stream="attention_output") in find_sites(model)


@pytest.mark.parametrize("block", ["pre_norm", "after_norm"])
def test_a_projection_in_half_precision_beside_a_stream_in_float32(block):
    # Also where the bias is added in float32; behind it the value is cast back and forth once more.
    model = small_decoder(block=block, typed=False)
    for layer in range(3):
        _put_behind(model, f"layers.{layer}.attention.output", "Cast", name=f"{layer}.up", to=int(ir.DataType.FLOAT))
        _put_behind(model, f"layers.{layer}.mlp.down", "Cast", name=f"{layer}.down", to=int(ir.DataType.FLOAT))
        _put_behind(model, f"layers.{layer}.mlp.output", "Cast", name=f"{layer}.half", to=int(ir.DataType.FLOAT16))
        _put_behind(model, f"{layer}.half", "Cast", name=f"{layer}.full", to=int(ir.DataType.FLOAT))
    found = find_sites(model)
    for layer in range(3):
        assert found[Site(layer=layer, stream="attention_output")].value.name == f"layers.{layer}.attention.output"
        assert found[Site(layer=layer, stream="mlp_output")].value.name == f"layers.{layer}.mlp.output"


@pytest.mark.parametrize("block", ["pre_norm", "pre_norm_fused", "parallel", "after_norm"])
@pytest.mark.parametrize("copied", ["present.{}.key", "layers.{}.attention.k4"])
def test_keys_that_go_out_as_a_side_copy(block, copied):
    # All keys cast for the cache, or only the new ones, as a cache of fixed size takes them.
    model = small_decoder(block=block)
    expected = {site: location.node.name for site, location in find_sites(model).items()}
    for layer in range(3):
        source = _node(model, copied.format(layer)).outputs[0]
        copy = ir.node("Cast", [source], {"to": int(ir.DataType.FLOAT16)}, name=f"{layer}.copy")
        model.graph.insert_after(source.producer(), copy)
        output = next(index for index, value in enumerate(model.graph.outputs) if value.name == f"present.{layer}.key")
        model.graph.outputs[output].name = f"keys.{layer}"
        model.graph.outputs[output] = copy.outputs[0]
        copy.outputs[0].name = f"present.{layer}.key"
    assert {site: location.node.name for site, location in find_sites(model).items()} == expected


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_a_constant_between_the_blocks_is_not_guessed_to_be_theirs(op):
    model = small_decoder()
    for layer in range(2):
        _put_behind(model, f"layers.{layer}.output", op, _vector(model, f"constant.{layer}", WIDTH), name=f"between.{layer}")
    with pytest.raises(SiteAmbiguous, match=rf"output of block 1 is either Add\('layers\.1\.output'\) or {op}\('between\.1'\)"):
        locate_sites(model, [Site(layer=1)])
    found = find_sites(model)
    assert not any(Site(layer=layer) in found for layer in range(3))
    # What a block reads, and what its modules return, is the same either way.
    assert found[Site(layer=1, stream="block_input")].node.name == "between.0"
    assert found[Site(layer=1, stream="mlp_output")].node.name == "layers.1.mlp.output"
    # Behind the last block too, it is part of every block.
    _put_behind(model, "layers.2.output", op, _vector(model, "constant.2", WIDTH), name="between.2")
    found = find_sites(model)
    assert [found[Site(layer=layer)].node.name for layer in range(3)] == [f"between.{layer}" for layer in range(3)]


def _with_one_more_mlp(model: ir.Model, block: str, *, factor: bool = False) -> ir.Model:
    """Another residual branch behind the last block: its own third, or a head's."""
    last = sum(value.name.startswith("present.") for value in model.graph.outputs) - 1
    stream = _node(model, BLOCK_OUTPUTS[block].format(last)).outputs[0]
    readers = stream.uses()
    product = ir.node("MatMul", [stream, _vector(model, "more.weight", WIDTH, WIDTH)], name="more.product")
    nodes = [product]
    if factor:
        nodes.append(ir.node("Mul", [stream, _vector(model, "more.factor")], name="more.scaled"))
    nodes.append(ir.node("Add", [product.outputs[0], nodes[-1].outputs[0] if factor else stream], name="more.output"))
    for node in nodes:
        node.outputs[0].name = node.name
    model.graph.insert_after(stream.producer(), nodes)
    for reader, index in readers:
        reader.replace_input_with(index, nodes[-1].outputs[0])
    return model


@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("block", ["pre_norm", "parallel", "after_norm", "post_norm"])
def test_a_residual_branch_behind_the_last_blocks_likeness_is_not_skipped(block, factor):
    model = _with_one_more_mlp(small_decoder(block=block), block, factor=factor)
    with pytest.raises(SiteAmbiguous, match=rf"last block \(layer 2\) is either .*{BLOCK_OUTPUTS[block][10:]}.* or Add\('more\.output'\)"):
        locate_sites(model, [Site(layer=2)])
    assert find_sites(model)[Site(layer=1)].node.name == BLOCK_OUTPUTS[block].format(1)


@pytest.mark.parametrize("block", ["pre_norm", "parallel", "after_norm"])
def test_a_single_block_and_a_residual_head_are_not_told_apart(block):
    model = _with_one_more_mlp(small_decoder(block=block, layers=1), block)
    with pytest.raises(SiteAmbiguous, match=r"several candidates: Add\('layers\.0\.output'\), Add\('more\.output'\).*two layers or more"):
        locate_sites(model, [Site(layer=0)])


def test_a_single_block_whose_stream_is_scaled_before_each_residual_add():
    # Doge: x * w + branch
    model = small_decoder(layers=1)
    for name in ("layers.0.middle", "layers.0.output"):
        add = _node(model, name)
        index = next(i for i, value in enumerate(add.inputs) if value.producer().name in ("embedding", "layers.0.middle"))
        scaled = ir.node("Mul", [add.inputs[index], _vector(model, f"{name}.weight", WIDTH)], name=f"{name}.scaled")
        scaled.outputs[0].name = scaled.name
        model.graph.insert_before(add, scaled)
        add.replace_input_with(index, scaled.outputs[0])
    found = find_sites(model)
    assert found[Site(layer=0)].node.name == "layers.0.output"
    assert found[Site(layer=0, stream="attention_output")].value.name == "layers.0.attention.output"


def test_a_single_block_and_a_constant_behind_it_are_not_told_apart():
    model = small_decoder(layers=1)
    _put_behind(model, "layers.0.output", "Add", _vector(model, "constant", WIDTH), name="behind")
    with pytest.raises(SiteAmbiguous, match=r"several candidates: Add\('layers\.0\.output'\), Add\('behind'\)"):
        locate_sites(model, [Site(layer=0)])


@pytest.mark.parametrize("layers", [1, 3])
def test_a_final_norm_and_a_head_that_add_branches_are_no_residual_adds(layers):
    # x + x * w in the final norm (Gemma's 1 + w), and a LoRA beside the head.
    model = small_decoder(layers=layers)
    normed = _node(model, "norm").outputs[0]
    scaled = ir.node("Mul", [normed, _vector(model, "one_plus", WIDTH)], name="scaled")
    total = ir.node("Add", [normed, scaled.outputs[0]], name="total")
    lora = ir.node("MatMul", [total.outputs[0], _vector(model, "lora.weight", WIDTH, 11)], name="lora")
    for node in (scaled, total, lora):
        node.outputs[0].name = node.name
    model.graph.insert_after(normed.producer(), [scaled, total, lora])
    head = _node(model, "logits")
    head.replace_input_with(0, total.outputs[0])
    both = ir.node("Add", [head.outputs[0], lora.outputs[0]], name="both")
    model.graph.insert_after(head, both)
    head.outputs[0].name, both.outputs[0].name = "head", "logits"
    model.graph.outputs[0] = both.outputs[0]
    if layers == 1:  # an Add behind a norm: for all that the structure tells, a post-norm block
        with pytest.raises(SiteAmbiguous, match="or the norm behind it"):
            locate_sites(model, [Site(layer=0)])
    else:
        assert find_sites(model)[Site(layer=2)].node.name == "layers.2.output"

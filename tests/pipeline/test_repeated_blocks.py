"""Blocks that are alike are traced few times: the graph is that of the whole model, node for node."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from reft_export.base.memory import share_weights
from reft_export.exporting.alike import Shallow, shallow_copy
from reft_export.exporting.dynamo import export_dynamo
from reft_export.exporting.exported_graph import ExportedGraph
from reft_export.exporting.repeated import NotAlikeError, export_repeated, repeat_blocks

needs_alike_blocks = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="in transformers 4's plain graph a block reads sizes of the one before it, and the whole model is traced",
)
SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def _model(family: str, **settings: Any) -> PreTrainedModel:
    """With other values in every layer, norms too: equal weights would hide that one stands for another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _llama(layers: int = 5) -> PreTrainedModel:
    return _model("llama", num_hidden_layers=layers, **SMALL)


def _export(model: PreTrainedModel, variable=(), *, in_place: bool = False) -> ExportedGraph:
    return export_dynamo(model, variable=variable, in_place=in_place)


def _shallow(model: PreTrainedModel, *, in_place: bool = False) -> tuple[Shallow, ExportedGraph]:
    shallow = shallow_copy(model)
    assert shallow is not None
    own = [name for name, _ in shallow.model.named_parameters(remove_duplicate=False) if name.startswith(f"{shallow.blocks}.")]
    return shallow, _export(shallow.model, own, in_place=in_place)


def _session(graph: ir.Model, folder) -> ort.InferenceSession:
    folder.mkdir()
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
    return ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def _run(graph: ir.Model, folder) -> list[np.ndarray]:
    session = _session(graph, folder)
    generator = np.random.default_rng(0)
    feeds = {"input_ids": generator.integers(0, 60, (2, 3)), "attention_mask": np.ones((2, 7), np.int64)}
    feeds["position_ids"] = np.arange(4, 7)[None].repeat(2, 0)
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = generator.standard_normal((2, value.shape[1], 4, value.shape[3])).astype(np.float32)
    return [np.asarray(output) for output in session.run(None, feeds)]


def _check_same(model: PreTrainedModel, tmp_path) -> None:
    whole = _export(share_weights(model))
    few = export_repeated(share_weights(model), _export)
    assert Counter(node.op_type for node in few.model.graph) == Counter(node.op_type for node in whole.model.graph)
    assert few.weights == whole.weights
    for mine, other in ((few.model.graph.inputs, whole.model.graph.inputs), (few.model.graph.outputs, whole.model.graph.outputs)):
        assert [(value.name, str(value.shape), value.dtype) for value in mine] == [(v.name, str(v.shape), v.dtype) for v in other]
    for mine, other in zip(_run(few.model, tmp_path / "few"), _run(whole.model, tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("in_place", [pytest.param(False, marks=needs_alike_blocks), True])
def test_the_graph_says_what_the_model_says(tmp_path, in_place) -> None:
    model = _llama()
    shallow, exported = _shallow(model, in_place=in_place)
    assert shallow.traced == (0, 1, 2)
    graph = repeat_blocks(exported, shallow, model).model
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.graph) == (5 if in_place else 0)
    ids = np.arange(6)[None].repeat(2, 0)
    feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    feeds |= {f"past_key_values.{layer}.{part}": np.zeros((2, 1, 0, 8), np.float32) for layer in range(5) for part in ("key", "value")}
    expected = model(torch.from_numpy(ids)).logits.numpy()
    (logits, *_) = _session(graph, tmp_path / "few").run(None, feeds)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_the_graph_is_that_of_the_whole_model(tmp_path) -> None:
    _check_same(_llama(), tmp_path)


@pytest.mark.long
def test_layers_of_two_kinds_whose_norms_are_folded(tmp_path) -> None:
    """Gemma adds one to the weight of every norm, and every third layer here looks at all tokens."""
    kinds = ["full_attention" if layer in (2, 4, 7, 8) else "sliding_attention" for layer in range(9)]
    model = _model("gemma3_text", num_hidden_layers=9, head_dim=8, layer_types=kinds, **SMALL)
    assert (shallow := shallow_copy(model)) is not None and shallow.traced == (0, 1, 2, 3, 4, 7)
    _check_same(model, tmp_path)


def test_the_model_itself_stays_as_it_is() -> None:
    model = _llama()
    before = dict(model.named_parameters())
    export_repeated(share_weights(model), lambda traced, _: repeat_nothing(traced))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert all(isinstance(layer.mlp.up_proj, torch.nn.Linear) for layer in model.model.layers)


def repeat_nothing(model: PreTrainedModel) -> ExportedGraph:
    """An exporter that rearranges all it is given, and whose graph shows no blocks."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, torch.nn.Identity())
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="none")
    return ExportedGraph(model=ir.Model(graph, ir_version=10), weights={})


def test_weights_are_the_models_own_memory() -> None:
    model = _llama()
    whole = export_repeated(share_weights(model), _export)
    name = "model.layers.4.mlp.up_proj.weight"
    held = whole.model.graph.initializers[name].const_value
    assert held is not None and np.shares_memory(held.numpy(), model.get_parameter(name).numpy())


def test_a_shallow_base_is_traced_whole() -> None:
    assert shallow_copy(_llama(4)) is None


CHANGES = ("constant", "operator", "attribute", "another layer's weight", "another layer's cache")


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_differ_are_not_repeated(change) -> None:
    """A fault in the third block alone, as of a family whose layers depend on their number."""
    shallow, exported = _shallow(_llama(), in_place=True)
    graph = exported.model.graph
    product = _reader(graph, "model.layers.2.mlp.down_proj.weight")
    cached = _reader(graph, "past_key_values.2.key")
    if change == "constant":
        for layer in (1, 2):
            product = _reader(graph, f"model.layers.{layer}.mlp.down_proj.weight")
            factor = ir.Value(name=f"factor.{layer}", const_value=ir.tensor(np.float32(layer)))
            graph.register_initializer(factor)
            scaled = ir.node("Mul", [product.inputs[0], factor])
            graph.insert_before(product, scaled)
            product.replace_input_with(0, scaled.outputs[0])
    elif change == "operator":
        negated = ir.node("Neg", [product.inputs[0]])
        graph.insert_before(product, negated)
        product.replace_input_with(0, negated.outputs[0])
    elif change == "attribute":
        cached.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 7)
    elif change == "another layer's weight":
        product.replace_input_with(1, graph.initializers["model.layers.1.mlp.down_proj.weight"])
    else:
        at = [value is not None and value.name == "past_key_values.2.key" for value in cached.inputs].index(True)
        cached.replace_input_with(at, next(value for value in graph.inputs if value.name == "past_key_values.1.key"))
    with pytest.raises(NotAlikeError):
        repeat_blocks(exported, shallow, _llama())


def _reader(graph: ir.Graph, name: str) -> ir.Node:
    return next(node for node in graph if any(value is not None and value.name == name for value in node.inputs))


def test_layers_that_know_their_number_are_traced_whole() -> None:
    """Attention scaled by a layer's number, as GPT-2 may have it: no two of its layers are alike then."""
    model = _llama()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.scaling /= number + 1
    assert shallow_copy(model) is None

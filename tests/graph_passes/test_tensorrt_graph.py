"""TensorRT's graph says what the bundle's says: both in onnxruntime, which feeds banks and rules to either."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import rounding
from decoders import ROUNDING as EXPORTED_ROUNDING
from decoders import build_decoder, export_decoder, feeds, session
from small_decoders import ROUNDING, WIDTH, small_decoder, small_feeds
from tensorrt_operators import RELEASES, lacking

from graph_passes.fold import fold_graph
from graph_passes.insert import is_edit
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from graph_passes.unfold import unfold_graph
from runtimes.edits.edit import Site
from runtimes.edits.op import DOMAIN, EXPLICIT_SLOTS, OVERRIDABLE_NUMBERS, PROMPT_LENGTH, RULE_DEFAULTS, SLOT_INPUT, EditNode
from runtimes.edits.positions import PositionRule
from runtimes.errors import EngineError, GraphError

NODES = (
    EditNode(site=Site(layer=0)),
    EditNode(site=Site(layer=1), activation="gelu"),
    EditNode(site=Site(layer=1), activation="relu", activated="first_half"),
    EditNode(site=Site(layer=2, stream="mlp_output")),
)
RULES = {"f2+l1": False, "f1+l3": True, "prompt": True, "all": True}
"""Positions, and whether the adapter is tied."""


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _folded(*, slots: str = "graph", **decoder: object) -> ir.Model:
    """``slots``: "graph" by the rule; "input" without attention_mask, and so an input; "version 1" the input of such a bundle."""
    model = small_decoder(opset=20, mask=slots == "graph", **decoder)
    fold_graph(model, NODES)
    if slots == "version 1":
        next(value for value in model.graph.inputs if value.name == EXPLICIT_SLOTS).name = SLOT_INPUT
    return model


def _slots_fed(slots: str) -> str:
    return SLOT_INPUT if slots == "version 1" else EXPLICIT_SLOTS


def _banks(model: ir.Model, rank: int = 4, slots: int = 2) -> dict[str, np.ndarray]:
    """Random banks as wide as the model's streams."""
    random = np.random.default_rng(7)
    banks = {}
    for value in model.graph.inputs:
        if value.is_initializer() and value.name not in OVERRIDABLE_NUMBERS:
            shape = (slots, rank, *(dim for dim in value.shape if isinstance(dim, int)))
            banks[value.name] = (random.standard_normal(shape) * 0.5).astype(value.dtype.numpy())
    return banks


def _rule(positions: str, *, tied: bool) -> dict[str, np.ndarray]:
    return PositionRule.parse(positions).tensors(tied=tied)


def _run(model: ir.Model, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Every output; refuses a value that the graph has no input for, as onnxruntime does."""
    return session(model).run(None, dict(values))


def _assert_same(model: ir.Model, derived: ir.Model, values: Mapping[str, np.ndarray], fed: Mapping[str, np.ndarray]) -> None:
    for want, got in zip(_run(model, values), _run(derived, fed), strict=True):
        rounding.check(got, want, ROUNDING)


@pytest.mark.parametrize(("positions", "tied"), RULES.items(), ids=RULES)
def test_same_results_with_banks_and_rules_as_inputs(positions: str, tied: bool) -> None:
    model = _folded()
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    values = small_feeds(model) | _banks(model) | _rule(positions, tied=tied) | {PROMPT_LENGTH: np.array([5, 3])}
    assert not np.allclose(_run(model, values)[0], _run(model, small_feeds(model))[0]), "the adapter steers"
    _assert_same(model, derived.model, values, values)


def test_rules_of_the_rows_are_inputs_too() -> None:
    model = _folded()
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    rows = [PositionRule.parse("f1").tensors(tied=True), PositionRule.parse("l2").tensors(tied=True, first_slot=1)]
    mixed = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} | {PROMPT_LENGTH: np.array([5, 3])}
    values = small_feeds(model) | _banks(model) | mixed
    _assert_same(model, derived.model, values, values)
    for row, rule in enumerate(rows):
        alone = {name: values[name][row : row + 1] for name in (*small_feeds(model), PROMPT_LENGTH)} | _banks(model) | rule
        for got, want in zip(_run(derived.model, alone), _run(model, values), strict=True):
            rounding.check(got[0], want[row], ROUNDING)


def test_zero_banks_and_rules_off_are_the_base() -> None:
    """What a session binds where no adapter is active: TensorRT knows no defaults."""
    model = _folded()
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    off = {name: np.array([value]) for name, value in RULE_DEFAULTS.items()}
    zeros = {name: np.zeros((1, 1, WIDTH)[: bank.ndim], bank.dtype) for name, bank in _banks(model).items()}
    for got, want in zip(_run(derived.model, small_feeds(model) | off | zeros), _run(model, small_feeds(model)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("slots", ["input", "version 1"])
def test_slots_as_an_input(slots: str) -> None:
    model = _folded(slots=slots)
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    assert {_slots_fed(slots)} == {t.name for t in derived.inputs if t.name.startswith("reft") and t.dtype == "int32"}
    assert not [t.name for t in derived.inputs if t.name in RULE_DEFAULTS]
    slot = np.array([[0, 1, -1, 7, 1], [1, -1, 0, 0, -1]], np.int32)
    values = small_feeds(model) | _banks(model) | {_slots_fed(slots): slot}
    _assert_same(model, derived.model, values, values)


@pytest.mark.parametrize("slots", ["graph", "input", "version 1"])
def test_a_frozen_adapter(slots: str) -> None:
    """Its banks and rule are constants; the prompt's length, or the slots, stay inputs."""
    model = _folded(slots=slots)
    adapter = _banks(model) | (_rule("f1+l3", tied=False) if slots == "graph" else {})
    derived = derive_tensorrt_graph(_copy(model), plugin=False, freeze=adapter)
    left = PROMPT_LENGTH if slots == "graph" else _slots_fed(slots)
    assert [t.name for t in derived.inputs if t.name.startswith("reft")] == [left]
    given = {PROMPT_LENGTH: np.array([4])} if slots == "graph" else {_slots_fed(slots): np.full((2, 5), 1, np.int32)}
    fed = small_feeds(model) | given
    _assert_same(model, derived.model, fed | adapter, fed)


@pytest.mark.parametrize("slots", ["graph", "input", "version 1"])
def test_a_frozen_base_has_no_edit_left(slots: str) -> None:
    model = _folded(slots=slots)
    derived = derive_tensorrt_graph(_copy(model), plugin=True, freeze={})
    assert derived.edit_nodes == 0 and not [t for t in derived.inputs if t.name.startswith("reft")]
    base = _copy(model)
    unfold_graph(base)
    fed = small_feeds(base)
    _assert_same(base, derived.model, fed, fed)


def test_exact_inputs() -> None:
    derived = derive_tensorrt_graph(_folded(dtype=ir.DataType.FLOAT16), plugin=True)
    found = {t.name: (t.dtype, t.shape) for t in derived.inputs}
    name = "reft.1.block_output.relu_first_half"
    assert found[f"{name}.U"] == found[f"{name}.A"] == ("float16", (f"{name}.N", f"{name}.r", WIDTH))
    assert found[f"{name}.b"] == ("float16", (f"{name}.N", f"{name}.r"))
    assert all(found[rule] == ("int64", (f"{rule}.rows",)) for rule in RULE_DEFAULTS)
    assert len(found) == 2 + 3 + len(RULE_DEFAULTS) + 3 * len(NODES)
    assert [t.name for t in derived.outputs] == ["logits", *(f"present.{i}.key" for i in range(3))]
    assert not set(derived.model.graph.initializers) & set(found), "no input has a default left"
    assert derived.edit_nodes == len(NODES)


def test_with_the_plugin_there_is_no_function_to_fall_back_to() -> None:
    derived = derive_tensorrt_graph(_folded(), plugin=True)
    assert not [key for key in derived.model.functions if key[0] == DOMAIN]
    for node in filter(is_edit, derived.model.graph):
        assert (node.attributes["plugin_namespace"].value, node.attributes["plugin_version"].value) == ("ai.reft", "1")
    expanded = derive_tensorrt_graph(_folded(), plugin=False)
    ops = {node.op_type for function in expanded.model.functions.values() for node in function}
    assert "Where" in ops and not ops & {"NonZero", "GatherND", "ScatterND"}, "the parser refuses what depends on data"


def test_other_initializers_that_are_inputs_become_constants() -> None:
    """As exporters before IR 4 wrote them; the parser makes constants of them too, without saying so."""
    model = _folded()
    weight = model.graph.initializers["head.weight"]
    model.graph.inputs.append(weight)
    derived = derive_tensorrt_graph(model, plugin=True)
    assert "head.weight" not in {t.name for t in derived.inputs}
    assert "head.weight" in derived.model.graph.initializers


def test_quantization_nodes_pass_through() -> None:
    model = _folded()
    head = next(node for node in model.graph if node.name == "logits")
    scale = ir.Value(name="head.scale", const_value=ir.tensor(np.array(0.01, np.float32), name="head.scale"))
    packed = ir.Value(name="head.int8", const_value=ir.tensor(np.ones((WIDTH, 11), np.int8), name="head.int8"))
    for value in (scale, packed):
        value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
        model.graph.register_initializer(value)
    node = ir.node("DequantizeLinear", [packed, scale])
    node.outputs[0].name = "head.dequantized"
    model.graph.insert_before(head, node)
    head.replace_input_with(1, node.outputs[0])
    derived = derive_tensorrt_graph(_copy(model), plugin=False)
    assert "DequantizeLinear" in {node.op_type for node in derived.model.graph}
    values = small_feeds(model) | _banks(model) | _rule("prompt", tied=True) | {PROMPT_LENGTH: np.array([5])}
    _assert_same(model, derived.model, values, values)


def _with_node(op: str, domain: str, opset: int = 20) -> ir.Model:
    model = small_decoder(opset=20)
    fold_graph(model, NODES[:1])
    model.opset_imports[""] = opset
    model.opset_imports[domain] = model.opset_imports.get(domain, 1)
    node = ir.node(op, [model.graph[0].outputs[0]], domain=domain, name="foreign")
    node.outputs[0].name = "foreign"
    model.graph.append(node)
    return model


@pytest.mark.parametrize(
    ("op", "domain", "match"),
    [
        ("MatMulNBits", "com.microsoft", "--scheme qdq-int4"),
        ("DynamicQuantizeLinear", "", "qdq-int4, qdq-int8, fp8"),
        ("GroupQueryAttention", "com.microsoft", r"GroupQueryAttention \(1\) of domain com.microsoft"),
        ("Attention", "", "--opset 20"),
    ],
)
def test_refused_operators(op: str, domain: str, match: str) -> None:
    with pytest.raises(EngineError, match=match) as caught:
        derive_tensorrt_graph(_with_node(op, domain, opset=23 if op == "Attention" else 20), plugin=True)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_fused_graph_is_refused() -> None:
    with pytest.raises(EngineError, match="SkipSimplifiedLayerNormalization"):
        derive_tensorrt_graph(_folded(block="pre_norm_fused"), plugin=True)


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    model = _folded()
    adapter = _banks(model) | _rule("prompt", tied=True)
    name = "reft.0.block_output.U"
    with pytest.raises(GraphError, match="the graph has 'reft.0.block_output.U', the adapter does not"):
        derive_tensorrt_graph(_copy(model), plugin=True, freeze={k: v for k, v in adapter.items() if k != name})
    with pytest.raises(GraphError, match="the adapter has 'reft.9.block_output.U', the graph does not"):
        derive_tensorrt_graph(_copy(model), plugin=True, freeze=adapter | {"reft.9.block_output.U": adapter[name]})
    for wrong in (adapter[name].astype(np.float16), adapter[name][..., :3], adapter[name][0]):
        with pytest.raises(GraphError, match=r"'reft.0.block_output.U' is float.*, the graph reads float32"):
            derive_tensorrt_graph(_copy(model), plugin=True, freeze=adapter | {name: wrong})


SLOW = ("gpt2", "gemma3_text", "opt", "gpt_neox")


@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_exported_families_prefill_and_decode(family: str) -> None:
    """Real exporters' graphs, steered, with what one call leaves in the cache fed to the next; OPT's MLP stream is of rank 2."""
    model = export_decoder(build_decoder(family))
    fold_graph(model, NODES)
    derived = derive_tensorrt_graph(_copy(model), plugin=False).model
    onnx.checker.check_model(ir.to_proto(derived), full_check=True)
    assert [list(lacking(ir.to_proto(derived), operators)) for operators in RELEASES.values()] == [[], []]
    adapter = _banks(model) | _rule("f2+l2", tied=False) | {PROMPT_LENGTH: np.array([6])}
    runs = [session(model), session(derived)]
    names = [output.name for output in runs[0].get_outputs()]
    past: list[dict[str, np.ndarray] | None] = [None, None]
    for ids in (np.array([[5, 9, 2, 7, 1, 8]]), np.array([[4]]), np.array([[3]])):
        got = [dict(zip(names, run.run(None, feeds(run, ids, past=p) | adapter), strict=True)) for run, p in zip(runs, past, strict=True)]
        past = list(got)
        for name in names:
            rounding.check(got[1][name], got[0][name], EXPORTED_ROUNDING, name)


@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt2", "opt", "gpt_neox"))])
def test_new_columns_behind_a_past_with_pads(family: str) -> None:
    """A step gives out what is new; the past it reads is wider than what is in it, pads behind that under a mask of 0."""
    model = export_decoder(build_decoder(family))
    fold_graph(model, NODES)
    derived = derive_tensorrt_graph(_copy(model), plugin=False, new_columns=True)
    assert derived.cache == "columns"
    onnx.checker.check_model(ir.to_proto(derived.model), full_check=True)
    adapter = _banks(model) | _rule("f2+l2", tied=False) | {PROMPT_LENGTH: np.array([6])}
    whole, new = session(model), session(derived.model)
    names = [output.name for output in whole.get_outputs()]
    past: dict[str, np.ndarray] | None = None
    columns = 9
    for ids in (np.array([[5, 9, 2, 7]]), np.array([[1, 8]]), np.array([[4]]), np.array([[3]])):
        fed = feeds(whole, ids, past=past) | adapter
        want = dict(zip(names, whole.run(None, fed), strict=True))
        width = fed["attention_mask"].shape[1] - ids.shape[1]
        if width:
            for name in [name for name in fed if name.startswith("past_key_values.")]:
                fed[name] = np.pad(fed[name], [(0, 0), (0, 0), (0, columns - width), (0, 0)])
            fed["attention_mask"] = np.insert(fed["attention_mask"], [width] * (columns - width), 0, axis=1)
        got = dict(zip(names, new.run(None, fed), strict=True))
        for name in names:
            rounding.check(got[name], want[name] if name == "logits" else want[name][:, :, width:], EXPORTED_ROUNDING, name)
        past = want


def test_a_cache_that_is_no_plain_join_is_given_out_whole() -> None:
    model = _folded()
    key = next(value for value in model.graph.outputs if value.name == "present.1.key")
    key.producer().replace_input_with(1, key.producer().inputs[0])  # the past twice
    before = [value.name for value in model.graph.outputs]
    derived = derive_tensorrt_graph(model, plugin=False, new_columns=True)
    assert derived.cache == "whole"
    assert [record.name for record in derived.outputs] == before


def test_planted_faults_are_seen() -> None:
    """A bank that is not bound, and one that is bound to the wrong node, change the numbers that the tests above compare."""
    model = _folded()
    derived = derive_tensorrt_graph(_copy(model), plugin=False).model
    values = small_feeds(model) | _banks(model) | _rule("prompt", tied=True) | {PROMPT_LENGTH: np.array([5])}
    swapped = values | {"reft.0.block_output.A": values["reft.2.mlp_output.A"]}
    with pytest.raises(AssertionError):
        _assert_same(model, derived, values, swapped)
    with pytest.raises(ValueError, match="reft.0.block_output.A"):
        _run(derived, {k: v for k, v in values.items() if k != "reft.0.block_output.A"})

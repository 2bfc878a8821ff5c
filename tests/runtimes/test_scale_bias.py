"""RED's edit y = scale * h + bias: oracle, composition, banks and the folder of an adapter."""

from __future__ import annotations

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reseal import reseal
from safetensors.numpy import load_file, save_file

from runtimes.artifacts.manifest import NodeRecord, TensorRecord
from runtimes.edits.adapter import BaseModel, load_adapter, save_adapter
from runtimes.edits.edit import STREAMS, LowRankEdit, ScaleBiasEdit, Site, in_sequence
from runtimes.edits.op import RED_TYPE, EditNode, bank_of, edits_of, is_no_edit, no_edit_bank, node_of
from runtimes.errors import AdapterError
from runtimes.files.records import from_json, to_json
from runtimes.tensorrt.adapters import DeviceAdapters

BASE = BaseModel(name="base", fingerprint="f" * 64, num_hidden_layers=tiny.LAYERS, hidden_size=tiny.WIDTH)
NODE = EditNode(site=Site(layer=2, stream="mlp_output"), op=RED_TYPE)


def _edit(seed: int, width: int) -> ScaleBiasEdit:
    g = np.random.default_rng(seed)
    return ScaleBiasEdit(scale=g.standard_normal(width), bias=g.standard_normal(width))


@given(st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_two_in_sequence_are_one(seed, width) -> None:
    first, second = _edit(seed, width), _edit(seed + 1, width)
    h = np.random.default_rng(seed).standard_normal((3, width))
    np.testing.assert_allclose(in_sequence(first, second).apply(h), second.apply(first.apply(h)), rtol=1e-12, atol=1e-12)
    # The order counts: the second's bias is not scaled by the first.
    assert not np.allclose(in_sequence(second, first).apply(h), second.apply(first.apply(h)))


@pytest.mark.parametrize("red_first", [True, False])
def test_two_forms_in_sequence_are_refused(red_first) -> None:
    low_rank = LowRankEdit(U=np.ones((1, 4)), A=np.ones((1, 4)), b=np.ones(1))
    pair = (_edit(0, 4), low_rank) if red_first else (low_rank, _edit(0, 4))
    with pytest.raises(AdapterError, match="cannot be composed into one; make them two adapters"):
        in_sequence(*pair)
    with pytest.raises(AdapterError, match="make them two adapters"):
        bank_of(pair, np.float32)


@pytest.mark.parametrize(
    ("scale", "bias", "message"),
    [
        (np.ones(4), np.ones(3), r"scale \[4\], bias \[3\]"),
        (np.ones((1, 4)), np.ones((1, 4)), "one shape"),
        (np.ones(0), np.ones(0), "one shape"),
        (np.array([1.0, np.nan]), np.zeros(2), "scale holds values that are not finite"),
        (np.ones(2), np.array([np.inf, 0.0]), "bias holds values that are not finite"),
    ],
)
def test_refused_edits(scale, bias, message) -> None:
    with pytest.raises(AdapterError, match=message):
        ScaleBiasEdit(scale=scale, bias=bias)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(["float32", "float16", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_banks_round_once_and_are_read_back(seed, slots, name) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    edits = [_edit(seed + n, 8) for n in range(slots)]
    bank = bank_of(edits, dtype)
    assert [a.shape for a in bank] == [(slots, 8), (slots, 8)] and all(a.dtype == dtype for a in bank)
    for edit, again in zip(edits, edits_of(NODE, bank), strict=True):
        np.testing.assert_array_equal(again.scale, edit.scale.astype(dtype).astype(np.float64))
        np.testing.assert_array_equal(again.bias, edit.bias.astype(dtype).astype(np.float64))


def test_a_bank_of_no_edit_is_the_identity() -> None:
    bank = no_edit_bank(8, np.dtype(np.float16), RED_TYPE)
    assert [(a.shape, set(a.ravel().tolist())) for a in bank] == [((1, 8), {1.0}), ((1, 8), {0.0})]
    h = np.random.default_rng(0).standard_normal((5, 8))
    h[0, :4] = -0.0, 0.0, 1e-300, -np.inf
    assert edits_of(NODE, bank)[0].apply(h).tobytes() == h.tobytes()
    assert is_no_edit(bank, RED_TYPE) and not is_no_edit(bank_of([_edit(0, 8)], np.float32), RED_TYPE)
    assert is_no_edit(no_edit_bank(8, np.dtype(np.float32))) and not is_no_edit((bank[0], bank[0]), RED_TYPE)


def test_overflow_in_half_precision_is_refused() -> None:
    with pytest.raises(AdapterError, match="bias overflows float16"):
        bank_of([ScaleBiasEdit(scale=np.ones(2), bias=np.array([0.0, 1e5]))], np.float16)


def test_nodes_and_their_names() -> None:
    node = node_of(Site(layer=3), _edit(0, 4))
    assert (node.op, node.name, node.overload) == ("RED", "reft.3.block_output.red", "")
    assert node.bank_names == ("reft.3.block_output.red.scale", "reft.3.block_output.red.bias")
    low_rank = EditNode(site=Site(layer=3))
    assert sorted([node, EditNode(site=Site(layer=3), activation="gelu"), low_rank])[::2] == [low_rank, node]
    with pytest.raises(AdapterError, match="RED takes no activation"):
        EditNode(site=Site(layer=0), op=RED_TYPE, activation="gelu")
    with pytest.raises(AdapterError, match="op 'LoRA' is none of ai.reft; known: LoReFT, RED"):
        EditNode(site=Site(layer=0), op="LoRA")


def test_node_records_of_bundles_from_before() -> None:
    """A manifest without the op says LoReFT; one with it comes back as it was written."""
    old = from_json(NodeRecord, {"layer": 1, "stream": "block_output", "activation": "gelu", "activated": "first_half"})
    assert old.node == EditNode(site=Site(layer=1), activation="gelu", activated="first_half")
    assert from_json(NodeRecord, json.loads(json.dumps(to_json(NodeRecord.of(NODE))))).node == NODE


def test_an_engine_without_an_adapter_binds_no_edit() -> None:
    """TensorRT knows no defaults: zeros for every bank would be a scale of zero."""
    inputs = [TensorRecord(name=name, dtype="float16", shape=("N", 8)) for name in NODE.bank_names]
    loaded = SimpleNamespace(inputs={record.name: record for record in inputs})
    bound = DeviceAdapters(SimpleNamespace(nodes=(NODE,)), loaded, None, None)._base()
    for name, want in zip(NODE.bank_names, no_edit_bank(8, np.dtype(np.float16), RED_TYPE), strict=True):
        assert bound[name].tobytes() == want.tobytes() and bound[name].shape == (1, 8)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_folds_to_its_vectors(stream, tied, tmp_path) -> None:
    adapter = tiny.random_adapter(BASE, method="red", tied=tied, stream=stream, positions="f1+l2")
    save_adapter(adapter, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert again.rank == 0 and again.digest == adapter.digest
    for site, edits in again.edits().items():
        for group, edit in zip(again.groups, edits, strict=True):
            for name in ("scale", "bias"):
                key = ".".join(filter(None, (str(site), group, name)))
                np.testing.assert_array_equal(getattr(edit, name), adapter.tensors[key])
    nodes = again.nodes()
    banks = again.banks((*nodes, EditNode(site=Site(layer=1)), EditNode(site=Site(layer=1), op=RED_TYPE)), np.dtype(np.float32))
    assert banks[nodes[0].bank_names[0]].shape == (1 if tied else 2, tiny.WIDTH)
    assert banks["reft.1.block_output.U"].shape == (1, 1, tiny.WIDTH)
    assert (banks["reft.1.block_output.red.scale"] == 1).all() and not banks["reft.1.block_output.red.bias"].any()
    with pytest.raises(AdapterError, match=r"has no edit node reft.0.*red \(2 missing\); export it with this adapter$"):
        again.banks((EditNode(site=Site(layer=0, stream=stream)),), np.dtype(np.float32))


@pytest.mark.parametrize("damage", ["nan", "matrix", "rank one", "missing"])
def test_damaged_folders(damage, tmp_path) -> None:
    save_adapter(tiny.random_adapter(BASE, method="red"), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    tensors, name = load_file(path), "0.block_output.scale"
    if damage == "nan":
        tensors[name][3] = np.nan
    elif damage == "matrix":
        tensors[name] = tensors[name][None].copy()
    elif damage == "rank one":
        tensors[name] = tensors[name][:1].copy()
    else:
        del tensors[name]
    save_file(tensors, path)
    reseal(tmp_path / "a")
    expected = {"nan": "not finite", "matrix": r"shape \[1, 64\], expected \[64\]", "rank one": r"\[1\], expected \[64\]"}
    with pytest.raises(AdapterError, match=expected.get(damage, "missing")):
        load_adapter(tmp_path / "a")


def test_an_activation_is_refused() -> None:
    with pytest.raises(AdapterError, match="red has no learned source for gelu"):
        tiny.random_adapter(BASE, method="red", activation="gelu")

"""The TensorRT plugin of RED: through a stand-in for TensorRT, and in the real TensorRT-RTX. What it shares with LoReFT's, and what both
do in the registries of the lean runtimes, is in test_tensorrt_plugin.py. No engine is executed.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from native_op import DTYPES, ELEMENTS
from native_red import NAMES, PLUGIN, check, draw
from onnx import TensorProto, helper
from plugin_host import BUILD, RUNTIME, Host, Refused
from test_tensorrt_plugin import build_engines

D = 64
H, SLOT = [2, 9, D], [2, 9]
BANKS = [[3, D], [3, D]]


@pytest.fixture
def host(host_library, tensorrt_plugin) -> Host:
    return Host(host_library, tensorrt_plugin, op="RED")


def test_identity(host) -> None:
    """What a node's domain, type and attributes must say for the parser to find this plugin; RED has no attributes of its own."""
    assert host.identity() == "RED|1|ai.reft|"


def test_there_is_nothing_to_serialize(host) -> None:
    for phase in (BUILD, RUNTIME):
        plugin = host.create(phase, unknown=b"whatever")
        for copy in (plugin, host.read_back(plugin), host.clone(plugin), host.attach(plugin)):
            assert host.fields(copy) == {}
            host.destroy(copy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(host, dtype) -> None:
    plugin = host.create()
    types = [dtype, "int32", dtype, dtype]
    assert host.output_type(plugin, types) == dtype
    for position in range(5):
        assert host.supports(plugin, position, [*types, dtype])
        assert not host.supports(plugin, position, [*types, dtype], format=1), "only linear memory"
        other = [*types, dtype]
        other[position] = "int64"
        assert not host.supports(plugin, position, other)
    assert not host.supports(plugin, 0, [*types, dtype, dtype]), "LoReFT's number of inputs"
    host.destroy(plugin)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        (["float32", "int32", "float16", "float16"], "h, scale and bias are float32, float16 and float16, expected one type for all"),
        (["float16", "int32", "float16", "bfloat16"], "h, scale and bias are float16, float16 and bfloat16, expected one type"),
        (["float16", "int64", "float16", "float16"], "slot is int64, expected int32"),
        (["int8", "int32", "int8", "int8"], "h is int8, expected float32, float16 or bfloat16"),
        (["float16", "int32", "float16"], "the node has 3 inputs and 1 outputs, expected h, slot, scale and bias and one output"),
        (["float16", "int32", *["float16"] * 3], "the node has 5 inputs and 1 outputs, expected h, slot, scale and bias and one"),
    ],
)
def test_types_refused(host, types, reason) -> None:
    with pytest.raises(Refused, match=f"^RED plugin, node edit: {reason}"):
        host.output_type(host.create(), types)


@pytest.mark.parametrize("leading", [[18], [2, 9]])
def test_shapes(host, leading) -> None:
    plugin = host.create()
    shapes = [[*leading, D], leading, *BANKS]
    unknown = [[-1] * len(shape) for shape in shapes]
    assert host.output_rank(plugin, shapes) == host.output_rank(plugin, unknown) == len(leading) + 1
    widest = [[*[64] * len(leading), D], [64] * len(leading), [500, D], [500, D]]
    narrowest = [[*[0] * len(leading), D], [0] * len(leading), [1, D], [1, D]]
    host.configure(plugin, narrowest, widest)
    for now in (narrowest, shapes, widest):
        host.shapes(plugin, now)


SHAPES_REFUSED = [
    ([[D], [], *BANKS], r"h has shape \[64\], expected \[tokens, D\] or \[batch, sequence, D\]"),
    ([[1, 2, 9, D], [1, 2, 9], *BANKS], r"h has shape \[1, 2, 9, 64\], expected \[tokens, D\]"),
    ([H, [2, 8], *BANKS], r"slot has shape \[2, 8\], expected \[2, 9\], one slot per token of h \[2, 9, 64\]"),
    ([H, [18], *BANKS], r"slot has shape \[18\], expected \[2, 9\]"),
    ([H, SLOT, [3, 32], BANKS[1]], r"scale has shape \[3, 32\], expected \[N, D\] with D being that of h \[2, 9, 64\]"),
    ([H, SLOT, [3, 4, D], BANKS[1]], r"scale has shape \[3, 4, 64\], expected \[N, D\]"),
    ([H, SLOT, BANKS[0], [2, D]], r"bias has shape \[2, 64\], expected \[3, 64\], the shape of scale"),
    ([H, SLOT, BANKS[0], [3, 32]], r"bias has shape \[3, 32\], expected \[3, 64\]"),
    ([H, SLOT, BANKS[0], [D]], r"bias has shape \[64\], expected \[3, 64\]"),
    ([H, SLOT, [0, D], [0, D]], r"scale has shape \[0, 64\], expected N >= 1 slots; bind a bank \[1, D\] of ones"),
]


@pytest.mark.parametrize(("shapes", "reason"), SHAPES_REFUSED)
def test_shapes_refused(host, shapes, reason) -> None:
    """When the network is put together, for a profile, and when a context sets its shapes."""
    plugin = host.create()
    for ask in (host.output_rank, lambda p, s: host.configure(p, s, s), host.shapes):
        with pytest.raises(Refused, match=f"^RED plugin, node edit: {reason}"):
            ask(plugin, shapes)
    with pytest.raises(Refused, match=reason):
        host.enqueue(plugin, "float16", shapes, [0] * 4, 0, None)


def test_profiles_refused(host) -> None:
    """Where the graph leaves N open, the profile's bounds are what must fit."""
    plugin = host.create()
    host.configure(plugin, [H, SLOT, [1, D], [1, D]], [H, SLOT, [9, D], [9, D]])
    with pytest.raises(Refused, match=r"scale has shape \[0\.\.9, 64\], expected N >= 1 slots"):
        host.configure(plugin, [H, SLOT, [0, D], [0, D]], [H, SLOT, [9, D], [9, D]])
    with pytest.raises(Refused, match=r"bias has shape \[5\.\.8, 64\], expected \[1\.\.4, 64\]"):
        host.configure(plugin, [H, SLOT, [1, D], [5, D]], [H, SLOT, [4, D], [8, D]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(1,), (33,), (2, 17), (0, 3)])
def test_enqueue_forwards_what_it_got(host_library, plugin_on_host, dtype, leading) -> None:
    """Every pointer and size in its place: over the CPU kernels, against float64."""
    host = Host(host_library, plugin_on_host, op="RED")
    feeds = draw(0, leading, 40, 3, dtype)
    y = np.full_like(feeds["h"], 77)
    plugin = host.attach(host.read_back(host.create()))
    shapes = [list(feeds[name].shape) for name in NAMES]
    host.shapes(plugin, shapes)
    host.enqueue(plugin, dtype, shapes, [feeds[name].ctypes.data for name in NAMES], y.ctypes.data, None)
    check(y, feeds, dtype)


def test_a_failed_launch_is_reported(host_library, plugin_on_host) -> None:
    host = Host(host_library, plugin_on_host, op="RED")
    with pytest.raises(Refused, match=r"^RED plugin, node edit: CUDA launch failed: cudaErrorOnPurpose"):
        host.enqueue(host.create(), "float16", [H, SLOT, *BANKS], [16] * 4, 16, 1)


def test_without_a_gpu_the_launch_says_what_is_missing(host) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(Refused, match=r"CUDA launch failed: cudaError\w+ \(.+\); the plugin was compiled for sm 86"):
        host.enqueue(host.create(), "float16", [H, SLOT, *BANKS], [16] * 4, 16, None)


# ---- in the real TensorRT-RTX


def edited_model(
    folder: Path, name: str, dtype: str, rank: int, *, dynamic: bool = False, slots: int = 2, wrong: str = "", **attributes: str
) -> str:
    """x -> Relu -> RED -> Relu, saved with its profile; returns "MODEL:PROFILE". ``wrong`` breaks one rule of the op.

    ``dynamic``: scale and bias are inputs of any N, else constants.
    """
    element = ELEMENTS[dtype]
    leading = ["batch", "sequence"][: rank - 1]
    info = helper.make_tensor_value_info
    slot_type = TensorProto.INT64 if wrong == "int64 slots" else TensorProto.INT32
    inputs = [info("x", element, [*leading, D]), info("slot", slot_type, leading)]
    low, middle, high = ([n] * (rank - 1) for n in (1, 8, 64))
    profile = {"x": [[*low, D], [*middle, D], [*high, D]], "slot": [low, middle, high]}
    initializers = []
    for bank in ("scale", "bias"):
        kind = "float16" if wrong == "mixed types" and bank == "bias" else dtype
        if dynamic:
            inputs.append(info(bank, ELEMENTS[kind], ["slots", D]))
            profile[bank] = [[1, D], [slots, D], [64, D]]
        else:
            values = np.random.default_rng(0).standard_normal((slots, D)).astype(DTYPES[kind])
            initializers.append(helper.make_tensor(bank, ELEMENTS[kind], values.shape, values.tobytes(), raw=True))
    edited = ["h", "slot", "scale"] if wrong == "no bias" else ["h", "slot", "scale", "bias"]
    node = helper.make_node("RED", edited, ["y"], name="edit_of_layer_3", domain="ai.reft", **attributes)
    nodes = [helper.make_node("Relu", ["x"], ["h"]), node, helper.make_node("Relu", ["y"], ["z"])]
    graph = helper.make_graph(nodes, "edit", inputs, [info("z", element, [*leading, D])], initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("ai.reft", 1)]
    model = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), model)
    model.with_suffix(".json").write_text(json.dumps(profile))
    return f"{model}:{model.with_suffix('.json')}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm", [86, 120])
def test_engines(tensorrt_rtx, tensorrt_plugin, tmp_path, sm, dtype) -> None:
    cases = list(product((2, 3), (False, True)))
    models = [edited_model(tmp_path, f"{rank}_{dynamic}", dtype, rank, dynamic=dynamic, **PLUGIN) for rank, dynamic in cases]
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, sm, *models)
    assert [t["plugins"] for t in told] == [1] * 4, printed
    assert all(t["engine"] for t in told), printed
    assert [len(t["inputs"]) for t in told] == [4 if dynamic else 2 for _, dynamic in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"slots": 0}, "scale has shape [0, 64], expected N >= 1 slots"),
        ({"wrong": "mixed types"}, "h, scale and bias are float32, float32 and float16, expected one type for all"),
        ({"wrong": "int64 slots"}, "slot is int64, expected int32"),
        ({"wrong": "no bias"}, "the node has 3 inputs and 1 outputs, expected h, slot, scale and bias and one output"),
    ],
)
def test_refused_with_a_reason(tensorrt_rtx, tensorrt_plugin, tmp_path, case, reason) -> None:
    told, printed = build_engines(tensorrt_rtx, tensorrt_plugin, 89, edited_model(tmp_path, "refused", "float32", 3, **case, **PLUGIN))
    assert not any(t["engine"] for t in told), printed
    assert f"RED plugin, node edit_of_layer_3: {reason}" in printed

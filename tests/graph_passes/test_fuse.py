"""RMS norms and rotary embeddings as one operator each: the same numbers, however they are written; what is another formula stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes.fuse.decoder import fuse_decoder
from graph_passes.fuse.heads import ROTARY
from graph_passes.fuse.norms import NORM

HEADS, KEYS, WIDTH, VOCABULARY = 4, 2, 8, 11
COLUMNS = HEADS * WIDTH
END = np.iinfo(np.int64).max


class Written:
    """A decoder's first attention, operator by operator."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0]

    def constant(self, numbers: object, kind: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(numbers, kind), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.standard_normal(shape), np.float32)

    def number(self, value: float) -> str:
        return self.constant(value, np.float32)

    def slice(self, x: str, start: int, stop: int, step: int = 1) -> str:
        return self.op("Slice", x, *(self.constant([n]) for n in (start, stop, -1, step)))

    def graph(self, attended: str) -> ir.Model:
        def info(name: str, *shape: int | str | None, kind: int = TensorProto.INT64) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, shape)

        caches = [info(name, "b", KEYS, "p", WIDTH, kind=TensorProto.FLOAT) for name in ("past.key", "past.value")]
        inputs = [info("input_ids", "b", "s"), info("attention_mask", "b", "t"), info("position_ids", "b", "s"), *caches]
        outputs = [info(attended, "b", "s", None, kind=TensorProto.FLOAT)]
        # onnx infers nothing behind an operator of onnxruntime's; torch notes its shape down.
        known = [info(n.output[0], "b", "s", COLUMNS, kind=TensorProto.FLOAT) for n in self.nodes if n.domain]
        graph = helper.make_graph(self.nodes, "written", inputs, outputs, self.constants, value_info=known)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return ir.from_proto(onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10)))


Rotate = Callable[[Written, str, str, str], str]


def halves(w: Written, x: str, cos: str, sin: str) -> str:
    turned = w.op("Concat", w.op("Neg", w.slice(x, WIDTH // 2, END)), w.slice(x, 0, WIDTH // 2), axis=-1)
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))


def split_halves(w: Written, x: str, cos: str, sin: str) -> str:
    one = w.op("Split", x, outputs=2, axis=3, num_outputs=2)
    turned = w.op("Concat", w.op("Neg", one[:-1] + "1"), one, axis=3)
    return w.op("Add", w.op("Mul", sin, turned), w.op("Mul", cos, x))


def other_sign(w: Written, x: str, cos: str, sin: str) -> str:
    turned = w.op("Concat", w.slice(x, WIDTH // 2, END), w.op("Neg", w.slice(x, 0, WIDTH // 2)), axis=-1)
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))


def not_rotated(w: Written, x: str, cos: str, sin: str) -> str:
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", x, sin))


def scaled(w: Written, x: str, cos: str, sin: str) -> str:
    return w.op("Mul", halves(w, x, cos, sin), w.number(1.001))


def products(w: Written, x: str, cos: str, sin: str) -> str:
    """Of the columns of each half, with angles of one half."""
    cos, sin = (w.slice(each, 0, WIDTH // 2) for each in (cos, sin))
    one, other = w.slice(x, 0, WIDTH // 2), w.slice(x, WIDTH // 2, WIDTH)
    left = w.op("Sub", w.op("Mul", one, cos), w.op("Mul", other, sin))
    return w.op("Concat", left, w.op("Add", w.op("Mul", other, cos), w.op("Mul", one, sin)), axis=-1)


def interleaved(w: Written, x: str, cos: str, sin: str) -> str:
    pairs = [w.op("Unsqueeze", each, w.constant([-1])) for each in (w.op("Neg", w.slice(x, 1, END, 2)), w.slice(x, 0, END, 2))]
    turned = w.op("Reshape", w.op("Concat", *pairs, axis=-1), w.constant([0, 0, 0, WIDTH]))
    return w.op("Add", w.op("Mul", x, cos), w.op("Mul", turned, sin))


def partial(w: Written, x: str, cos: str, sin: str) -> str:
    rotated, quarter = w.slice(x, 0, WIDTH // 2), WIDTH // 4
    turned = w.op("Concat", w.op("Neg", w.slice(rotated, quarter, END)), w.slice(rotated, 0, quarter), axis=-1)
    rotated = w.op("Add", w.op("Mul", rotated, cos), w.op("Mul", turned, sin))
    return w.op("Concat", rotated, w.slice(x, WIDTH // 2, END), axis=-1)


def written(
    rotate: Rotate,
    *,
    pairs: int = WIDTH // 2,
    repeat: bool = False,
    heads_first: bool = True,
    norm: bool = False,
    swapped: bool = False,
    at: Callable[[Written, str], str] = lambda w, angles: angles,
) -> ir.Model:
    """``repeat``: every angle twice in turn, else one half after the other; ``at``: what is done to the angles."""
    w = Written()
    x = w.op("Gather", w.weight(VOCABULARY, COLUMNS), "input_ids")
    position = w.op("Cast", w.op("Unsqueeze", "position_ids", w.constant([2])), to=TensorProto.FLOAT)
    angles = at(w, w.op("Mul", position, w.constant(1.0 / 7.0 ** np.linspace(0, 1, pairs), np.float32)))
    if repeat:
        twice = w.op("Concat", *[w.op("Unsqueeze", angles, w.constant([3]))] * 2, axis=3)
        angles = w.op("Reshape", twice, w.constant([0, 0, 2 * pairs]))
    else:
        angles = w.op("Concat", angles, angles, axis=-1)
    axis = w.constant([1 if heads_first else 2])
    cos, sin = (w.op("Unsqueeze", w.op(each, angles), axis) for each in (("Sin", "Cos") if swapped else ("Cos", "Sin")))
    given = []
    for heads, turns in ((HEADS, True), (KEYS, True), (KEYS, False)):
        y = w.op("Add", w.op("MatMul", x, w.weight(COLUMNS, heads * WIDTH)), w.weight(heads * WIDTH))
        y = w.op("Reshape", y, w.constant([0, 0, heads, WIDTH]))
        y = w.op("Transpose", y, perm=[0, 2, 1, 3]) if heads_first else y
        if norm and turns:
            y = rms(w, y, WIDTH)
        y = rotate(w, y, cos, sin) if turns else y
        y = w.op("Transpose", y, perm=[0, 2, 1, 3]) if heads_first else y
        given.append(w.op("Reshape", y, w.constant([0, 0, heads * WIDTH])))
    lengths = w.op(
        "Cast", w.op("Sub", w.op("ReduceSum", "attention_mask", w.constant([1]), keepdims=0), w.constant(1)), to=TensorProto.INT32
    )
    total = w.op("Cast", w.op("Squeeze", w.op("Shape", "attention_mask", start=1, end=2)), to=TensorProto.INT32)
    heads = {"num_heads": HEADS, "kv_num_heads": KEYS}
    attended = w.op("GroupQueryAttention", *given, "past.key", "past.value", lengths, total, outputs=3, domain="com.microsoft", **heads)
    back = w.op("Reshape", w.op("Reshape", attended, w.constant([0, 0, HEADS, WIDTH])), w.constant([0, 0, COLUMNS]))
    return w.graph(w.op("MatMul", back, w.weight(COLUMNS, COLUMNS)))


def rms(w: Written, x: str, width: int, *, power: float = 2.0, shared: bool = False, form: str = "reciprocal") -> str:
    square = w.op("Mul", x, x) if form == "divided" else w.op("Pow", x, w.number(power))
    root = w.op("Sqrt", w.op("Add", w.op("ReduceMean", square, w.constant([-1])), w.number(1e-5)))
    normed = w.op("Div", x, root) if form == "divided" else w.op("Mul", w.op("Reciprocal", root), x)
    if form == "unweighted":
        return normed
    y = w.op("Mul", w.weight(width), normed)
    return w.op("Add", y, normed) if shared else y


def run(graph: ir.Model, rows: int = 2) -> np.ndarray:
    """Two rows of unequal length, and what they would be fed a step later."""
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])[:rows]
    feeds = {"input_ids": np.arange(5 * rows).reshape(rows, 5) % VOCABULARY, "attention_mask": mask}
    feeds["position_ids"] = np.arange(5)[None] + np.array([[0], [70]])[:rows]
    feeds |= {name: np.zeros((rows, KEYS, 0, WIDTH), np.float32) for name in ("past.key", "past.value")}
    (found,) = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
    return np.asarray(found)[mask > 0]


def fused(graph: ir.Model) -> Counter[str]:
    """The operators that are left; what they compute is what was computed before."""
    before = [run(graph, rows) for rows in (1, 2)]
    fuse_decoder(graph)
    for rows, expected in zip((1, 2), before, strict=True):
        found = run(graph, rows)
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    return Counter(node.op_type for node in graph.graph)


@pytest.mark.parametrize(
    "settings",
    [
        {"rotate": halves},
        {"rotate": halves, "heads_first": False},
        {"rotate": halves, "norm": True},
        {"rotate": halves, "at": lambda w, angles: w.op("Mul", angles, w.number(0.25))},
        {"rotate": halves, "at": lambda w, angles: w.op("Mul", angles, w.op("ReduceMax", angles, w.constant([0, 1, 2])))},
        {"rotate": split_halves},
        {"rotate": products},
        {"rotate": partial, "pairs": WIDTH // 4},
        {"rotate": interleaved, "repeat": True},
    ],
    ids=["halves", "heads last", "norms", "scaled positions", "all positions", "split", "products", "partial", "interleaved"],
)
def test_every_way_to_rotate(settings) -> None:
    left = fused(written(**settings))
    assert left[ROTARY] == 2 and not left["Neg"] and left["Add"] == 3, "two rotations, and three biases"
    assert left["Reshape"] <= (7 if settings.get("norm") else 5) and not left["Transpose"], (
        "no head is moved where the operator takes columns as they come"
    )
    assert left[NORM] == (2 if settings.get("norm") else 0)


@pytest.mark.parametrize("settings", [{"rotate": lambda w, x, cos, sin: x}, {"rotate": lambda w, x, cos, sin: x, "heads_first": False}])
def test_without_positions_nothing_is_left(settings) -> None:
    left = fused(written(**settings))
    assert not left[ROTARY] and not left["Reshape"] and not left["Transpose"]


@pytest.mark.parametrize(
    "settings",
    [
        {"rotate": other_sign},
        {"rotate": not_rotated},
        {"rotate": scaled},
        {"rotate": halves, "repeat": True},
        {"rotate": interleaved},
    ],
    ids=["other sign", "not rotated", "scaled", "halves of repeated angles", "pairs of halved angles"],
)
def test_another_formula_stays(settings) -> None:
    assert not fused(written(**settings))[ROTARY]


def test_sines_for_cosines_are_told_apart() -> None:
    """Which of the two tables is which comes from the arithmetic, not from names: this is a rotation by another angle."""
    assert fused(written(halves, swapped=True))[ROTARY] == 2


@pytest.mark.parametrize("form", ["reciprocal", "divided", "unweighted"])
def test_every_way_to_norm(form) -> None:
    w = Written()
    x = w.op("Gather", w.weight(VOCABULARY, COLUMNS), "input_ids")
    left = fused(w.graph(rms(w, x, COLUMNS, form=form)))
    assert left == {"Gather": 1, NORM: 1}


def test_the_fused_norm_has_the_epsilon_of_the_written_one() -> None:
    """Beside rows that are nearly zero, where it is all there is."""
    w = Written()
    x = w.op("Mul", w.op("Gather", w.weight(VOCABULARY, COLUMNS), "input_ids"), w.number(1e-3))
    graph = w.graph(rms(w, x, COLUMNS))
    assert fused(graph)[NORM] == 1
    (norm,) = (node for node in graph.graph if node.op_type == NORM)
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-5)


@pytest.mark.parametrize("settings", [{"power": 3.0}, {"shared": True}])
def test_another_norm_stays(settings) -> None:
    w = Written()
    x = w.op("Abs", w.op("Gather", w.weight(VOCABULARY, COLUMNS), "input_ids"))
    left = fused(w.graph(rms(w, x, COLUMNS, **settings)))
    assert left[NORM] == (1 if settings.get("shared") else 0)
    assert left["Mul"] == (1 if settings.get("shared") else 2), "the product with a weight stays where others read what it multiplies"

"""Decoders of a few dozen nodes, written by hand, in the block layouts that real exporters produce; they run in onnxruntime."""

from __future__ import annotations

import zlib

import numpy as np
import onnx_ir as ir
import rounding

from runtimes.edits.op import EXPLICIT_SLOTS, OVERRIDABLE_NUMBERS, SLOT_INPUT

WIDTH = 8
VOCABULARY = 11
ROUNDING = 2 * rounding.logits(2 * WIDTH, layers=3)
"""How far two runs of one such decoder, computed in another order, may be apart."""
EVERY_TOKEN = {EXPLICIT_SLOTS: np.zeros((1, 1), np.int32)}
"""Fed to a folded model: bank 0 edits every token."""


class _Builder:
    def __init__(self, dtype: ir.DataType, opset: int, seed: int) -> None:
        self.dtype = dtype
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def add(self, op: str, *inputs: ir.Value | None, name: str, domain: str = "", outputs: int = 1, **attributes) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, domain=domain, name=name, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs[0]

    def weight(self, name: str, *shape: int, scale: float = 0.4) -> ir.Value:
        return self.constant(name, (self.random.standard_normal(shape) * scale).astype(np.float32), self.dtype)

    def constant(self, name: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.initializers.append(value)
        return value

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        weight = self.weight(f"{name}.weight", WIDTH, scale=1.0)
        return self.add("SimplifiedLayerNormalization", x, weight, name=name, axis=-1, epsilon=1e-5)

    def attention(self, x: ir.Value, layer: int, past: ir.Value) -> ir.Value:
        """One head without a mask, keys used as values: enough to tie logits to present.<layer>.key."""
        name = f"layers.{layer}.attention"
        key = self.add("MatMul", x, self.weight(f"{name}.k.weight", WIDTH, WIDTH), name=f"{name}.k")
        query = self.add("MatMul", x, self.weight(f"{name}.q.weight", WIDTH, WIDTH), name=f"{name}.q")
        key = self.add("Unsqueeze", key, self.head_axis, name=f"{name}.k4")
        query = self.add("Unsqueeze", query, self.head_axis, name=f"{name}.q4")
        present = self.add("Concat", past, key, name=f"present.{layer}.key", axis=2)
        transposed = self.add("Transpose", present, name=f"{name}.kt", perm=[0, 1, 3, 2])
        scores = self.add("Softmax", self.add("MatMul", query, transposed, name=f"{name}.scores"), name=f"{name}.softmax", axis=-1)
        context = self.add("MatMul", scores, present, name=f"{name}.context4")
        context = self.add("Squeeze", context, self.head_axis, name=f"{name}.context")
        return self.add("MatMul", context, self.weight(f"{name}.o.weight", WIDTH, WIDTH), name=f"{name}.output")

    def mlp(self, x: ir.Value, layer: int) -> ir.Value:
        name = f"layers.{layer}.mlp"
        up = self.add("MatMul", x, self.weight(f"{name}.up.weight", WIDTH, 2 * WIDTH), name=f"{name}.up")
        hidden = self.add("Relu", up, name=f"{name}.relu")
        down = self.add("MatMul", hidden, self.weight(f"{name}.down.weight", 2 * WIDTH, WIDTH), name=f"{name}.down")
        return self.add("Add", down, self.weight(f"{name}.down.bias", WIDTH), name=f"{name}.output")

    def experts(self, x: ir.Value, layer: int, *, kind: str) -> ir.Value:
        """Two experts that take every token, and but for ``kind`` experts a third beside their sum: sum_e (x E_e) [+ x S].

        reshaped_experts puts a Reshape behind that Add, as families do that flatten the tokens.
        """
        name = f"layers.{layer}.mlp"
        first = self.constant(f"{name}.first_axis", np.array([0]), ir.DataType.INT64)
        each = [self.add("MatMul", x, self.weight(f"{name}.{e}.weight", WIDTH, WIDTH), name=f"{name}.{e}") for e in range(2)]
        stacked = self.add("Concat", *(self.add("Unsqueeze", e, first, name=f"{e.name}.row") for e in each), name=f"{name}.rows", axis=0)
        routed = self.add("ReduceSum", stacked, first, name=f"{name}.output" if kind == "experts" else f"{name}.routed", keepdims=0)
        if kind == "experts":
            return routed
        beside = self.add("MatMul", x, self.weight(f"{name}.shared.weight", WIDTH, WIDTH), name=f"{name}.shared")
        if kind != "reshaped_experts":
            return self.add("Add", routed, beside, name=f"{name}.output")
        same = self.constant(f"{name}.same_shape", np.array([0, 0, 0]), ir.DataType.INT64)
        return self.add("Reshape", self.add("Add", routed, beside, name=f"{name}.both"), same, name=f"{name}.output")

    def skip_norm(self, x: ir.Value, branch: ir.Value, name: str, *, write_sum: bool) -> tuple[ir.Value, ir.Value | None]:
        weight = self.weight(f"{name}.weight", WIDTH, scale=1.0)
        outputs = 4 if write_sum else 1
        normed = self.add(
            "SkipSimplifiedLayerNormalization", x, branch, weight, name=name, domain="com.microsoft", outputs=outputs, epsilon=1e-5
        )  # fmt: skip
        node = self.nodes[-1]
        if not write_sum:
            return normed, None
        node.outputs[1].name = node.outputs[2].name = ""
        return normed, node.outputs[3]


def small_decoder(
    *,
    layers: int = 3,
    block: str = "pre_norm",
    dtype: ir.DataType = ir.DataType.FLOAT,
    opset: int = 18,
    seed: int = 0,
    typed: bool = True,
    mask: bool = True,
) -> ir.Model:
    """input_ids, attention_mask, past_key_values.<i>.key -> logits, present.<i>.key.

    ``block``: pre_norm, pre_norm_fused (skip norms, the last without its sum), post_norm, parallel, parallel_late (x + attention
    first), after_norm (a norm on each branch), scaled (a scalar on each branch), experts, shared_experts, reshaped_experts,
    scaled_experts (a sum over experts for an MLP; with a shared one beside it, a Reshape or a scalar behind it). ``typed=False``
    leaves types and shapes of inner values out, as optimized graphs do. ``mask=False`` leaves attention_mask out, which nothing reads.
    """
    build = _Builder(dtype, opset, seed)
    build.head_axis = build.constant("head_axis", np.array([1]), ir.DataType.INT64)

    def graph_input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    ids = graph_input("input_ids", ir.DataType.INT64, "batch", "sequence")
    masks = [graph_input("attention_mask", ir.DataType.INT64, "batch", "total")] if mask else []
    pasts = [graph_input(f"past_key_values.{layer}.key", dtype, "batch", 1, "past", WIDTH) for layer in range(layers)]
    table = build.weight("embedding.weight", VOCABULARY, WIDTH, scale=1.0)
    x = build.add("Gather", table, ids, name="embedding")
    normed = build.norm(x, "layers.0.norm") if block == "pre_norm_fused" else None

    for layer in range(layers):
        name = f"layers.{layer}"
        if block == "pre_norm_fused":
            attention = build.attention(normed, layer, pasts[layer])
            normed, x = build.skip_norm(x, attention, f"{name}.norm_2", write_sum=True)
            mlp = build.mlp(normed, layer)
            normed, x = build.skip_norm(x, mlp, f"{name}.next_norm", write_sum=layer + 1 < layers)
        elif block == "post_norm":
            x = build.norm(build.add("Add", x, build.attention(x, layer, pasts[layer]), name=f"{name}.add_1"), f"{name}.norm_1")
            x = build.norm(build.add("Add", x, build.mlp(x, layer), name=f"{name}.add_2"), f"{name}.norm_2")
        elif block.startswith("parallel"):
            normed = build.norm(x, f"{name}.norm")
            attention, mlp = build.attention(normed, layer, pasts[layer]), build.mlp(normed, layer)
            first, second = (x, attention) if block == "parallel_late" else (mlp, attention)
            inner = build.add("Add", first, second, name=f"{name}.add_1")
            x = build.add("Add", inner, mlp if block == "parallel_late" else x, name=f"{name}.output")
        else:
            attention = build.attention(build.norm(x, f"{name}.norm_1"), layer, pasts[layer])
            x = build.add("Add", x, _behind(build, attention, f"{name}.attention", block), name=f"{name}.middle")
            normed = build.norm(x, f"{name}.norm_2")
            experts = block.endswith("experts")
            mlp = build.experts(normed, layer, kind=block) if experts else build.mlp(normed, layer)
            x = build.add("Add", _behind(build, mlp, f"{name}.mlp", block), x, name=f"{name}.output")

    if block == "pre_norm_fused":
        last = normed
    else:
        last = x if block == "post_norm" else build.norm(x, "norm")
    logits = build.add("MatMul", last, build.weight("head.weight", WIDTH, VOCABULARY), name="logits")
    logits.type, logits.shape = ir.TensorType(dtype), ir.Shape(["batch", "sequence", VOCABULARY])
    presents = [value for node in build.nodes for value in node.outputs if (value.name or "").startswith("present.")]
    for value in presents:
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(["batch", 1, "total", WIDTH])
    if typed:
        for node in build.nodes:
            for value in node.outputs:
                if value.name and value.type is None and (node.op_type in ("Add", "Gather") or "Norm" in node.op_type):
                    value.type, value.shape = ir.TensorType(dtype), ir.Shape(["batch", "sequence", WIDTH])
    graph = ir.Graph(
        [ids, *masks, *pasts], [logits, *presents], nodes=build.nodes, initializers=build.initializers,
        opset_imports={"": opset, "com.microsoft": 1}, name="decoder",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def _behind(build: _Builder, branch: ir.Value, name: str, block: str) -> ir.Value:
    if block == "after_norm":
        return build.norm(branch, f"{name}.after_norm")
    if block == "scaled" or (block == "scaled_experts" and name.endswith("mlp")):
        return build.add("Mul", branch, build.constant(f"{name}.scale", np.array(0.5), build.dtype), name=f"{name}.scaled")
    return branch


def small_feeds(model: ir.Model, *, batch: int = 2, sequence: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a prefill without padding; slots of a graph that takes them select bank 0 everywhere."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (batch, sequence))
    taken = {value.name for value in model.graph.inputs if not value.is_initializer()}
    feeds = {"input_ids": ids}
    if "attention_mask" in taken:
        feeds["attention_mask"] = np.ones((batch, sequence), np.int64)
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values."):
            feeds[value.name] = np.zeros((batch, 1, 0, WIDTH), value.dtype.numpy())
    for name in taken & {EXPLICIT_SLOTS, SLOT_INPUT}:
        feeds[name] = np.zeros((batch, sequence), np.int32)
    return feeds


def random_banks(model: ir.Model, *, seed: int = 0, slots: int = 1, rank: int = 2) -> dict[str, np.ndarray]:
    """Values for every bank of a folded model; a bank's values depend on its name and the seed alone."""
    banks = {}
    for value in model.graph.inputs:
        if value.name and value.is_initializer() and value.name not in OVERRIDABLE_NUMBERS:
            random = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
            sizes = iter((slots, rank))
            shape = [dim if isinstance(dim, int) else next(sizes) for dim in value.shape]
            banks[value.name] = (random.standard_normal(shape) * 0.5).astype(value.dtype.numpy())
    return banks

"""Decoders of a few dozen nodes with the structure that TensorRT-Edge-LLM's exporter gives them; and a stand-in for its attention.

Written by hand after real exports of tensorrt_edgellm 0.7 to 0.11: inputs, outputs, their order and types, AttentionPlugin's operands,
norms taken apart into float32 operators, the exporter's scopes. "padded" is the layout to 0.10, "tokens" that from 0.11, whose
stream is [T, 1, D]; "flat" is the same with a stream [T, D].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

WIDTH, HEADS, VOCABULARY = 16, 2, 11
HEAD = WIDTH // HEADS
LAYOUTS = ("padded", "tokens", "flat")


@dataclass(kw_only=True)
class _Builder:
    dtype: ir.DataType
    random: np.random.Generator
    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)

    def add(self, op: str, *inputs: ir.Value, name: str, scope: str = "", outputs: int = 1, domain: str = "", **attributes) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"node_{name}", num_outputs=outputs, domain=domain)
        node.outputs[0].name = name
        scopes = ["", *([scope] if scope else []), name]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(scopes)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        self.initializers.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.constant(name, (self.random.standard_normal(shape) * 0.3).astype(self.dtype.numpy()))

    def norm(self, x: ir.Value, weight: ir.Value, name: str, scope: str) -> ir.Value:
        wide = self.add("Cast", x, name=f"{name}.wide", scope=scope, to=int(ir.DataType.FLOAT))
        square = self.add("Pow", wide, self.two, name=f"{name}.square", scope=scope)
        mean = self.add("ReduceMean", square, self.last_axis, name=f"{name}.mean", scope=scope, keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.epsilon, name=f"{name}.add", scope=scope), name=f"{name}.root", scope=scope)
        scaled = self.add("Mul", wide, self.add("Reciprocal", root, name=f"{name}.rsqrt", scope=scope), name=f"{name}.scaled", scope=scope)
        narrow = self.add("Cast", scaled, name=f"{name}.narrow", scope=scope, to=int(self.dtype))
        return self.add("Mul", weight, narrow, name=f"{name}.normed", scope=scope)


def edge_decoder(layout: str = "padded", *, layers: int = 3, dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 20) -> ir.Model:
    """inputs_embeds, past_key_values_<i>, rope_rotary_cos_sin, the layout's lengths -> logits, present_key_values_<i>."""
    build = _Builder(dtype=dtype, random=np.random.default_rng(0))
    build.two = build.constant("two", np.float32(2))
    build.epsilon = build.constant("epsilon", np.float32(1e-6))
    build.last_axis, one = build.constant("last_axis", np.array([-1])), build.constant("one", np.array([1]))
    i32, i64, f32 = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT

    def graph_input(name: str, dtype: ir.DataType, *shape: str | int) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    padded = layout == "padded"
    tokens: tuple[str, ...] = ("batch", "seq_len") if padded else ("physical_tokens",)
    stream_dims = ("physical_tokens", 1) if layout == "tokens" else tokens
    embeds = graph_input("inputs_embeds", dtype, *tokens, WIDTH)
    pasts = [graph_input(f"past_key_values_{i}", dtype, "batch", 2, HEADS, "past_len", HEAD) for i in range(layers)]
    if padded:
        rope = graph_input("rope_rotary_cos_sin", f32, "rope_batch", "max_pos", HEAD)
        named = [graph_input("context_lengths", i32, "batch"), graph_input("kvcache_start_index", i32, "kv_batch")]
        selected = graph_input("last_token_ids", i64, "batch", 1)
        metadata = [named[0], rope, named[1]]
    else:
        rope = graph_input("rope_rotary_cos_sin", f32, "physical_tokens", HEAD)
        named = [graph_input("positions", i32, "physical_tokens"), graph_input("query_start_offsets", i32, "num_sequences + 1")]
        for name in ("query_lengths", "past_lengths", "attention_sequence_lengths", "state_indices"):
            named.append(graph_input(name, i32, "num_sequences"))
        named.append(graph_input("execution_phase_marker", i32, "execution_phase_extent"))
        named.append(graph_input("context_sequence_count_carrier", i32, "num_context_sequences"))
        named.append(graph_input("kv_page_table", i32, "num_sequences", 2, "max_pages_per_seq"))
        selected = graph_input("logits_indices", i64, "num_sequences")
        values = {value.name: value for value in named}
        metadata = [values["query_lengths"], rope, values["past_lengths"], values["kv_page_table"], values["query_start_offsets"]]
        names = ("attention_sequence_lengths", "execution_phase_marker", "context_sequence_count_carrier")
        metadata += [values[name] for name in names]

    x = build.add("Unsqueeze", embeds, one, name="unsqueeze") if layout == "tokens" else embeds
    block_shape = ir.Shape([*stream_dims, WIDTH])
    norm_weight = build.weight("_model.model.layers.0.input_layernorm.weight", WIDTH)
    flat = build.constant("flat", np.array([-1, 3 * WIDTH]))
    joined = build.constant("joined", np.array([0, 0, WIDTH] if padded else [-1, 1, WIDTH] if layout == "tokens" else [-1, WIDTH]))
    presents = []
    for layer in range(layers):
        scope = f"_model.model.layers.{layer}"
        # From 0.11 the exporter traces another method of the block, whose own nodes have no scope.
        own = scope if padded else ""
        normed = build.norm(x, norm_weight, f"norm_{layer}", f"{scope}.input_layernorm")
        inner = f"{scope}.self_attn"
        qkv = build.add("MatMul", normed, build.weight(f"qkv_{layer}", WIDTH, 3 * WIDTH), name=f"linear_{layer}", scope=inner)
        if not padded:
            qkv = build.add("Reshape", qkv, flat, name=f"view_{layer}", allowzero=1)
        attention = build.add(
            "AttentionPlugin", qkv, pasts[layer], *metadata, name=f"getitem_{layer}", outputs=2, domain="trt_edgellm",
            num_q_heads=HEADS, num_kv_heads=HEADS, head_size=HEAD,
        )  # fmt: skip
        present = build.nodes[-1].outputs[1]
        present.name, present.type, present.shape = f"present_key_values_{layer}", ir.TensorType(dtype), pasts[layer].shape
        presents.append(present)
        attention = build.add("Reshape", attention, joined, name=f"attn_{layer}", scope=inner)
        output = build.add("MatMul", attention, build.weight(f"o_{layer}", WIDTH, WIDTH), name=f"o_proj_{layer}", scope=inner)
        x = build.add("Add", x, output, name=f"add_{2 * layer}", scope=own)
        normed = build.norm(x, norm_weight, f"post_{layer}", f"{scope}.post_attention_layernorm")
        gate = build.add("MatMul", normed, build.weight(f"gate_{layer}", WIDTH, 2 * WIDTH), name=f"gate_proj_{layer}", scope=f"{scope}.mlp")
        up = build.add("Mul", gate, build.add("Sigmoid", gate, name=f"sigmoid_{layer}", scope=f"{scope}.mlp"), name=f"silu_{layer}")
        down = build.add("MatMul", up, build.weight(f"down_{layer}", 2 * WIDTH, WIDTH), name=f"down_proj_{layer}", scope=f"{scope}.mlp")
        x = build.add("Add", x, down, name=f"add_{2 * layer + 1}", scope=own)
        for value in (x, build.nodes[-1].inputs[0]):
            value.type, value.shape = ir.TensorType(dtype), block_shape
    final = build.norm(x, norm_weight, "norm", "_model.model.norm")
    if padded:
        indices = build.add("Unsqueeze", selected, build.last_axis, name="indices_3d")
        last = build.add("GatherND", final, indices, name="gather_nd", batch_dims=1)
    else:
        rows = build.add("Reshape", final, build.constant("rows", np.array([-1, WIDTH])), name="view_last")
        last = build.add("Gather", rows, selected, name="index_select", axis=0)
    head = build.add("MatMul", last, build.weight("_model.lm_head.weight", WIDTH, VOCABULARY), name="linear_last")
    logits = build.add("Cast", head, name="logits", to=int(f32))
    logits.type = ir.TensorType(f32)
    logits.shape = ir.Shape(["batch", 1, VOCABULARY] if padded else ["num_sequences", VOCABULARY])
    graph = ir.Graph(
        [embeds, *pasts, rope, *named, selected], [logits, *presents], nodes=build.nodes, initializers=build.initializers,
        opset_imports={"": opset, "trt_edgellm": 1}, name="main_graph",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def attention_stand_in(model: ir.Model) -> None:
    """Gives ``model`` a function under the name of TensorRT-Edge-LLM's plugin, so that onnxruntime can run it. Not attention: every token
    gets its own first D of [Q | K | V] back, in heads, and the cache stays as it is."""
    node = next(node for node in model.graph if node.op_type == "AttentionPlugin")
    inputs = [ir.Value(name=f"in_{index}") for index in range(len(node.inputs))]
    heads, head = (node.attributes.get_int(name) for name in ("num_q_heads", "head_size"))
    rank = 3 if "context_lengths" in {value.name for value in model.graph.inputs} else 2

    def constant(values: list[int]) -> ir.Node:
        return ir.node("Constant", [], {"value": ir.tensor(np.array(values))})

    start, stop, axis, shape = (constant(values) for values in ([0], [heads * head], [-1], [0] * (rank - 1) + [heads, head]))
    query = ir.node("Slice", [inputs[0], start.outputs[0], stop.outputs[0], axis.outputs[0]])
    split = ir.node("Reshape", [query.outputs[0], shape.outputs[0]])
    cache = ir.node("Identity", [inputs[1]])
    nodes = [start, stop, axis, shape, query, split, cache]
    for index, each in enumerate(nodes):
        each.outputs[0].name = f"value_{index}"
    body = ir.Graph(inputs, [split.outputs[0], cache.outputs[0]], nodes=nodes, opset_imports={"": model.opset_imports[""]}, name="stand_in")
    attributes = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in node.attributes]
    function = ir.Function(node.domain, node.op_type, "", graph=body, attributes=attributes)
    model.functions[function.identifier()] = function


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    """A session over ``model`` with the stand-in; ``model`` is not changed."""
    model = ir.from_proto(ir.to_proto(model))
    if any(node.op_type == "AttentionPlugin" for node in model.graph):
        attention_stand_in(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence in one call: tokens in the cache, new tokens."""

    past: int
    new: int


def lengths_of(layout: str, rows: list[Row], *, decode: bool) -> dict[str, np.ndarray]:
    """What TensorRT-Edge-LLM's runtime binds for one call, by its sources (stepPreparer.cpp; phaseRaggedMetadata.cpp)."""
    past, new = (np.array([getattr(row, name) for row in rows], np.int32) for name in ("past", "new"))
    if layout == "padded":
        counts = past + 1 if decode else new
        return {"context_lengths": counts, "kvcache_start_index": past if past.any() else past[:0]}
    width = int(new.max())
    positions = np.full((len(rows), width), -1, np.int32)
    for index, row in enumerate(rows):
        positions[index, : row.new] = row.past + np.arange(row.new)
    return {
        "positions": positions.reshape(-1),
        "query_start_offsets": np.arange(len(rows) + 1, dtype=np.int32) * width,
        "query_lengths": new,
        "past_lengths": past,
        "attention_sequence_lengths": past + new,
        "state_indices": np.arange(len(rows), dtype=np.int32),
        "execution_phase_marker": np.zeros(3 if decode else 2 if past.any() else 1, np.int32),
        "context_sequence_count_carrier": np.zeros(0 if decode else len(rows), np.int32),
        "kv_page_table": np.zeros((len(rows), 2, 1), np.int32),
    }


def edge_feeds(model: ir.Model, layout: str, rows: list[Row], *, decode: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """All inputs of one call; the embeddings of padding are noise, as the runtime leaves them."""
    shapes = {value.name: value for value in model.graph.inputs}
    width = shapes["inputs_embeds"].shape[-1]
    dtype = shapes["inputs_embeds"].dtype.numpy()
    longest = max(row.new for row in rows)
    embeds = np.random.default_rng(seed).standard_normal((len(rows), longest, width)).astype(dtype)
    last = np.array([row.new - 1 for row in rows], np.int64)
    feeds = {"inputs_embeds": embeds if layout == "padded" else embeds.reshape(-1, width), **lengths_of(layout, rows, decode=decode)}
    if layout == "padded":
        feeds["last_token_ids"] = last[:, None]
    else:
        feeds["logits_indices"] = feeds["query_start_offsets"][:-1].astype(np.int64) + last
    for name, value in shapes.items():
        if name not in feeds:
            sizes = [dim if isinstance(dim, int) else 1 for dim in value.shape]
            feeds[name] = np.zeros(sizes, value.dtype.numpy())
    return {name: array for name, array in feeds.items() if name in shapes}


def checked(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto

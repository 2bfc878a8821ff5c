"""A two-layer decoder with learned positions, masked attention and a KV cache, twice: in numpy without a cache, and as a bundle.

The numpy side is float64, one unpadded row at a time: it knows nothing of caches, pads, chunks or slots in a graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import rounding
import tokenizers
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tokenizers import decoders, models, pre_tokenizers, trainers

from graph_passes.first_logit import remove_first_logit
from graph_passes.fold import fold_graph
from graph_passes.slots.add import rule_names, rules_of
from graph_passes.slots.rule import SLOT_VALUE
from runtimes.artifacts.adapter_record import AdapterRecord, write_adapter_record
from runtimes.artifacts.bundle import Bundle, bank_file, open_bundle
from runtimes.artifacts.manifest import Manifest, ModelRecord, NodeRecord, TensorRecord, write_manifest
from runtimes.artifacts.ort_adapter_file import write_onnx_adapter
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import Site
from runtimes.edits.op import (
    EXPLICIT_SLOTS,
    FIRST_LOGIT,
    FIRST_SLOT,
    OVERRIDABLE_NUMBERS,
    PROMPT_LENGTH,
    RULE_DEFAULTS,
    SLOT_INPUT,
    EditNode,
)
from runtimes.edits.positions import PositionRule, slots

WIDTH = 16
LAYERS = 2
ROUNDING = 10 * rounding.logits(WIDTH, LAYERS)
"""Of a session on this decoder. It has no norms: scores of up to ten make a softmax ten times as sensitive as its inputs are exact."""
CONTEXT = 64
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Größe, naïve café — 你好世界 🙂", "a b c d e f g, a stop here"]
PROMPTS = ("The fox", "Hi", "a lazy dog jumps over the quick brown fox")
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def toy_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE with <s>, </s> and a bos-free encoding; some characters are several tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:1] * 4, trainer)
    return tokenizer


VOCABULARY = toy_tokenizer().get_vocab_size()


@dataclass(frozen=True)
class ToyDecoder:
    weights: dict[str, np.ndarray]

    @classmethod
    def random(cls, seed: int = 0) -> ToyDecoder:
        random = np.random.default_rng(seed)
        square = {f"{i}.{n}": (WIDTH, WIDTH) for i in range(LAYERS) for n in ("q", "k", "v", "o", "up", "down")}
        shapes = {"embed": (VOCABULARY, WIDTH), "places": (CONTEXT, WIDTH), "head": (WIDTH, VOCABULARY), **square}
        scale = {"embed": 1.0, "places": 0.5, "head": 0.25}
        return cls({n: (random.standard_normal(s) * scale.get(n, 0.35)).astype(np.float32) for n, s in shapes.items()})

    def logits(
        self, tokens: list[int], adapter: Adapter | None = None, prompt_length: int | None = None, strength: float = 1.0
    ) -> np.ndarray:
        """[S, V] of one whole row: block output = x + tanh(x up) down after x = h + softmax(causal q k^T / 4) v o.

        ``strength``: of what the adapter's edits add.
        """
        w = {n: x.astype(np.float64) for n, x in self.weights.items()}
        h = w["embed"][tokens] + w["places"][: len(tokens)]
        slot = np.full(len(tokens), -1)
        if adapter is not None:
            length = np.array([prompt_length or len(tokens)])
            slot = slots(adapter.where, np.ones((1, len(tokens))), len(tokens), tied=adapter.tied, prompt_length=length)[0]
        for i in range(LAYERS):
            scores = (h @ w[f"{i}.q"]) @ (h @ w[f"{i}.k"]).T / np.sqrt(WIDTH)
            scores = np.where(np.tri(len(tokens)) > 0, scores, -np.inf)
            share = np.exp(scores - scores.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
            h = h + share @ (h @ w[f"{i}.v"]) @ w[f"{i}.o"]
            h = h + np.tanh(h @ w[f"{i}.up"]) @ w[f"{i}.down"]
            edits = {} if adapter is None else adapter.edits()
            for s, edit in enumerate(edits.get(Site(layer=i), ())):
                h = h + strength * np.where((slot == s)[:, None], edit.apply(h) - h, 0)
        return h @ w["head"]

    def greedy(self, prompt: list[int], count: int, adapter: Adapter | None = None, strength: float = 1.0) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, adapter, len(prompt), strength)[-1].argmax()))
        return tokens[len(prompt) :]

    def graph(self, *, precision: str = "fp32", logits: str = "all", position_ids: bool = True, in_place: bool = False) -> onnx.ModelProto:
        """``in_place``: its attention is GroupQueryAttention, over which a session can write the KV cache in place."""
        t = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}[precision]
        inputs = ["int64[B, S] input_ids", "int64[B, T] attention_mask", *(["int64[B, S] position_ids"] if position_ids else [])]
        inputs += [f'{t}[B, 1, P, {WIDTH}] "past_key_values.{i}.{n}"' for i in range(LAYERS) for n in ("key", "value")]
        outputs = [f"{t}[B, {'S' if logits == 'all' else 1}, {VOCABULARY}] logits"]
        outputs += [f'{t}[B, 1, T, {WIDTH}] "present.{i}.{n}"' for i in range(LAYERS) for n in ("key", "value")]
        column = "Range(before, all, one)"
        # GroupQueryAttention takes a row's tokens as the first ones of its cache, wherever they stand in the mask.
        where = "position_ids" if position_ids else "ranks" if in_place else "columns"
        blocks = "".join((_fused_block if in_place else _block)(i) for i in range(LAYERS))
        keep = f"out = Slice(h{LAYERS}, minus_ones, ends, axis)" if logits == "last" else f"out = Identity(h{LAYERS})"
        text = f"""<ir_version: 10, opset_import: ["" : 20{', "com.microsoft" : 1' if in_place else ""}]>
            toy ({", ".join(inputs)}) => ({", ".join(outputs)}) {{
              zero = Constant<value_int = 0>()  one = Constant<value_int = 1>()  axis1 = Constant<value_ints = [1]>()
              axis = Constant<value_ints = [1]>()  axis2 = Constant<value_ints = [2]>()  axis3 = Constant<value_ints = [3]>()
              minus_ones = Constant<value_ints = [-1]>()  ends = Constant<value_ints = [9223372036854775807]>()
              shape = Shape(attention_mask)  all = Gather(shape, one)  ids_shape = Shape(input_ids)  size = Gather(ids_shape, one)
              before = Sub(all, size)  columns = {column}  every = Range(zero, all, one)
              query = Unsqueeze(columns, axis1)  causal = LessOrEqual(every, query)
              bool_mask = Cast<to = 9>(attention_mask)  keys = Unsqueeze(bool_mask, axis1)  seen2 = And(keys, causal)
              seen = Unsqueeze(seen2, axis1)
              {_LENGTHS if in_place else ""}
              word = Gather(embed, input_ids)  place = Gather(places, {where})  h0 = Add(word, place)
              {blocks}
              {keep}
              logits = MatMul(out, head)
            }}"""
        model = onnx.parser.parse_model(text)
        dtype = DTYPES[precision]
        constants = {**self.weights, "scale": np.array(1 / np.sqrt(WIDTH)), "never": np.array(-1e4)}
        for name, value in constants.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        onnx.checker.check_model(model, full_check=True)
        return model


_LENGTHS = """
    zero1 = Constant<value_ints = [0]>()  counted = CumSum(attention_mask, one)  rank = Sub(counted, one)
    positive = Max(rank, zero)  first = Unsqueeze(before, zero1)  ranks = Slice(positive, first, ends, axis1)
    tokens = ReduceSum<keepdims = 0>(attention_mask, axis1)  last = Sub(tokens, one)
    past_lengths = Cast<to = 6>(last)  total = Cast<to = 6>(all)"""
"""What GroupQueryAttention is told of every row: its tokens less one, and how wide the mask is."""


def _block(i: int) -> str:
    x, past = f"h{i}", f"past_key_values.{i}"
    return f"""
        q{i} = MatMul({x}, "{i}.q")  k{i} = MatMul({x}, "{i}.k")  v{i} = MatMul({x}, "{i}.v")
        qh{i} = Unsqueeze(q{i}, axis1)  kh{i} = Unsqueeze(k{i}, axis1)  vh{i} = Unsqueeze(v{i}, axis1)
        "present.{i}.key" = Concat<axis = 2>("{past}.key", kh{i})  "present.{i}.value" = Concat<axis = 2>("{past}.value", vh{i})
        kt{i} = Transpose<perm = [0, 1, 3, 2]>("present.{i}.key")  raw{i} = MatMul(qh{i}, kt{i})  scaled{i} = Mul(raw{i}, scale)
        masked{i} = Where(seen, scaled{i}, never)  share{i} = Softmax<axis = -1>(masked{i})
        context{i} = MatMul(share{i}, "present.{i}.value")  flat{i} = Squeeze(context{i}, axis1)
        {_rest(i)}"""


def _fused_block(i: int) -> str:
    past, present = f"past_key_values.{i}", f"present.{i}"
    return f"""
        q{i} = MatMul(h{i}, "{i}.q")  k{i} = MatMul(h{i}, "{i}.k")  v{i} = MatMul(h{i}, "{i}.v")
        flat{i}, "{present}.key", "{present}.value" = com.microsoft.GroupQueryAttention<num_heads = 1, kv_num_heads = 1>(
          q{i}, k{i}, v{i}, "{past}.key", "{past}.value", past_lengths, total)
        {_rest(i)}"""


def _rest(i: int) -> str:
    x = f"h{i}"
    return f"""attended{i} = MatMul(flat{i}, "{i}.o")
        x{i} = Add({x}, attended{i})  up{i} = MatMul(x{i}, "{i}.up")  act{i} = Tanh(up{i})  mlp{i} = MatMul(act{i}, "{i}.down")
        h{i + 1} = Add(x{i}, mlp{i})"""


def toy_adapter(
    positions: str = "f2+l2",
    *,
    tied: bool = True,
    seed: int = 1,
    rank: int = 2,
    strength: float = 1.0,
    activation: str = "",
    last: str = "",
) -> Adapter:
    """``last``: positions of the last layer, where they are others."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for group in ("",) if tied else ("prefix.", "suffix."):
            rotation = np.linalg.qr(random.standard_normal((WIDTH, rank)))[0].T
            values = {"R": rotation, "W": random.standard_normal((rank, WIDTH)) * 0.3, "b": random.standard_normal(rank) * strength}
            tensors |= {f"{layer}.block_output.{group}{n}": v.astype(np.float32) for n, v in values.items()}
    return Adapter(
        method="loreft",
        rank=rank,
        sites=tuple(Site(layer=i) for i in range(LAYERS)),
        positions=PositionRule.parse(positions),
        rules={Site(layer=LAYERS - 1): PositionRule.parse(last)} if last else {},
        tied=tied,
        activation=activation,
        base=BaseModel(name="toy", fingerprint="0" * 64, num_hidden_layers=LAYERS, hidden_size=WIDTH),
        tensors=tensors,
    )


ADAPTERS = {
    "ends": toy_adapter("f2+l2", tied=False),
    "prompt": toy_adapter("prompt", seed=2, rank=3),
    "all": toy_adapter("all", seed=3, rank=1),
}
EXPLICIT = {"sets": toy_adapter("l1", seed=4, rank=1, last="all"), "chosen": toy_adapter("1,-2", seed=5, rank=1)}
"""Whose slots no graph computes."""


def golden_arrays(
    decoder: ToyDecoder, name: str, adapters: dict[str, Adapter], *, float32_arrays: bool = False, probes: bool = True
) -> dict[str, np.ndarray]:
    """What the host records of the eager model: here of the numpy decoder, all columns of its small vocabulary. ``probes``: the rows are
    taken for probes of the adapters."""
    tokenizer = toy_tokenizer()
    prompts = [tokenizer.encode(p).ids for p in PROMPTS]
    rows = [p + decoder.greedy(p, 5) for p in prompts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    positions = np.argwhere(mask > 0)[::2]
    adapter = adapters.get(name)

    def said(adapter: Adapter | None) -> dict[str, np.ndarray]:
        whole = [decoder.logits(row, adapter, len(p)) for row, p in zip(rows, prompts, strict=True)]
        logits = np.stack([whole[r][c] for r, c in positions])
        best = np.argsort(-logits, 1)[:, :8]
        answers = [x[len(p) - 1 : -1] - _logsumexp(x[len(p) - 1 : -1])[:, None] for x, p in zip(whole, prompts, strict=True)]
        tokens = [x[np.arange(len(x)), r[-len(x) :]] for x, r in zip(answers, rows, strict=True)]
        return {
            "logits": logits.astype(np.float32),
            "best_tokens": best,
            "best_logits": np.take_along_axis(logits, best, 1).astype(np.float32),
            "logsumexp": _logsumexp(logits),
            "log_probabilities": np.concatenate(tokens).astype(np.float32),
        }

    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_length": np.array([len(p) for p in prompts]),
        "logit_positions": positions,
        "logit_columns": np.tile(np.arange(VOCABULARY), (len(positions), 1)),
        "greedy_tokens": np.array([decoder.greedy(p, 12, adapter) for p in prompts]),
        **said(adapter),
    }
    if adapter is not None:
        base = said(None)
        arrays |= {f"base_{n}": base[n] for n in ("logits", "log_probabilities")}
        # The decoder is float64: what it says is what any float type is held to.
        own = ("logits", "best_tokens", "best_logits", "logsumexp", "log_probabilities", "base_logits", "base_log_probabilities")
        arrays |= {f"fp32_{n}": arrays[n] for n in own} if float32_arrays else {}
    return {n: a for n, a in arrays.items() if not n.endswith("log_probabilities") or (probes and adapter is not None)}


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    return np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)


def write_toy_bundle(
    folder: Path,
    *,
    precision: str = "fp32",
    logits: str = "all",
    slot_mode: str = "graph",
    position_ids: bool = True,
    adapters: dict[str, Adapter] | None = None,
    decoder: ToyDecoder | None = None,
    float32_arrays: bool = False,
    one_rule: bool = False,
    in_place: bool = False,
) -> Bundle:
    """``slot_mode``: "input" is a graph of version 1 that takes its slots. ``one_rule``: one of version 1 with the rule.
    ``float32_arrays``: the golden arrays of a bundle that is not float32, as one in half precision has them anyway. ``in_place``: as of
    ToyDecoder.graph."""
    decoder = decoder or ToyDecoder.random()
    adapters = ADAPTERS if adapters is None else adapters
    folder.mkdir(parents=True)
    linear = {EditNode(site=Site(layer=i)) for i in range(LAYERS)}
    nodes = tuple(sorted(linear | {node for adapter in adapters.values() for node in adapter.nodes()}))
    model = ir.from_proto(decoder.graph(precision=precision, logits=logits, position_ids=position_ids, in_place=in_place))
    fold_graph(model, nodes)
    if slot_mode == "input":
        take_slots(model)
    if one_rule:
        share_rule(model.graph)
    ir.save(model, folder / "model.onnx")
    for name, adapter in adapters.items():
        write_adapter_record(folder, name, AdapterRecord.of(adapter))
        tensors = adapter.banks(nodes, np.dtype(DTYPES[precision]))
        tensors |= {name: number for name, number in adapter.rule_tensors().items() if name in rule_names(model.graph)}
        write_onnx_adapter(folder / bank_file(name, adapter.where), tensors)
    (folder / "golden").mkdir()
    half = float32_arrays or precision != "fp32"
    for name in ("base", *adapters):
        np.savez(folder / "golden" / f"{name}.npz", **golden_arrays(decoder, name, adapters, float32_arrays=half))
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    manifest = Manifest(
        created_by="tests",
        model=ModelRecord(
            name="toy",
            model_type="toy",
            fingerprint="0" * 64,
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            context_length=CONTEXT,
            eos_token_ids=(1,),
        ),
        precision=precision,
        quantization=None,
        exporter="foreign",
        opset=20,
        ir_version=10,
        logits=logits,
        slots=slot_mode,
        rules=rules_of(model.graph),
        inputs=records(value for value in model.graph.inputs if not value.is_initializer()),
        outputs=records(model.graph.outputs),
        nodes=tuple(map(NodeRecord.of, nodes)),
        adapters=tuple(adapters),
        parity_budget={},
        weights={},
        genai="a toy",
        padding="none" if in_place else "left",
        kv_cache="in-place" if in_place else "appended",
    )
    write_manifest(folder, manifest)
    return open_bundle(folder)


def records(values: Iterable[ir.Value]) -> tuple[TensorRecord, ...]:
    return tuple(
        TensorRecord(name=v.name, dtype=v.dtype.name.lower(), shape=tuple(d if isinstance(d, int) else str(d.value) for d in v.shape))
        for v in values
    )


def take_slots(model: ir.Model) -> None:
    """Makes of a folded graph what ``export --slots input`` made in version 1: no rule, an input reft_slot."""
    graph = model.graph
    remove_first_logit(graph)
    rule = next(value for node in graph for value in node.outputs if value.name == SLOT_VALUE)
    slot = ir.Value(name=SLOT_INPUT, type=rule.type, shape=rule.shape)
    ir.convenience.replace_all_uses_with(rule, slot)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if value.name in OVERRIDABLE_NUMBERS]:
        graph.inputs.remove(value)
        graph.initializers.pop(value.name, None)
    graph.inputs.append(slot)


def share_rule(graph: ir.Graph) -> None:
    """Makes of a folded graph one as of version 1: a rule [1] for all rows, and nothing that came later can be overridden."""
    for value in list(graph.inputs):
        if value.name in (FIRST_SLOT, EXPLICIT_SLOTS, FIRST_LOGIT):
            graph.inputs.remove(value)
        elif value.name in RULE_DEFAULTS and value.name != PROMPT_LENGTH:
            value.shape = ir.Shape([1])


def change_manifest(bundle: Bundle, **changes: object) -> Bundle:
    """The same files under a manifest that says something else."""
    write_manifest(bundle.folder, replace(bundle.manifest, **changes))
    return open_bundle(bundle.folder)

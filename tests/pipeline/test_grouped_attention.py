"""``--target``: attention as one operator over a KV cache that can be written in place, wherever that computes what the family does."""

from __future__ import annotations

import inspect
import subprocess
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from models import bases
from other_onnxruntime import python_with
from transformers import PreTrainedModel

from graph_passes.cache_shapes import ATTENTION
from graph_passes.fuse.heads import ROTARY
from graph_passes.fuse.norms import NORM
from reft_export.exporting import dynamo, grouped_attention
from reft_export.exporting.dynamo import cache_shapes, export_dynamo
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.exporting.grouped_attention import LayerAttention, NotGroupedError, probe
from runtimes.errors import ParityError

ROWS, PROMPT = 2, (24, 7)
SCALE = 0.25
"""One over the root of the tiny bases' head width, 16."""


def probed(family: str, **overrides: object) -> list[LayerAttention]:
    """Without a graph: seconds less, and all that decides whether there will be one."""
    model = bases.build_base(family, overrides=overrides)
    caches = [torch.empty(1, heads, 0, width) for pair in cache_shapes(model) for heads, width in pair]
    return probe(model, caches, takes_positions="position_ids" in inspect.signature(model.forward).parameters)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", [LayerAttention(scale=SCALE)] * 2),
        ("mistral", [LayerAttention(scale=SCALE, window=bases.WINDOW)] * 2),
        ("gemma2", [LayerAttention(scale=SCALE, window=bases.WINDOW, softcap=50.0), LayerAttention(scale=SCALE, softcap=50.0)]),
        ("gemma3_text", [LayerAttention(scale=SCALE, window=bases.WINDOW)] * 2),
        ("granite", [LayerAttention(scale=0.015)] * 2),
        ("gpt2", [LayerAttention(scale=SCALE)] * 2),
    ],
)
def test_every_layer_is_read_off_the_model(family, layers) -> None:
    assert probed(family) == layers


@pytest.mark.parametrize(
    ("family", "overrides", "why"),
    [
        ("bloom", {}, "does not go through transformers' attention interface"),
        ("deepseek_v3", {}, "changes keys or values after they are cached|its keys are 24 wide and its values 16"),
        ("gpt_oss", {}, "its attention takes s_aux"),
        ("doge", {}, "its own code does not run with another attention"),
        ("llama", {"head_dim": 12}, "its heads are 12 wide, no multiple of 8"),
    ],
)
def test_what_the_operator_cannot_say_is_told_before_tracing(family, overrides, why) -> None:
    with pytest.raises(NotGroupedError, match=why):
        probed(family, **overrides)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda options: options | {"scaling": options["scaling"] * 1.01}, "computes something else"),
        (lambda options: options | {"softcap": 20.0}, "computes something else"),
        (lambda options: options | {"alibi": torch.ones(1)}, "its attention takes alibi"),
    ],
)
def test_an_attention_that_says_something_else_of_itself(fault, why, monkeypatch) -> None:
    """The probe holds what the function was told against what the decoder computes."""
    right = grouped_attention._attend
    monkeypatch.setattr(grouped_attention, "_attend", lambda *inputs, **options: right(*inputs, **fault(options)))
    with pytest.raises(NotGroupedError, match=why):
        probed("llama")


@pytest.mark.parametrize(("allows", "window"), [(lambda b, h, q, k: k <= q, -1), (lambda b, h, q, k: (k <= q) & (k > q - 40), 40)])
def test_masks_are_told_by_what_they_allow(allows, window) -> None:
    assert grouped_attention._window(allows, 40, 512) == window


@pytest.mark.parametrize(
    "allows",
    [
        lambda b, h, q, k: q >= 0 * k,  # bidirectional
        lambda b, h, q, k: (k <= q) & (k > q - 41),  # another window than the config's
        lambda b, h, q, k: (k <= q) & (k // 40 == q // 40),  # chunks
        lambda b, h, q, k: (k <= q) & (k > q - 400),  # one that the config does not tell
        lambda b, h, q, k: (k <= q) | (k < 5),  # a prefix
    ],
)
def test_other_masks_are_refused(allows) -> None:
    with pytest.raises(NotGroupedError, match="neither causal nor a sliding window"):
        grouped_attention._window(allows, 40, 512)


def run_graph(graph: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def beyond_the_window(model: PreTrainedModel, graph: ir.Model) -> float:
    """Largest relative logit error of a right-padded prefill and one decode step, against each row alone by eager PyTorch."""
    tokens = torch.randint(0, 100, (ROWS, max(PROMPT) + 1), generator=torch.Generator().manual_seed(0))
    lengths = np.array(PROMPT)[:, None]
    mask = (np.arange(max(PROMPT)) < lengths).astype(np.int64)
    past = {i.name: np.zeros([ROWS, i.shape[1], 0, i.shape[3]], np.float32) for i in graph.graph.inputs if i.name.startswith("past")}
    feeds = {"input_ids": tokens[:, : max(PROMPT)].numpy(), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0)}
    taken = {value.name for value in graph.graph.inputs}
    first = run_graph(graph, {k: v for k, v in (feeds | past).items() if k in taken})
    cache = {name.replace("present", "past_key_values"): array for name, array in first.items() if name != "logits"}
    # A row's past first, its new token in the last column, zeros between.
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    step = {"input_ids": np.take_along_axis(tokens.numpy(), lengths, 1), "attention_mask": mask, "position_ids": lengths}
    second = run_graph(graph, {k: v for k, v in (step | cache).items() if k in taken})
    worst = 0.0
    for row, length in enumerate(PROMPT):
        with torch.no_grad():
            expected = model(input_ids=tokens[row : row + 1, : length + 1], use_cache=False).logits[0].numpy()
        found = np.concatenate([first["logits"][row, :length], second["logits"][row]])
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize(
    "family",
    ["gemma2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "mistral", "gemma3_text", "gpt2", "phi", "cohere2"))],
)
def test_the_traced_graph_is_the_eager_model(family) -> None:
    """Sliding windows, soft caps, heads of keys shared or not: rows of unequal length, prefilled and decoded together."""
    model = bases.build_base(family)
    eager = bases.build_base(family)
    exported = export_dynamo(model, in_place=True)
    assert exported.note == ""
    operators = Counter(node.op_type for node in exported.model.graph)
    assert operators[ATTENTION] == 2 and not operators["Softmax"] and not operators["Where"], "no attention and no mask is written out"
    # Positions are learned in GPT-2; of Cohere 2's layers those that see everything have none.
    assert not operators["Neg"] and operators[ROTARY] == {"gpt2": 0, "cohere2": 2}.get(family, 4), "nor is a rotary embedding"
    assert not operators["Sqrt"], "nor a norm"
    caches = [value for value in exported.model.graph.inputs if value.name.startswith("past")]
    assert all([use.node.op_type for use in value.uses()] == [ATTENTION] for value in caches)
    assert model.config._attn_implementation == eager.config._attn_implementation, "the model's own attention is back"
    assert beyond_the_window(eager, exported.model) < 2e-5


def test_targets(bundle_folder) -> None:
    plain = ir.load(bundle_folder("llama", target="tensorrt") / "model.onnx")
    assert not {node.op_type for node in plain.graph} & {ATTENTION, NORM, ROTARY}
    fused = ir.load(bundle_folder("llama") / "model.onnx")
    operators = Counter(node.op_type for node in fused.graph)
    assert (operators[ATTENTION], operators[NORM], operators[ROTARY]) == (3, 7, 6) and fused.opset_imports["com.microsoft"] == 1


def _wrong_epsilon(graph: ir.Model) -> None:
    for node in graph.graph:
        if node.op_type == NORM:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def _sines_for_cosines(graph: ir.Model) -> None:
    for node in graph.graph:
        if node.op_type == ROTARY:
            cos, sin = node.inputs[2:4]
            node.replace_input_with(2, sin)
            node.replace_input_with(3, cos)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_wrong_epsilon, _sines_for_cosines])
def test_a_wrong_fusion_does_not_pass_the_gate(fault, tmp_path, monkeypatch) -> None:
    right = dynamo.fuse_decoder

    def wrong(graph: ir.Model) -> None:
        right(graph)
        fault(graph)

    monkeypatch.setattr(dynamo, "fuse_decoder", wrong)
    base = bases.save_base(tmp_path / "base", "llama", layers=1)
    with pytest.raises(ParityError):
        export_bundle(str(base), [], tmp_path / "b", ExportSettings(), report=lambda _: None)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_plain_graph_where_the_operator_does_not_fit(tmp_path) -> None:
    """By itself, in one line that says why."""
    narrow = bases.save_base(tmp_path / "narrow", "llama", layers=1, overrides={"head_dim": 12})
    result = export_bundle(str(narrow), [], tmp_path / "b", ExportSettings(), report=lambda _: None)
    assert result.parity.passed and result.manifest.padding == "left"
    assert result.note == "the KV cache is copied at every step, not written in place: its heads are 12 wide, no multiple of 8"


@pytest.mark.slow
def test_a_decoder_that_torch_cannot_trace_so_gets_the_plain_graph(monkeypatch) -> None:
    """As one that reads its cache beside its attention."""
    right = grouped_attention._operator

    def reads_the_cache(cache, layer, query, *rest):
        return right(cache, layer, query + layer.keys.sum(), *rest)

    monkeypatch.setattr(grouped_attention, "_operator", reads_the_cache)
    exported = export_dynamo(bases.build_base("llama", layers=1), in_place=True)
    assert exported.note.endswith("past_key_values.0.key is read by others than its attention")
    assert ATTENTION not in {node.op_type for node in exported.model.graph}


OPENED_ELSEWHERE = """
import sys
import numpy as np, onnxruntime as ort
graph, feeds, out = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
np.save(out, session.run(["logits"], dict(np.load(feeds)))[0])
"""


@pytest.mark.slow
def test_the_oldest_onnxruntime_has_all_of_its_operators(bundle_folder, tmp_path) -> None:
    graph = bundle_folder("llama") / "model.onnx"
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    ids = np.arange(9)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    feeds |= {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    (expected,) = session.run(["logits"], feeds)
    np.savez(tmp_path / "feeds.npz", **feeds)
    command = [python_with("1.18.1"), "-c", OPENED_ELSEWHERE, graph, tmp_path / "feeds.npz", tmp_path / "logits.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "logits.npy")
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

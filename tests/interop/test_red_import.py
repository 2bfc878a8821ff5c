"""RED: the authors' delta_vector.pth against a model wrapped as their code wraps it, and plain scales and biases against a hook by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cases import BASE, TOLERANCE
from rounding import distance
from safetensors.torch import save_file
from test_refusals import Hostile, refused
from torch import Tensor, nn

from reft_export.base.load import Base
from reft_export.eager.steering import site_module, steered
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.edit import Site
from runtimes.ort.session import OrtSession

WIDTH, LAYERS = 64, 4
IDS = torch.tensor([[5, 17, 201, 44, 9, 120]])
G = np.random.default_rng(0)
SCALES = (1 + 0.3 * G.standard_normal((LAYERS, WIDTH))).astype(np.float32)
BIASES = (0.5 * G.standard_normal((LAYERS, WIDTH))).astype(np.float32)
PROJECTIONS = {"llama": r"\.mlp\.down_proj", "gpt2": r"\.mlp\.c_proj", "gpt2 more": r"\.(attn|mlp)\.c_proj", "opt": r"\.fc2"}
"""What the authors' classes for Llama and GPT-2, and RED++ for GPT-2, wrap; OPT in the same way."""


class Wrapped(nn.Module):
    """What a projection becomes: its output, scaled and shifted. Names and shapes as the authors' state dict has them."""

    def __init__(self, update_layer: nn.Module, width: int) -> None:
        super().__init__()
        self.update_layer = update_layer
        scaling, bias = torch.from_numpy(1 + 0.3 * G.standard_normal((1, width))), torch.from_numpy(0.5 * G.standard_normal((1, width)))
        self.delta_vector = nn.ParameterDict({"activation_scaling": scaling.float(), "activation_bias": bias.float()})

    def forward(self, x: Tensor) -> Tensor:
        return self.update_layer(x) * self.delta_vector["activation_scaling"] + self.delta_vector["activation_bias"]


def wrapped(model: nn.Module, pattern: str) -> dict[str, Tensor]:
    """Wraps every module whose path matches, in place, and returns what the authors would save."""
    for path in [name for name, _ in model.named_modules() if re.search(pattern + "$", name)]:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Wrapped(model.get_submodule(path), WIDTH))
    return {name: value for name, value in model.state_dict().items() if "activation_" in name}


@contextmanager
def edited(model: nn.Module, edits: Mapping[Site, tuple[np.ndarray, np.ndarray]], tokens: slice = slice(None)) -> Iterator[None]:
    handles = []
    for site, (scale, bias) in edits.items():

        def hook(module, args, output, scale=torch.from_numpy(scale), bias=torch.from_numpy(bias)):  # noqa: ANN001
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, tokens] = h[:, tokens] * scale + bias
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(site_module(model, site).register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def by_hand(base: Base, layers: list[int], stream: str, tokens: slice = slice(None)) -> np.ndarray:
    edits = {Site(layer=n, stream=stream): (SCALES[n], BIASES[n]) for n in layers}
    with torch.no_grad(), edited(base.model, edits, tokens):
        return base.model(IDS).logits.numpy()


def imported(source: Path, base: Base, request: Request) -> np.ndarray:
    adapter = import_adapter(source, str(BASE), source.parent / "out", request, force=True, report=lambda _: None).adapter
    assert (adapter.method, adapter.rank, adapter.tied) == ("red", 0, True)
    with torch.no_grad(), steered(base.model, adapter):
        return base.model(IDS).logits.numpy()


def _imported_from_the_authors(form: str, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """(base, the wrapped model's logits); the adapter is in ``tmp_path``/red, and eager says the same with it."""
    family = form.partition(" ")[0]
    folder = tiny.save_base(tmp_path / "base", family)
    theirs, ours = tiny.build(family), tiny.build(family)
    saved = wrapped(theirs, PROJECTIONS[form])
    torch.save(saved, tmp_path / "delta_vector.pth")
    result = import_adapter(tmp_path / "delta_vector.pth", str(folder), tmp_path / "red", Request(), report=lambda _: None)
    assert (result.format, str(result.adapter.positions)) == ("red", "all") and len(result.adapter.sites) == len(saved) // 2
    streams = {"mlp_output", "attention_output"} if form == "gpt2 more" else {"mlp_output"}
    assert {site.stream for site in result.adapter.sites} == streams
    with torch.no_grad():
        want, base = theirs(IDS).logits, ours(IDS).logits
        with steered(ours, result.adapter):
            found = ours(IDS).logits
    assert float((want - base).abs().max()) > 0.1
    assert distance(found, want) <= TOLERANCE
    return folder, want.numpy()


@pytest.mark.parametrize("form", PROJECTIONS)
def test_the_authors_file(form, tmp_path) -> None:
    """Every token; the scales of every wrapped projection at its own site."""
    _imported_from_the_authors(form, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", PROJECTIONS)
def test_the_authors_file_in_the_graph(form, tmp_path) -> None:
    """Prefill and decode steps."""
    folder, want = _imported_from_the_authors(form, tmp_path)
    export_bundle(str(folder), [tmp_path / "red"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    session = OrtSession(open_bundle(tmp_path / "bundle"), threads=1)
    session.set_adapter("red")
    first = session.step(IDS[:, :4].numpy(), np.ones((1, 4)))
    later = session.step(IDS[:, 4:].numpy(), np.ones((1, 6)), past=first.past)
    graph = np.concatenate([first.logits, later.logits], 1)
    assert distance(graph, want) <= TOLERANCE


def test_the_authors_bfloat16_prefix_and_layers(base, tmp_path) -> None:
    """As train.sh leaves it for Llama: bfloat16; and with the wrapper's own name in front."""
    tensors = {}
    for n in (1, 2):
        place = f"base_model.model.layers.{n}.mlp.down_proj.delta_vector"
        tensors |= {f"{place}.activation_scaling": torch.from_numpy(SCALES[n : n + 1]).bfloat16()}
        tensors |= {f"{place}.activation_bias": torch.from_numpy(BIASES[n : n + 1]).bfloat16()}
    torch.save(tensors, tmp_path / "d.pth")
    adapter = import_adapter(
        tmp_path / "d.pth", str(BASE), tmp_path / "a", Request(layers="2", positions="l1"), report=lambda _: None
    ).adapter
    assert adapter.sites == (Site(layer=2, stream="mlp_output"),) and adapter.dtype == "bfloat16" and str(adapter.positions) == "l1"
    expected = torch.from_numpy(SCALES[2]).bfloat16().float().numpy()
    np.testing.assert_array_equal(adapter.tensors["2.mlp_output.scale"], expected)


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.base_model.model."], ids=["peft", "peft in the authors' wrapper"])
def test_the_authors_file_under_peft(prefix, tmp_path) -> None:
    torch.save(_theirs(f"{prefix}model.layers.2.mlp"), tmp_path / "d.pth")
    adapter = import_adapter(tmp_path / "d.pth", str(BASE), tmp_path / "a", Request(), report=lambda _: None).adapter
    assert adapter.sites == (Site(layer=2, stream="mlp_output"),)
    torch.save(_theirs(f"{prefix}model.layers.9.mlp"), tmp_path / "d.pth")
    refused(tmp_path / "d.pth", tmp_path / "out", Request(), "layer 9 does not exist in this base .4 layers")


def test_arrays_that_are_said_to_be_red(tmp_path) -> None:
    """--format red on a file of arrays: what they are without it, but never a steering vector."""
    np.savez(tmp_path / "pair.npz", **PAIR)
    save_file({name: torch.from_numpy(value.copy()) for name, value in PAIR.items()}, tmp_path / "pair.safetensors")
    plain = import_adapter(tmp_path / "pair.npz", str(BASE), tmp_path / "plain", ALL, report=lambda _: None).adapter
    for suffix in (".npz", ".safetensors"):
        source, output = tmp_path / f"pair{suffix}", tmp_path / f"said-{suffix[1:]}"
        said = import_adapter(source, str(BASE), output, ALL, format="red", report=lambda _: None).adapter
        assert said.method == "red" and all((said.tensors[name] == value).all() for name, value in plain.tensors.items())
    refused(tmp_path / "pair.npz", tmp_path / "out", Request(positions="all", method="lobireft"), "do not apply", format="red")
    np.savez(tmp_path / "vector.npz", **{"1": BIASES[1]})
    refused(tmp_path / "vector.npz", tmp_path / "out", ALL, "'1' is no scale or bias of a layer", format="red")


@pytest.mark.parametrize("names", ["{}.mlp_output.{}", "layer_{}.mlp_output.{}", "model.layers.{}.mlp_output.{}", "layers.{}.{}", "{}_{}"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_named_pairs(names, suffix, base, tmp_path) -> None:
    source = tmp_path / f"v{suffix}"
    arrays = {names.format(n, word): value[n] for n in (0, 3) for word, value in (("scale", SCALES), ("bias", BIASES))}
    np.savez(source, **arrays) if suffix == ".npz" else save_file({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, source)
    stream = None if "mlp_output" in names else "mlp_output"
    found = imported(source, base, Request(positions="l1", stream=stream))
    want = by_hand(base, [0, 3], "mlp_output", slice(-1, None))
    assert distance(found, want) <= TOLERANCE
    # The comparison can fail: the same file at every token.
    assert distance(imported(source, base, Request(positions="all", stream=stream)), want) > 50 * TOLERANCE


def test_one_pair(base, tmp_path) -> None:
    """Alone it goes to --layers; a row a layer goes to its layer; scaling is a name too."""
    np.savez(tmp_path / "one.npz", scale=SCALES[0], bias=BIASES[0])
    found = imported(tmp_path / "one.npz", base, Request(positions="all", layers="0", stream="block_output"))
    assert distance(found, by_hand(base, [0], "block_output")) <= TOLERANCE
    pair = {"delta_vector.activation_scaling": SCALES[:1], "delta_vector.activation_bias": BIASES[:1]}
    torch.save({name: torch.from_numpy(value) for name, value in pair.items()}, tmp_path / "d.pth")
    found = imported(tmp_path / "d.pth", base, Request(positions="all", layers="0", stream="mlp_output"))
    assert distance(found, by_hand(base, [0], "mlp_output")) <= TOLERANCE
    save_file({"scaling": torch.from_numpy(SCALES), "bias": torch.from_numpy(BIASES)}, tmp_path / "rows.safetensors")
    found = imported(tmp_path / "rows.safetensors", base, Request(positions="all", stream="attention_output", layers="1;3"))
    assert distance(found, by_hand(base, [1, 3], "attention_output")) <= TOLERANCE


def test_a_vector_called_bias_can_be_asked_for(base, tmp_path) -> None:
    np.savez(tmp_path / "v.npz", bias=BIASES[1])
    request = Request(positions="all", layers="1", method="lobireft", stream="mlp_output")
    adapter = import_adapter(tmp_path / "v.npz", str(BASE), tmp_path / "a", request, report=lambda _: None).adapter
    assert (adapter.method, adapter.sites) == ("lobireft", (Site(layer=1, stream="mlp_output"),))


ALL = Request(positions="all", stream="mlp_output")
PAIR = {"1.scale": SCALES[1], "1.bias": BIASES[1]}


@pytest.mark.parametrize(
    ("arrays", "request_", "match"),
    [
        (PAIR, Request(stream="mlp_output"), "does not record positions.*--positions"),
        ({"scale": SCALES[0], "bias": BIASES[0]}, Request(), "positions, the stream and its layers.*--positions .*--stream .*--layers"),
        (PAIR, Request(positions="all"), "does not record the stream.*--stream .block_input"),
        ({"scale": SCALES[0], "bias": BIASES[0]}, ALL, "does not record its layers.*--layers .0 to 3"),
        ({"1.scale": SCALES[1]}, ALL, r"1.scale has no bias beside it \(1.mlp_output\).*store zeros as its bias"),
        ({"bias": BIASES[0]}, Request(positions="all", layers="1", stream="mlp_output"), "bias has no scale beside it.*store ones"),
        (PAIR | {"layers.1.bias": BIASES[1]}, ALL, "1.bias and 1.bias|layers.1.bias and 1.bias are both the bias of 1.mlp_output"),
        ({"9.scale": SCALES[1], "9.bias": BIASES[1]}, ALL, "layer 9 does not exist in base-llama-tiny .4 layers"),
        (PAIR, Request(positions="all", stream="mlp_output", layers="1-2"), "no scale and bias for layer 2"),
        ({"1.scale": SCALES[1][:32], "1.bias": BIASES[1][:32]}, ALL, "1.scale has width 32, base-llama-tiny has width 64; pass the base"),
        ({"1.scale": SCALES[1], "1.bias": BIASES[1][:32]}, ALL, r"1.scale \[64\], 1.bias \[32\]; a scale and its bias are of one length"),
        ({"scale": SCALES[:3], "bias": BIASES[:3]}, ALL, "has shape .3, 64., expected a row for each of base-llama-tiny's 4 layers"),
        (PAIR | {"happy": BIASES[1]}, ALL, "'happy' is no scale or bias of a layer"),
        (PAIR | {"1.scale": SCALES[1] * np.nan}, ALL, "1.scale holds values that are not finite"),
        (PAIR | {"1.scale": np.arange(64)}, ALL, "is int64; a float array is expected"),
        (PAIR | {"1.scale": np.ones((2, 64), np.float32)}, ALL, r"1.scale has shape \[2, 64\], expected \[D\]$"),
        (PAIR, Request(positions="all", stream="mlp_output", scale=2.0), "--scale does not apply to RED"),
        (PAIR, Request(positions="f1+l1", stream="mlp_output", tied=False), "--untied and --activation do not apply"),
        (PAIR, Request(positions="all", stream="everywhere"), "--stream 'everywhere' is unknown"),
        ({"1.mlp_output.scale": SCALES[1], "1.mlp_output.bias": BIASES[1]}, Request(positions="all", stream="block_output"), "contradicts"),
        ({"happy": BIASES[1]}, Request(positions="all", stream="mlp_output", method="red"), "'happy' is no scale or bias"),
    ],
)
def test_refused_arrays(arrays, request_, match, tmp_path) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    refused(tmp_path / "v.npz", tmp_path / "out", request_, match)


def _theirs(module: str = "model.layers.1.mlp.down_proj", **more: Tensor) -> dict[str, Tensor]:
    names = {f"{module}.delta_vector.activation_scaling": SCALES, f"{module}.delta_vector.activation_bias": BIASES}
    return {name: torch.from_numpy(value[:1].copy()) for name, value in names.items()} | more


@pytest.mark.parametrize(
    ("tensors", "request_", "match"),
    [
        (_theirs("model.layers.1.self_attn.q_proj"), Request(), "q_proj.* is not a stream that can be edited"),
        (_theirs("roberta.encoder.layer.1.output.dense"), Request(), "is not a stream that can be edited"),
        (_theirs("model.layers.7.mlp.down_proj"), Request(), "layer 7 does not exist in this base .4 layers"),
        (dict([*_theirs().items()][:1]), Request(), "has no bias beside it"),
        (_theirs(**{"model.layers.1.mlp.down_proj.delta_vector.activation_ln.weight": torch.ones(64)}), Request(), "a LayerNorm behind"),
        (_theirs(**{"lm_head.weight": torch.ones(2, 2)}), Request(), "lm_head.weight is none of RED's tensors"),
        (_theirs(), Request(stream="mlp_output"), "--stream mlp_output does not apply"),
        (_theirs(), Request(method="loreft"), "--method, --untied and --activation do not apply"),
        ({}, Request(), "holds no arrays"),
        ({"delta": {"a": 1}}, Request(), "delta is not a tensor"),
    ],
)
def test_refused_pickles(tensors, request_, match, tmp_path) -> None:
    torch.save(tensors, tmp_path / "delta_vector.pth")
    refused(tmp_path / "delta_vector.pth", tmp_path / "out", request_, match)


def test_damaged_and_hostile_pickles(tmp_path) -> None:
    path = tmp_path / "delta_vector.pth"
    torch.save(_theirs(), path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, tmp_path / "out", Request(), "is damaged")
    torch.save({"a": Hostile(tmp_path / "ran")}, path)
    refused(path, tmp_path / "out", Request(), "its pickle asks for code to be run")
    assert not (tmp_path / "ran").exists()

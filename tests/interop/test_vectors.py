"""Steering vectors: GGUF as llama.cpp adds them, .npz and .safetensors, each against a hook that adds the vector by hand."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cases import BASE, TOLERANCE
from rounding import distance
from safetensors.numpy import save_file
from test_refusals import refused

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
VECTORS = {n: np.random.default_rng(n).standard_normal(WIDTH).astype(np.float32) for n in range(LAYERS)}


def write_gguf(path: Path, vectors: dict[int | str, np.ndarray], hint: str = "llama") -> Path:
    """As repeng's export_gguf and llama.cpp's cvector-generator write them."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def added(base: Base, vectors: dict[Site, np.ndarray], tokens: slice = slice(None)) -> Iterator[None]:
    """Vectors added to what their module returns, at ``tokens``."""
    handles = []
    for site, vector in vectors.items():

        def hook(module, args, output, vector=torch.from_numpy(vector)):  # noqa: ANN001
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, tokens] += vector
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handles.append(site_module(base.model, site).register_forward_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def imported_logits(source: Path, output: Path, base: Base, request: Request) -> np.ndarray:
    adapter = import_adapter(source, str(BASE), output, request, report=lambda _: None).adapter
    assert adapter.method == "lobireft" and adapter.rank == 1
    with torch.no_grad(), steered(base.model, adapter):
        return base.model(IDS).logits.numpy()


def logits_by_hand(base: Base, vectors: dict[Site, np.ndarray], tokens: slice = slice(None)) -> np.ndarray:
    with torch.no_grad(), added(base, vectors, tokens):
        return base.model(IDS).logits.numpy()


@pytest.mark.parametrize("scale", [None, -0.5, 3.0])
def test_gguf_acts_at_every_token_after_its_block(scale, base, tmp_path) -> None:
    source = write_gguf(tmp_path / "happy.gguf", {n: VECTORS[n] for n in (1, 3)})
    found = imported_logits(source, tmp_path / "happy", base, Request(scale=scale))
    expected = logits_by_hand(base, {Site(layer=n): (scale or 1.0) * VECTORS[n] for n in (1, 3)})
    assert distance(found, expected) <= TOLERANCE


def test_gguf_layers_positions_and_graph(base, tmp_path) -> None:
    """--layers is llama.cpp's --control-vector-layer-range; decode steps are steered too, in the graph as well."""
    source = write_gguf(tmp_path / "happy.gguf", {n: VECTORS[n] for n in (1, 2, 3)} | {2: np.zeros(WIDTH, np.float32)})
    result = import_adapter(source, str(BASE), tmp_path / "two", Request(layers="1-2"), report=lambda _: None)
    assert result.adapter.sites == (Site(layer=1),) and result.notes == ("1 vectors are zero and were left out",)
    assert result.adapter.training["model_hint"] == "llama" and str(result.adapter.positions) == "all"
    found = imported_logits(source, tmp_path / "last", base, Request(layers="1", positions="l1"))
    assert distance(found, logits_by_hand(base, {Site(layer=1): VECTORS[1]}, slice(-1, None))) <= TOLERANCE
    export_bundle(str(BASE), [tmp_path / "two"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    session = OrtSession(open_bundle(tmp_path / "bundle"), threads=1)
    session.set_adapter("two")
    first = session.step(IDS[:, :4].numpy(), np.ones((1, 4)))
    later = session.step(IDS[:, 4:].numpy(), np.ones((1, 6)), past=first.past)
    expected = logits_by_hand(base, {Site(layer=1): VECTORS[1]})
    assert distance(np.concatenate([first.logits, later.logits], 1), expected) <= TOLERANCE


@pytest.mark.parametrize("names", ["{}", "layer_{}", "layers.{}", "model.layers.{}", "direction.{}", "{}.block_output"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_named_vectors(names, suffix, base, tmp_path) -> None:
    source = tmp_path / f"v{suffix}"
    write = (lambda a: np.savez(source, **a)) if suffix == ".npz" else (lambda a: save_file(a, source))
    write({names.format(n): VECTORS[n] for n in (0, 3)})
    found = imported_logits(source, tmp_path / "out", base, Request(positions="all"))
    assert distance(found, logits_by_hand(base, {Site(layer=n): VECTORS[n] for n in (0, 3)})) <= TOLERANCE


def test_one_array(base, tmp_path) -> None:
    """A vector alone goes to --layers; a row a layer goes to its layer; another stream is named."""
    np.savez(tmp_path / "one.npz", refusal=VECTORS[2].astype(np.float64))
    found = imported_logits(tmp_path / "one.npz", tmp_path / "one", base, Request(positions="prompt", layers="1;2"))
    assert distance(found, logits_by_hand(base, {Site(layer=n): VECTORS[2] for n in (1, 2)})) <= TOLERANCE
    save_file({"all": np.stack(list(VECTORS.values())).astype(np.float16)}, tmp_path / "rows.safetensors")
    found = imported_logits(tmp_path / "rows.safetensors", tmp_path / "rows", base, Request(positions="all", layers="2-3"))
    half = {Site(layer=n): VECTORS[n].astype(np.float16).astype(np.float32) for n in (2, 3)}
    assert distance(found, logits_by_hand(base, half)) <= TOLERANCE
    np.savez(tmp_path / "own.npz", **{"transformer.h.1": VECTORS[1]})
    import_adapter(tmp_path / "own.npz", str(BASE), tmp_path / "own", Request(positions="all", layers="1"), report=lambda _: None)
    np.savez(tmp_path / "mlp.npz", **{"1.mlp_output": VECTORS[1]})
    found = imported_logits(tmp_path / "mlp.npz", tmp_path / "mlp", base, Request(positions="all"))
    assert distance(found, logits_by_hand(base, {Site(layer=1, stream="mlp_output"): VECTORS[1]})) <= TOLERANCE


@pytest.mark.parametrize("name", ["layer_2", "vector"])
def test_a_vector_may_be_a_row(name, tmp_path) -> None:
    """[1, D] is [D], as in a file of RED's."""
    adapters = []
    for shape in ((WIDTH,), (1, WIDTH)):
        source = tmp_path / f"rank{len(shape)}.npz"
        np.savez(source, **{name: VECTORS[2].reshape(shape)})
        request = Request(positions="all", layers="2")
        adapters.append(import_adapter(source, str(BASE), tmp_path / f"out{len(shape)}", request, report=lambda _: None).adapter)
    one, row = adapters
    assert one.sites == row.sites == (Site(layer=2),)
    assert all(np.array_equal(one.tensors[n], row.tensors[n]) for n in one.tensors)


@pytest.mark.parametrize(
    ("arrays", "request_", "match"),
    [
        ({"1": VECTORS[1]}, Request(), "does not record positions.*--positions"),
        ({"v": VECTORS[1]}, Request(positions="all"), "does not record its layers.*--layers .0 to 3"),
        ({"9": VECTORS[1]}, Request(positions="all"), "layer 9 does not exist in base-llama-tiny .4 layers"),
        ({"v": VECTORS[1]}, Request(positions="all", layers="7"), "layer 7 does not exist"),
        ({"1": VECTORS[1]}, Request(positions="all", layers="1-2"), "the file has no vector for layer 2"),
        ({"1": VECTORS[1][:32]}, Request(positions="all"), "width 32, base-llama-tiny has width 64"),
        ({"v": VECTORS[1][:32]}, Request(positions="all", layers="1"), "has shape .32., expected .64."),
        ({"v": np.zeros((5, 64), np.float32)}, Request(positions="all"), "5 rows for 4 layers.*hidden_states"),
        ({"v": np.zeros((3, 64), np.float32)}, Request(positions="all"), "has shape .3, 64., expected .4, 64."),
        ({"1": VECTORS[1], "happy": VECTORS[2]}, Request(positions="all"), "'happy' does not name a layer"),
        ({"1": VECTORS[1], "layer_1": VECTORS[2]}, Request(positions="all"), "are both the vector of 1.block_output"),
        ({"layers.1.output": VECTORS[1]}, Request(positions="all", layers="2"), "--layers 2 contradicts .*'layers.1.output' .*layer 1's"),
        ({"transformer.h.1": VECTORS[1]}, Request(positions="all", layers="1-2"), "--layers 1-2 contradicts .*'transformer.h.1'"),
        ({"1": VECTORS[1] * np.nan}, Request(positions="all"), "not finite"),
        ({"1": np.arange(64)}, Request(positions="all"), "is int64; a float array is expected"),
        ({"1": VECTORS[1] * 0}, Request(positions="all"), "every vector is zero"),
        ({"1": np.full(64, 1e300)}, Request(positions="all"), "not finite"),
        ({"1": VECTORS[1]}, Request(positions="all", scale=0.0), "--scale 0.0 is not a strength"),
        ({"1": VECTORS[1]}, Request(positions="all", scale=1e39), "exceeds float32"),
        ({"1": VECTORS[1]}, Request(positions="f1+l1", tied=False), "--untied and --activation do not apply"),
        ({"1": np.array([{}], object)}, Request(positions="all"), "holds more than numbers"),
        ({}, Request(positions="all"), "holds no arrays"),
    ],
)
def test_refused_arrays(arrays, request_, match, tmp_path) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    refused(tmp_path / "v.npz", tmp_path / "out", request_, match)


def test_damaged_files(tmp_path) -> None:
    request = Request(positions="all")
    np.savez(tmp_path / "v.npz", **{"1": VECTORS[1]})
    whole = (tmp_path / "v.npz").read_bytes()
    (tmp_path / "v.npz").write_bytes(whole[:200])
    refused(tmp_path / "v.npz", tmp_path / "out", request, "v.npz is damaged")
    claimed = io.BytesIO()
    np.lib.format.write_array_header_1_0(claimed, {"descr": "<f4", "fortran_order": False, "shape": (10**14,)})
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as z:
        z.writestr("1.npy", claimed.getvalue())
    refused(tmp_path / "v.npz", tmp_path / "out", request, "v.npz is damaged")
    np.savez_compressed(tmp_path / "v.npz", **{"1": VECTORS[1]})
    compressed = (tmp_path / "v.npz").read_bytes()
    entry = compressed.index(b"PK\1\2")
    for at, content in ((70, b"\xff" * 8), (entry + 8, b"\1")):  # the stream itself; the flag of encryption
        (tmp_path / "v.npz").write_bytes(compressed[:at] + content + compressed[at + len(content) :])
        refused(tmp_path / "v.npz", tmp_path / "out", request, "v.npz is damaged")
    with (tmp_path / "v.npz").open("wb") as f:
        np.save(f, VECTORS[1])
    refused(tmp_path / "v.npz", tmp_path / "out", request, "v.npz is one array, as np.save writes it.*np.savez")
    (tmp_path / "v.safetensors").write_bytes(b"\xff" * 30)
    refused(tmp_path / "v.safetensors", tmp_path / "out", request, "v.safetensors is damaged")
    good = write_gguf(tmp_path / "v.gguf", {1: VECTORS[1]})
    content = good.read_bytes()
    for cut in (4, 7, 20, 60, 120, len(content) - 100):
        good.write_bytes(content[:cut])
        refused(good, tmp_path / "out", Request(), "v.gguf is damaged, or not GGUF")
    good.write_bytes(content[:16] + b"\xff" * 8 + content[24:])
    refused(good, tmp_path / "out", Request(), "v.gguf is damaged, or not GGUF")


@pytest.mark.parametrize(
    ("vectors", "match"),
    [
        ({0: VECTORS[0]}, "direction.0; llama.cpp numbers control vectors from layer 1"),
        ({"00": VECTORS[0]}, "direction.00; llama.cpp numbers control vectors from layer 1"),
        ({"1": VECTORS[0], "01": VECTORS[1]}, "direction.01 and direction.1 are both the vector of 1.block_output"),
        ({4: VECTORS[0]}, "layer 4 does not exist in base-llama-tiny .4 layers"),
        ({1: VECTORS[1][:32]}, "width 32, base-llama-tiny has width 64"),
        ({1: VECTORS[1].astype(np.float16)}, "direction.1 is F16; control vectors are F32"),
        ({1: np.ones((2, 64), np.float32)}, "has shape .2, 64., expected"),
        ({1: VECTORS[1] * np.inf}, "not finite"),
        ({}, "holds no direction"),
    ],
)
def test_refused_gguf(vectors, match, tmp_path) -> None:
    refused(write_gguf(tmp_path / "v.gguf", vectors), tmp_path / "out", Request(), match)


def test_a_model_in_gguf_is_no_control_vector(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    refused(tmp_path / "m.gguf", tmp_path / "out", Request(), "is a GGUF model, not an adapter: a base goes to -m")

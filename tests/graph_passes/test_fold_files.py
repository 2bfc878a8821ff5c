"""Folding from file to file: what is written, what stays untouched, and which files are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from decoders import session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_decoders import EVERY_TOKEN, random_banks, small_decoder, small_feeds

from graph_passes.external import DATA_FILE, MODEL_FILE, load_graph, write_graph
from graph_passes.fold import fold_file
from graph_passes.insert import insert_edits
from runtimes.edits.edit import Site
from runtimes.edits.op import EXPLICIT_SLOTS, RULE_DEFAULTS, EditNode
from runtimes.errors import GraphError

NODES = [EditNode(site=Site(layer=1)), EditNode(site=Site(layer=2, stream="mlp_output"), activation="silu")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small decoder with every weight in model.onnx.data, scalars included."""
    folder = tmp_path / "source"
    folder.mkdir()
    ir.save(small_decoder(), folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=0)
    return folder / MODEL_FILE


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _file_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_fold_file_steers_and_leaves_the_source_alone(source, tmp_path):
    before = _bytes(source.parent)
    fold_file(source, NODES, tmp_path / "folded")
    assert _bytes(source.parent) == before
    assert {path.name for path in (tmp_path / "folded").iterdir()} == {MODEL_FILE, DATA_FILE}
    in_memory = small_decoder()
    insert_edits(in_memory, NODES)
    feeds = {**small_feeds(in_memory), **random_banks(in_memory), **EVERY_TOKEN}
    written = _file_session(tmp_path / "folded" / MODEL_FILE)
    for left, right in zip(session(in_memory).run(None, feeds), written.run(None, feeds), strict=True):
        np.testing.assert_array_equal(left, right)


def test_banks_stored_beside_the_graph_can_be_overridden(tmp_path):
    # Banks of real widths are written to the data file too; axes and shapes must stay inside the graph for onnxruntime.
    model = small_decoder()
    insert_edits(model, NODES)
    ir.save(model, tmp_path / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=16)
    written = _file_session(tmp_path / MODEL_FILE)
    banks = random_banks(model)
    assert {value.name for value in written.get_overridable_initializers()} == {*banks, *RULE_DEFAULTS, EXPLICIT_SLOTS}
    base, steered = (written.run(["logits"], {**small_feeds(model), **extra})[0] for extra in ({}, banks | EVERY_TOKEN))
    assert np.abs(base - steered).max() > 0.1


def test_weights_stay_on_disk_while_the_graph_is_folded(source):
    model = load_graph(source)
    insert_edits(model, NODES)
    external = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    # raw is the memory map that reading a weight opens.
    assert len(external) > 20 and all(tensor.raw is None for tensor in external)


def test_an_existing_graph_is_not_overwritten(source, tmp_path):
    before = _bytes(source.parent)
    with pytest.raises(GraphError, match="exists already; name an empty folder"):
        fold_file(source, NODES, source.parent)
    assert _bytes(source.parent) == before


def test_a_failed_write_leaves_nothing_behind(source, tmp_path, monkeypatch):
    model = load_graph(source)

    def breaks(*arguments: object, **keywords: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ir, "save", breaks)
    with pytest.raises(OSError, match="disk full"):
        write_graph(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_truncated_weights_are_refused(source):
    data = source.parent / DATA_FILE
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(GraphError, match=r"model\.onnx\.data has \d+ bytes, weight '.*' needs bytes \d+ to \d+; the file is cut short"):
        load_graph(source)


def test_missing_weights_are_refused(source):
    (source.parent / DATA_FILE).unlink()
    with pytest.raises(GraphError, match=r"stored in 'model\.onnx\.data', which is missing from"):
        load_graph(source)


@pytest.mark.parametrize("location", ["../secret.data", "/etc/hostname", "inner/../../secret.data"])
def test_a_location_outside_the_folder_is_refused(source, location):
    (source.parent.parent / "secret.data").write_bytes(bytes(1 << 16))
    (source.parent / "inner").mkdir()
    source.write_bytes(_with_location(source, location))
    with pytest.raises(GraphError, match="leaves the graph's folder"):
        load_graph(source)


def test_a_link_out_of_the_folder_is_refused(source):
    data = source.parent / DATA_FILE
    outside = source.parent.parent / "outside.data"
    os.replace(data, outside)
    data.symlink_to(outside)
    with pytest.raises(GraphError, match=r"leaves the graph's folder.*cp -L"):
        load_graph(source)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_linked_as_the_graph_is(link, source, tmp_path):
    """Links of graph and data into one folder, as the hub's cache has them, and files of several names: they are read to the byte."""
    weights = {name: value.const_value.numpy().copy() for name, value in load_graph(source).graph.initializers.items()}
    for name, blob in ((source.name, "0123"), (DATA_FILE, "4567")):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        os.replace(source.parent / name, tmp_path / "blobs" / blob)
        link(tmp_path / "blobs" / blob, source.parent / name)
    read = load_graph(source).graph.initializers
    assert len(weights) > 3
    for name, value in weights.items():
        np.testing.assert_array_equal(read[name].const_value.numpy(), value)


def test_a_length_that_does_not_fit_the_shape_is_refused(source):
    model = ir.load(source)
    value = model.graph.initializers["embedding.weight"]
    tensor = value.const_value
    value.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length + 4, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=tensor.base_dir
    )
    ir.save(model, source)
    with pytest.raises(GraphError, match=r"'embedding\.weight' of shape \[11, 8\] takes 352 bytes, the graph declares 356"):
        load_graph(source)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(64), b"\x08"])
def test_files_that_are_not_onnx(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"cannot be read as an ONNX model|holds no graph"):
        load_graph(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(GraphError, match="is not a file"):
        load_graph(tmp_path / "absent.onnx")


def test_a_value_that_nothing_computes_is_refused(source):
    source.write_bytes(source.read_bytes().replace(b"layers.0.middle", b"layers.9.middle", 1))
    with pytest.raises(GraphError, match=r"reads 'layers\.\d\.middle', which nothing computes; the file is damaged"):
        load_graph(source)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flip=st.integers(0, 255))
def test_damaged_graphs_never_fail_with_anything_but_graph_error(source, cut, flip):
    content = bytearray(source.read_bytes())
    place = int(cut * (len(content) - 1))
    content[place] ^= flip
    damaged = source.parent / "damaged.onnx"
    damaged.write_bytes(content[: place + 1] if flip % 2 else content)
    try:
        model = load_graph(damaged)
        insert_edits(model, NODES)
    except GraphError:
        pass


def _with_location(source: Path, location: str) -> bytes:
    model = ir.load(source)
    value = model.graph.initializers["embedding.weight"]
    tensor = value.const_value
    value.const_value = ir.ExternalTensor(
        location, 0, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=tensor.base_dir
    )
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    ("dims", "data_type", "said"),
    [
        ([2**40], 1, "takes 4398046511104 bytes, and the graph holds 16"),
        ([2**62, 2**62], 1, "the graph holds 16"),
        ([-4], 1, "the graph holds 16"),
        ([4], 0, "is of a type that is no number's"),
        ([4], 8, "is of a type that is no number's"),
        ([4], 99, "cannot be read as an ONNX model|is of a type that is no number's"),
        ([3], 1, "takes 12 bytes, and the graph holds 16"),
    ],
)
def test_tensors_that_claim_more_than_they_hold(dims, data_type, said, source):
    """Inside the file, where no size of a data file gives them away; nothing of what is claimed is made."""
    model = onnx.load(source, load_external_data=False)
    tensor = model.graph.initializer.add()
    tensor.name, tensor.raw_data, tensor.data_type = "lying", bytes(16), data_type
    tensor.dims[:] = dims
    source.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=said):
        load_graph(source)


def test_what_onnx_ir_repairs_is_refused_in_silence(source, capfd):
    model = onnx.load(source, load_external_data=False)
    model.graph.node[3].input[0] = "nowhere"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match="reads 'nowhere', which nothing computes"):
        load_graph(source)
    assert capfd.readouterr().err == ""

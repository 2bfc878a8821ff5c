"""Loads and writes graphs whose weights lie in files beside them; weights stay on disk until they are copied."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.serde import TensorProtoTensor

from graph_passes.accessors import describe
from runtimes.errors import GraphError

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
INLINE = 256
"""Bytes of the largest initializer that lies in model.onnx itself."""


def load_graph(path: Path | str) -> ir.Model:
    """The graph at ``path``; external weights stay lazy (2.3 GB load in 0.02 s and 0.09 GB of memory).

    Data may be a link that stays in the graph's folder or, where the graph is one, leads to the folder that it leads to: the rule of
    onnxruntime, and the layout of the hub's cache. Raises GraphError where the file is missing or is not ONNX, and where external data is
    missing, ends too early or lies elsewhere (.., absolute paths, other links).
    """
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"{path} is not a file; name the .onnx file itself")
    try:
        with _quiet():
            model = ir.load(path)
    except Exception as error:
        # Foreign bytes fail in protobuf, in numpy or in onnx-ir, each with exceptions of its own.
        raise GraphError(f"{path} cannot be read as an ONNX model ({_first_line(error)}); export it again or fetch it again") from error
    if not len(model.graph):
        raise GraphError(f"{path} holds no graph; the file is empty or is not an ONNX model")
    _check_wiring(model, path)
    tensors = list(_tensors(model))
    _check_tensors(tensors, path)
    check_external_data(tensors, path)
    _take_links(model)
    return model


class _CheckedTensor(ir.ExternalTensor):
    """One whose file was found to be where ``load_graph`` lets it be. onnx-ir takes none that has another name or lies elsewhere."""

    def _check_path_containment(self) -> None:
        pass


def _take_links(model: ir.Model) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and _is_linked(Path(tensor.path)):
                value.const_value = _CheckedTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=tensor.base_dir,
                )


def _is_linked(path: Path) -> bool:
    return path.is_symlink() or path.stat().st_nlink > 1


def check_external_data(tensors: Sequence[ir.TensorProtocol], path: Path) -> None:
    """Raises GraphError for the first external tensor that the folder of the graph ``path`` does not hold in full; no data is read."""
    folder = path.parent
    sizes: dict[str, int] = {}
    for tensor in (each for each in tensors if isinstance(each, ir.ExternalTensor)):
        location = _checked_location(tensor)
        if location not in sizes:
            sizes[location] = _checked_size(path, location, tensor)
        needed = math.ceil(tensor.nbytes)
        length = needed if tensor.length is None else tensor.length
        offset = tensor.offset or 0
        if any(not isinstance(dim, int) or dim < 0 for dim in tensor.shape):
            raise GraphError(f"weight {tensor.name!r} has the shape {list(tensor.shape)}; the graph is damaged: export it again")
        if length != needed or offset < 0:
            raise GraphError(
                f"weight {tensor.name!r} of shape {list(tensor.shape)} takes {needed} bytes, the graph declares {length} at offset "
                f"{offset} of {location}; the graph is damaged: export it again"
            )
        if offset + length > sizes[location]:
            raise GraphError(
                f"{folder / location} has {sizes[location]} bytes, weight {tensor.name!r} needs bytes {offset} to {offset + length}; "
                "the file is cut short: copy or fetch it again"
            )


def write_graph(model: ir.Model, folder: Path | str) -> None:
    """Writes model.onnx and model.onnx.data into ``folder``; both appear complete or not at all.

    Weights are copied one at a time, so memory stays flat. Initializers over the same bytes, in memory or in a file, share one range.
    Raises GraphError where the folder holds either file already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_FILE, DATA_FILE):
        if (folder / name).exists():
            raise GraphError(f"{folder / name} exists already; name an empty folder")
    partial = Path(tempfile.mkdtemp(prefix=".model.partial-", dir=folder))
    try:
        with _one_range_each(model, partial):
            ir.save(model, partial / MODEL_FILE)
        # The graph goes last: a reader that finds it finds its weights too.
        for name in (DATA_FILE, MODEL_FILE):
            if (partial / name).exists():
                _flush(partial / name)
                os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial)


@contextmanager
def _one_range_each(model: ir.Model, folder: Path) -> Iterator[None]:
    """Inside the ``with``, initializers of more than ``INLINE`` bytes are external, in ``folder``, and others are not.

    onnx-ir's own writer gives every initializer a range, and so writes shared bytes twice.
    """
    stored = [(v, v.const_value) for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    try:
        ranges: dict[object, list[tuple[ir.Value, ir.TensorProtocol]]] = {}
        for value, tensor in stored:
            if tensor.nbytes > INLINE:
                ranges.setdefault(_bytes_of(tensor), []).append((value, tensor))
            elif isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
        placed = ir.external_data.convert_tensors_to_external([shared[0][1] for shared in ranges.values()], folder, DATA_FILE)
        for place, shared in zip(placed, ranges.values(), strict=True):
            for value, tensor in shared:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    place.location, place.offset, place.length, tensor.dtype, shape=shape, name=tensor.name or "", base_dir=folder
                )
        yield
    finally:
        for value, tensor in stored:
            value.const_value = tensor


def _bytes_of(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors over the same bytes: one range of a file, or one piece of memory."""
    if isinstance(tensor, ir.ExternalTensor):
        return os.path.realpath(tensor.path), tensor.offset or 0, tensor.nbytes
    if (
        isinstance(tensor, ir.Tensor)
        and isinstance(tensor.raw, np.ndarray)
        and tensor.raw.flags.c_contiguous
        and tensor.dtype.bitwidth >= 8
    ):
        return tensor.raw.__array_interface__["data"][0], tensor.nbytes
    return id(tensor)


def unmap(value: ir.Value | None) -> None:
    """Gives the pages of a weight's file back; it is mapped again when it is read again. All of a model's would add up to the model."""
    if value is not None and isinstance(value.const_value, ir.ExternalTensor):
        with suppress(BufferError):  # somebody holds an array over the file: its pages go when that does
            value.const_value.release()


def _check_wiring(model: ir.Model, path: Path) -> None:
    """Raises GraphError where a name is not text or a node reads a value that nothing computes; onnx-ir lets both pass."""
    remedy = "the file is damaged: export it again or fetch it again"
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.outputs, *(value for node in nodes for value in (*node.inputs, *node.outputs))]
    for name in [*(value.name for value in values if value is not None), *(node.op_type for node in nodes)]:
        if not isinstance(name, str | None):
            raise GraphError(f"{path}: the name {name!r} is not UTF-8; {remedy}")
    for node in nodes:
        for value in node.inputs:
            if value is None or value.name == "" or value.producer() is not None:
                continue
            if not value.is_graph_input() and not value.is_initializer():
                raise GraphError(f"{path}: node {describe(node)} reads {value.name!r}, which nothing computes; {remedy}")


@contextmanager
def _quiet() -> Iterator[None]:
    """onnx-ir warns of what it repairs; ``load_graph`` refuses that, or it does not matter."""
    log = logging.getLogger("onnx_ir")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _check_tensors(tensors: Sequence[ir.TensorProtocol], path: Path) -> None:
    """Raises GraphError for a tensor of a type that has no width, or of another number of bytes than its shape takes: onnx-ir would make
    all of what is claimed."""
    for tensor in tensors:
        where = f"{path}: weight {tensor.name!r}"
        dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
        proto = tensor.raw if isinstance(tensor, TensorProtoTensor) else None
        texts = proto is not None and proto.data_type == onnx.TensorProto.STRING and len(proto.string_data) == math.prod(dims)
        try:
            needed = 0 if texts else math.prod(dims) * tensor.dtype.bitwidth
        except (TypeError, ValueError):
            raise GraphError(f"{where} is of a type that is no number's; the graph is damaged: export it again") from None
        if proto is None or texts:
            continue
        held = 8 * len(proto.raw_data) if proto.HasField("raw_data") else needed if _listed(proto) * 64 >= needed else 0
        if min(dims, default=0) < 0 or not needed <= held <= needed + 7:
            raise GraphError(
                f"{where} of shape {dims} takes {math.ceil(needed / 8)} bytes, and the graph holds {held // 8}; it is damaged: "
                "export it again"
            )


def _listed(proto: Any) -> int:
    """Values of a tensor that is stored as a list of them; one may stand for several of few bits."""
    return sum(len(getattr(proto, name)) for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for body in (model.graph, *model.functions.values()):
        for node in body.all_nodes():
            for attribute in node.attributes.values():
                # Not isinstance: a protocol's looks at every property, and a damaged tensor's raise.
                if attribute.type == ir.AttributeType.TENSOR and attribute.value is not None:
                    yield attribute.value


def _checked_location(tensor: ir.ExternalTensor) -> str:
    location = tensor.location
    if not isinstance(location, str) or "\0" in location:
        # Bytes here mean that the name is not UTF-8.
        raise GraphError(
            f"weight {tensor.name!r} is stored in {location!r}, which is not a file name; the graph is damaged: export it again"
        )
    return location


def _checked_size(graph: Path, location: str, tensor: ir.ExternalTensor) -> int:
    """Bytes of the data file at ``location``, as ``load_graph`` says where that may be."""
    where = f"weight {tensor.name!r} is stored in {location!r}"
    folder = graph.parent
    path = folder / location
    homes = (folder.resolve(), graph.resolve().parent)
    outside = os.path.isabs(location) or ".." in Path(location).parts
    # realpath, unlike Path.resolve, has a path for a link to itself, too.
    if outside or not any(Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
        raise GraphError(f"{where}, which leaves the graph's folder {folder}; copy the data file itself into that folder (cp -L)")
    try:
        status = path.stat()
    except OSError as error:
        raise GraphError(f"{where}, which is missing from {folder}; copy it beside the graph") from error
    if not path.is_file():
        raise GraphError(f"{where}, which is not a file in {folder}")
    return status.st_size


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

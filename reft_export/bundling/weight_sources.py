"""Which parameter each matrix of a graph came from, told by its values alone: exporters rename, transpose, split and join weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graph_passes.accessors import array_of, name_of
from graph_passes.external import unmap
from runtimes.artifacts.manifest import WeightSource

_PRODUCTS = frozenset({"MatMul", "Gemm"})
_Named = tuple[str, torch.nn.Linear | torch.nn.Embedding | Conv1D]


def find_weight_sources(graph: ir.Model, model: PreTrainedModel) -> dict[str, WeightSource]:
    """The source of every matrix that ``graph`` multiplies by or gathers rows from, where parameters of ``model`` hold its values.

    A matrix equals a parameter, its transpose, consecutive rows of either, or whole parameters one below the other (q, k, v in one
    product), bit for bit in the matrix's own type. Products are looked for among linear modules and gathered rows among embeddings, so
    that tied weights lead to the module that does the same. A matrix that no parameter holds (scaled by the exporter) is left out.
    One matrix is in memory at a time.
    """
    linear: list[_Named] = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    embeddings: list[_Named] = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
    sources = {}
    for value, is_product in _matrices(graph):
        name = name_of(value)
        source = _find(array_of(value), linear if is_product else embeddings, name)
        unmap(value)
        if source is not None:
            sources[name] = source
    return sources


def _matrices(graph: ir.Model) -> Iterator[tuple[ir.Value, bool]]:
    """Every float matrix among the initializers, and whether it is multiplied by rather than gathered from."""
    for value in graph.graph.initializers.values():
        if value.const_value is None or len(value.const_value.shape) != 2:
            continue
        readers = {(use.node.op_type, use.idx) for use in value.uses()}
        if any(op in _PRODUCTS and index == 1 for op, index in readers):
            yield value, True
        elif ("Gather", 0) in readers:
            yield value, False


def _find(array: np.ndarray, modules: Sequence[_Named], name: str) -> WeightSource | None:
    # Modules whose layer number the initializer's name carries come first: the search then ends at once.
    digits = [part for part in name.split(".") if part.isdigit()]
    ordered = sorted(modules, key=lambda pair: digits != [part for part in pair[0].split(".") if part.isdigit()])
    for module_name, module in ordered:
        for transpose in (True, False):
            source = _rows(array.T if transpose else array, module.weight.detach(), f"{module_name}.weight", transpose=transpose)
            if source is not None:
                return source
    return _joined(array.T, ordered, transpose=True) or _joined(array, ordered, transpose=False)


def _rows(array: np.ndarray, weight: torch.Tensor, parameter: str, *, transpose: bool) -> WeightSource | None:
    """Where ``array`` [R, C] stands among the rows of ``weight`` [.., C]; None where it does not."""
    if array.shape[1] != weight.shape[1] or array.shape[0] > weight.shape[0]:
        return None
    first = _as(weight[:, 0], array)
    for start in np.flatnonzero(first[: weight.shape[0] - array.shape[0] + 1] == array[0, 0]):
        stop = int(start) + array.shape[0]
        if np.array_equal(_as(weight[start:stop], array), array):
            whole = array.shape[0] == weight.shape[0]
            slices = {} if whole else {"axis": 0, "start": int(start), "stop": stop}
            return WeightSource(parameter=parameter, transpose=transpose, **slices)
    return None


def _joined(array: np.ndarray, modules: Sequence[_Named], *, transpose: bool) -> WeightSource | None:
    """The whole parameters whose rows make up ``array`` [R, C], in order; None where a row is left over."""
    parts: list[WeightSource] = []
    start = 0
    while start < len(array):
        name, count = next(((n, len(m.weight)) for n, m in modules if _starts_with(array[start:], m.weight.detach())), ("", 0))
        if not count:
            return None
        parts.append(WeightSource(parameter=f"{name}.weight", transpose=transpose))
        start += count
    return replace(parts[0], joined=tuple(parts[1:]))


def _starts_with(array: np.ndarray, weight: torch.Tensor) -> bool:
    rows = weight.shape[0]
    if rows == 0 or array.shape[1] != weight.shape[1] or len(array) < rows or not np.array_equal(_as(weight[0], array), array[0]):
        return False
    return np.array_equal(_as(weight, array), array[:rows])


def _as(weight: torch.Tensor, array: np.ndarray) -> np.ndarray:
    """In the type of ``array``; bfloat16, which numpy lacks, by way of float32, which holds all of its values."""
    return weight.float().numpy().astype(array.dtype, copy=False)

"""What a manifest says of the graph, held against the graph that onnxruntime opened: the parity budget and the sessions follow from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import TensorRecord
from runtimes.artifacts.ort_adapter_file import Tensor, host_array
from runtimes.edits.op import EXPLICIT_SLOTS, FIRST_SLOT, PROMPT_LENGTH, RULE_DEFAULTS
from runtimes.errors import BundleError
from runtimes.precision import FLOAT_TYPES

PAST = "past_key_values."


class Argument(Protocol):
    """What is read of an input, an output or an overridable initializer (onnxruntime's NodeArg)."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> Sequence[int | str | None]: ...


class Graph(Protocol):
    """onnxruntime's InferenceSession."""

    def get_inputs(self) -> Sequence[Argument]: ...

    def get_outputs(self) -> Sequence[Argument]: ...

    def get_overridable_initializers(self) -> Sequence[Argument]: ...


def check_graph(bundle: Bundle, graph: Graph) -> None:
    """Raises BundleError for the first thing that manifest.json says and the graph is not."""
    for said, found in _differences(bundle, graph):
        raise BundleError(f"{bundle.folder}: manifest.json says {said}, and {bundle.graph_path.name} has {found}; export the bundle again")


def check_adapter(file: Path, tensors: Mapping[str, Tensor], bundle: Bundle, graph: Graph) -> None:
    """Raises BundleError where an adapter's tensors are not those that the graph takes of one, or are not numbers."""
    banks = {bank for node in bundle.nodes for bank in node.bank_names}
    of_adapters = {*banks, *bundle.manifest.head, *RULE_DEFAULTS} - {PROMPT_LENGTH}
    taken = {value.name: value for value in graph.get_overridable_initializers() if value.name in of_adapters}
    if odd := sorted({*tensors} - {*taken}):
        raise BundleError(f"{file} holds {odd[0]!r}, which the graph does not take; export the bundle again")
    if missing := sorted({*taken} - {*tensors}):
        raise BundleError(f"{file} does not hold {missing[0]}, which the graph takes of every adapter; export the bundle again")
    for name, value in tensors.items():
        argument = taken[name]
        if value.data_type() != argument.type or not _fit(value.shape(), argument.shape):
            raise BundleError(
                f"{file}: {name} is {value.data_type()} {list(value.shape())}, and the graph takes {argument.type} {list(argument.shape)}; "
                "export the bundle again"
            )
        if not np.isfinite(host_array(value)).all():
            raise BundleError(f"{file}: {name} holds values that are not finite; export the bundle again")


def _differences(bundle: Bundle, graph: Graph) -> Iterator[tuple[str, str]]:
    """(what the manifest says, what the graph has)."""
    inputs, outputs = graph.get_inputs(), graph.get_outputs()
    overridable = {value.name: value for value in graph.get_overridable_initializers()}
    for kind, records, arguments in (("input", bundle.manifest.inputs, inputs), ("output", bundle.manifest.outputs, outputs)):
        yield from _tensors(kind, records, arguments)
    yield from _nodes(bundle, overridable)
    yield from _sizes(bundle, inputs, {value.name: value for value in outputs})
    if bundle.manifest.rules == "row" and not {EXPLICIT_SLOTS, FIRST_SLOT} & {*overridable, *(value.name for value in inputs)}:
        yield "rules row", f"neither {EXPLICIT_SLOTS} nor {FIRST_SLOT}"


def _tensors(kind: str, records: Sequence[TensorRecord], arguments: Sequence[Argument]) -> Iterator[tuple[str, str]]:
    found = {argument.name: argument for argument in arguments}
    for record in records:
        argument = found.pop(record.name, None)
        if argument is None:
            yield f"{kind} {record.name}", "none of that name"
        elif argument.type != f"tensor({record.dtype})" or not _fit(record.shape, argument.shape):
            yield f"{kind} {record.name} {record.dtype} {list(record.shape)}", f"{argument.type} {list(argument.shape)}"
    if kind == "input":  # more outputs do no harm: activations are some while a calibration reads them
        yield from ((f"nothing of input {name}", "it") for name in found)


def _fit(said: Sequence[object], found: Sequence[object]) -> bool:
    """Whether the sizes agree that both know; a negative one is what onnxruntime itself does not take at its word."""
    pairs = zip(said, found, strict=False)
    return len(said) == len(found) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int) and min(a, b) >= 0)


def _nodes(bundle: Bundle, overridable: dict[str, Argument]) -> Iterator[tuple[str, str]]:
    m, expected = bundle.manifest, _float_type(bundle)
    banks = {bank: node for node in bundle.nodes for bank in node.bank_names}
    for bank, node in banks.items():
        value = overridable.get(bank)
        if value is None:
            yield f"edit node {node.name}", f"no {bank}"
        elif value.type != expected:
            yield f"precision {m.precision}", f"{bank} of {value.type}"
        elif len(value.shape) == 3 and value.shape[-1] not in (m.model.hidden_size, None) and isinstance(value.shape[-1], int):
            yield f"hidden_size {m.model.hidden_size}", f"{bank} of width {value.shape[-1]}"
    unlisted = sorted(name for name in overridable if re.match(r"reft\.\d+\.", name) and name not in banks)
    yield from (("no such edit node", name) for name in unlisted)


def _float_type(bundle: Bundle) -> str:
    """onnxruntime's name of the manifest's precision."""
    element = FLOAT_TYPES.get(bundle.manifest.precision)
    return f"tensor({element.name})" if element is not None else ""


def _sizes(bundle: Bundle, inputs: Sequence[Argument], outputs: dict[str, Argument]) -> Iterator[tuple[str, str]]:
    m = bundle.manifest
    past = [value for value in inputs if value.name.startswith(PAST)]
    keys = [value for value in past if value.name.endswith(".key")]
    if keys and m.kv_cache == "none":
        yield "kv_cache none", keys[0].name
    elif keys and len(keys) != m.model.num_hidden_layers:
        yield f"num_hidden_layers {m.model.num_hidden_layers}", f"a KV cache of {len(keys)}"
    heads, kept = m.model.num_attention_heads, [value.shape[1] for value in keys if len(value.shape) == 4]
    yield from ((f"num_attention_heads {heads}", f"a KV cache of {n} heads") for n in kept if heads and isinstance(n, int) and heads % n)
    yield from _cache_type(bundle, past)
    floats = [value for value in (*past, *outputs.values()) if value.type in {f"tensor({e.name})" for e in FLOAT_TYPES.values()}]
    if floats and not m.nodes and _float_type(bundle) not in {value.type for value in floats}:
        yield f"precision {m.precision}", f"{floats[0].name} of {floats[0].type}"
    if (logits := outputs.get("logits")) is not None and logits.shape:
        yield from _logits(bundle, logits.shape)


def _cache_type(bundle: Bundle, past: Sequence[Argument]) -> Iterator[tuple[str, str]]:
    q = bundle.manifest.quantization
    said = "float" if q is None else q.cache
    floats = {f"tensor({e.name})" for e in FLOAT_TYPES.values()}
    expected = {"tensor(int8)"} if said == "int8" else floats
    yield from ((f"cache {said}", f"{value.name} of {value.type}") for value in past if value.type not in expected)


def _logits(bundle: Bundle, shape: Sequence[int | str | None]) -> Iterator[tuple[str, str]]:
    m = bundle.manifest
    name, width = ("labels", len(m.labels)) if m.labels else ("vocab_size", m.model.vocab_size)
    if isinstance(shape[-1], int) and shape[-1] != width:
        yield f"{name} {width}", f"{shape[-1]} logits"
    if len(shape) == 3 and (m.logits == "last") != (shape[1] == 1):
        yield f"logits {m.logits}", f"logits of shape {list(shape)}"

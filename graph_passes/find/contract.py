"""What a graph must offer to be folded: ``input_ids``, ``logits``, and of a decoder a KV cache that goes in and comes out.

Every ``present.<layer>.key|value`` has its ``past_key_values.<layer>.key|value`` of the same type and shape, every layer has what the
others have, and the cache is what a decode step knows of its history: what went in comes out with the step's own tokens added, and
logits depend on it. A graph that keeps half of that folds and runs, and answers as if nothing had come before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_

import onnx_ir as ir

from graph_passes.accessors import name_of
from graph_passes.find.dominators import SHAPE_READERS, read_values
from graph_passes.find.encoder import attention_anchors, is_classifier, row_of_every_token
from runtimes.errors import GraphError

# present.0.key, present.0.decoder.key, present_key_values.0.key, present_0_key, present_key_0, present_key.0, present_keys.0; of values
# and of the past alike.
_CACHE = re.compile(r"(?:past|present)(?:_key_values)?(?:[._]([0-9]{1,9})[._](?:decoder[._])?(key|value)s?|_(key|value)s?[._]([0-9]{1,9}))")

_BEGINNING = re.compile(r"(?:past|present)(?:_key_values)?")

_FLOATS = frozenset({None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Types of another state than keys and values; integers are lengths. None is a type that the graph does not declare."""

_TOKENS = 2
"""The axis of a cache [batch, heads, tokens, width] that grows."""

Slot = tuple[int, str]
"""A layer, and "key" or "value"; of another state than those -1 and what its name says behind past or present."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderContract:
    """The graph inputs and outputs that the passes read."""

    input_ids: ir.Value
    logits: ir.Value
    keys: tuple[ir.Value, ...]
    """One value of each layer's attention, in layer order: ``present.<layer>.key``, or what an encoder's attention computes."""
    cache: tuple[tuple[ir.Value, ir.Value], ...] = ()
    """Of a decoder every state that a step hands to the next: the input, and the output that takes its place."""
    attention_mask: ir.Value | None
    """[batch, past + sequence]; None where the graph has no such input."""


def read_contract(graph: ir.Graph) -> DecoderContract:
    """The graph's inputs and outputs by name; spellings of the cache that exporters use are accepted too.

    Raises GraphError naming everything that is missing, and for a cache whose input and output differ in type or shape.
    """
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    if is_classifier(graph):
        return DecoderContract(
            input_ids=inputs["input_ids"],
            logits=row_of_every_token(outputs["logits"]),
            keys=attention_anchors(graph, inputs["input_ids"]),
            attention_mask=inputs.get("attention_mask"),
        )
    pasts, presents = _states(graph.inputs, "past"), _states(graph.outputs, "present")
    missing = ["input 'input_ids'"] if "input_ids" not in inputs else []
    missing += ["output 'logits'"] if "logits" not in outputs else []
    if any(part == "key" for _, part in presents):
        # Either half alone is missing: a cache that does not come out never grows, one that does not go in is never read.
        slots = {*pasts, *presents, *_of_every_layer({*pasts, *presents})}
        missing += [f"output {_missing(slot, presents, pasts, 'present')!r}" for slot in sorted(slots - set(presents))]
        if pasts:
            missing += [f"input {_missing(slot, pasts, presents, 'past_key_values')!r}" for slot in sorted(slots - set(pasts))]
        else:
            missing.append("inputs 'past_key_values.<layer>.key|value'")
    else:
        missing.append("outputs 'present.<layer>.key'")
    if missing:
        raise GraphError(
            f"the graph is not a decoder with a KV cache: {_shortened(missing)} missing; it has inputs {_shortened(inputs)} and "
            f"outputs {_shortened(outputs)}; export the decoder over token ids with its cache (text-generation-with-past), or a "
            "classifier with logits [batch, labels]"
        )
    cache = tuple((pasts[slot], presents[slot]) for slot in sorted(presents))
    for past, present in cache:
        _check_alike(past, present)
    return DecoderContract(
        input_ids=inputs["input_ids"],
        logits=outputs["logits"],
        keys=tuple(presents[slot] for slot in sorted(presents) if slot[1] == "key" and slot[0] >= 0),
        attention_mask=inputs.get("attention_mask"),
        cache=cache,
    )


def check_history(graph: ir.Graph) -> None:
    """Raises GraphError where a decode step would not know what came before it, whatever the names say.

    Every present must depend on its own past and on the step's tokens, and logits on every past; who reads a shape alone does not
    depend on the values. An encoder has no history.
    """
    contract = read_contract(graph)
    sources = [contract.input_ids, *(past for past, _ in contract.cache)]
    reached = {value: 1 << bit for bit, value in enumerate(sources)}
    for node in graph:
        if node.op_type in SHAPE_READERS:
            continue
        if mask := reduce(or_, (reached.get(value, 0) for value in read_values(node)), 0):
            reached.update(dict.fromkeys(node.outputs, mask))
    remedy = "a decode step would not know its history: export the decoder again with its cache (text-generation-with-past)"
    for past, present in contract.cache:
        if not reached.get(present, 0) & reached[past]:
            raise GraphError(f"{present.name} does not hold what came in as {past.name}, so that {remedy}")
        if not reached.get(present, 0) & reached[contract.input_ids]:
            raise GraphError(f"{present.name} does not depend on the tokens, so that it never grows and {remedy}")
        if not reached.get(contract.logits, 0) & reached[past]:
            raise GraphError(f"logits do not depend on {past.name}, so that {remedy}")


def name_cache(graph: ir.Graph) -> bool:
    """Names a decoder's cache as a bundle's is, ``past_key_values.<i>.key`` and ``present.<i>.key``; returns whether any name changed."""
    changed = False
    for past, present in read_contract(graph).cache:
        layer, part = _slot(name_of(past))
        if layer >= 0:
            names = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
            changed = changed or names != (past.name, present.name)
            past.name, present.name = names
    return changed


def _states(values: Iterable[ir.Value], prefix: str) -> dict[Slot, ir.Value]:
    """Of the graph's inputs or outputs those that hold a state; GraphError where two are the same layer's."""
    states: dict[Slot, ir.Value] = {}
    for value in values:
        name = value.name or ""
        if not name.startswith(prefix) or (value.dtype not in _FLOATS and not _CACHE.fullmatch(name)):
            continue
        slot = _slot(name)
        if slot in states:
            raise GraphError(
                f"{states[slot].name} and {value.name} are both the {slot[1]} of layer {slot[0]}, and which of them is its cache cannot be "
                "told; leave one out of the graph"
            )
        states[slot] = value
    return states


def _slot(name: str) -> Slot:
    if match := _CACHE.fullmatch(name):
        return int(match[1] or match[4]), match[2] or match[3]
    return -1, _BEGINNING.sub("", name, count=1).lstrip("._")


def _of_every_layer(slots: Iterable[Slot]) -> set[Slot]:
    """Keys, or keys and values, of every layer up to the last, or to the first gaps where a layer's number is absurd."""
    known = [(layer, part) for layer, part in slots if layer >= 0]
    layers, parts = {layer for layer, _ in known}, {part for _, part in known}
    return {(layer, part) for layer in range(min(max(layers), len(layers)) + 1) for part in parts}


def _missing(slot: Slot, halves: Mapping[Slot, ir.Value], others: Mapping[Slot, ir.Value], usual: str) -> str:
    """What the missing one of ``halves`` would be called: as they begin, and as its other half ends; else by the ``usual`` name."""
    if slot not in others:
        return f"{usual}.{slot[0]}.{slot[1]}"
    known = (_BEGINNING.match(name_of(value)) for (layer, _), value in halves.items() if layer >= 0)
    begins = {match[0] for match in known if match}
    begin = begins.pop() if slot[0] >= 0 and begins else usual if slot[0] >= 0 else usual.removesuffix("_key_values")
    return _BEGINNING.sub(begin, name_of(others[slot]), count=1)


def _check_alike(past: ir.Value, present: ir.Value) -> None:
    """One step's output is the next one's input: types are equal, and so are all dimensions but that of the tokens."""
    differ = None not in (past.dtype, present.dtype) and past.dtype != present.dtype
    if past.shape is not None and present.shape is not None:
        pairs = enumerate(zip(past.shape, present.shape, strict=False))
        fixed = [pair for axis, pair in pairs if axis != _TOKENS and all(isinstance(dim, int) for dim in pair)]
        differ = differ or len(past.shape) != len(present.shape) or any(a != b for a, b in fixed)
    if differ:
        raise GraphError(
            f"{past.name} is {_described(past)}, and {present.name}, which takes its place at the next step, {_described(present)}; export "
            "the decoder again with its cache (text-generation-with-past)"
        )


def _described(value: ir.Value) -> str:
    dtype = "of no stated type" if value.dtype is None else value.dtype.name.lower()
    return dtype if value.shape is None else f"{dtype} [{', '.join(map(str, value.shape))}]"


def _shortened(names: Iterable[str | None]) -> str:
    listed = [str(name) for name in names]
    return (", ".join(listed[:6]) or "none") + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")

"""What a graph must offer to be folded: ``input_ids``, ``logits``, and one ``present.<layer>.key`` per layer of a decoder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.encoder import attention_anchors, is_classifier
from runtimes.errors import GraphError

# present.0.key, present.0.decoder.key, present_key_values.0.key, present_0_key, present_key_0, present_key.0, present_keys.0
_KEY_OUTPUT = re.compile(r"present(?:_key_values)?(?:[._](\d+)[._](?:decoder[._])?keys?|_keys?[._](\d+))")

_KEY_INPUT = re.compile(r"past_key_values\.(\d+)\.key")


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderContract:
    """The graph inputs and outputs that the passes read."""

    input_ids: ir.Value
    logits: ir.Value
    keys: tuple[ir.Value, ...]
    """One value of each layer's attention, in layer order: ``present.<layer>.key``, or what an encoder's attention computes."""
    attention_mask: ir.Value | None
    """[batch, past + sequence]; None where the graph has no such input."""


def read_contract(graph: ir.Graph) -> DecoderContract:
    """The graph's inputs and outputs by name; spellings of the key outputs that exporters use are accepted too.

    Raises GraphError naming everything that is missing.
    """
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs}
    if is_classifier(graph):
        return DecoderContract(
            input_ids=inputs["input_ids"],
            logits=outputs["logits"],
            keys=attention_anchors(graph, inputs["input_ids"]),
            attention_mask=inputs.get("attention_mask"),
        )
    matches = ((_KEY_OUTPUT.fullmatch(name or ""), value) for name, value in outputs.items())
    keys = {int(match[1] or match[2]): value for match, value in matches if match}
    missing = ["input 'input_ids'"] if "input_ids" not in inputs else []
    missing += ["output 'logits'"] if "logits" not in outputs else []
    if keys:
        # A layer whose cache goes in but does not come out counts too: its cache would never grow.
        cached = {int(match[1]) for name in inputs if (match := _KEY_INPUT.fullmatch(name or ""))}
        missing += [f"output 'present.{layer}.key'" for layer in range(max(keys.keys() | cached) + 1) if layer not in keys]
    else:
        missing.append("outputs 'present.<layer>.key'")
    if missing:
        raise GraphError(
            f"the graph is not a decoder with a KV cache: {', '.join(missing)} missing; it has inputs {_shortened(inputs)} and "
            f"outputs {_shortened(outputs)}; export the decoder over token ids with its cache (text-generation-with-past), or a "
            "classifier with logits [batch, labels]"
        )
    return DecoderContract(
        input_ids=inputs["input_ids"],
        logits=outputs["logits"],
        keys=tuple(keys[layer] for layer in range(len(keys))),
        attention_mask=inputs.get("attention_mask"),
    )


def _shortened(names: Iterable[str | None]) -> str:
    listed = [str(name) for name in names]
    return (", ".join(listed[:6]) or "none") + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")

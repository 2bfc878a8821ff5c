"""torch.onnx.export(dynamo=True): an encoder, or a decoder without a cache, with a classification head.

Inputs ``input_ids``, ``attention_mask`` and, where the model tells the texts of a pair apart, ``token_type_ids``, each [B, S]; output
``logits`` [B, labels]. Positions are the model's own to count. Batch and sequence are dynamic.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from reft_export.base.classifiers import decodes, takes_token_types
from reft_export.exporting.dynamo import Wrapper, make_row_major, name_weights, strip_provenance, trace
from reft_export.exporting.exported_graph import ExportedGraph

BATCH, SEQUENCE = 2, 5
"""Of the traced example; any but 0 and 1, which torch takes for constants."""


class LogitsOnly(Wrapper):
    """The model's logits as a tensor, its inputs as keywords."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        uncached = {"use_cache": False} if decodes(self.model) else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **uncached).logits


def export_classifier(model: PreTrainedModel, *, opset: int = 20) -> ExportedGraph:
    """Exports ``model`` in the dtype it has. **Rearranges its linear weights in place**: record eager results before.

    Raises ExportError with torch's own reason when the family cannot be traced.
    """
    weights = make_row_major(model)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if takes_token_types(model) else [])]
    example = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    dynamic = torch.export.Dim.DYNAMIC
    # Token 3 is a pad of no supported family: RoBERTa's positions skip pads.
    arguments = {name: 3 * example if name == "input_ids" else example.clone() for name in names}
    graph = trace(LogitsOnly(model).eval(), arguments, {name: {0: dynamic, 1: dynamic} for name in names}, names, ["logits"], opset=opset)
    strip_provenance(graph)
    for value in graph.graph.inputs:
        value.shape = ir.Shape(["batch_size", "sequence_length"])
    for value in graph.graph.outputs:
        value.shape = ir.Shape(["batch_size", model.config.num_labels])
    return ExportedGraph(model=graph, weights=name_weights(graph, weights))

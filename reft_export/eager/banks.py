"""An adapter as a bundle holds it, the folded banks of a ``.onnx_adapter`` file, back in eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from reft_export.base.classifiers import with_head
from reft_export.eager.steering import EditFn, Steerer, Steering, device_of, edit_fn, steer
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.edits.edit import Edit, Site
from runtimes.edits.op import EditNode, edits_of, is_no_edit


def bank_edits(bundle: Bundle, name: str) -> dict[EditNode, tuple[Edit, ...]]:
    """The folded edits of one of the bundle's adapters, one per slot, at the nodes where it edits anything."""
    tensors = read_onnx_adapter(bundle.adapter(name).file)
    banks = {node: [tensors[bank] for bank in node.bank_names] for node in bundle.nodes}
    return {node: edits_of(node, bank) for node, bank in banks.items() if not is_no_edit(bank, node.op)}


def bank_head(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    """A classifier's head as one of the bundle's adapters carries it, by the base's parameter names; empty for a decoder."""
    tensors = read_onnx_adapter(bundle.adapter(name).file) if bundle.manifest.head else {}
    return {s.parameter: tensors[n].T if s.transpose else tensors[n] for n, s in bundle.manifest.head.items()}


def bank_steerer(bundle: Bundle, name: str) -> Steerer:
    """Switches the bundle's adapter on in an eager model; nodes at one site act in series, in the order of the graph."""
    edits, adapter = bank_edits(bundle, name), bundle.adapter(name)

    @contextmanager
    def steering(model: PreTrainedModel) -> Iterator[Steering]:
        by_site: dict[Site, list[EditFn]] = {}
        for node in sorted(edits):
            by_site.setdefault(node.site, []).append(edit_fn(edits[node], model.dtype, device_of(model)))
        functions = {site: _in_series(each) for site, each in by_site.items()}
        with with_head(model, bank_head(bundle, name)), steer(model, functions, rule=adapter.positions, tied=adapter.tied) as handle:
            yield handle

    return steering


def _in_series(functions: list[EditFn]) -> EditFn:
    def apply(h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        for function in functions:
            h = function(h, slot)
        return h

    return apply

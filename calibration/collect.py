"""Runs prompts through a folded graph with the edits on, and counts what every quantizable product is fed.

Each prompt is run once for every source (the base, each adapter) as it would be served: the prompt in chunks, then greedy tokens one
by one, one row at a time and so without pads. Memory is one chunk's activations and the histograms, however long the data is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.collected import Collected
from graph_passes.accessors import dtype_of, input_of, name_of
from graph_passes.find.weights import weight_products
from graph_passes.tied_head import tied_head
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.edits.positions import every_other
from runtimes.ort.session import to_float32
from runtimes.text.encoded_text import EncodedText, padded

CHUNK = 128
"""Prompt tokens per call."""
SAVE_EVERY = 10.0
"""Seconds of work that an interruption may cost."""


def product_inputs(model: ir.Model, float_inputs: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the values that the quantizable products read, each once, in graph order; not of those by weights in ``float_inputs``."""
    return tuple(dict.fromkeys(name_of(input_of(node, 0)) for node in _calibrated(model, float_inputs)))


def _calibrated(model: ir.Model, float_inputs: Collection[str]) -> list[ir.Node]:
    head = tied_head(model.graph)
    products = {*weight_products(model.graph), *([] if head is None else [head.node])}
    return [node for node in model.graph if node in products and input_of(node, 1).name not in float_inputs]


def expose_inputs(model: ir.Model, float_inputs: Collection[str] = ()) -> None:
    """Makes every such value a graph output, in place."""
    existing = {value.name for value in model.graph.outputs}
    for node in _calibrated(model, float_inputs):
        value = input_of(node, 0)
        if value.name not in existing:
            existing.add(value.name)
            value.type = value.type or ir.TensorType(dtype_of(input_of(node, 1)))
            model.graph.outputs.append(value)


def collect(
    session: Any,
    prompts: Iterable[Sequence[int] | EncodedText],
    collected: Collected,
    state: Path,
    *,
    on_prompt: Callable[[int], None] | None = None,
) -> Collected:
    """Goes on from what ``collected`` holds; writes ``state`` every few seconds and at the end, and returns it complete.

    ``session``: an OrtSession over a graph after ``expose_inputs``, and prompts are token ids; or an OrtClassifier, and they are texts.
    Raises CalibrationError for activations that are not finite.
    """
    saved = time.monotonic()
    for number, prompt in enumerate(prompts):
        if number < collected.header.done:
            continue
        tokens = sum(_run(session, source, prompt, collected) for source in collected.header.sources)
        collected.header = replace(collected.header, done=number + 1, tokens=collected.header.tokens + tokens)
        if on_prompt:
            on_prompt(number + 1)
        if time.monotonic() - saved > SAVE_EVERY:
            collected.save(state)
            saved = time.monotonic()
    collected.save(state)
    return collected


def _run(session: Any, source: str, prompt: Sequence[int] | EncodedText, collected: Collected) -> int:
    """One prompt and its greedy continuation; returns how many tokens were fed."""
    session.set_adapter(None if source == BASE_GOLDEN else source)
    histograms = collected.histograms[source]
    if isinstance(prompt, EncodedText):
        _count(session.classify(*padded([prompt], 0)).outputs, histograms, source)
        return len(prompt)
    ends = set(session.bundle.manifest.model.eos_token_ids)
    length = np.array([len(prompt)], np.int64)
    marks = every_other([len(prompt)])
    fed, past = 0, None

    def feed(tokens: Sequence[int]) -> int:
        nonlocal fed, past
        mask = np.ones((1, fed + len(tokens)), np.int64)
        output = session.step(np.array([tokens], np.int64), mask, past=past, prompt_length=length, marks=marks)
        fed, past = fed + len(tokens), output.past
        _count(output.outputs, histograms, source)
        return int(output.logits[0, -1].argmax())

    for start in range(0, len(prompt), CHUNK):
        token = feed(prompt[start : start + CHUNK])
    for _ in range(collected.header.decode_tokens):
        if token in ends:
            break
        token = feed([token])
    return fed


def _count(outputs: Mapping[str, Any], histograms: Mapping[str, Any], source: str) -> None:
    for name, histogram in histograms.items():
        histogram.add(to_float32(outputs[name]), f"activation {name} of {source}")

"""Golden arrays: what eager PyTorch said, recorded on the host so that a device can check itself without PyTorch.

One npz per name, "base" and every adapter; runtimes/artifacts/golden_schema.py says what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from calibration.products import stored_activations
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import Base, set_precision
from reft_export.base.token_rules import output_rows
from reft_export.eager.steering import Steerer
from reft_export.tasks.task import TASKS, Inputs
from runtimes.artifacts.bundle import BASE_GOLDEN, WeightSource
from runtimes.artifacts.golden_schema import GoldenSchema, write_golden
from runtimes.parity.figures import compare

NOISE, NOISE_DRAWS = 1e-5, 3
"""Of ``reference_noise``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What a base was recorded on and said, carried to the recording of its quantized weights."""

    inputs: Inputs
    steerers: Mapping[str, Steerer]
    fp32: Mapping[str, np.ndarray]
    """Logits by name of the float32 model; empty of a bundle that is float32."""


def record_base(folder: Path, base: Base, steerers: Mapping[str, Steerer], precision: str, *, quantized: bool = False) -> Recorded:
    """Golden arrays of the base and every adapter into ``folder``; the base is left in ``precision``, a bundle's float type.

    ``quantized``: its weights will be, and ``record_quantized`` writes the arrays then.
    """
    inputs = inputs_of(base)
    fp32 = fp32_logits(base.model, inputs, steerers) if quantized or precision != "fp32" else {}
    set_precision(base.model, precision)
    if not quantized:
        record_golden(folder, base.model, inputs, steerers, fp32=fp32 or None)
    return Recorded(inputs=inputs, steerers=steerers, fp32=fp32)


def inputs_of(base: Base) -> Inputs:
    """What ``base`` is recorded on: prompts with its continuation, or a classifier's texts."""
    return TASKS[base.task].inputs(base)


def reference_noise(model: PreTrainedModel, inputs: Inputs, steerer: Steerer | None, logits: np.ndarray) -> np.ndarray:
    """[largest relative error, lowest top-1 agreement] of the model against itself, float32 [2], over NOISE_DRAWS of noise.

    The embeddings are multiplied by 1 + NOISE n, n normal: no more than the fp32 row of the budgets lets two right graphs differ by.
    Rounding to a few levels may turn that into as much as quantization costs itself, and no device can be nearer to the reference than
    the reference is to itself.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator)).to(output.device, output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        found = [compare(inputs.logits(model, steerer), logits) for _ in range(NOISE_DRAWS)]
    finally:
        handle.remove()
    return np.array([max(f.max_relative for f in found), min(f.top1 for f in found if f.top1 is not None)], np.float32)


def record_golden(
    folder: Path,
    model: PreTrainedModel,
    inputs: Inputs,
    steerers: Mapping[str, Steerer],
    *,
    fp32: Mapping[str, np.ndarray] | None = None,
    noisy: bool = False,
    of_base: bool = True,
    on_name: Callable[[str], None] | None = None,
) -> None:
    """Writes ``folder``/<name>.npz. ``model`` carries the weights that ship; ``fp32`` holds the float32 model's logits by name.

    ``noisy``: the model quantizes activations, and how far that lets float noise carry is recorded, too. ``of_base``: the base's arrays,
    too, which a bundle may have already.
    """
    folder.mkdir(exist_ok=True)
    base_logits = inputs.logits(model)
    schema = GoldenSchema(
        task=inputs.task,
        vocabulary=output_rows(model),
        labels=base_logits.shape[1],
        adapter=False,
        float32=fp32 is None,
        noisy=noisy,
    )
    names: dict[str, Steerer | None] = {**({BASE_GOLDEN: None} if of_base else {}), **steerers}
    answers = inputs.answers(model, names)
    for name, steerer in names.items():
        if on_name:
            on_name(name)
        arrays = inputs.arrays | answers[name]
        arrays["logits"] = base_logits if steerer is None else inputs.logits(model, steerer)
        if noisy:
            arrays["noise"] = reference_noise(model, inputs, steerer, arrays["logits"])
        if steerer is not None:
            arrays["base_logits"] = base_logits
            if fp32 is not None:
                arrays |= {"fp32_logits": fp32[name], "fp32_base_logits": fp32[BASE_GOLDEN]}
        write_golden(folder / f"{name}.npz", arrays, replace(schema, adapter=steerer is not None))


def fp32_logits(model: PreTrainedModel, inputs: Inputs, steerers: Mapping[str, Steerer]) -> dict[str, np.ndarray]:
    """Logits by name of the float32 model, for ``record_golden``'s delta references."""
    return {name: inputs.logits(model, steerer) for name, steerer in {BASE_GOLDEN: None, **steerers}.items()}


def record_quantized(
    golden: Path,
    proof: Path,
    model: PreTrainedModel,
    graph: ir.Model,
    sources: Mapping[str, WeightSource],
    inputs: Inputs,
    steerers: Mapping[str, Steerer],
    fp32: Mapping[str, np.ndarray],
    *,
    of_base: bool = True,
) -> None:
    """Golden arrays of ``model`` carrying the graph's dequantized weights, and its fake-quantized activations where a scheme has any.

    There the same without the activations goes into ``proof``, where exactness is shown; else ``proof`` stays empty: what MatMulNBits
    rounds inside is held to float activations, too. ``of_base``: as of ``record_golden``.
    """
    load_dequantized(model, graph, sources)
    if not stored_activations(graph):
        record_golden(golden, model, inputs, steerers, fp32=fp32, of_base=of_base)
        return
    record_golden(proof, model, inputs, steerers, fp32=fp32, of_base=of_base)
    with activations_quantized(model, graph, sources):
        record_golden(golden, model, inputs, steerers, fp32=fp32, noisy=True, of_base=of_base)

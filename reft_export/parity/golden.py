"""Golden arrays: what eager PyTorch said, recorded on the host so that a device can check itself without PyTorch.

One npz per name, "base" and every adapter; runtimes/artifacts/golden_schema.py says what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from calibration.products import activation_quantization
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import Base
from reft_export.eager.steering import Steerer, steering_of
from reft_export.tasks.classification import ClassifierInputs, classifier_inputs, classifier_logits
from reft_export.tasks.generation import GREEDY_TOKENS, GoldenInputs, eager_greedy, golden_inputs, golden_prompts
from runtimes.artifacts.bundle import BASE_GOLDEN, WeightSource
from runtimes.artifacts.golden_schema import GoldenSchema, write_golden
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.parity.figures import compare

NOISE, NOISE_DRAWS = 1e-5, 3
"""Of ``reference_noise``."""

Inputs = GoldenInputs | ClassifierInputs


def inputs_of(base: Base) -> Inputs:
    """What ``base`` is recorded on: prompts with its continuation, or a classifier's texts."""
    if base.task == TEXT_CLASSIFICATION:
        return classifier_inputs(base.model, base.tokenizer)
    return golden_inputs(base.model, golden_prompts(base.model, base.tokenizer))


def eager_logits(model: PreTrainedModel, inputs: Inputs, steerer: Steerer | None = None) -> np.ndarray:
    """Logits [K, V] float32 at ``logit_positions``, or [B, labels] of a classifier's texts, from one full forward."""
    if isinstance(inputs, ClassifierInputs):
        with steering_of(model, steerer):
            return classifier_logits(model, inputs)
    mask = torch.from_numpy(inputs.attention_mask)
    device = next(model.parameters()).device
    with torch.no_grad(), steering_of(model, steerer) as handle:
        if handle is not None:
            handle.prompt_length = inputs.prompt_length
        logits = model(
            input_ids=torch.from_numpy(inputs.input_ids).to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
        ).logits
    rows, columns = torch.from_numpy(inputs.logit_positions).to(device).unbind(1)
    return logits[rows, columns].float().cpu().numpy()


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
        found = [compare(eager_logits(model, inputs, steerer), logits) for _ in range(NOISE_DRAWS)]
    finally:
        handle.remove()
    return np.array([max(f.max_relative for f in found), min(f.top1 for f in found)], np.float32)


def record_golden(
    folder: Path,
    model: PreTrainedModel,
    inputs: Inputs,
    steerers: Mapping[str, Steerer],
    *,
    fp32: Mapping[str, np.ndarray] | None = None,
    max_tokens: int = GREEDY_TOKENS,
    noisy: bool = False,
    on_name: Callable[[str], None] | None = None,
) -> None:
    """Writes ``folder``/<name>.npz. ``model`` carries the weights that ship; ``fp32`` holds the float32 model's logits by name.

    ``noisy``: the model quantizes activations, and how far that lets float noise carry is recorded, too.
    """
    folder.mkdir(exist_ok=True)
    shared = {f: getattr(inputs, f) for f in inputs.__dataclass_fields__}
    base_logits = eager_logits(model, inputs)
    schema = GoldenSchema(
        task=TEXT_CLASSIFICATION if isinstance(inputs, ClassifierInputs) else TEXT_GENERATION,
        vocabulary=(model.get_output_embeddings() or model.get_input_embeddings()).weight.shape[0],
        labels=base_logits.shape[1],
        adapter=False,
        float32=fp32 is None,
        noisy=noisy,
    )
    for name, steerer in {BASE_GOLDEN: None, **steerers}.items():
        if on_name:
            on_name(name)
        arrays = dict(shared)
        if isinstance(inputs, GoldenInputs):
            arrays["greedy_tokens"] = eager_greedy(model, inputs, steerer, max_tokens=max_tokens)
        arrays["logits"] = base_logits if steerer is None else eager_logits(model, inputs, steerer)
        if noisy:
            arrays["noise"] = reference_noise(model, inputs, steerer, arrays["logits"])
        if steerer is not None:
            arrays["base_logits"] = base_logits
            if fp32 is not None:
                arrays |= {"fp32_logits": fp32[name], "fp32_base_logits": fp32[BASE_GOLDEN]}
        write_golden(folder / f"{name}.npz", arrays, replace(schema, adapter=steerer is not None))


def fp32_logits(model: PreTrainedModel, inputs: Inputs, steerers: Mapping[str, Steerer]) -> dict[str, np.ndarray]:
    """Logits by name of the float32 model, for ``record_golden``'s delta references."""
    return {name: eager_logits(model, inputs, steerer) for name, steerer in {BASE_GOLDEN: None, **steerers}.items()}


def record_quantized(
    golden: Path,
    proof: Path,
    model: PreTrainedModel,
    graph: ir.Model,
    sources: Mapping[str, WeightSource],
    inputs: Inputs,
    steerers: Mapping[str, Steerer],
    exact: Mapping[str, np.ndarray],
) -> None:
    """Golden arrays of ``model`` carrying the graph's dequantized weights, and its fake-quantized activations where it has any.

    There the same without the activations goes into ``proof``, where exactness is shown; else ``proof`` stays empty.
    """
    load_dequantized(model, graph, sources)
    if activation_quantization(graph):
        record_golden(proof, model, inputs, steerers, fp32=exact)
    with activations_quantized(model, graph, sources):
        record_golden(golden, model, inputs, steerers, fp32=exact, noisy=bool(activation_quantization(graph)))

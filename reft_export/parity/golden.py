"""Golden arrays: what eager PyTorch said, recorded on the host so that a device can check itself without PyTorch.

One npz per name, "base" and every adapter; runtimes/artifacts/golden_schema.py says what it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from calibration.products import stored_activations
from graph_passes.stored_cache import stored_cache
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import Base, set_precision
from reft_export.base.token_rules import output_rows
from reft_export.eager.steering import Steerer
from reft_export.eager.stored_cache import rounded_cache
from reft_export.tasks.generation import GoldenInputs
from reft_export.tasks.task import TASKS, Inputs
from reft_export.training.probes import probe_examples
from runtimes.artifacts.golden_schema import BASE_GOLDEN, GoldenSchema, write_golden
from runtimes.artifacts.manifest import WeightSource
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import needs_marks

NOISE, NOISE_DRAWS = 1e-5, 3
"""Of ``reference_noise``."""


Arrays = Mapping[str, np.ndarray]
InputsByName = Mapping[str, Inputs]
"""Of the base, as BASE_GOLDEN, and of every adapter."""
Around = Callable[[str], AbstractContextManager[object]]
"""By an adapter's name what is entered while the model, steered by it, is asked."""
BaseAnswers = Mapping[bytes, Arrays]
"""What the model says without an adapter, by ``inputs_key``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """What a base was recorded on and said, carried to the recording of its quantized weights."""

    inputs: InputsByName
    steerers: Mapping[str, Steerer]
    fp32: Mapping[str, Arrays]
    """By name what the float32 model says, as ``fp32_answers`` gives it; empty of a bundle that is float32."""


def record_base(
    folder: Path,
    base: Base,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    precision: str,
    *,
    quantized: bool = False,
    around: Around = nullcontext,
) -> Recorded:
    """Golden arrays of the base and every adapter into ``folder``; the base is left in ``precision``, a bundle's float type.

    ``quantized``: its weights will be, and ``record_quantized`` writes the arrays then. ``around``: as of ``fp32_answers``.
    """
    inputs = with_likelihoods(base, inputs) if quantized else inputs
    fp32 = fp32_answers(base.model, inputs, steerers, around=around) if quantized or precision != "fp32" else {}
    set_precision(base.model, precision)
    if not quantized:
        record_golden(folder, base.model, inputs, steerers, fp32=fp32 or None)
    return Recorded(inputs=inputs, steerers=steerers, fp32=fp32)


def inputs_of(base: Base, adapters: Mapping[str, Adapter]) -> dict[str, Inputs]:
    """What each is recorded on: the base on prompts with its own continuation, or a classifier's texts; an adapter on its probes, or where
    it has none as the base."""
    of_base = TASKS[base.task].inputs(base)
    return {BASE_GOLDEN: of_base, **adapter_inputs(base, adapters, of_base)}


def adapter_inputs(base: Base, adapters: Mapping[str, Adapter], of_base: Inputs) -> dict[str, Inputs]:
    """``inputs_of`` where the base's are there. Raises AdapterError for probes that do not fit the base."""
    shared = of_base.for_adapters(base.model)
    marking = shared.marking() if isinstance(shared, GoldenInputs) else shared  # one for all, as the base's answers are

    def of(adapter: Adapter) -> Inputs:
        if adapter.probes:
            return TASKS[base.task].probe_inputs(base.model, probe_examples(base, adapter), of_base)
        return marking if needs_marks(adapter.where) else shared

    return {name: of(adapter) for name, adapter in adapters.items()}


def with_likelihoods(base: Base, inputs: InputsByName) -> InputsByName:
    """``inputs`` as a quantized bundle is recorded on them: what rounding costs the base is measured, too."""
    return {**inputs, BASE_GOLDEN: TASKS[base.task].with_likelihoods(base, inputs[BASE_GOLDEN])}


def reference_noise(model: PreTrainedModel, inputs: Inputs, steerer: Steerer | None, said: Arrays) -> np.ndarray:
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
        found = [inputs.differs(model, steerer, said) for _ in range(NOISE_DRAWS)]
    finally:
        handle.remove()
    return np.array([max(f.max_relative for f in found), min(f.top1 for f in found if f.top1 is not None)], np.float32)


def record_golden(
    folder: Path,
    model: PreTrainedModel,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    *,
    fp32: Mapping[str, Arrays] | None = None,
    known: Mapping[str, Arrays] | None = None,
    noisy: bool = False,
    of_base: bool = True,
    base_known: BaseAnswers | None = None,
    on_name: Callable[[str], None] | None = None,
) -> None:
    """Writes ``folder``/<name>.npz. ``model`` carries the weights that ship; ``fp32``: as of ``Recorded``.

    ``noisy``: the model quantizes activations, and how far that lets float noise carry is recorded, too. ``of_base``: the base's arrays,
    too, which a bundle may have already. ``known``: by adapter what this model said before, of the same inputs; ``base_known``: what it
    said without one, as an adapter's golden arrays hold it, which is less than the base's do.
    """
    folder.mkdir(exist_ok=True)
    names: dict[str, Steerer | None] = {**({BASE_GOLDEN: None} if of_base else {}), **steerers}
    task = TASKS[next(iter(inputs.values())).task]
    answers = task.answers(model, {name: (inputs[name], steerer) for name, steerer in names.items()})
    base_of = _base_answers(model, base_known)
    for name, steerer in names.items():
        if on_name:
            on_name(name)
        if steerer is None:
            said = dict(base_of(inputs[name]))
        elif known is not None and name in known:
            said = dict(known[name])
        else:
            said = inputs[name].said(model, steerer)
        arrays = inputs[name].arrays | answers[name] | said
        if noisy:
            arrays["noise"] = reference_noise(model, inputs[name], steerer, said)
        if steerer is not None:
            arrays |= _named("base_", base_of(inputs[name]))
        arrays |= dict({} if fp32 is None else fp32.get(name, {}))
        schema = GoldenSchema(
            task=task.name,
            vocabulary=output_rows(model),
            labels=said["logits"].shape[1],
            adapter=steerer is not None,
            float32=fp32 is None,
            noisy=noisy,
        )
        write_golden(folder / f"{name}.npz", {n: array for n, array in arrays.items() if n in schema.table}, schema)


def inputs_key(inputs: Inputs) -> bytes:
    """The same for inputs that a model says the same of: whatever they are held in, every value counts."""
    digest = hashlib.sha256(repr(inputs.likelihoods).encode())
    for name, array in sorted(inputs.arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _base_answers(model: PreTrainedModel, known: BaseAnswers | None = None) -> Callable[[Inputs], Arrays]:
    """What ``model`` says without an adapter, once for all adapters that are recorded on equal inputs; never for those of ``known``."""
    found = dict(known or {})

    def said(inputs: Inputs) -> Arrays:
        key = inputs_key(inputs)
        if key not in found:
            found[key] = inputs.said(model)
        return found[key]

    return said


def _named(kind: str, said: Arrays) -> dict[str, np.ndarray]:
    return {f"{kind}{name}": array for name, array in said.items()}


def fp32_answers(
    model: PreTrainedModel,
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    *,
    of_base: bool = True,
    base_known: BaseAnswers | None = None,
    around: Around = nullcontext,
) -> dict[str, Arrays]:
    """What the float32 model says, for ``record_golden``: arrays fp32_*. By adapter with it and without, which deltas are held to; of the
    base, unless its arrays are there already, how likely its passages are, where it has any.

    ``base_known``: as of ``record_golden``, of this model. ``around``: what else is learned from each adapter's forward passes."""
    base_of = _base_answers(model, base_known)
    found: dict[str, Arrays] = {}
    for name, steerer in steerers.items():
        with around(name):
            said = inputs[name].said(model, steerer)
        found[name] = _named("fp32_", said) | _named("fp32_base_", base_of(inputs[name]))
    if of_base and inputs[BASE_GOLDEN].likelihoods:
        found[BASE_GOLDEN] = {"fp32_log_probabilities": base_of(inputs[BASE_GOLDEN])["log_probabilities"]}
    return found


def record_quantized(
    golden: Path,
    proof: Path,
    model: PreTrainedModel,
    graph: ir.Model,
    sources: Mapping[str, WeightSource],
    inputs: InputsByName,
    steerers: Mapping[str, Steerer],
    fp32: Mapping[str, Arrays],
    *,
    of_base: bool = True,
    loaded: bool = False,
    known: Mapping[str, Arrays] | None = None,
    base_known: BaseAnswers | None = None,
) -> None:
    """Golden arrays of ``model`` carrying the graph's dequantized weights, and its fake-quantized activations where a scheme has any.

    There, and where its KV cache is rounded, the same without either goes into ``proof``, where exactness is shown; else ``proof`` stays
    empty: what MatMulNBits rounds inside is held to float activations, too. ``of_base``: as of ``record_golden``. ``loaded``: ``model``
    carries them already; ``known``: by adapter what it said then, with float activations. ``base_known``: as of ``record_golden``, of
    the model as the bundle ships it.
    """
    if not loaded:
        load_dequantized(model, graph, sources)
    activations, cache = bool(stored_activations(graph)), stored_cache(graph.graph)
    if not activations and cache is None:
        record_golden(golden, model, inputs, steerers, fp32=fp32, known=known, of_base=of_base, base_known=base_known)
        return
    record_golden(proof, model, inputs, steerers, fp32=fp32, known=known, of_base=of_base)
    # What MatMulNBits rounds inside, nobody can follow: the proof of such a graph, its cache rounded or not, is its accuracy level 1.
    rounded = activations_quantized(model, graph, sources) if activations else nullcontext()
    with rounded, rounded_cache(model, cache):
        record_golden(golden, model, inputs, steerers, fp32=fp32, noisy=True, of_base=of_base, base_known=base_known)

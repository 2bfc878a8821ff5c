"""What pyreft's own trainer loses in 100 steps on a tiny base: ``python pyreft_losses.py`` writes pyreft_losses.json; pyreft 0.1.0 and
pyvene 0.1.8 (installed with --no-deps) are needed for that alone, and test_pyreft_losses.py reads the file. Base and initial values are
sines, so that no random generator decides them, and every batch holds all examples, so that no order does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.bases import byte_tokenizer
from tiny import random_adapter
from trl_preference import sine_model, sines

from reft_export.base.load import Base, base_from_memory
from reft_export.training.data import collate, load_data
from runtimes.edits.adapter import Adapter

FIGURES = Path(__file__).with_suffix(".json")
STEPS, RATE, RANK, LAYERS = 100, 4e-3, 2, (0, 1)
SEED = 0
"""Torch's orthogonal parametrization completes R to a basis at random when it is set, and moves it in the coordinates of that basis."""
METHODS = {"loreft": "LoreftIntervention", "noreft": "NoreftIntervention", "direft": "NodireftIntervention"}
"""Ours, and pyreft's class of the same formula."""
EXAMPLES = [
    {"prompt": "what is it?", "completion": " a fox"},
    {"prompt": "who?", "completion": " somebody else"},
    {"prompt": "why not", "completion": " yes"},
    {"prompt": "where does it go", "completion": " home"},
]


def start(base: Base, method: str) -> Adapter:
    """Initial values, R with orthonormal rows; the last prompt token of every layer is edited."""
    made = random_adapter(base.info, method=method, rank=RANK, positions="l1", layers=LAYERS)
    tensors = {name: _value(name, each.shape, shift) for shift, (name, each) in enumerate(sorted(made.tensors.items()))}
    return replace(made, tensors=tensors)


def _value(name: str, shape: tuple[int, ...], shift: int) -> np.ndarray:
    value = sines(shape, shift).double().numpy()
    if name.endswith(".R"):
        value = np.linalg.svd(value, full_matrices=False)[2]
    elif name.endswith(".P"):
        value = value * 0.2
    else:
        value = value * 0.1
    return value.astype(np.float32)


def set_values(intervention: Any, method: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """pyreft's parameters from ours: its rotate_layer.weight is R^T."""
    source, projection = {"loreft": ("W", "R"), "noreft": ("W", "P"), "direft": ("W1", "W2")}[method]
    with torch.no_grad():
        intervention.learned_source.weight.copy_(tensors[source])
        intervention.learned_source.bias.copy_(tensors["b"])
        if method == "loreft":
            torch.manual_seed(SEED)
            intervention.rotate_layer.weight = tensors[projection].T
        else:
            intervention.proj_layer.weight.copy_(tensors[projection])
        if method == "noreft":
            intervention.proj_layer.bias.copy_(tensors["p"])


def losses(method: str) -> list[float]:
    import pyreft  # pyright: ignore[reportMissingImports]
    from transformers import TrainingArguments

    base = base_from_memory(sine_model(), byte_tokenizer())
    base.model.requires_grad_(False)
    adapter, width = start(base, method), base.info.hidden_size
    kind = getattr(pyreft, METHODS[method])
    shape = {"embed_dim": width, "low_rank_dimension": RANK, "dtype": torch.float32, "add_bias": method == "noreft"}
    sites = [{"layer": n, "component": "block_output", "low_rank_dimension": RANK, "intervention": kind(**shape)} for n in LAYERS]
    reft = pyreft.get_reft_model(base.model, pyreft.ReftConfig(representations=sites), set_device=False)
    interventions = [v[0] if isinstance(v, (tuple, list)) else v for v in reft.interventions.values()]
    for layer, intervention in zip(LAYERS, interventions, strict=True):
        values = {n.rpartition(".")[2]: torch.from_numpy(v) for n, v in adapter.tensors.items() if n.startswith(f"{layer}.")}
        set_values(intervention, method, values)
    examples = load_data(EXAMPLES, base.tokenizer, max_length=64).examples
    batch = collate(examples, pad_token_id=0)
    where = (batch.pop("prompt_length") - 1)[:, None, None].expand(-1, len(LAYERS), -1)  # [B, sites, 1]
    rows = [{name: value[i] for name, value in batch.items()} | {"intervention_locations": where[i]} for i in range(len(examples))]
    found: list[float] = []

    class Recording(pyreft.ReftTrainerForCausalLM):
        """Its compute_loss is older than the argument that transformers passes now."""

        def compute_loss(self, intervenable: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = super().compute_loss(intervenable, inputs, return_outputs)
            found.append(loss.item())
            return loss

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=len(rows), learning_rate=RATE, warmup_steps=STEPS // 10,
        lr_scheduler_type="linear", weight_decay=0.0, report_to="none", use_cpu=True, save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    stacked = lambda each: {name: torch.stack([row[name] for row in each]) for name in each[0]}  # noqa: E731
    Recording(model=reft, args=arguments, train_dataset=rows, data_collator=stacked).train()
    return found


def main() -> None:
    from importlib.metadata import version

    figures = {"versions": {name: version(name) for name in ("pyreft", "pyvene", "torch", "transformers")}}
    FIGURES.write_text(json.dumps(figures | {method: losses(method) for method in METHODS}, indent=1) + "\n")


if __name__ == "__main__":
    main()

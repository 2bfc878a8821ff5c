"""A training step beside pyreft's and peft's LoRA: seconds, what autograd keeps, and peak memory, on one base and the same batches.

    PYTHONPATH=tests python -m evidence.training_bench MODEL REVIEWS [--steps 6] [--clock processor] [--only NAME]... [--memory]

MODEL is a decoder's folder or GGUF file, REVIEWS a folder for the package of evidence.review_text: film reviews, positive or negative by
prompt. Each contestant has a base of its own in one process, AdamW, float32, batches of 8, and takes its step on the same batch in turn,
forward and backward. LoReFT: rank 4, four layers, the last prompt token. LoRA: rank 8. A ratio is a contestant's seconds over those of
"counted", the median over the steps, with its quartiles. Not installed here: peft; pyreft with pyvene and datasets, without which a plain
hook stands in for it and is named so.

    plain      every logit behind the shortest prompt: a step before there were other ways
    counted    the head on counted tokens alone
    real       the same, and linear maps on real tokens alone, never on pads: a first epoch where the prompt's first tokens are edited
    layers     the same, behind the kept output of the layers below the first edit: later epochs there
    prefix     counted, and the tokens before the edit without a graph, computed anew each step: a first epoch with the prompt's last
    kept       the same from the store, with real tokens and kept layers: later epochs there
    compiled   counted, the blocks that have no edit compiled by torch.compile (dynamic shapes), which `train` does not do

``--memory``: one process a contestant; the growth of its peak memory over the loaded base in three steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence.real_adapters import _reviews
from reft_export.base.load import load_base
from reft_export.eager.steering import decoder_layers, edit_rows, steer
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, collate, load_data
from reft_export.training.frozen_layers import LayerStore, frozen_layers
from reft_export.training.frozen_prefix import PrefixStore, frozen_of
from reft_export.training.interventions import Interventions
from reft_export.training.real_tokens import on_real_tokens
from reft_export.training.ways import Batch, Ways, loss_of
from runtimes.edits.edit import Site
from runtimes.edits.form import one_form
from runtimes.edits.positions import PositionRule

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
LAYERS = (4, 10, 18, 24)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RULE = PositionRule(last=1)
STEERED = ExitStack()
"""Keeps every contestant's hooks on."""
Loss = Callable[[Batch], Tensor]
Made = tuple[list[torch.nn.Parameter], Loss]


def ours(model: Any, examples: Sequence[Example], way: str, layers: Sequence[int] = LAYERS) -> Made:
    made = Interventions(one_form((Site(layer=n) for n in layers), method="loreft", rank=4), width=model.config.hidden_size)
    steering, head = STEERED.enter_context(steer(model, made.edits(), rule=RULE, tied=True)), CountedHead(model)
    real = STEERED.enter_context(on_real_tokens(model)) if way in ("real", "layers", "kept") else None
    below = LayerStore(model, steering, frozen_layers(made.sites), dtype=model.dtype, pad_token_id=0) if way in ("layers", "kept") else None
    ways = Ways(head=head, steering=steering, rule=RULE, real=real, layers=below)
    store = PrefixStore(head, steering, dtype=model.dtype, pad_token_id=0)
    if way == "kept":
        store.keep([e.input_ids[: frozen_of(RULE, e)] for e in examples], limit=10**10, group=8)
    if below is not None:
        below.keep([(e.input_ids, frozen_of(RULE, e) if way == "kept" else 0) for e in examples], limit=10**10, group=8)
    behind = way in ("prefix", "kept")
    if way == "compiled":
        for number, block in enumerate(decoder_layers(model)):
            if number not in layers:  # the edits are hooks, which would be compiled with their blocks
                block.compile(dynamic=True)
    chosen = ways.plain if way == "plain" else ways.behind_prefix(store) if behind else ways.counted
    return list(made.parameters()), lambda batch: loss_of(chosen(batch), batch) / len(batch.targets)


def lora(model: Any, modules: list[str]) -> Made:
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    peft = get_peft_model(model, LoraConfig(r=8, target_modules=modules, lora_dropout=0.0))
    trained = [p for p in peft.parameters() if p.requires_grad]
    return (
        trained,
        lambda batch: peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False).loss,
    )


def pyreft(model: Any, layers: Sequence[int]) -> Made:
    import pyreft as library  # pyright: ignore[reportMissingImports]

    sites = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": library.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4, dtype=torch.float32),
        }
        for layer in layers
    ]
    reft = library.get_reft_model(model, library.ReftConfig(representations=sites))
    trained = [p for v in reft.interventions.values() for p in v.parameters() if p.requires_grad]

    def loss(batch: Batch) -> Tensor:
        where = [[[n - 1] for n in batch.prompt_length.tolist()]] * len(layers)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        return reft(inputs, unit_locations={"sources->base": (None, where)}, use_cache=False)[1].loss

    return trained, loss


def hooks(model: Any, layers: Sequence[int]) -> Made:
    """pyreft's way by plain hooks: torch's orthogonal parametrization, every logit."""
    width = model.config.hidden_size
    edits = torch.nn.ModuleList(
        torch.nn.ModuleDict(
            {
                "R": torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, 4, bias=False)),
                "W": torch.nn.Linear(width, 4),
            }
        )
        for _ in layers
    )

    def function(edit: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, slot: edit_rows(h, slot, [lambda x: x + (edit["W"](x) - edit["R"](x)) @ edit["R"].weight])

    functions = {Site(layer=n): function(edit) for n, edit in zip(layers, edits, strict=True)}
    steering = STEERED.enter_context(steer(model, functions, rule=RULE, tied=True))

    def loss(batch: Batch) -> Tensor:
        steering.prompt_length = batch.prompt_length
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, use_cache=False).loss

    return list(edits.parameters()), loss


def contestants(layers: Sequence[int]) -> dict[str, Callable[[Any, Sequence[Example]], Made]]:
    found: dict[str, Callable[[Any, Sequence[Example]], Made]] = {
        way: lambda model, examples, way=way: ours(model, examples, way, layers)
        for way in ("plain", "counted", "real", "layers", "prefix", "kept", "compiled")
    }
    if all(map(importlib.util.find_spec, ("pyreft", "pyvene", "datasets"))):
        found["pyreft"] = lambda model, examples: pyreft(model, layers)
    else:
        found["pyreft's way by hooks"] = lambda model, examples: hooks(model, layers)
    if importlib.util.find_spec("peft"):
        found["LoRA q,v"] = lambda model, examples: lora(model, ["q_proj", "v_proj"])
        found["LoRA all linears"] = lambda model, examples: lora(model, LINEAR)
    return found


def step(made: Made, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = made[1](batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def kept_bytes(made: Made, model: Any, batch: Batch) -> int:
    """Of all tensors that autograd keeps for a backward, each memory once, without the base's weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = made[1](batch)
    del loss
    return sum(size for pointer, size in seen.items() if pointer not in weights)


def batches_of(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    for first in range(0, len(examples) - size + 1, size):
        yield Batch.of(collate(examples[first : first + size], pad_token_id=0), torch.device("cpu"))


def own_memory(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("reviews", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--layers", type=lambda text: tuple(map(int, text.split(";"))), default=LAYERS, help="edited; for example 18;24")
    parser.add_argument("--only", action="append")
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = CLOCKS[asked.clock]
    names = asked.only or list(contestants(asked.layers))
    if asked.memory and len(names) > 1:
        for name in names:
            subprocess.run([sys.executable, "-m", "evidence.training_bench", *sys.argv[1:], "--only", name], check=True)
        return

    def load() -> Any:
        base = load_base(asked.model, require_tokenizer=True)
        base.model.requires_grad_(False)
        return base

    base = load()
    read = load_data(_reviews(asked.reviews)[: asked.steps * asked.batch_size], base.tokenizer, max_length=512)
    batches = list(batches_of(read.examples, asked.batch_size))
    made, models, optimizers = {}, {}, {}
    for name in names:
        models[name] = base.model if name == names[0] else load().model
        torch.manual_seed(0)
        if asked.memory:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = own_memory("VmRSS")
        made[name] = contestants(asked.layers)[name](models[name], read.examples)
        optimizers[name] = torch.optim.AdamW(made[name][0], lr=1e-4)
    if asked.memory:
        for batch in batches[:3]:
            step(made[names[0]], optimizers[names[0]], batch)
        print(f"| {names[0]} | {(own_memory('VmHWM') - before) / 1e6:.0f} MB over the base |", flush=True)
        return
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for batch in batches:
        for name in order.sample(names, len(names)):
            started = clock()
            step(made[name], optimizers[name], batch)
            seconds[name].append(clock() - started)
    reference = seconds["counted" if "counted" in names else names[0]]
    print("| | s a step | over counted | autograd keeps, MB |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = np.array(found[1:]) / np.array(reference[1:])  # the first step warms up
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        kept = kept_bytes(made[name], models[name], batches[1]) / 1e6
        print(f"| {name} | {np.median(found[1:]):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {kept:.0f} |", flush=True)


if __name__ == "__main__":
    main()

"""Greedy answers of transformers with an adapter as plain forward hooks: written from the formulas, with nothing of the product's steering.

LoReFT at the output of a block, at positions f<n>+l<n>, l<n>, prompt or all:  h + R^T (W h + b - R h), h [B, S, D], R and W [r, D], b [r].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

MARGIN = 1e-3
"""Between the two best logits: closer ones are no preference that two right graphs must share."""


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    """The likeliest ones, going on after an end token."""
    certain: int
    """How many of them come before the first choice that was closer than MARGIN."""


@contextmanager
def hooked(model: PreTrainedModel, adapter: Path | None) -> Iterator[Callable[[int], None]]:
    """``model`` with the adapter of a folder; what is yielded is told the length of each prompt before it runs."""
    now = {"prompt": 0, "seen": 0}
    handles = []
    if adapter is not None:
        tensors, positions = load_file(adapter / "adapter.safetensors"), _positions(json.loads((adapter / "adapter.json").read_text()))
        layers = sorted({int(key.partition(".")[0]) for key in tensors})
        for layer in layers:
            rotation, weight, bias = (tensors[f"{layer}.block_output.{name}"] for name in ("R", "W", "b"))
            handles.append(
                model.model.layers[layer].register_forward_hook(_edit(rotation, weight, bias, positions, now, counts=layer == layers[-1]))
            )

    def begin(length: int) -> None:
        now.update(prompt=length, seen=0)

    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()


def _edit(
    rotation: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    positions: Callable[[int, int], bool],
    now: dict[str, int],
    *,
    counts: bool,
) -> Callable[..., object]:
    def hook(_: torch.nn.Module, __: object, output: object) -> object:
        h = output[0] if isinstance(output, tuple) else output
        chosen = torch.tensor([positions(now["seen"] + column, now["prompt"]) for column in range(h.shape[1])])
        edited = h + (h @ weight.T + bias - h @ rotation.T) @ rotation
        result = torch.where(chosen[None, :, None], edited, h)
        if counts:
            now["seen"] += h.shape[1]
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return hook


def _positions(config: dict) -> Callable[[int, int], bool]:
    """(position, prompt's length) -> whether it is edited; counts are cut to half the prompt."""
    text = config["rules"][0]["positions"] if "rules" in config else config["positions"]
    if text == "all":
        return lambda position, length: True
    if text == "prompt":
        return lambda position, length: position < length
    if not re.fullmatch(r"[fl]\d+(\+[fl]\d+)?", text):
        raise ValueError(f"positions {text!r} are not known here")
    first, last = (int(match[1]) if (match := re.search(rf"{letter}(\d+)", text)) else 0 for letter in "fl")

    def chosen(position: int, length: int) -> bool:
        half = length // 2
        return position < min(first, half) or length - min(last, half) <= position < length

    return chosen


def greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int, adapter: Path | None) -> list[Answer]:
    """``count`` tokens after each prompt, one prompt after the other, with transformers' own cache."""
    answers = []
    with torch.no_grad(), hooked(model, adapter) as begin:
        for prompt in prompts:
            begin(len(prompt))
            tokens, certain, past, new = [], count, None, torch.tensor([list(prompt)])
            for step in range(count):
                output = model(input_ids=new, past_key_values=past, use_cache=True)
                best = output.logits[0, -1].topk(2)
                if best.values[0] - best.values[1] <= MARGIN:
                    certain = min(certain, step)
                tokens.append(int(best.indices[0]))
                past, new = output.past_key_values, best.indices[:1][None]
            answers.append(Answer(tuple(tokens), certain))
    return answers

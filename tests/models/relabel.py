"""The same function with its channels relabelled: bases whose weights lay on a 4-bit grid, made fit for figures on 4-bit methods.

    PYTHONPATH=tests python -m models.relabel MODEL OUT/     (a folder or a GGUF file; OUT is what ``-m`` takes)

A base out of a GGUF file holds dequantized numbers: a block of 32 along a weight's input axis has at most 16 values, and a quantizer that
finds the file's own grid again loses nothing, which says nothing about it. A decoder's function does not depend on the order of its
channels, so one fixed seed draws

    p  [D]  the residual stream's order: h' = h[p]. Columns of the embedding, the head, q, k, v, gate and up; rows of o and down; norms
    m  [M]  the MLP's order: rows of gate and up, columns of down
    v  [d]  every head's order of its values, and factors s [d]: rows of v within each KV head, times s; columns of o in each head, over s

Queries and keys keep their order, which the rotary embedding means. Within a head o's columns have only d / 32 old blocks to mix: of
SmolLM2's, an order alone leaves every block some old neighbours on one old grid. The factors (of both signs, from 0.84 to 1.19) give every
column a grid of its own. In exact arithmetic the logits are the same; in float32 sums run in another order.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SEED = 14
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")
NOT_THE_MODEL = (".safetensors", ".index.json", "gguf.json")
"""Files of the folder that are not copied: the weights, and what says that a GGUF file rounded them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Relabelling:
    """Indices int64 of the new order's channels in the old one; ``factors`` float32 of the heads' values."""

    residual: torch.Tensor
    mlp: torch.Tensor
    values: torch.Tensor
    factors: torch.Tensor

    @classmethod
    def drawn(cls, *, width: int, mlp: int, head: int, seed: int = SEED) -> Relabelling:
        random = np.random.default_rng(seed)
        orders = [torch.from_numpy(random.permutation(size)) for size in (width, mlp, head)]
        factors = random.choice([-1, 1], head) * 2 ** random.uniform(-0.25, 0.25, head)
        return cls(residual=orders[0], mlp=orders[1], values=orders[2], factors=torch.from_numpy(factors.astype(np.float32)))

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter ``name`` of the relabelled model; ValueError for one that no rule is known for."""
        module, _, kind = name.rpartition(".")
        layer = module.rpartition(".")[2]
        if layer in HEAD_NORMS or (kind == "bias" and layer in ("q_proj", "k_proj")):
            return tensor
        if layer == "norm" or layer.endswith("layernorm"):
            return tensor[self.residual]
        if layer in ("embed_tokens", "lm_head") and kind == "weight":
            return tensor[:, self.residual]
        if layer in LINEARS:
            return self._rows(layer, tensor) if kind == "bias" else self._columns(layer, self._rows(layer, tensor))
        raise ValueError(f"parameter {name} {tuple(tensor.shape)} has no rule; relabelled are decoders of Llama's form")

    def _rows(self, layer: str, tensor: torch.Tensor) -> torch.Tensor:
        if layer in ("gate_proj", "up_proj"):
            return tensor[self.mlp]
        if layer in ("o_proj", "down_proj"):
            return tensor[self.residual]
        return self._within_heads(tensor.transpose(0, -1), self.factors).transpose(0, -1) if layer == "v_proj" else tensor

    def _columns(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        if layer == "o_proj":
            return self._within_heads(weight, 1 / self.factors)
        return weight[:, self.mlp if layer == "down_proj" else self.residual]

    def _within_heads(self, tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """``tensor`` [.., heads * d], ``factors`` [d]."""
        heads = tensor.reshape(*tensor.shape[:-1], -1, len(self.values))
        return (heads[..., self.values] * factors.to(tensor.dtype)).reshape(tensor.shape)


def relabelling_of(config: Mapping[str, object], seed: int = SEED) -> Relabelling:
    """``config``: config.json's keys."""
    sizes = {key: int(str(config[key])) for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    head = config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    return Relabelling.drawn(width=sizes["hidden_size"], mlp=sizes["intermediate_size"], head=int(str(head)), seed=seed)


def relabel(model: str | Path, folder: Path, *, seed: int = SEED) -> Path:
    """Writes the relabelled model of a folder or a GGUF file as a model folder, deterministically; a folder that is there is kept as it is.

    Raises InputError for what is no base, ValueError for one that is not of Llama's form.
    """
    from reft_export.base.checkpoint import open_checkpoint

    if (folder / "config.json").is_file():
        return folder
    checkpoint = open_checkpoint(model)
    relabelled = relabelling_of(checkpoint.config, seed)
    tensors = {name: tensor for file in checkpoint.files for name, tensor in load_file(file).items()}
    folder.mkdir(parents=True, exist_ok=True)
    new = {name: relabelled(name, tensors.pop(name)).contiguous() for name in sorted(tensors)}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    for path in checkpoint.folder.iterdir():
        if not path.name.endswith(NOT_THE_MODEL) and path.name != "config.json":
            shutil.copy(path, folder)
    shutil.copy(checkpoint.folder / "config.json", folder)  # last: a folder that has it is whole
    return folder


def different_values(weight: torch.Tensor, block: int = 32) -> np.ndarray:
    """How many different values each block along the last axis of ``weight`` [N, K] holds; partial blocks are left out."""
    whole = weight[:, : weight.shape[1] // block * block].reshape(-1, block).numpy()
    ordered = np.sort(whole, axis=-1)  # many times as fast as torch's on short rows
    return (ordered[:, 1:] != ordered[:, :-1]).sum(-1) + 1


def on_a_grid(weight: torch.Tensor, block: int = 32) -> np.ndarray:
    """bool, by block as ``different_values``: at most 16 values, and fewer than three in four of the weights that are not 0 are different.

    A quarter of some rows of Gemma 3 270M and more is 0, which is on every grid: no order of channels gives each of their blocks 17 values,
    and the few weights that are not 0 are on no common grid all the same. A block as a 4-bit file holds it repeats every second.
    """
    values = different_values(weight, block)
    others = (weight[:, : weight.shape[1] // block * block].reshape(-1, block) != 0).sum(-1).numpy()
    return (values <= 16) & (values - (others < block) < 0.75 * others)


def matrices(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight [N, K] of the folder, its input axis last; the embedding is one of them."""
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        if tensor.ndim == 2:
            yield name, tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args()
    relabel(asked.model, asked.folder, seed=asked.seed)
    total = poor = gridded = 0
    fewest, where = 33, ""
    for name, weight in matrices(asked.folder):
        count = different_values(weight)
        total, poor, gridded = total + len(count), poor + int((count <= 16).sum()), gridded + int(on_a_grid(weight).sum())
        fewest, where = min((fewest, where), (int(count.min()), name))
    print(f"{gridded:,} of {total:,} blocks of 32 are on a 4-bit grid; {poor:,} hold 16 values or fewer, at least {fewest} ({where})")


if __name__ == "__main__":
    main()

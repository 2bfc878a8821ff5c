"""Tensors of a checkpoint that others quantized for which transformers' model has no place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from reft_export.base.model_folder import WEIGHT_FILES
from reft_export.base.packed.blocks import ORIGIN
from reft_export.console import err, escape
from runtimes.errors import InputError


def tell_left_out(folder: Path, name: str, model: str, unexpected: Sequence[str]) -> None:
    """One line of what ``unexpected`` are, where ``plain_folder`` made the folder of the base ``name``; ``model``: the class without them.

    A bias of zeros, which AutoGPTQ writes beside weights that have none, says nothing. Raises InputError for any other bias of a weight
    that the model has: without it, it would compute something else.
    """
    if not unexpected or not (folder / ORIGIN).is_file():
        return
    left_out = []
    with safe_open(folder / WEIGHT_FILES[0], "pt") as stored:
        taken = set(stored.keys()) - set(unexpected)
        for tensor in unexpected:
            module, _, end = tensor.rpartition(".")
            if end != "bias" or f"{module}.weight" not in taken:
                left_out.append(tensor)
            elif stored.get_tensor(tensor).any():
                raise InputError(
                    f"{name}: {tensor} is not zero, and {model} adds no bias there: it would compute something else than the checkpoint "
                    "means; correct config.json (attention_bias, mlp_bias), or pass the float model"
                )
    if left_out:
        said = f"{name}: {len(left_out)} tensor(s) of the checkpoint have no place in {model} and are left out, first {left_out[0]}"
        err.print(f"[yellow]note:[/] {escape(said)}")

"""torch.onnx.export, whose graph of one model and one set of options is made once for a whole run.

It takes seconds, and the tests export a handful of tiny bases with many adapters, precisions and slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from shared_folders import shared_folder

_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
_LARGEST = 64 << 20
"""Bytes of the models whose graphs are shared."""


def shared(export: Callable[..., Any]) -> Callable[..., Any]:
    """``export``, for a call as the product's: a module, example inputs by name, dynamo. The first such call gets torch's own program,
    every later one its graph read back from the file that it was saved to."""

    @wraps(export)
    def exported(model: Any, *arguments: Any, **options: Any) -> Any:
        if not options.get("dynamo") or "kwargs" not in options or not isinstance(model, torch.nn.Module) or _size(model) > _LARGEST:
            return export(model, *arguments, **options)
        programs = []

        def make(folder: Path) -> None:
            programs.append(export(model, *arguments, **options))
            folder.mkdir()
            ir.save(programs[0].model, folder / "model.onnx")

        folder = shared_folder(f"exports/{_digest(model, options)}", make)
        return programs[0] if programs else torch.onnx.ONNXProgram(ir.from_proto(onnx.load(folder / "model.onnx")), None)

    return exported


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _size(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model).values())


def _digest(model: torch.nn.Module, options: dict[str, Any]) -> str:
    """Of all that the graph depends on: modules and their settings, values, which of them are one tensor, and the options."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if not key.startswith("_") and isinstance(value, _PLAIN)}
        config = getattr(module, "config", None)
        family = None if config is None else (config.to_json_string(use_diff=False), config._attn_implementation)
        digest.update(repr((name, type(module).__qualname__, settings, family)).encode())
    first: dict[int, str] = {}
    for name, tensor in _tensors(model).items():
        same = first.setdefault(tensor.data_ptr(), name)
        digest.update(repr((name, same, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    inputs = {name: [(t.dtype, tuple(t.shape)) for t in (v if isinstance(v, list) else [v])] for name, v in options["kwargs"].items()}
    digest.update(repr((inputs, {key: value for key, value in options.items() if key != "kwargs"})).encode())
    return digest.hexdigest()

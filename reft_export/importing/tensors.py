"""Tensors out of foreign files. Nothing a file says is trusted: no pickled code runs, and shapes are checked before copies are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reft_export.base.model_folder import first_line
from runtimes.errors import AdapterError


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A ``torch.save``d state dict, unpickled with ``weights_only``; AdapterError, in one line, for anything else."""
    _check_regular(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; the adapter is incomplete") from None
    except Exception as e:  # torch raises pickle, zip, runtime, type and index errors for a damaged or hostile file
        reason = "its pickle asks for code to be run" if "weights_only" in str(e) or "WeightsUnpickler" in str(e) else first_line(e)
        raise AdapterError(f"{path} is damaged, or holds more than weights ({reason}); it was not loaded") from None
    return _tensors(state, path)


def _check_regular(path: Path) -> None:
    """A pipe or a device may not end."""
    if path.exists() and not path.is_file():
        raise AdapterError(f"{path} is no regular file; copy the adapter again")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_regular(path)
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing; the adapter is incomplete") from None
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise AdapterError(f"{path} is damaged ({first_line(e)}); copy it again") from None


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What the file says beside its tensors (``__metadata__``); ``read_safetensors`` has found it whole."""
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return dict(f.metadata() or {})


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise AdapterError(f"{path} holds a {type(state).__name__}, expected a state dict")
    wrong = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise AdapterError(f"{path}: {wrong[0]} is not a tensor; a state dict is expected")
    if nested := [name for name, value in state.items() if value.is_nested]:
        raise AdapterError(f"{path}: {nested[0]} is a nested tensor, which has no shape; save it as a plain one")
    # A pickled tensor may claim any shape over a few bytes, by strides of 0: copying it would take all memory.
    for name, value in state.items():
        if value.layout == torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise AdapterError(f"{path}: {name} claims shape {list(value.shape)}, more than the file holds; it is damaged")
    return dict(state)


def as_float32(value: Tensor | np.ndarray, shape: tuple[int | str, ...], where: str) -> np.ndarray:
    """``value`` in float32, C-contiguous; bfloat16 and float16 widen exactly. A name in ``shape`` (r, D) is any length of at least 1.

    Raises AdapterError for another shape, integers, values that are not finite, and float64 beyond float32's range.
    """
    fits = len(value.shape) == len(shape)
    fits = fits and all(n >= 1 and (n if isinstance(e, str) else e) == n for n, e in zip(value.shape, shape, strict=True))
    if not fits:
        expected = ", ".join(map(str, shape))
        raise AdapterError(f"{where} has shape {list(value.shape)}, expected [{expected}]")
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise AdapterError(f"{where} is {value.dtype} ({value.layout}); a float tensor is expected")
        try:
            array = value.detach().to(torch.float32).contiguous().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as e:  # of the kinds that torch has, not all are numbers in memory
            raise AdapterError(f"{where} cannot be read ({first_line(e)}); a plain float tensor is expected") from None
    else:
        if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
            raise AdapterError(f"{where} is {value.dtype}; a float array is expected")
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(array).all():
        raise AdapterError(f"{where} holds values that are not finite; the file is damaged or its training diverged")
    return array


def vector_float32(value: Tensor | np.ndarray, width: int | str, where: str) -> np.ndarray:
    """``value``, [width] or [1, width], as ``as_float32`` gives [width]."""
    row = value[0] if len(value.shape) == 2 and value.shape[0] == 1 else value
    return as_float32(row, (width,), where)


def orthogonal(original: np.ndarray, base: np.ndarray | None) -> np.ndarray:
    """The weight [m, n] of torch's ``parametrizations.orthogonal`` from its stored tensors, original [m, n] and base [k, k], k = max.

        tall    Q = base @ H(original)          H: the first n columns of the product of the reflections I - tau v v^T, where v is a
                                                column of original below its diagonal, with 1 on it, and tau = 2 / |v|^2; each column
                                                times original's diagonal cut to an integer
        wide    Q = (base @ H(original^T))^T
        square  Q = base @ expm(X - X^T)        X: original's lower triangle

    Training that moves the diagonal off -1 makes torch cut it to 0: that column of R is zero in the library as well. The operations
    and the float32 are torch's own, so that Q is, to the bit where the processor agrees, what the library multiplied by.

    Source: torch/nn/utils/parametrizations.py, _Orthogonal.forward with the default maps.
    """
    x = torch.from_numpy(original)
    wide = x.shape[0] < x.shape[1]
    x = x.mT if wide else x
    if x.shape[0] == x.shape[1]:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        v = x.tril(diagonal=-1)
        q = torch.linalg.householder_product(v, 2.0 / (1.0 + (v * v).sum(dim=-2)))
        q = q * x.diagonal().int()
    if base is not None:
        q = torch.from_numpy(base) @ q
    return np.ascontiguousarray((q.mT if wide else q).numpy())


def stored_dtype(value: Tensor) -> str:
    """The name of a stored tensor's dtype, where it is one that a base can have."""
    name = str(value.dtype).removeprefix("torch.")
    return name if name in ("float32", "float16", "bfloat16") else "float32"

"""What the tests of both ops' CUDA kernels share: torch tensors on the device, guarded outputs, a captured graph, the CUDA provider.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from native_op import DTYPES, installed_library

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Launch = Callable[[torch.Tensor, torch.Tensor, int], bytes | None]
"""(h, y, stream) -> the error of the C interface, or None."""


def on_gpu(feeds: dict[str, np.ndarray], dtype: str) -> dict[str, torch.Tensor]:
    def tensor(name: str, array: np.ndarray) -> torch.Tensor:
        if name == "slot":
            return torch.from_numpy(array).cuda()
        return torch.from_numpy(array.astype(np.float32)).to(TORCH[dtype]).cuda()

    return {name: tensor(name, array) for name, array in feeds.items()}


def run_guarded(h: torch.Tensor, dtype: str, launch: Launch, *, in_place: bool) -> np.ndarray:
    """y of one launch. It is poisoned before, so that a value which the kernel forgets shows; eight values on either side must survive."""
    guarded = torch.full((h.numel() + 16,), float("nan"), dtype=TORCH[dtype], device="cuda")
    y = guarded[8:-8].view(h.shape)
    if in_place:
        y.copy_(h)
    error = launch(y if in_place else h, y, torch.cuda.current_stream().cuda_stream)
    assert error is None, error
    torch.cuda.synchronize()
    assert guarded[:8].isnan().all() and guarded[-8:].isnan().all()
    return y.float().cpu().numpy().astype(DTYPES[dtype])


def check_captured(feeds: dict[str, np.ndarray], device: dict[str, torch.Tensor], launch: Launch, check: Callable[..., Any]) -> None:
    """Slots that change between replays of a CUDA graph take effect: nothing of them was read on the host."""
    y = torch.empty_like(device["h"])

    def call() -> None:
        error = launch(device["h"], y, torch.cuda.current_stream().cuda_stream)
        assert error is None, error

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for slot in (-1, 0, 1):
        feeds["slot"][:] = slot
        device["slot"].fill_(slot)
        graph.replay()
        torch.cuda.synchronize()
        check(y.cpu().numpy(), feeds, "float32")


def cuda_provider_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(installed_library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CUDAExecutionProvider"])
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    return session

"""RED's CUDA kernel through the C interface, on torch tensors, and on onnxruntime's CUDA provider. Not yet run on a GPU; in emulation:
test_emulated_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_gpu import Launch, check_captured, cuda_provider_session, on_gpu, run_guarded
from native_op import DTYPES, ELEMENTS, installed_library, load
from native_red import NAMES, check, draw, red_model


def launch_on(feeds: dict[str, np.ndarray], device: dict[str, torch.Tensor], dtype: str) -> Launch:
    banks = [device[name].data_ptr() for name in NAMES[1:]]

    def launch(h: torch.Tensor, y: torch.Tensor, stream: int) -> bytes | None:
        pointers = (h.data_ptr(), y.data_ptr(), *banks)
        return load(installed_library()).reft_red_cuda(ELEMENTS[dtype], *pointers, feeds["slot"].size, *feeds["scale"].shape, stream)

    return launch


def red_cuda(feeds: dict[str, np.ndarray], dtype: str, *, in_place: bool = False) -> np.ndarray:
    device = on_gpu(feeds, dtype)
    return run_guarded(device["h"], dtype, launch_on(feeds, device, dtype), in_place=in_place)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 130, 1024, 4096, 5120])
def test_against_float64(dtype, width, in_place) -> None:
    for seed, leading in enumerate([(1,), (7,), (2, 33), (1030,)]):
        feeds = draw(seed, leading, width, 3, dtype)
        check(red_cuda(feeds, dtype, in_place=in_place), feeds, dtype)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    feeds = draw(0, (64,), 128, 2, "float32")
    device = on_gpu(feeds, "float32")
    check_captured(feeds, device, launch_on(feeds, device, "float32"), check)


@pytest.mark.gpu
def test_on_the_cuda_provider() -> None:
    for dtype in ("float32", "float16"):
        feeds = draw(0, (2, 40), 64, 2, dtype)
        check(cuda_provider_session(red_model(dtype)).run(None, feeds)[0], feeds, dtype)


def test_without_a_gpu_the_error_has_a_name() -> None:
    """The library loads where there is no CUDA, and says what is missing: the kernels, or a device to run them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    library = load(installed_library())
    error = library.reft_red_cuda(1, *[16] * 5, 1, 1, 8, None).decode()
    if library.reft_cuda_architectures():
        assert error.startswith("RED: CUDA launch failed: cudaError")
    else:
        assert error.startswith("RED: this build has no CUDA kernels")
    assert library.reft_red_cuda(1, *[None] * 5, 0, 0, 8, None).startswith(b"RED: tokens 0, slots 0 and width 8, expected")

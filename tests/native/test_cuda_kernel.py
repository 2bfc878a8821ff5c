"""The CUDA kernel through the C interface, on torch tensors, and the op on onnxruntime's CUDA provider. Not yet run on a GPU; in emulation:
test_emulated_kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_gpu import Launch, check_captured, cuda_provider_session, on_gpu, run_guarded
from native_op import DTYPES, ELEMENTS, check, draw, installed_library, load, op_model

from runtimes.edits.edit import ACTIVATED, ACTIVATIONS


def launch_on(
    feeds: dict[str, np.ndarray], device: dict[str, torch.Tensor], dtype: str, activation: str = "", activated: str = "all"
) -> Launch:
    banks = [device[name].data_ptr() for name in ("slot", "U", "A", "b")]
    names = (activation.encode(), activated.encode())
    library = load(installed_library())
    size = library.reft_edit_cuda_workspace(feeds["slot"].size, feeds["U"].shape[1])
    workspace = torch.full((size // 4,), float("nan"), device="cuda")

    def launch(h: torch.Tensor, y: torch.Tensor, stream: int) -> bytes | None:
        pointers = (h.data_ptr(), y.data_ptr(), *banks)
        beside = (*names, workspace.data_ptr() or None, stream)
        return library.reft_edit_cuda(ELEMENTS[dtype], *pointers, feeds["slot"].size, *feeds["U"].shape, *beside)

    return launch


def edit_cuda(
    feeds: dict[str, np.ndarray], dtype: str, activation: str = "", activated: str = "all", *, in_place: bool = False
) -> np.ndarray:
    device = on_gpu(feeds, dtype)
    return run_guarded(device["h"], dtype, launch_on(feeds, device, dtype, activation, activated), in_place=in_place)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 130, 1024, 4096, 5120])
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 64, 256])
def test_against_float64(dtype, width, rank, in_place) -> None:
    for seed, leading in enumerate([(1,), (7,), (2, 33), (1030,)]):
        if seed == 3 and width * rank > 8192:
            continue  # the oracle is slow, and the other sizes have seen these kernels
        feeds = draw(seed, leading, width, rank, 3, dtype)
        check(edit_cuda(feeds, dtype, in_place=in_place), feeds, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("activated", ACTIVATED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, activated) -> None:
    for dtype in DTYPES:
        feeds = draw(0, (33,), 64, 6, 2, dtype)
        check(edit_cuda(feeds, dtype, activation, activated), feeds, dtype, activation, activated)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "rank"), [(64, 4), (8, 64)])
def test_captured_in_a_cuda_graph(tokens, rank) -> None:
    """The second is spread, in two kernels."""
    feeds = draw(0, (tokens,), 128, rank, 2, "float32")
    device = on_gpu(feeds, "float32")
    check_captured(feeds, device, launch_on(feeds, device, "float32"), check)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_the_cuda_provider(dtype) -> None:
    """Also few tokens of a high rank, whose workspace is the provider's."""
    session = cuda_provider_session(op_model(dtype))
    for leading, rank in (((2, 40), 4), ((1, 5), 64), ((2, 16), 33), ((1, 5), 64)):
        feeds = draw(0, leading, 64, rank, 2, dtype)
        check(session.run(None, feeds)[0], feeds, dtype)


def test_without_a_gpu_the_error_has_a_name() -> None:
    """The library loads where there is no CUDA, and says what is missing: the kernels, or a device to run them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    library = load(installed_library())
    error = library.reft_edit_cuda(1, *[16] * 6, 1, 1, 1, 8, b"", b"all", None, None).decode()
    if library.reft_cuda_architectures():
        assert error.startswith("LoReFT: CUDA launch failed: cudaError")
    else:
        assert "this build has no CUDA kernels" in error
    assert library.reft_edit_cuda(1, *[None] * 6, 0, 1, 1, 8, b"softmax", b"all", None, None).startswith(b"LoReFT: activation is 'softmax'")

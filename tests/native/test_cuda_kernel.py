"""The CUDA kernel through the C interface, on torch tensors, and the op on onnxruntime's CUDA provider. Not yet run on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_op import DTYPES, check, draw, installed_library, load, op_model

from runtimes.edit import ACTIVATED, ACTIVATIONS

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16}


def on_gpu(feeds: dict[str, np.ndarray], dtype: str) -> dict[str, torch.Tensor]:
    def tensor(name: str, array: np.ndarray) -> torch.Tensor:
        if name == "slot":
            return torch.from_numpy(array).cuda()
        return torch.from_numpy(array.astype(np.float32)).to(TORCH[dtype]).cuda()

    return {name: tensor(name, array) for name, array in feeds.items()}


def edit_cuda(
    feeds: dict[str, np.ndarray], dtype: str, activation: str = "", activated: str = "all", *, in_place: bool = False
) -> np.ndarray:
    library = load(installed_library())
    device = on_gpu(feeds, dtype)
    # Poisoned: a value that the kernel forgets to write shows. One value before and after it must survive.
    guarded = torch.full((device["h"].numel() + 16,), float("nan"), dtype=TORCH[dtype], device="cuda")
    y = guarded[8:-8].view(device["h"].shape)
    if in_place:
        y.copy_(device["h"])
    h = y if in_place else device["h"]
    slots, rank, width = feeds["U"].shape
    pointers = [t.data_ptr() for t in (h, y, device["slot"], device["U"], device["A"], device["b"])]
    stream = torch.cuda.current_stream().cuda_stream
    names = (activation.encode(), activated.encode())
    error = library.reft_edit_cuda(ELEMENTS[dtype], *pointers, feeds["slot"].size, slots, rank, width, *names, stream)
    assert error is None, error
    torch.cuda.synchronize()
    assert guarded[:8].isnan().all() and guarded[-8:].isnan().all()
    return y.float().cpu().numpy().astype(DTYPES[dtype])


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
def test_captured_in_a_cuda_graph() -> None:
    """Slots that change between replays take effect: nothing of them was read on the host."""
    feeds = draw(0, (64,), 128, 4, 2, "float32")
    device = on_gpu(feeds, "float32")
    y = torch.empty_like(device["h"])
    library = load(installed_library())
    pointers = [t.data_ptr() for t in (device["h"], y, device["slot"], device["U"], device["A"], device["b"])]

    def launch() -> None:
        error = library.reft_edit_cuda(1, *pointers, 64, 2, 4, 128, b"", b"all", torch.cuda.current_stream().cuda_stream)
        assert error is None, error

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for slot in (-1, 0, 1):
        feeds["slot"][:] = slot
        device["slot"].fill_(slot)
        graph.replay()
        torch.cuda.synchronize()
        check(y.cpu().numpy(), feeds, "float32")


@pytest.mark.gpu
def test_on_the_cuda_provider() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(installed_library()))
    for dtype in ("float32", "float16"):
        session = onnxruntime.InferenceSession(op_model(dtype).SerializeToString(), options, providers=["CUDAExecutionProvider"])
        assert session.get_providers()[0] == "CUDAExecutionProvider"
        feeds = draw(0, (2, 40), 64, 4, 2, dtype)
        check(session.run(None, feeds)[0], feeds, dtype)


def test_without_a_gpu_the_error_has_a_name() -> None:
    """The library loads where there is no CUDA, and says what is missing: the kernels, or a device to run them."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    library = load(installed_library())
    error = library.reft_edit_cuda(1, *[16] * 6, 1, 1, 1, 8, b"", b"all", None).decode()
    if library.reft_cuda_architectures():
        assert error.startswith("LoReFT: CUDA launch failed: cudaError")
    else:
        assert "this build has no CUDA kernels" in error
    assert library.reft_edit_cuda(1, *[None] * 6, 0, 1, 1, 8, b"softmax", b"all", None).startswith(b"LoReFT: activation is 'softmax'")

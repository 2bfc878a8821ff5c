"""``.onnx_adapter`` files: what is written is read back to the bit, in every dtype of a bundle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from runtimes.artifacts.ort_adapter_file import read_onnx_adapter, write_onnx_adapter


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(dtype, tmp_path) -> None:
    bank = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(dtype)
    written = {"reft.0.block_output.U": bank, "reft.0.block_output.b": bank[0, :, :1].T, "reft.first": np.array([7])}
    write_onnx_adapter(tmp_path / "a.onnx_adapter", written)
    read = read_onnx_adapter(tmp_path / "a.onnx_adapter")
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert (read[name].dtype, read[name].shape, read[name].tobytes()) == (value.dtype, value.shape, value.tobytes()), name

"""The float types of a bundle, by the names that its manifest gives them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

NUMPY_DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

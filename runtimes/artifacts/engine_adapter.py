"""``adapters/<name>.safetensors`` of an engine folder: one adapter's banks and rule, under the names of the engine's inputs.

Banks are [N, r, D] and [N, r] in the engine's float type, rules int64 [1]; binding them steers. An engine whose adapter is frozen has
no such inputs, and its file holds no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtimes.errors import BundleError
from runtimes.files.records import read_regular
from runtimes.precision import ELEMENT_TYPES

DTYPES = {e.safetensors: e.dtype for e in ELEMENT_TYPES.values() if e.safetensors is not None}
"""By the format's own names. safetensors.numpy writes bfloat16 and does not read it, so its bytes are given their dtype here."""


def write_engine_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes ``tensors`` (float32, float16, bfloat16, int64 or int32) to ``path``; none at all is a file too."""
    from safetensors.numpy import save

    for name, value in tensors.items():
        if value.dtype not in DTYPES.values():
            raise BundleError(f"{path}: {name} is {value.dtype}, which no engine input is; known: {', '.join(map(str, DTYPES.values()))}")
    path.write_bytes(save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def read_engine_adapter(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file by name, bfloat16 as ml_dtypes.bfloat16; raises BundleError for a damaged file or another dtype."""
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(read_regular(path))
    except (OSError, SafetensorError) as e:
        raise BundleError(f"{path} cannot be read as safetensors ({' '.join(str(e).split())}); build the engine again") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise BundleError(f"{path}: {name} is {entry['dtype']}, which no engine input is; known: {', '.join(DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    return tensors

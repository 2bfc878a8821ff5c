"""How a base is named while it is used: what is rounded in it is said."""

from __future__ import annotations

from pathlib import Path

from reft_export.base import gguf
from reft_export.base.packed import checkpoint


def described(model: str | Path) -> str:
    """``model`` as it is given, and how much of it others rounded: base (210 of 272 tensors quantized by GPTQ, 4 bits, groups of 128)."""
    path = Path(model)
    return f"{model}{gguf.rounded(path) if gguf.is_gguf(path) else checkpoint.described(path)}"

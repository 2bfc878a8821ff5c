"""Which file a user means: the .onnx file itself, or the one in a folder."""

from __future__ import annotations

from pathlib import Path

from runtimes.errors import GraphError


def graph_file(path: Path) -> Path:
    """The .onnx file itself, or of a folder model.onnx or its only .onnx file; raises GraphError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise GraphError(f"{path} does not exist; name an .onnx file or the folder that holds one")
    files = sorted(path.glob("*.onnx"))
    preferred = [f for f in files if f.name == "model.onnx"]
    if len(files) != 1 and not preferred:
        listed = ", ".join(f.name for f in files) or "none"
        raise GraphError(f"{path} holds {len(files)} graphs ({listed}); name the .onnx file itself")
    return (preferred or files)[0]

"""TensorRT as JetPack brings it, its trtexec and nothing of Python; the GPU is made up, and so is trtexec."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from reft_export.building import plan

PROGRAM = """#!{python}
# A mock of trtexec that writes its command line where the engine should be.
import sys
print("[11/21/2026-11:00:00] [I] TensorRT version: 10.3.0")
open(next(a.partition("=")[2] for a in sys.argv if a.startswith("--saveEngine=")), "w").write("\\n".join(sys.argv[1:]))
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """On PATH, beside a GPU of compute capability 8.7."""
    folder.mkdir()
    (folder / "trtexec").write_text(PROGRAM.format(python=sys.executable))
    (folder / "trtexec").chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    patch.setattr(plan, "is_installed", lambda target: False)
    patch.setattr(plan, "present_compute_capability", lambda: "8.7")

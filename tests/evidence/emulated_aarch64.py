"""``PYTHONPATH=tests python -m evidence.emulated_aarch64 FOLDER WHEEL -- VERB ...``: the device install on an emulated AArch64 processor.

WHEEL is what ``make wheels`` makes for aarch64. The first call puts Debian's arm64 Python, onnxruntime's and the other wheels of PyPI into
FOLDER (0.3 GB); each runs one command of ``reft-export`` there, for example

    python -m evidence.emulated_aarch64 arm dist/reft_export-*_aarch64.whl -- parity bundle

It needs Debian's qemu-user, and apt with arm64 as a foreign architecture (``dpkg --add-architecture arm64 && apt-get update``). QEMU_CPU
chooses the processor: ``cortex-a72`` has neither dot products nor bfloat16, ``max`` has both. Nothing here says how fast a processor is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PYTHON = "3.11"
# Debian's interpreter, and what it and onnxruntime are linked to.
PACKAGES = (
    *(f"python{PYTHON}", f"python{PYTHON}-minimal", f"libpython{PYTHON}-minimal", f"libpython{PYTHON}-stdlib"),
    *("libc6", "libstdc++6", "libgcc-s1", "libgomp1", "zlib1g", "libexpat1", "libssl3", "libffi8", "libbz2-1.0", "liblzma5"),
    *("libsqlite3-0", "libuuid1", "libncursesw6", "libtinfo6", "libreadline8", "libdb5.3"),
)
# qemu 7.2, Debian 12's, dies of a signal in the import of 1.28 and later.
ONNXRUNTIME = "onnxruntime<1.28"
REQUIREMENTS = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "typer", "rich")
PLATFORMS = ("manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
MAIN = "import sys; sys.argv[0] = 'reft-export'; from reft_export.cli.main import main; main()"


def install(folder: Path, wheel: Path) -> None:
    """Debian's Python into ``folder/root``, the wheels into ``folder/site``."""
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", *(f"{name}:arm64" for name in PACKAGES)], cwd=debs, check=True, stdout=subprocess.DEVNULL)
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", deb, folder / "root"], check=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--python-version", PYTHON, *platforms]
    subprocess.run([*pip, "--target", folder / "site", ONNXRUNTIME, *REQUIREMENTS], check=True)
    subprocess.run([*pip, "--target", folder / "site", "--no-deps", wheel], check=True)


def emulated(folder: Path, *words: str) -> int:
    """The exit status of ``reft-export WORDS`` on the emulated processor."""
    python = folder / "root" / "usr" / "bin" / f"python{PYTHON}"
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["qemu-aarch64", "-L", folder / "root", python, "-P", "-c", MAIN, *words], env=environment, check=False
    ).returncode


if __name__ == "__main__":
    if "--" not in sys.argv or sys.argv.index("--") != 3:
        sys.exit(__doc__)
    where, made, _, *command = sys.argv[1:]
    if not (Path(where) / "site").exists():
        install(Path(where).absolute(), Path(made).absolute())
    sys.exit(emulated(Path(where).absolute(), *command))

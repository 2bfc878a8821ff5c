"""llama.cpp beside a bundle: its own library, as node-llama-cpp ships it, and a small program over it (llama_probe.cc). Evidence only.

    PYTHONPATH=tests python -m evidence.llama_cpp real-models                                    downloads and builds, says the version
    PYTHONPATH=tests python -m evidence.llama_cpp real-models --quantize IN.gguf OUT.gguf Q4_K_M

A wheel of llama.cpp's takes half an hour to compile. The npm package holds its libraries ready, for every set of instructions; the headers
are those of the pinned llama-cpp-python sdist. Needs npm, g++ and Linux on x86-64.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "llama.cpp v0.5.0 (node-llama-cpp 3.22.1)"
LIBRARIES = ("@node-llama-cpp/linux-x64@3.22.1", "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0")
HEADERS = ("llama-cpp-python==0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
"""Each with the sha256 of the file that is downloaded."""
HEADER_FOLDERS = ("vendor/llama.cpp/include/", "vendor/llama.cpp/ggml/include/")
LINKED = ("libllama.v0.5.0.so", "libggml.v0.5.0.so", "libggml-base.so")
TYPES = ("Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32")
SOURCE = Path(__file__).parent / "llama_probe.cc"


@dataclass(frozen=True, kw_only=True)
class Benched:
    decode_ms: tuple[float, ...]
    """A token, at each number of columns: minima."""
    prefill_s: tuple[float, ...]
    """Up to each number of columns."""
    peak_mb: int


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    program: Path
    libraries: Path

    @property
    def environment(self) -> dict[str, str]:
        """What ``program`` needs."""
        return {"LLAMA_BACKENDS": str(self.libraries)}

    def bench(self, file: Path, columns: Sequence[int], *, threads: int = 1, flash: bool = False) -> Benched:
        figures = self._run("bench", file, threads, int(flash), *columns).split()
        count = len(columns)
        decode, prefill = ([float(figure) for figure in part] for part in (figures[:count], figures[count : 2 * count]))
        return Benched(decode_ms=tuple(decode), prefill_s=tuple(prefill), peak_mb=int(figures[-1]))

    def quantize(self, source: Path, target: Path, kind: str, *, threads: int = 2) -> Path:
        """``kind``: one of TYPES, by llama.cpp's own rules for which tensor gets which type."""
        part = target.with_name(f"{target.name}.part")
        self._run("quantize", source, part, kind, threads)
        return part.replace(target)

    def likelihoods(self, file: Path, rows: Sequence[Sequence[int]], *, threads: int = 2) -> list[tuple[int, float]]:
        """Of every row of token ids (at most 512): tokens predicted, and their negative log-likelihood in nats, summed."""
        given = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        lines = self._run("likelihood", file, threads, given=given).splitlines()
        return [(int(count), float(nats)) for count, nats in (line.split() for line in lines)]

    def _run(self, *arguments: object, given: str = "") -> str:
        command = [str(self.program), *map(str, arguments)]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:2])} exited {done.returncode}: {done.stderr[-500:]}")
        return done.stdout


def llama_cpp(folder: Path) -> LlamaCpp:
    """The program in ``folder``/llama.cpp, downloaded and built once; again where its source is newer.

    Raises ValueError where a download has another sha256.
    """
    home = folder / "llama.cpp"
    libraries, include, program = home / "lib", home / "include", home / "llama-probe"
    home.mkdir(parents=True, exist_ok=True)
    if not libraries.is_dir():
        _unpack(_download(LIBRARIES, home), libraries, ("package/bins/linux-x64/",))
    if not include.is_dir():
        _unpack(_download(HEADERS, home), include, HEADER_FOLDERS)
    if not program.is_file() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        linked = [str(libraries / name) for name in LINKED]
        flags = ["-std=c++17", "-O2", "-Wall", f"-I{include}", f"-Wl,-rpath,{libraries.resolve()}"]
        subprocess.run(["g++", *flags, str(SOURCE), *linked, "-o", str(program)], check=True)
    return LlamaCpp(program=program, libraries=libraries)


def _download(pinned: tuple[str, str], folder: Path) -> Path:
    package, sha256 = pinned
    with tempfile.TemporaryDirectory(dir=folder) as made:
        if package.startswith("@"):
            subprocess.run(["npm", "pack", "--silent", "--pack-destination", made, package], check=True, stdout=subprocess.DEVNULL)
        else:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "-d", made, package], check=True)
        (file,) = Path(made).iterdir()
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"{package} has sha256 {found}, expected {sha256}")
        return file.replace(folder / file.name)


def _unpack(archive: Path, folder: Path, members: Sequence[str]) -> None:
    """The files right inside ``members``, without folders; the archive is removed."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made, tarfile.open(archive) as opened:
        for member in opened:
            inside = member.name if member.name.startswith("package/") else member.name.partition("/")[2]
            if member.isfile() and any(inside.startswith(prefix) and "/" not in inside.removeprefix(prefix) for prefix in members):
                file = opened.extractfile(member)
                assert file is not None
                (Path(made) / Path(inside).name).write_bytes(file.read())
        Path(made).rename(folder)
        Path(made).mkdir()  # which the temporary folder's end removes
    folder.chmod(0o755)
    archive.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", nargs=3, metavar=("IN", "OUT", "TYPE"))
    asked = parser.parse_args()
    built = llama_cpp(asked.folder)
    if asked.quantize:
        source, target, kind = asked.quantize
        print(built.quantize(Path(source), Path(target), kind))
    else:
        print(f"{VERSION}: {built.program}")


if __name__ == "__main__":
    main()

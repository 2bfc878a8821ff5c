"""What nvcc makes of the CUDA kernels: 16 bytes at once on every target, banks through the read-only path, no spills, a bounded library."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_host import NATIVE, run

ARCHITECTURES = (75, 87, 90, 120)
"""The oldest, an Orin's, a data centre's and the newest."""
VECTORS = re.compile(r"(edit|red|project|add)_kernelI.*Li[48]E")
"""Kernels of rows that are 16-byte aligned; the others take one value at a time."""
KERNELS = 3 * (3 + 3 + 2 + 2)


@dataclass(frozen=True)
class Kernel:
    name: str
    accesses: Counter[str]
    """Global loads and stores by their PTX instruction."""

    def count(self, pattern: str) -> int:
        return sum(n for instruction, n in self.accesses.items() if re.fullmatch(pattern, instruction))


def kernels_of(ptx: str) -> list[Kernel]:
    bodies = re.split(r"^\.(?:weak \.)?(?:visible )?(?:\.)?entry ", ptx, flags=re.MULTILINE)[1:]
    return [Kernel(body.partition("(")[0], Counter(re.findall(r"^\s+((?:ld|st)\.global[.\w]*)", body, re.MULTILINE))) for body in bodies]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, list[Kernel]], str]:
    """Kernels of both ops by architecture, and all that ptxas says of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the path")
    folder = tmp_path_factory.mktemp("cuda-code")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ("-fatbin", "-O3", "-std=c++17", "--threads", "2", "-Xptxas", "-v", "--keep", "--keep-dir", folder)
    told = ""
    for name in ("edit_cuda", "red_cuda"):
        source = NATIVE / "cuda" / f"{name}.cu"
        done = run(nvcc, *flags, *targets, f"-I{NATIVE}", f"-I{NATIVE}/include", source, "-o", folder / f"{name}.fatbin")
        told += done.stdout + done.stderr
    return {a: [k for path in sorted(Path(folder).glob(f"*{a}.ptx")) for k in kernels_of(path.read_text())] for a in ARCHITECTURES}, told


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_move_16_bytes_at_once(compiled, architecture) -> None:
    kernels = compiled[0][architecture]
    # Three types: rows by one and four, and values alone, of both ops; a spread edit's two kernels, for vectors and for values.
    assert len(kernels) == KERNELS
    vectors = [kernel for kernel in kernels if VECTORS.search(kernel.name)]
    assert len(vectors) == 3 * (2 + 2 + 2)
    for kernel in vectors:
        wide = kernel.count(r"st\.global(\.cg)?\.v4\.\w+")
        z = "project_kernel" in kernel.name
        assert (wide == 0) if z else (wide > 0), kernel
        # A spread edit's z is one float32 value of each rank; nothing else is stored in less than 16 bytes.
        assert kernel.count(r"st\.global.*") - wide == (kernel.count(r"st\.global\.f32|st\.global\.b32") if z else 0), kernel
        assert kernel.count(r"ld\.global(\.nc)?\.v4\.\w+") > 0, kernel
        # Banks: through the read-only path. What is read in 2 bytes is b, one value of each rank.
        assert kernel.count(r"ld\.global\.nc\.v4\.\w+") > 0, kernel
        assert kernel.count(r"ld\.global\.(u16|b16|v2\.u16)") == 0, kernel


@pytest.mark.slow
def test_nothing_spills(compiled) -> None:
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert len(spills) == len(ARCHITECTURES) * KERNELS
    assert set(spills) == {("0", "0", "0")}


def test_the_count_would_see_a_split_store() -> None:
    (kernel,) = kernels_of(
        ".visible .entry red_kernelIfLi8E(\n\tst.global.u16 [a], b;\n\tst.global.v4.u32 [a], {b};\n\tld.global.nc.f32 f, [a];\n"
    )
    assert kernel.name == "red_kernelIfLi8E"
    assert kernel.count(r"st\.global.*") == 2 and kernel.count(r"st\.global(\.cg)?\.v4\.\w+") == 1

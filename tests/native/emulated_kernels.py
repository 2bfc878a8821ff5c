"""Both ops' CUDA kernels, the unmodified .cu files, compiled for the host over cuda_emulation/ and held against float64 under sanitizers.

The tests run a pairwise sample of the grid. All of it takes hours, and is run by hand, in parts where that is better:

    python tests/native/emulated_kernels.py                     # all of the grid
    python tests/native/emulated_kernels.py --part 3/40 --jobs 2
    python tests/native/emulated_kernels.py --only rank=256 --only dtype=bfloat16
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plugin_host import NATIVE, compiler, cuda_include, run

SOURCES = Path(__file__).parent / "cuda_emulation"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
READS = {
    "emulated_lo_reft": ("cuda/edit_cuda.cu", "cuda/lanes.h"),
    "emulated_red": ("cuda/red_cuda.cu", "cuda/lanes.h"),
}
"""The kernels' sources by the object that they become."""
FACTORS: Mapping[str, Sequence[object]] = {
    "op": ("LoReFT", "RED"),
    "dtype": ("float32", "float16", "bfloat16"),
    "tokens": (1, 3, 9, 40, 1023, 1025, 1030),
    "width": (1, 7, 9, 130, 576, 640, 896, 2048, 4096, 8192, 16384),
    "rank": (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 255, 256),
    "slots": (1, 3),
    "activation": tuple(range(7)),
    "first_half": (0, 1),
    "pattern": ("none", "all", "ends", "random", "alternating"),
    "in_place": (0, 1),
    "beside": ("none", "all", "h", "y", "first", "second"),
    "workspace": (0, 1),
    "falling": (0, 1),
}
"""What a case is made of, in the order of its line: check_kernels.cc says what each is."""
CROSSED = ("op", "dtype", "tokens", "width", "rank", "pattern", "in_place", "beside", "workspace", "falling")
"""The whole grid crosses these; the others take turns."""
MOST_WORK = 20_000_000
"""Multiplications of a case, a fraction of a second under the sanitizers; cases of more are left out, and their pairs with them."""
SMALL: Mapping[str, Sequence[object]] = {
    "tokens": (1, 3, 1030),
    "width": (1, 9, 72, 130),
    "rank": (1, 4, 5, 33),
    "activation": (0, 2),
}
SMALL_WORK = 2_500_000
"""Values in place of FACTORS' at which a pairwise sample takes no time, and the most work of its cases."""
FAR_BANKS = (
    "LoReFT float32 9 131072 4 4200 0 0 ends 1 none 0 0 1",
    "RED float32 9 131072 1 16500 0 0 ends 0 none 0 0 1",
)
FAR_TOKENS = (
    "LoReFT float16 17000 131072 4 2 0 0 ends 1 none 0 0 1",
    "RED bfloat16 17000 131072 1 2 0 0 ends 1 none 0 1 1",
)
"""More than 2^31 values from the first; what is not edited stays untouched, and takes no memory."""

Case = dict[str, object]


def line_of(case: Case, seed: int) -> str:
    return " ".join(str(case[name]) for name in FACTORS) + f" {seed}"


def work(case: Case) -> int:
    """Multiplications, of the kernel and of the reference, and the fibers that start."""
    tokens, width, rank = int(case["tokens"]), int(case["width"]), int(case["rank"])
    edited = {"none": 0, "ends": min(14, tokens)}.get(str(case["pattern"]), tokens)
    return tokens * width + edited * width * (1 if case["op"] == "RED" else 2 * rank) + 2000 * tokens


def pairwise(factors: Mapping[str, Sequence[object]], most_work: int = MOST_WORK) -> list[Case]:
    """Cases in which every two values of two factors meet, but for those that take more than ``most_work``."""
    pick = random.Random(0)
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases = []
    for pair in sorted(missing, key=str):
        if pair not in missing:
            continue
        drawn = [{name: pick.choice(factors[name]) for name in names} | dict(pair) for _ in range(60)]
        affordable = [case for case in drawn if work(case) <= most_work]
        if not affordable:
            missing.discard(pair)
            continue
        best = max(affordable, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        cases.append(best)
    return cases


def _pairs(case: Case) -> set[tuple]:
    return set(itertools.combinations(case.items(), 2))


def whole_grid() -> Iterator[Case]:
    """Every crossing of CROSSED that is not too much work; RED, which has no rank and no workspace, once."""
    others = {name: values for name, values in FACTORS.items() if name not in CROSSED}
    for turn, values in enumerate(itertools.product(*(FACTORS[name] for name in CROSSED))):
        case = dict(zip(CROSSED, values, strict=True)) | {name: choices[turn % len(choices)] for name, choices in others.items()}
        if work(case) <= MOST_WORK and (case["op"] == "LoReFT" or (case["rank"], case["workspace"]) == (1, 0)):
            yield case


def build(folder: Path, *, fault: tuple[str, str, str] | None = None, sound: Path | None = None) -> Path:
    """The program of the kernels; skips by name where the machine cannot make it.

    ``fault``: a file below runtimes/native, a text that it holds once, and what takes its place. ``sound``: the program without it, whose
    other objects are taken.
    """
    if os.uname().machine != "x86_64":
        pytest.skip("the emulation's fibers are x86-64's")
    cxx = compiler()
    if not Path(run(cxx, "-print-file-name=libasan.so").stdout.strip()).is_absolute():
        pytest.skip(f"{cxx} has no AddressSanitizer runtime")
    includes = ["-isystem", str(cuda_include()), f"-I{NATIVE}", f"-I{NATIVE}/include"]
    if fault is not None:
        includes.insert(0, f"-I{_with_fault(folder / 'faulty', *fault)}")
    # Kernels without strict aliasing: on a GPU 16 bytes are moved at once, whatever they hold.
    kernel = ("-O1", "-g1", *SANITIZE, "-fno-strict-aliasing", "-Wno-unknown-pragmas")
    flags = {"emulated_lo_reft": kernel, "emulated_red": kernel, "check_kernels": ("-O1",), "cuda_on_cpu": ("-O2",)}

    def compiled(name: str) -> Path:
        if sound is not None and fault is not None and fault[0] not in READS.get(name, ()):
            return sound.parent / f"{name}.o"
        output = folder / f"{name}.o"
        run(cxx, "-c", "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags[name], *includes, SOURCES / f"{name}.cc", "-o", output)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, flags))
    run(cxx, *SANITIZE, *objects, "-o", folder / "check")
    return folder / "check"


def _with_fault(folder: Path, name: str, text: str, replacement: str) -> Path:
    """An include folder in which the file ``name`` holds ``replacement`` for ``text``."""
    source = (NATIVE / name).read_text()
    assert source.count(text) == 1, f"{name} has {text!r} {source.count(text)} times"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(source.replace(text, replacement))
    return folder


def check(program: Path, lines: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """What the program says of these cases; its status is 0 where every value is right."""
    text = "".join(line + "\n" for line in lines)
    return subprocess.run([program], input=text, capture_output=True, text=True, check=False)


def cases_of(told: str) -> dict[str, int]:
    """Cases by op and type, of a program that found no fault."""
    return {line.partition(" cases ")[0]: int(line.split()[3]) for line in told.splitlines()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", default="1/1", help="K/N: every N-th case, from the K-th on")
    parser.add_argument("--only", action="append", default=[], metavar="FACTOR=VALUE", help="cases with this value; may be repeated")
    parser.add_argument("--far", action="store_true", help="offsets beyond 2^31 instead of the grid")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    wanted = [pair.split("=") for pair in options.only]
    grid = (case for case in whole_grid() if all(str(case[name]) == value for name, value in wanted))
    lines = [*FAR_BANKS, *FAR_TOKENS] if options.far else [line_of(case, i) for i, case in enumerate(grid) if i % parts == part - 1]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        program = build(Path(folder))
        shares = [lines[i :: options.jobs] for i in range(options.jobs)]
        done = list(pool.map(lambda share: check(program, share), shares))
    for share in done:
        print(share.stdout, share.stderr, sep="", end="")
    print(f"{len(lines)} cases, {'all right' if not any(share.returncode for share in done) else 'FAULTS'}")
    return max(share.returncode != 0 for share in done)


if __name__ == "__main__":
    sys.exit(main())

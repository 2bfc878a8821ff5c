"""The CUDA kernels of both ops on the host: in an emulation of CUDA's blocks and threads, under sanitizers, against float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from emulated_kernels import (
    FACTORS,
    FAR_BANKS,
    FAR_TOKENS,
    MOST_WORK,
    SMALL,
    SMALL_WORK,
    build,
    cases_of,
    check,
    line_of,
    pairwise,
    work,
)
from tiers import slow_and_long


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated"))


def test_small_cases(program) -> None:
    """Pairs of everything, at sizes that take no time."""
    lines = [line_of(case, i) for i, case in enumerate(pairwise({**FACTORS, **SMALL}, SMALL_WORK))]
    done = check(program, lines)
    assert done.returncode == 0, done.stderr
    assert sum(cases_of(done.stdout).values()) == len(lines)


@pytest.mark.slow
def test_a_pairwise_sample(program) -> None:
    lines = [line_of(case, i) for i, case in enumerate(pairwise(FACTORS))]
    done = check(program, lines)
    assert done.returncode == 0, done.stderr
    assert set(cases_of(done.stdout)) == {f"{op} {dtype}" for op in FACTORS["op"] for dtype in FACTORS["dtype"]}


@pytest.mark.slow
def test_offsets_beyond_two_to_the_31(program) -> None:
    lines = [*FAR_BANKS, FAR_TOKENS[0]]
    done = check(program, lines)
    assert done.returncode == 0, done.stderr
    assert sum(cases_of(done.stdout).values()) == len(lines)


def test_the_sample_has_every_affordable_pair() -> None:
    cases = pairwise(FACTORS)
    assert max(map(work, cases)) <= MOST_WORK
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(case[a], case[b]) for case in cases}
        missing = set(itertools.product(FACTORS[a], FACTORS[b])) - met
        assert not missing, f"{a} and {b} never meet at {missing}"


EDIT, RED = "cuda/edit_cuda.cu", "cuda/red_cuda.cu"
BARRIER = "  __syncthreads();\n"
TO_SUMS, TO_Z, TO_ADD = "  if (threadIdx.x < R * kRanks) {\n", "  }\n\n  const T* U = a.U", "\n  if (warp != 0 || !inside) return;"
SECOND = "queue(&add_kernel<T, kLanes>, (arguments.width + columns - 1) / columns, kWarps * columns);\n  "
FAULTS = {
    "no barrier before the sums are read": (EDIT, BARRIER + TO_SUMS, TO_SUMS, "a wrong value"),
    "no barrier before z is read": (EDIT, "  " + BARRIER + TO_Z, TO_Z, "a wrong value"),
    "half a block's barrier": (EDIT, BARRIER + TO_SUMS, "  if (threadIdx.x < 128) __syncthreads();\n" + TO_SUMS, "barrier"),
    "a lane that leaves": (
        EDIT,
        "if (first_k >= ranks) break;",
        "if (threadIdx.x == 3) return;\n      if (first_k >= ranks) break;",
        "a shuffle that",
    ),
    "unaligned h": (EDIT, " && aligned(edit.h)", "", "misaligned address"),
    "unaligned A": (EDIT, " && aligned(edit.A)", "", "misaligned address"),
    "unaligned bias": (RED, " && aligned(edit.bias)", "", "misaligned address"),
    "one column too many": (EDIT, "d < a.width; d += stride) {\n    Lanes", "d <= a.width; d += stride) {\n    Lanes", "a wrong value"),
    "one token too many": (RED, "if (token >= a.tokens)", "if (token > a.tokens)", "heap-buffer-overflow"),
    "an offset of 32 bits": (
        EDIT,
        "a.A + (static_cast<int64_t>(slot) * a.rank + k0) * a.width",
        "a.A + (slot * a.rank + k0) * static_cast<int>(a.width)",
        "overflow",
    ),
    "no barrier before the warps' sums are added": (EDIT, BARRIER + TO_ADD, TO_ADD, "a wrong value"),
    "ranks that no block takes": (EDIT, "(arguments.rank + kRanks - 1) / kRanks,", "arguments.rank / kRanks,", "a wrong value"),
    "columns that no block takes": (EDIT, "(arguments.width + columns - 1) / columns,", "arguments.width / columns,", "a wrong value"),
    "z of another token": (EDIT, "kRanks, shared, a.z + token * a.rank", "kRanks, shared, a.z", "a wrong value"),
    "the second kernel first": (
        EDIT,
        "if (const cudaError_t error = queue(&project",
        SECOND + "if (const cudaError_t error = queue(&project",
        "a wrong value",
    ),
    "a rank beyond the last": (EDIT, "if (k >= a.rank) continue;", "if (k > a.rank) continue;", "heap-buffer-overflow"),
    "columns beyond the row": (EDIT, "inside && k0 < a.rank", "k0 < a.rank", "heap-buffer-overflow"),
    "too small a workspace": (EDIT, "? tokens * rank * static", "? (tokens * rank - 1) * static", "heap-buffer-overflow"),
    "too little shared memory": (EDIT, "kRanks + arguments.rank)", "kRanks + arguments.rank - 1)", "use-after-poison"),
}
"""What is planted: the file, a text in it and what takes its place, and what is said of it."""
SEEN_IN_CI = (
    "unaligned bias",
    "one token too many",
    "an offset of 32 bits",
    "no barrier before the warps' sums are added",
    "z of another token",
    "too little shared memory",
)
"""Each in another way, and in both files."""
SEEN_BY = [
    f"{op} float32 {tokens} {width} {rank} 2 2 0 {pattern} {in_place} {beside} {workspace} {falling} 1"
    for op in FACTORS["op"]
    for tokens, width, rank, workspace, pattern in ((3, 64, 5, 0, "random"), (1030, 64, 5, 0, "random"), (3, 200, 41, 1, "all"))
    for in_place in (0, 1)
    for beside in FACTORS["beside"]
    for falling in (0, 1)
]


@pytest.mark.parametrize("fault", slow_and_long(FAULTS, *SEEN_IN_CI))
def test_a_planted_fault_is_seen(fault, program, tmp_path) -> None:
    *planted, said = FAULTS[fault]
    op = "RED" if planted[0] == RED else "LoReFT"
    lines = [line for line in (*SEEN_BY, *FAR_BANKS) if line.startswith(op)]
    done = check(build(tmp_path, fault=tuple(planted), sound=program), lines)
    assert done.returncode != 0
    assert said in done.stderr

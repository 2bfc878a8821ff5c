"""Cases of native/cuda_emulation/check_kernels.cc, a line each: ``python -m gpu.case_lines small`` or ``sample``."""

from __future__ import annotations

import sys

from emulated_kernels import FACTORS, SMALL, SMALL_WORK, line_of, pairwise

PICKED = {"small": ({**FACTORS, **SMALL}, SMALL_WORK), "sample": (FACTORS,)}
"""What ``pairwise`` is given: the cases for the sanitizers, and those for the GPU alone."""

if __name__ == "__main__":
    print("\n".join(line_of(case, seed) for seed, case in enumerate(pairwise(*PICKED[sys.argv[1]]))))

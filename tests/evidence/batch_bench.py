"""What a batch of rows gives over one row: decode steps of a Batcher's pool, at several lengths.

    PYTHONPATH=tests python -m evidence.batch_bench BUNDLE [--rows 1 4 16] [--columns 64 512] [--threads 1] [--clock processor]

One session, one pool of rows; the numbers of rows take turns in blocks, forward and backward. Milliseconds are medians over all steps,
tokens a second follow from them, and ratios are to the first number of rows; in brackets the quartiles of the blocks' own ratios.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from runtimes.open import open_artifact
from runtimes.ort.session import OrtSession

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--columns", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    asked = parser.parse_args()
    clock = CLOCKS[asked.clock]
    with OrtSession(open_artifact(asked.bundle), threads=asked.threads) as session:
        vocabulary, random = session.bundle.manifest.model.vocab_size, np.random.default_rng(0)
        pool = session.open_pool(None, max(asked.rows), max(asked.columns) + STEPS + 1)
        fed = 0
        for columns in sorted(asked.columns):
            for row in range(max(asked.rows)):
                pool.feed(row, random.integers(0, vocabulary, columns - fed), fed, columns)
            fed = columns
            times: dict[int, list[list[float]]] = {rows: [] for rows in asked.rows}
            for block in range(asked.blocks):
                for rows in asked.rows if block % 2 == 0 else reversed(asked.rows):
                    times[rows].append([])
                    for step in range(STEPS + 1):
                        started = clock()
                        pool.decode(random.integers(0, vocabulary, rows), np.full(rows, columns + step), np.full(rows, columns))
                        if step:  # the first one binds
                            times[rows][-1].append((clock() - started) * 1e3)
            one = asked.rows[0]
            for rows, found in times.items():
                each = [rows * np.median(b) / (one * np.median(a)) for a, b in zip(found, times[one], strict=True)]
                low, high = np.quantile(each, [0.25, 0.75])
                step, first = (float(np.median(np.concatenate(x))) for x in (found, times[one]))
                ratio = rows * first / (one * step)
                print(f"| {columns} | {rows} | {step:.1f} | {1e3 * rows / step:.1f} | x{ratio:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()

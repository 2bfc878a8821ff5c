"""The ReFT paper in miniature, on SmolLM2-135M-Instruct: the figures of docs/experiments.md.

    PYTHONPATH=tests python -m evidence.experiments run real-models/smollm2.gguf real-models OUT/ [--only SECTION]... [--until 23:45]
    PYTHONPATH=tests python -m evidence.experiments page
    PYTHONPATH=tests python -m evidence.experiments lines real-models OUT/

``run`` measures the rows that docs/experiments.json lacks, one by one, and keeps each; trained edits lie in OUT/. ``page`` writes
docs/experiments.md and its picture from the file; ``lines`` writes the sentiment's lines as JSONL. LoRA needs peft, which is not installed
here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

DOCS = Path("docs")


def run(asked: argparse.Namespace) -> None:
    import torch

    from evidence.experiments.measuring import Bench
    from evidence.experiments.rows import keep, read
    from evidence.experiments.setups import setups

    torch.set_num_threads(asked.threads)
    bench = Bench(asked.model, asked.reviews, asked.folder)
    for setup in setups():
        if setup.key in read(asked.docs) or (asked.only and setup.section not in asked.only):
            continue
        if asked.until and datetime.datetime.now().strftime("%H:%M") >= asked.until:
            break
        row = bench.measured(setup, lambda text, key=setup.key: print(f"{key}: {text}", file=sys.stderr, flush=True))
        keep(asked.docs, row)
        print(row, flush=True)


def lines(asked: argparse.Namespace) -> None:
    from evidence.experiments.tasks import sentiment

    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, each in sentiment(asked.reviews).items():
        (asked.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in each), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measured = verbs.add_parser("run")
    measured.add_argument("model")
    measured.add_argument("reviews", type=Path, help="where review_text.py downloads its sentences")
    measured.add_argument("folder", type=Path)
    measured.add_argument("--only", action="append")
    measured.add_argument("--until", help="no row starts after this time of day, HH:MM")
    measured.add_argument("--threads", type=int, default=1)
    verbs.add_parser("page")
    written = verbs.add_parser("lines")
    written.add_argument("reviews", type=Path)
    written.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.verb == "run":
        run(asked)
    elif asked.verb == "lines":
        lines(asked)
    else:
        from evidence.experiments.page import write

        write(asked.docs)


if __name__ == "__main__":
    main()

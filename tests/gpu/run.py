"""Everything that only a GPU can show, in at most eight minutes, and written down: kernels, tests, sanitizers, training, engines.

    tests/gpu/run.sh OUT [WHEELS] [--dry]

OUT gets gpu.json, gpu.md and gpu.log (what every program printed). WHEELS is a folder of wheels that this Python lacks, whole or in parts:

    {how_to_split}

A stage that fails or cannot be done does not keep the others from running; the status is 1 where one failed. Needed: CUDA's toolkit, CMake,
a C++17 compiler and Python with torch; pytest, onnx, onnx_ir, onnxruntime and ml_dtypes for the tests, transformers and accelerate for
training, and onnxscript for bundles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gpu.facts import machine
from gpu.process import Failed, Run, Skipped
from gpu.report import FAILED, JSON_FILE, LOG_FILE, PAGE_FILE, PASSED, READY, SKIPPED, Report, StageRecord
from gpu.stages import STAGES, Stage
from gpu.wheels import HOW_TO_SPLIT

LIMIT = 470
"""Seconds for all stages: eight minutes, less what starting and writing takes."""
DRY_ARCHITECTURE = "86"
NO_GPU = "no GPU: neither nvidia-smi nor the driver names one with its compute capability; --dry does everything up to the launch"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    facts = machine()
    capability = facts["compute capability"]
    if capability is None and not options.dry:
        print(NO_GPU, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / LOG_FILE).absolute()
    log.write_text("", encoding="utf-8")
    report = Report(dry=options.dry, names=[stage.name for stage in STAGES], machine=facts)
    report.write(options.out)
    end = time.monotonic() + LIMIT
    with TemporaryDirectory(prefix="reft-gpu-") as work:
        run = Run(
            work=Path(work),
            log=log,
            wheels=None if options.wheels is None else options.wheels.absolute(),
            dry=options.dry,
            architecture=DRY_ARCHITECTURE if capability is None else capability.replace(".", ""),
        )
        for stage in STAGES:
            record = perform(stage, run, end)
            report.stages.append(record)
            report.write(options.out)
            print(f"{record.stage:16} {record.result:8} {record.seconds:6.1f} s  {record.summary}", flush=True)
    print(f"{report.counts()}; {options.out / PAGE_FILE} and {options.out / JSON_FILE} have them")
    return 1 if report.failed else 0


def perform(stage: Stage, run: Run, end: float) -> StageRecord:
    """One stage, within its own time and what is left of everyone's; whatever it raises becomes its record."""
    started = time.monotonic()
    figures: dict[str, Any] = {}
    run.until = min(started + stage.seconds, end)
    try:
        if started >= end:
            raise Skipped(f"the {LIMIT} s of all stages were over")
        summary, result = stage.work(run, figures), READY if run.dry else PASSED
    except Skipped as reason:
        summary, result = str(reason), SKIPPED
    except Failed as reason:
        summary, result = str(reason), FAILED
    except Exception as error:  # a fault of the script's own must not cost the stages that follow
        summary, result = f"{type(error).__name__}: {error}", FAILED
    line = " ".join(summary.split())
    return StageRecord(stage=stage.name, result=result, summary=line, seconds=round(time.monotonic() - started, 2), figures=figures)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/gpu/run.sh",
        description=(__doc__ or "").format(how_to_split=HOW_TO_SPLIT),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder for gpu.json, gpu.md and gpu.log")
    parser.add_argument("wheels", type=Path, nargs="?", metavar="WHEELS", help="a folder of wheels, whole or in parts")
    parser.add_argument("--dry", action="store_true", help="everything up to the launch; needs no GPU")
    options = parser.parse_args(arguments)
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"{options.wheels} is not a folder; name the one that holds the wheels, or leave it out")
    return options


if __name__ == "__main__":
    sys.exit(main())

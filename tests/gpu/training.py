"""Training in bfloat16 on the GPU against float32 on the CPU: the same 20 steps on the built-in base, loss by loss.

    python -m gpu.training RESULT [--dry]       RESULT: a JSON file; --dry: bases, data and settings, and no step

Losses are in nats per completion token, each taken before its step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

STEPS = 20
TOLERANCE = 2**-7
"""Of each loss, relative: two of bfloat16's roundings (2^-8). On a CPU in bfloat16 the largest difference was 2^-9.4."""
PLACES = {"reference": ("float32", "cpu"), "gpu": ("bfloat16", "cuda")}
"""(dtype, device) of the two runs."""


def losses(name: str, dtype: str, device: str, folder: Path, *, dry: bool) -> list[float]:
    """One a step; none of a dry form, which checks all that comes before the first."""
    # Not at the head: the stages read this module's constants, and need no torch.
    from reft_export.base.load import load_base
    from reft_export.quickstart import base_path
    from reft_export.training.preparation import prepare
    from reft_export.training.settings import TrainSettings
    from reft_export.training.trainer import train

    data = base_path().parent / "pirate.train.jsonl"
    # The CPU stands in for a GPU that is not there: what is checked is the data and the settings.
    device = "cpu" if dry else device
    settings = TrainSettings(positions="f2+l2", lr=4e-3, max_steps=STEPS, batch_size=16, samples=0, probes=0, dtype=dtype, device=device)
    base = load_base(base_path(), dtype=dtype, device=device, require_tokenizer=True)
    if dry:
        prepare(base, data, settings, folder / name)
        return []
    return [record.loss for record in train(base, data, settings, folder / name).history]


def worst(reference: Sequence[float], gpu: Sequence[float]) -> float:
    """The largest difference of a loss, relative to the reference's."""
    return max(abs(a - b) / a for a, b in zip(reference, gpu, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--dry", action="store_true", help="everything up to the first step")
    options = parser.parse_args(arguments)
    told: dict[str, object] = {"steps": STEPS, "tolerance": TOLERANCE}
    with TemporaryDirectory() as folder:
        for name, (dtype, device) in PLACES.items():
            started = time.perf_counter()
            told[name] = losses(name, dtype, device, Path(folder), dry=options.dry)
            told[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
            options.result.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()

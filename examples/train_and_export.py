"""Train an adapter on the built-in base, export base and adapter as one bundle, and prove that it is what was trained.

`python examples/train_and_export.py` writes examples-out/pirate and examples-out/bundle, which other examples run.
"""

from pathlib import Path

from reft_export import check_parity, export_bundle, load_base, train
from reft_export.exporting.settings import ExportSettings
from reft_export.quickstart import base_path
from reft_export.training.settings import TrainSettings

OUT = Path("examples-out")
BASE = base_path()
DATA = BASE.parent / "pirate.train.jsonl"  # {"prompt": ..., "completion": ...} a line


def show_loss(step: int, total: int, loss: float, held_out: float | None) -> None:
    if step % 20 == 0:
        print(f"step {step} of {total}, loss {loss:.2f}")


# A LoReFT edit of rank 4 behind every block, at the first two and the last two tokens of the prompt.
settings = TrainSettings(method="loreft", rank=4, positions="f2+l2", lr=4e-3, max_steps=120, batch_size=16, samples=2)
base = load_base(BASE, require_tokenizer=True)
result = train(base, DATA, settings, OUT / "pirate", force=True, on_step=show_loss)
for before, after in zip(result.samples_before, result.samples_after, strict=True):
    print(f"\n{before.prompt}\n  base     {before.text}\n  steered  {after.text}")

# The base goes to int8, the edits stay in float. A bundle that is not what eager PyTorch says is not written: ParityError.
export_bundle(BASE, [OUT / "pirate"], OUT / "bundle", ExportSettings(precision="int8"), force=True)

# The same check as a device makes it, with nothing but the bundle.
for rung in check_parity(OUT / "bundle").rungs:
    print(f"{rung.name}: {rung.figures.max_relative:.0e} of the largest logit, {'pass' if rung.passed else 'MISS'}")

"""What quantization does to steering, what steered calibration and a refit give back: the table of docs/QUANTIZED_STEERING.md.

    PYTHONPATH=tests python -m evidence.steering_experiment OUT/          about five minutes on two cores, offline

Three adapters on the built-in base, with fixed seeds: the quickstart's pirate (a style: any of its words will do), twelve secrets (answers
learned by heart: every token has one right value), and a strong steering vector made by hand (one channel of the residual stream, far
beyond what the base puts there). Each is exported once and then quantized in several ways. Bundles are not held to their parity budgets
here: what a budget would refuse is what this wants to show.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from calibration.settings import QuantizationSettings, settings_for
from evidence.quickstart_base.corpus import compose
from evidence.quickstart_base.lexicon import SUBJECTS
from evidence.quickstart_base.secrets import SECRETS, secret_examples
from reft_export.base.load import Base, load_base
from reft_export.evaluation.checker import CheckedTask, load_task
from reft_export.evaluation.quantization_report import Measurements, QuantizationReport, Yardsticks, write_reports
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.quantizing.adapters import refit_in
from reft_export.quantizing.assemble import assemble, planned
from reft_export.quantizing.refit import plan_refit
from reft_export.quantizing.settings import CalibrationRequest, RefitSettings
from reft_export.quickstart import base_path
from reft_export.quickstart.subjects import built_in
from reft_export.quickstart.task import held_out_prompts, training_examples
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule
from runtimes.ort.session import OrtSession

Say = Callable[[str], None]
TEXT_SEED, TEXT_DOCUMENTS = 5, 60


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One adapter: what it is trained on and how, what it is asked, and who judges the answers."""

    name: str
    train: TrainSettings | None
    """None: made by hand."""
    examples: Callable[[], list[dict[str, str]]]
    prompts: Callable[[], list[str]]
    checker: str | None
    """None: an answer succeeds where it is the float bundle's, word for word."""


SETTINGS_TRIED = (
    Setting(
        name="pirate",
        train=built_in().settings,
        examples=training_examples,
        prompts=held_out_prompts,
        checker="reft_export.quickstart.task:check",
    ),
    Setting(
        name="secrets",
        train=TrainSettings(rank=8, positions="prompt", lr=1e-2, max_steps=800, batch_size=SECRETS, samples=0, seed=0),
        examples=secret_examples,
        prompts=lambda: [example["prompt"] for example in secret_examples()],
        checker="evidence.quickstart_base.secrets:check",
    ),
    Setting(name="vector", train=None, examples=training_examples, prompts=held_out_prompts, checker=None),
)
VECTOR = 100.0
"""Of one channel after the first block, where the base stays within a few units; RMSNorm then gives that channel its largest value."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to quantize, and the objectives of the refits that follow it."""

    name: str
    settings: QuantizationSettings
    refits: tuple[str, ...] = ()


WAYS = (
    Way(name="int8, blocks of 32", settings=settings_for("weight-only", 8)),
    Way(name="int4, blocks of 32", settings=settings_for("weight-only", 4, method="rtn"), refits=("teacher", "data")),
    Way(name="int4, blocks of 128", settings=settings_for("weight-only", 4, method="rtn", block_size=128), refits=("teacher", "data")),
    Way(name="int8 dynamic", settings=settings_for("dynamic")),
    Way(name="int8 static, steered ranges", settings=settings_for("static"), refits=("teacher",)),
)


def run(
    output: Path, *, settings: Sequence[Setting] = SETTINGS_TRIED, ways: Sequence[Way] = WAYS, say: Say = print
) -> dict[str, QuantizationReport]:
    """Trains, exports, quantizes, refits and measures everything under ``output``; writes reports and table.md there."""
    torch.set_num_threads(1)  # more threads add in another order, and the numbers would not repeat
    output.mkdir(parents=True, exist_ok=True)
    reports = {setting.name: _try(output / setting.name, setting, ways, say) for setting in settings}
    (output / "table.md").write_text(markdown(reports), encoding="utf-8")
    return reports


def _try(folder: Path, setting: Setting, ways: Sequence[Way], say: Say) -> QuantizationReport:
    folder.mkdir(exist_ok=True)
    model, data, prompts = str(base_path()), folder / "data.jsonl", folder / "prompts.jsonl"
    _write_lines(data, setting.examples())
    _write_lines(prompts, [{"prompt": prompt} for prompt in setting.prompts()])
    say(f"{setting.name}: training and exporting")
    adapter = folder / setting.name
    base = load_base(model, require_tokenizer=True)
    if setting.train is None:
        save_adapter(steering_vector(base), adapter, force=True)
    else:
        train(base, data, setting.train, adapter, force=True)
    export_bundle(model, [adapter], folder / "fp32", ExportSettings(), force=True, report=lambda _: None)
    bundle, refits = open_bundle(folder / "fp32"), []
    figures = Measurements(Yardsticks(text=plain_text(), task=_task(setting, prompts, bundle)))
    figures.add("fp32", bundle)
    for way in ways:
        say(f"{setting.name}: {way.name}")
        static = way.settings.kind.activations == "static"
        request = CalibrationRequest(data=data) if static else None
        plan = planned(bundle, model, folder / "static", way.settings, request, lambda _: None)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            if static:
                _assembled(replace(plan, ranges=plan.base_ranges), Path(work) / "base-only")
                figures.add("int8 static, base-only ranges", open_bundle(Path(work) / "base-only"))
            made = Path(work) / "made"
            _assembled(plan, made)
            figures.add(way.name, open_bundle(made))
            for objective in way.refits:
                again = Path(shutil.copytree(made, Path(work) / objective))
                asked = RefitSettings(data=data, sources=(adapter,), objective=objective, output=Path(work) / "adapters")
                refit = plan_refit(open_bundle(again), model, asked, again, force=True)
                with tempfile.TemporaryDirectory() as proof:
                    refitted, _ = refit_in(again, model, refit, Path(proof), lambda _: None)
                name = f"{way.name} + refit ({objective})"
                refits += [replace(each.figures, adapter=f"{each.figures.adapter}, {name}") for each in refitted.values()]
                figures.add(name, open_bundle(again))
    report = figures.report(folder, refits=tuple(refits))
    write_reports(report, folder / "report")
    return report


def steering_vector(base: Base) -> Adapter:
    """h + VECTOR on channel 0 behind the first block, at every token."""
    site = Site(layer=0, stream="block_output")
    R = np.eye(1, base.info.hidden_size, dtype=np.float32)
    return Adapter(
        method="lobireft",
        rank=1,
        sites=(site,),
        positions=PositionRule.parse("all"),
        tied=True,
        base=base.info,
        tensors={f"{site}.R": R, f"{site}.s": np.full(1, VECTOR, np.float32)},
    )


def _task(setting: Setting, prompts: Path, bundle: Bundle) -> CheckedTask:
    if setting.checker is not None:
        return load_task(setting.checker, prompts, max_new_tokens=80)
    task = load_task("reft_export.quickstart.task:check", prompts, max_new_tokens=80)
    said = [answer.text.strip() for answer in task.answer(bundle, OrtSession(bundle, adapter=setting.name))]
    wanted = {str(messages[-1]["content"]): text for (_, messages), text in zip(task.prompts, said, strict=True)}
    return replace(task, name="the float bundle's answer", check=lambda prompt, answer: answer == wanted[prompt])


def _assembled(plan: Any, folder: Path) -> None:
    folder.mkdir()
    with tempfile.TemporaryDirectory() as proof:
        assemble(plan, folder, Path(proof), lambda _: None)


def plain_text() -> str:
    """Plain exchanges as the base knows them, of other random choices than its corpus; perplexity is taken of them."""
    rng = Random(TEXT_SEED)
    exchanges = (compose(rng, subject, "plain") for subject in rng.sample(list(SUBJECTS), TEXT_DOCUMENTS))
    return "".join(f"<s><|user|>{e.prompt}<|assistant|>{e.answer}</s>" for e in exchanges)


def markdown(reports: dict[str, QuantizationReport]) -> str:
    """One table per adapter, under the header of the report."""
    lines: list[str] = []
    for name, report in reports.items():
        drop = report.HEADER.index("adapter")
        rows = [report.HEADER, ("---",) * len(report.HEADER), *report.rows()]
        lines += [f"### {name}", "", *("| " + " | ".join(c for i, c in enumerate(row) if i != drop) + " |" for row in rows), ""]
    return "\n".join(lines)


def _write_lines(path: Path, records: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    run(parser.parse_args().output)

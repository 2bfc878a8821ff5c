"""The quickstart: the project's whole story on the built-in base, with the same functions that the other verbs call."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.settings import QuantizationSettings, settings_for
from reft_export.base.load import load_base
from reft_export.bundling.result import ExportResult
from reft_export.console import Progress, escape, out, print_parity, print_table, progress, size
from reft_export.evaluation.checker import load_task
from reft_export.evaluation.quantization_report import QuantizationReport, Yardsticks, trimmed, write_reports
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import CalibrationRequest, RefitSettings
from reft_export.quantizing.swap import swap_bundle
from reft_export.quickstart import base_path
from reft_export.quickstart.task import held_out_prompts, talks_like_a_pirate, training_examples
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import StepRecord, train
from runtimes.artifacts.bundle import open_bundle
from runtimes.bench import bench
from runtimes.errors import ExportError, ReftError
from runtimes.files.folders import check_destination
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.parity.figures import ParityReport
from runtimes.text.chat import ChatTemplate
from runtimes.text.tokenizer import Tokenizer

ADAPTER = "pirate"
SETTINGS = TrainSettings(method="loreft", rank=4, layers="all", positions="f2+l2", lr=4e-3, max_steps=120, batch_size=16, samples=0, seed=0)
ANSWER_TOKENS = 80
REFIT_STEPS, CALIBRATION_TOKENS = 20, 8
SHOWN = 3
BASE_LIMIT, STEERED_LIMIT = 0.10, 0.90
"""The quickstart fails when more of the base's answers, or fewer of the steered ones, talk like a pirate."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One bundle of the story: fp32, int8 or int4. Rates are shares of the held-out prompts; times in milliseconds."""

    name: str
    folder: Path
    size: int
    base_rate: float
    steered_rate: float
    delta_cosine: float
    delta_norm: float
    ttft_ms: float
    decode_ms: float
    decode_ratio: float
    parity: ParityReport


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that the report shows."""

    seconds: float
    history: tuple[StepRecord, ...]
    answers: tuple[tuple[str, str, str], ...]
    """(prompt, base's answer, steered answer), from the int4 bundle."""
    ladder: ParityReport
    variants: tuple[Variant, ...]
    quantization: QuantizationReport
    """Without calibration, with ranges of the base alone and of the steered model, and after a refit."""
    prompts: int


def tell(output: Path, *, force: bool) -> Story:
    """Trains, exports, folds, quantizes, runs and proves into ``output``; prints tables and writes report.html there.

    Raises InputError for an output that exists (without ``force``), ParityError for a missed budget, ReftError where the
    steering does not work.
    """
    from reft_export.quickstart.report import write_report

    started = time.monotonic()
    folder = Path(output)
    check_destination(folder, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    base_folder = str(base_path())
    data = folder / f"{ADAPTER}.jsonl"
    data.write_text("".join(json.dumps(e) + "\n" for e in training_examples()), encoding="utf-8")
    with progress() as report:
        history = _train(base_folder, data, folder / ADAPTER, report)
        report("exporting, folding, holding against eager PyTorch")
        results = {
            "fp32": export_bundle(base_folder, [folder / ADAPTER], folder / "fp32", ExportSettings(), force=True, report=report.update)
        }
        for bits in (8, 4):
            report(f"quantizing to int{bits}")
            results[f"int{bits}"] = quantize_bundle(
                folder / "fp32", base_folder, folder / f"int{bits}", QuantizationSettings(bits=bits), force=True, report=report.update
            )
        quantization = _quantization(folder, base_folder, data, report)
        report("the parity ladder, rung by rung")
        ladder = host_ladder(open_bundle(folder / "fp32"), base_folder, report=report.update)
        report("answering held-out prompts, base and steered; measuring speed")
        answers, variants = {}, []
        for name, result in results.items():
            answers[name], variant = _measure(name, folder / name, result)
            variants.append(variant)
    shown = _shown(answers["int4"])
    told = Story(
        seconds=time.monotonic() - started,
        history=history,
        answers=shown,
        ladder=ladder,
        variants=tuple(variants),
        quantization=quantization,
        prompts=len(held_out_prompts()),
    )
    _print(told)
    write_report(folder / "report.html", told)
    out.print(f"\nreport: {folder / 'report.html'}   ({told.seconds:.0f} s)")
    out.print(f'try it: reft-export run {folder / "int4"} -a {ADAPTER} -p "Tell me about the moon."')
    ladder.require()
    for v in variants:
        if v.base_rate >= BASE_LIMIT or v.steered_rate <= STEERED_LIMIT:
            raise ReftError(
                f"{v.name}: {v.base_rate:.0%} of the base's and {v.steered_rate:.0%} of the steered answers talk like a pirate; "
                f"expected below {BASE_LIMIT:.0%} and above {STEERED_LIMIT:.0%}"
            )
    return told


def _train(base_folder: str, data: Path, adapter: Path, report: Progress) -> tuple[StepRecord, ...]:
    report(f"training a rank-{SETTINGS.rank} LoReFT edit on {len(training_examples())} examples")

    def on_step(step: int, total: int, loss: float, _: float | None) -> None:
        report.update(f"training, step {step}/{total}, loss {loss:.3f}", step, total)

    base = load_base(base_folder, require_tokenizer=True)
    return train(base, data, SETTINGS, adapter, force=True, on_step=on_step).history


def _quantization(folder: Path, base_folder: str, data: Path, report: Progress) -> QuantizationReport:
    """The int4 bundle's adapter refitted, and static int8 with both kinds of ranges; what is left of the steering in all of them."""
    prompts = folder / "held-out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in held_out_prompts()[::2]), encoding="utf-8")
    task = load_task("reft_export.quickstart.task:check", prompts, max_new_tokens=ANSWER_TOKENS)
    yardsticks = Yardsticks(task=task)
    report("refitting the adapter on the int4 weights")
    refit = RefitSettings(data=data, sources=(folder / ADAPTER,), steps=REFIT_STEPS)
    refitted = swap_bundle(
        folder / "int4", base_folder, folder / "int4-refit", refit=refit, yardsticks=yardsticks, force=True, report=report.update
    )
    report("calibrating static int8, with the edits on")
    static = quantize_bundle(
        folder / "fp32",
        base_folder,
        folder / "static",
        settings_for("static"),
        calibration=CalibrationRequest(data=data, decode_tokens=CALIBRATION_TOKENS),
        yardsticks=yardsticks,
        compare=True,
        force=True,
        report=report.update,
    )
    of_static, of_refitted = _report(static), _report(refitted)
    float_graph, *calibrated = of_static.variants
    told = replace(of_static, variants=(float_graph, *of_refitted.variants, *calibrated), refits=of_refitted.refits)
    write_reports(told, folder / "steering")
    return told


def _report(result: ExportResult) -> QuantizationReport:
    if result.report is None:
        raise ExportError("the quantization was asked for a comparison, and made none")
    return result.report


def _measure(name: str, folder: Path, result: ExportResult) -> tuple[dict[str, tuple[str, str]], Variant]:
    """Answers to every held-out prompt, base and steered, and the variant's figures."""
    bundle = open_bundle(folder)
    session = OrtSession(bundle)
    tokenizer, template = Tokenizer.load(folder, bundle.manifest.model), ChatTemplate.load(folder)
    prompts = held_out_prompts()
    if template is None or result.parity is None:
        raise ExportError(f"{folder} has no chat template, or was not held to parity; the built-in base has both: install reft-export anew")
    rendered = [template.render([{"role": "user", "content": p}]) for p in prompts]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    texts = []
    for adapter in (None, ADAPTER):
        session.set_adapter(adapter)
        texts.append([g.text.strip() for g in generate(session, tokenizer, tokens, GenerationSettings(max_new_tokens=ANSWER_TOKENS))])
    rates = [sum(map(talks_like_a_pirate, each)) / len(each) for each in texts]
    timed = bench(lambda: session, prompt_tokens=64, new_tokens=24, repeats=5)
    base, steered = timed.measurements
    deltas = [rung.delta for rung in result.parity.rungs if rung.delta is not None]
    variant = Variant(
        name=name,
        folder=folder,
        size=sum(f.size for path, f in bundle.manifest.files.items() if path.startswith("model.onnx")),
        base_rate=rates[0],
        steered_rate=rates[1],
        delta_cosine=min(d.cosine for d in deltas),
        delta_norm=deltas[-1].norm_ratio,
        ttft_ms=base.ttft_min,
        decode_ms=base.decode_min,
        decode_ratio=steered.decode_ratio or 1.0,
        parity=result.parity,
    )
    return dict(zip(prompts, zip(*texts, strict=True), strict=True)), variant


def _shown(answers: dict[str, tuple[str, str]]) -> tuple[tuple[str, str, str], ...]:
    every = [(prompt, base, steered) for prompt, (base, steered) in answers.items()]
    return tuple(every[:: max(1, len(every) // SHOWN)][:SHOWN])


def _print(story: Story) -> None:
    """The answers, then three tables: parity, what quantization left of the steering, speed."""
    out.print("\n[bold]The same prompt, the same int4 bundle, with and without the adapter[/]")
    for prompt, base, steered in story.answers:
        out.print(f"\n[bold]{escape(prompt)}[/]\n  base     {escape(base)}\n  [cyan]steered[/]  {escape(steered)}")
    out.print()
    reports = (story.ladder, *(v.parity for v in story.variants[1:]))
    print_parity(ParityReport(rungs=tuple(rung for report in reports for rung in report.rungs)), title="parity, rung by rung", compact=True)
    out.print()
    print_table("what quantization left of the steering", *trimmed(story.quantization))
    out.print()
    print_table(
        f"steering: answers that talk like a pirate, {story.prompts} held-out prompts",
        ("bundle", "size", "base", "steered", "delta cos", "decode ms", "steered / base"),
        [
            (
                v.name,
                size(v.size),
                f"{v.base_rate:.0%}",
                f"{v.steered_rate:.0%}",
                f"{v.delta_cosine:.4f}",
                f"{v.decode_ms:.2f}",
                f"{v.decode_ratio:.2f}",
            )
            for v in story.variants
        ],
    )

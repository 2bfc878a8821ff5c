"""The quickstart: the project's whole story on the built-in base or a real model, with the same functions that the other verbs call."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
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
from reft_export.quickstart.subjects import Subject
from reft_export.training.trainer import StepRecord, train
from runtimes.artifacts.bundle import open_bundle
from runtimes.bench import bench
from runtimes.errors import ExportError, ParityError, ReftError
from runtimes.files.folders import atomic_folder, check_destination, marker
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.parity.figures import ParityReport
from runtimes.text.chat import ChatTemplate
from runtimes.text.tokenizer import Tokenizer

REFIT_STEPS, CALIBRATION_TOKENS = 20, 8
SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One bundle of the story: fp32, int8 or int4. Rates are shares of the held-out prompts; times in milliseconds."""

    name: str
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
    answered_by: str
    """The variant that answered: the smallest."""
    answers: tuple[tuple[str, str, str], ...]
    """(prompt, base's answer, steered answer)."""
    ladder: ParityReport
    variants: tuple[Variant, ...]
    quantization: QuantizationReport
    """Of every variant; where it was compared without calibration, with ranges of the base alone and of the steered model, and after a
    refit."""
    prompts: int
    says: str
    """What a steered answer does: "talks like a pirate"."""
    refused: Mapping[str, str]
    """Precisions that missed their budget, and how."""

    @property
    def parity(self) -> ParityReport:
        """Every rung, of every variant."""
        reports = (self.ladder, *(v.parity for v in self.variants[1:]))
        return ParityReport(rungs=tuple(rung for report in reports for rung in report.rungs))


def tell(output: Path, subject: Subject, *, force: bool) -> Story:
    """Trains, exports, folds, quantizes, runs and proves into ``output``; prints tables and writes report.html there.

    Raises InputError for an output that exists (without ``force``), ParityError for a missed budget, ReftError where the steering does
    not work.
    """
    from reft_export.quickstart.report import write_report

    folder = Path(output)
    check_destination(folder, force=force, inputs=[Path(subject.base)])
    with progress() as report, atomic_folder(folder, force=force) as work:
        try:
            told = _tell(subject, work, report)
        except ParityError as e:
            for figures in work.glob("*.parity.json"):  # they outlive what they refuse
                os.replace(figures, folder.with_name(f"{folder.name}.{figures.name}"))
            raise ParityError(str(e).replace(f"{work}/", f"{folder}."), e.report) from None
        told = replace(told, refused={name: why.replace(f"{work}/", f"{folder}/") for name, why in told.refused.items()})
        write_report(marker(work, "report.html"), told)
    _print(told)
    out.print(f"\nreport: {folder / 'report.html'}   ({told.seconds:.0f} s)", markup=False)
    out.print(f'try it: reft-export run {folder / told.variants[-1].name} -a {subject.name} -p "{subject.ask}"', markup=False)
    told.ladder.require()
    for v in told.variants:
        if v.base_rate >= subject.base_limit or v.steered_rate <= subject.steered_limit:
            raise ReftError(
                f"{v.name}: {v.base_rate:.0%} of the base's and {v.steered_rate:.0%} of the steered answers are as trained ("
                f"{subject.says}); expected below {subject.base_limit:.0%} and above {subject.steered_limit:.0%}"
            )
    return told


def _tell(subject: Subject, folder: Path, report: Progress) -> Story:
    started = time.monotonic()
    data = folder / f"{subject.name}.jsonl"
    data.write_text("".join(json.dumps(e) + "\n" for e in subject.examples()), encoding="utf-8")
    history = _train(subject, data, folder / subject.name, report)
    report("exporting, folding, holding against eager PyTorch")
    adapter, settings = folder / subject.name, ExportSettings()
    results = {"fp32": export_bundle(subject.base, [adapter], folder / "fp32", settings, force=True, report=report.update)}
    refused = _quantize(subject, folder, results, report)
    quantization = _quantization(subject, folder, data, report) if subject.compares else _side_by_side(results)
    ladder = results["fp32"].parity or ParityReport(rungs=())
    if subject.compares:
        report("the parity ladder, rung by rung")
        ladder = host_ladder(open_bundle(folder / "fp32"), subject.base, report=report.update)
    report("answering held-out prompts, base and steered; measuring speed")
    measured = [_measure(subject, name, folder / name, result) for name, result in results.items()]
    answers, last = measured[-1]
    return Story(
        seconds=time.monotonic() - started,
        history=history,
        answered_by=last.name,
        answers=_shown(answers),
        ladder=ladder,
        variants=tuple(variant for _, variant in measured),
        quantization=quantization,
        prompts=len(subject.prompts()),
        says=subject.says,
        refused=refused,
    )


def _train(subject: Subject, data: Path, adapter: Path, report: Progress) -> tuple[StepRecord, ...]:
    report(f"training a rank-{subject.settings.rank} LoReFT edit on {len(subject.examples())} examples")

    def on_step(step: int, total: int, loss: float, _: float | None) -> None:
        report.update(f"training, step {step}/{total}, loss {loss:.3f}", step, total)

    base = load_base(subject.base, require_tokenizer=True)
    return train(base, data, subject.settings, adapter, force=True, on_step=on_step).history


def _quantize(subject: Subject, folder: Path, results: dict[str, ExportResult], report: Progress) -> dict[str, str]:
    """int8 and int4 of the float bundle into ``results``; which of them missed their budget where the subject lets them, and how."""
    refused = {}
    for bits in (8, 4):
        name = f"int{bits}"
        report(f"quantizing to {name}")
        try:
            results[name] = quantize_bundle(
                folder / "fp32", subject.base, folder / name, QuantizationSettings(bits=bits), force=True, report=report.update
            )
        except ParityError as e:
            if name not in subject.may_be_refused:
                raise
            refused[name] = str(e)
    return refused


def _side_by_side(results: Mapping[str, ExportResult]) -> QuantizationReport:
    """What the quantized bundles' own reports say, in one table."""
    reports = [_report(result) for result in results.values() if result.manifest.quantization is not None]
    return replace(reports[0], variants=tuple(variant for each in reports for variant in each.variants))


def _quantization(subject: Subject, folder: Path, data: Path, report: Progress) -> QuantizationReport:
    """The int4 bundle's adapter refitted, and static int8 with both kinds of ranges; what is left of the steering in all of them."""
    prompts = folder / "held-out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in subject.prompts()[::2]), encoding="utf-8")
    task = load_task("reft_export.quickstart.task:check", prompts, max_new_tokens=subject.answer_tokens)
    yardsticks = Yardsticks(task=task)
    report("refitting the adapter on the int4 weights")
    refit = RefitSettings(data=data, sources=(folder / subject.name,), steps=REFIT_STEPS)
    refitted = swap_bundle(
        folder / "int4", subject.base, folder / "int4-refit", refit=refit, yardsticks=yardsticks, force=True, report=report.update
    )
    report("calibrating static int8, with the edits on")
    static = quantize_bundle(
        folder / "fp32",
        subject.base,
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
    told = replace(of_static, bundle="static", variants=(float_graph, *of_refitted.variants, *calibrated), refits=of_refitted.refits)
    write_reports(told, folder / "steering")
    return told


def _report(result: ExportResult) -> QuantizationReport:
    if result.report is None:
        raise ExportError("the quantization was asked for a comparison, and made none")
    return result.report


def _measure(subject: Subject, name: str, folder: Path, result: ExportResult) -> tuple[dict[str, tuple[str, str]], Variant]:
    """Answers to every held-out prompt, base and steered, and the variant's figures."""
    bundle = open_bundle(folder)
    session = OrtSession(bundle)
    tokenizer, template = Tokenizer.load(folder, bundle.manifest.model), ChatTemplate.load(folder)
    prompts = subject.prompts()
    if template is None or result.parity is None:
        raise ExportError(f"{folder} has no chat template, or was not held to parity; the story is of a chat model")
    rendered = [template.render([{"role": "user", "content": p}]) for p in prompts]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    texts, settings = [], GenerationSettings(max_new_tokens=subject.answer_tokens)
    for adapter in (None, subject.name):
        session.set_adapter(adapter)
        texts.append([g.text.strip() for g in generate(session, tokenizer, tokens, settings)])
    rates = [sum(map(subject.passes, each)) / len(each) for each in texts]
    timed = bench(lambda: session, prompt_tokens=64, new_tokens=24, repeats=5)
    base, steered = timed.measurements
    deltas = [rung.delta for rung in result.parity.rungs if rung.delta is not None]
    variant = Variant(
        name=name,
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
    out.print(f"\n[bold]The same prompt, the same {story.answered_by} bundle, with and without the adapter[/]")
    for prompt, base, steered in story.answers:
        out.print(f"\n[bold]{escape(prompt)}[/]\n  base     {escape(base)}\n  [cyan]steered[/]  {escape(steered)}")
    out.print()
    print_parity(story.parity, title="parity, rung by rung", compact=True)
    out.print()
    print_table("what quantization left of the steering", *trimmed(story.quantization))
    out.print()
    print_table(
        f"steering: answers of which each {story.says}, {story.prompts} held-out prompts",
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
    for name, why in story.refused.items():
        out.print(f"\n[yellow]no {name} bundle[/], since its gate refused it: {escape(why)}")

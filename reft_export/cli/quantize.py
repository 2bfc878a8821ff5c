"""``reft-export quantize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.export import show_result
from reft_export.cli.guard import guarded, parity_failed
from reft_export.cli.options import (
    AcceptBase,
    AcceptLoss,
    AccuracyLevel,
    AsJson,
    BlockSize,
    BudgetMB,
    CacheStore,
    Embeddings,
    Force,
    KeepHigh,
    Method,
    MinRetention,
    Model,
    Output,
    Symmetric,
    asks_auto,
    check_choice,
    embedding_bits,
    given,
    parse_patterns,
    refuse_given,
)
from reft_export.console import Progress, out, print_table, progress
from reft_export.parity.quality import MIN_RETENTION, QualityGate

if TYPE_CHECKING:
    from reft_export.bundling.result import ExportResult
    from reft_export.evaluation.quantization_report import Yardsticks
    from reft_export.quantizing.settings import CalibrationRequest

QUANTIZES = (
    "precision", "scheme", "method", "block_size", "symmetric", "accuracy_level", "keep_high", "budget_mb", "lm_head", "embeddings",
    "cache", "calibrate", "ranges", "mixture", "observer", "percentile", "decode_tokens", "compare",
)  # fmt: skip
"""Parameters that say how weights are quantized: nothing that a quantized bundle could follow."""
PROBES = "probes"
"""In place of a file: the probes that each adapter carries."""
BITS = {"int4": 4, "int8": 8, "fp8": 8}


def register(app: typer.Typer) -> None:
    app.command("quantize")(guarded(quantize))


def quantize(
    context: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(help="A float bundle. With --refit or -a also a quantized one, whose graph then stays as it is.")
    ],
    model: Model,
    output: Output,
    precision: Annotated[str | None, typer.Option("--precision", "-p", help="int4, int8 or fp8; default: the scheme's own.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help="onnxruntime: weight-only (blockwise; default), dynamic (int8, a scale per token), static (int8, calibrated). "
            "TensorRT: qdq-int4 (weights), qdq-int8, fp8 (weights and calibrated activations).",
        ),
    ] = None,
    method: Method = None,
    block_size: BlockSize = None,
    symmetric: Symmetric = None,
    accuracy_level: AccuracyLevel = None,
    keep_high: KeepHigh = None,
    budget_mb: BudgetMB = None,
    lm_head: Annotated[
        bool | None, typer.Option("--lm-head/--no-lm-head", help="Quantize the head; default: not where activations have fixed ranges.")
    ] = None,
    embeddings: Embeddings = None,
    cache: CacheStore = "float",
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", help="Prompts (JSONL, as for train) for activation ranges, edits on; default: the adapters' probes."),
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option("--ranges", help="In place of --calibrate: the OUTPUT.calibration of an earlier run of this bundle.")
    ] = None,
    mixture: Annotated[str, typer.Option("--mixture", help="How much base and adapters count: base=1,pirate=3; default: all alike.")] = "",
    observer: Annotated[str, typer.Option("--observer", help="minmax, percentile, entropy or mse.")] = "minmax",
    percentile: Annotated[float, typer.Option("--percentile", help="Of --observer percentile.")] = 99.99,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Greedy tokens after each calibration prompt.")] = 16,
    compare: Annotated[
        bool, typer.Option("--compare", help="With calibrated ranges: also measure what those of the base alone would have given.")
    ] = False,
    refit: Annotated[
        Path | None,
        typer.Option(
            "--refit",
            help="JSONL, as for train, or `probes`, each adapter's own: re-train those of -a for a few steps on the quantized weights.",
        ),
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Adapters to refit, or that may be where they lose too much; or to put into a quantized bundle.",
        ),
    ] = None,
    refit_steps: Annotated[int, typer.Option("--refit-steps", help="Optimizer steps of the refit.")] = 40,
    refit_lr: Annotated[float, typer.Option("--refit-lr", help="Learning rate of the refit.")] = 1e-3,
    refit_objective: Annotated[
        str,
        typer.Option("--refit-objective", help="teacher: what the float model says when the adapter steers it; data: the completions."),
    ] = "teacher",
    refit_output: Annotated[
        Path | None, typer.Option("--refit-output", help="Folder for the refitted adapters' folders; default: OUTPUT.adapters.")
    ] = None,
    perplexity: Annotated[Path | None, typer.Option("--perplexity", help="A text file whose perplexity the report has.")] = None,
    checker: Annotated[
        str | None,
        typer.Option(
            "--checker", help="module:function or file.py:function, (prompt, answer) -> bool or 0..1: the report has the success rate."
        ),
    ] = None,
    checker_data: Annotated[Path | None, typer.Option("--checker-data", help="Prompts for --checker: JSONL, as for train.")] = None,
    checker_tokens: Annotated[int, typer.Option("--checker-tokens", min=1, help="Tokens of an answer, at most.")] = 64,
    min_retention: MinRetention = MIN_RETENTION,
    accept_loss: AcceptLoss = False,
    accept_base: AcceptBase = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a bundle's base, the edits staying in the graph's float type; parity is proven on what is quantized.

    Writes OUTPUT.quantization.json and .png beside it: size, error per tensor, delta parity, perplexity, success.
    """
    from reft_export.quantizing.settings import RefitSettings
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.errors import InputError

    measured = calibrate is not None or (ranges is None and fixes_ranges(scheme, precision))
    refuse_idle(context, refit=refit, checker=checker, checker_data=checker_data, measured=measured, ranges=ranges, observer=observer)
    yardsticks = read_yardsticks(perplexity, checker, checker_data, checker_tokens)
    refitting = None
    if refit is not None:
        refitting = RefitSettings(
            data=None if str(refit) == PROBES else refit,
            sources=tuple(adapters or ()),
            steps=refit_steps,
            lr=refit_lr,
            objective=refit_objective,
            output=refit_output,
        )
    if (refit or adapters) and open_bundle(bundle).manifest.quantization is not None:
        from reft_export.quantizing.swap import swap_bundle

        if ignored := [f"--{name.replace('_', '-')}" for name in QUANTIZES if given(context, name)]:
            raise InputError(f"{bundle} is quantized already and keeps its graph, so {ignored[0]} would do nothing; leave it out")
        make = partial(swap_bundle, adapters=() if refitting else adapters or ())
    else:
        from calibration.settings import settings_for
        from reft_export.quantizing.quantize import quantize_bundle

        settings = settings_for(
            *scheme_and_bits(scheme, precision),
            method=method,
            block_size=block_size,
            symmetric=symmetric,
            accuracy_level=accuracy_level,
            keep_high=parse_patterns(keep_high),
            lm_head=lm_head,
            embeddings=embedding_bits(embeddings),
            cache=cache,
        )
        static = fixes_ranges(scheme, precision)
        request = calibration_request(calibrate, ranges, mixture, observer, percentile, decode_tokens, static=static)
        mixed = asks_auto(keep_high) or budget_mb is not None
        make = partial(quantize_bundle, settings=settings, calibration=request, compare=compare, mixed=mixed, budget_mb=budget_mb)
        if refitting is None:
            make = partial(make, adapters=adapters or ())
    quality = QualityGate(min_retention=min_retention, accept_loss=accept_loss)
    make = partial(make, refit=refitting, yardsticks=yardsticks, quality=quality, accept_base=accept_base, force=force)
    run_and_show(lambda report: make(bundle, model, output, report=report), output, as_json=as_json)


def run_and_show(make: Callable[[Progress], ExportResult], output: Path, *, as_json: bool) -> None:
    from reft_export.evaluation.quantization_report import write_reports
    from runtimes.errors import ParityError

    try:
        with progress() as report:
            result = make(report)
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    written = () if result.report is None else write_reports(result.report, output)
    show_result(output, result, as_json=as_json)
    if not as_json:
        show_report(result, written)


def refuse_idle(
    context: typer.Context,
    *,
    refit: Path | None,
    checker: str | None,
    checker_data: Path | None,
    measured: bool,
    ranges: Path | None,
    observer: str,
) -> None:
    """Raises InputError for an option that says how to do what was not asked for. ``measured``: whether activation ranges are."""
    if refit is None:
        refuse_given(context, ("refit_steps", "refit_lr", "refit_objective", "refit_output"), "of a --refit, which is not asked for")
    if checker is None and checker_data is None:
        refuse_given(context, ("checker_tokens",), "of a --checker, which is not given")
    if not measured:
        refuse_given(context, ("decode_tokens",), "of --calibrate, which is not given")
    if not measured and ranges is None:
        refuse_given(context, ("observer", "percentile"), "of --calibrate or --ranges, and neither is given")
    if observer != "percentile":
        refuse_given(context, ("percentile",), "of --observer percentile, which is not asked for")


def show_report(result: ExportResult, written: Sequence[Path]) -> None:
    """The table of variants, what the refit did, and where the files are."""
    from reft_export.evaluation.quantization_report import trimmed

    if result.report is None:
        return
    print_table("what quantization left of the steering", *trimmed(result.report))
    for r in result.report.refits:
        done = f"{r.before:.4f} to {r.after:.4f} nats" if not r.kept else f"{r.before:.4f} nats, and {r.after:.4f} after: kept as it was"
        out.print(f"refit of {r.adapter}: {r.steps} steps, loss ({r.objective}) {done}", markup=False)
    for name, folder in result.refitted.items():
        out.print(f"adapter {name}: {folder}", markup=False)
    out.print(f"report: {', '.join(map(str, written))}", markup=False)


def read_yardsticks(perplexity: Path | None, checker: str | None, prompts: Path | None, tokens: int) -> Yardsticks:
    """What the report measures; raises InputError for a text, a checker or prompts that cannot be used."""
    from reft_export.evaluation.checker import load_task
    from reft_export.evaluation.quantization_report import Yardsticks, read_text
    from runtimes.errors import InputError

    task = None
    if checker is not None and prompts is not None:
        task = load_task(checker, prompts, max_new_tokens=tokens)
    elif checker is not None or prompts is not None:
        raise InputError("--checker and --checker-data go together: the function that judges answers, and the prompts to answer")
    return Yardsticks(text=None if perplexity is None else read_text(perplexity), task=task)


def calibration_request(
    data: Path | None, ranges: Path | None, mixture: str, observer: str, percentile: float, decode_tokens: int, *, static: bool = False
) -> CalibrationRequest | None:
    """None where nothing asks for activation ranges; raises InputError or CalibrationError for options that do not go together."""
    from calibration.observers import Observer
    from reft_export.quantizing.settings import CalibrationRequest
    from runtimes.errors import InputError

    if data is None and ranges is None and not static:
        if mixture:
            raise InputError("--mixture says what --calibrate runs; pass --calibrate or --ranges with it")
        return None
    return CalibrationRequest(
        data=data,
        ranges=ranges,
        mixture=parse_mixture(mixture),
        observer=Observer(name=observer, percentile=percentile),
        decode_tokens=decode_tokens,
    )


def scheme_and_bits(scheme: str | None, precision: str | None) -> tuple[str, int | None]:
    """What -p and --scheme ask for together; either may be left out. Raises InputError where they contradict each other."""
    from runtimes.errors import InputError

    check_choice("--precision", precision, tuple(BITS))
    if scheme is None:
        scheme = "fp8" if precision == "fp8" else "weight-only"
    if precision is not None and (precision == "fp8") != (scheme == "fp8"):
        raise InputError(f"-p {precision} and --scheme {scheme} contradict each other; leave one of them out")
    return scheme, None if precision is None else BITS[precision]


def fixes_ranges(scheme: str | None, precision: str | None) -> bool:
    """Whether activation ranges are measured before anything is quantized."""
    from calibration.settings import SCHEMES

    asked = scheme_and_bits(scheme, precision)[0]
    return any(name == asked and kind.activations == "static" for name, kind in SCHEMES.items())


def parse_mixture(text: str) -> dict[str, float]:
    """``base=1,pirate=3``; raises InputError."""
    from runtimes.errors import InputError

    mixture: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, share = part.partition("=")
        try:
            if not equals or name in mixture:
                raise ValueError
            mixture[name] = float(share)
        except ValueError:
            raise InputError(f"--mixture {text!r}: {part!r} is not understood; write base=1,NAME=1, each name once") from None
    return mixture

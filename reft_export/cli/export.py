"""``reft-export export``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reft_export.cli.guard import guarded, parity_failed
from reft_export.cli.hub_adapters import here
from reft_export.cli.options import (
    AcceptBase,
    AcceptLoss,
    AccuracyLevel,
    Adapters,
    AsJson,
    BlockSize,
    BudgetMB,
    CacheStore,
    DryRun,
    Embeddings,
    Force,
    KeepHigh,
    Method,
    MinRetention,
    Model,
    Output,
    Sites,
    Symmetric,
    asks_auto,
    check_choice,
    embedding_bits,
    parse_patterns,
    parse_sites,
    refuse_given,
)
from reft_export.console import escape, out, print_json, print_parity, progress
from reft_export.parity.quality import MIN_RETENTION, QualityGate

QUANTIZED = (
    "block_size", "accuracy_level", "method", "symmetric", "keep_high", "budget_mb", "embeddings", "cache", "min_retention", "accept_loss",
)  # fmt: skip
"""Parameters of -p int8 and int4."""
GRAPHS = ("precision", "exporter", "target", "logits", "sites", "opset", *QUANTIZED)
"""Parameters that mean nothing for an adapter alone."""

if TYPE_CHECKING:
    from reft_export.forecast import Forecast


def register(app: typer.Typer) -> None:
    app.command("export")(guarded(export))


def export(
    context: typer.Context,
    model: Model,
    output: Output,
    adapters: Adapters = None,
    precision: Annotated[str, typer.Option("--precision", "-p", help="fp32, fp16, bf16, or weight-only int8, int4.")] = "fp32",
    exporter: Annotated[
        str,
        typer.Option(
            "--exporter",
            help="dynamo; builder: onnxruntime-genai's, faster to decode; transformers: its own, for mixtures of experts "
            "(transformers 5); optimum: optimum-onnx's (transformers 4.57).",
        ),
    ] = "dynamo",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="onnxruntime: fused attention over a KV cache that can be written in place, where the family allows it; "
            "tensorrt: ONNX's own operators, which `build` takes.",
        ),
    ] = "onnxruntime",
    logits: Annotated[str, typer.Option("--logits", help="all tokens, or the last one only (a shorter prefill).")] = "all",
    sites: Sites = "",
    opset: Annotated[int, typer.Option("--opset", help="20 runs on onnxruntime 1.18 and later, and parses in TensorRT.")] = 20,
    block_size: BlockSize = None,
    accuracy_level: AccuracyLevel = None,
    method: Method = None,
    symmetric: Symmetric = None,
    keep_high: KeepHigh = None,
    budget_mb: BudgetMB = None,
    embeddings: Embeddings = None,
    cache: CacheStore = "float",
    min_retention: MinRetention = MIN_RETENTION,
    accept_loss: AcceptLoss = False,
    format: Annotated[
        str, typer.Option("--format", help="bundle: an ONNX bundle; pyreft: the adapter alone, as pyreft saves and loads it.")
    ] = "bundle",
    accept_base: AcceptBase = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn a base and its adapters into a bundle: exported, folded, quantized where asked, and held against eager PyTorch."""
    from reft_export.exporting.export import export_bundle
    from reft_export.exporting.settings import ExportSettings
    from runtimes.errors import ParityError

    check_choice("--format", format, ("bundle", "pyreft"))
    adapters = here(adapters)
    if format == "pyreft":
        refuse_given(context, GRAPHS, "a graph's, and --format pyreft writes an adapter alone")
        export_adapter(model, adapters, output, accept_base=accept_base, force=force, dry_run=dry_run, as_json=as_json)
        return
    if precision not in ("int8", "int4"):
        refuse_given(context, QUANTIZED, "of quantized weights: -p int8 or int4, which is not asked for")
    settings = ExportSettings(
        precision=precision,
        exporter=exporter,
        logits=logits,
        sites=parse_sites(sites),
        opset=opset,
        block_size=block_size,
        accuracy_level=accuracy_level,
        method=method,
        symmetric=symmetric,
        keep_high=parse_patterns(keep_high),
        embeddings=embedding_bits(embeddings),
        cache=cache,
        mixed=asks_auto(keep_high) or budget_mb is not None,
        budget_mb=budget_mb,
        target=checked_target(target),
    )
    quality = QualityGate(min_retention=min_retention, accept_loss=accept_loss)
    if dry_run:
        from reft_export.exporting.plan import plan_export
        from reft_export.forecast import forecast_export, refuse_download

        refuse_download(model)
        plan = plan_export(model, adapters, output, settings, accept_base=accept_base, force=force)
        if not plan.settled:
            from reft_export.exporting.assemble import check_model

            plan = check_model(plan, settings, accept_base=accept_base)
        show_forecast(forecast_export(plan, settings), as_json=as_json)
        return
    try:
        with progress() as report:
            result = export_bundle(model, adapters, output, settings, quality=quality, accept_base=accept_base, force=force, report=report)
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    show_result(output, result, as_json=as_json)


def checked_target(target: str) -> Literal["onnxruntime", "tensorrt"]:
    """Raises InputError for a target that is none."""
    check_choice("--target", target, ("onnxruntime", "tensorrt"))
    return "tensorrt" if target == "tensorrt" else "onnxruntime"


def export_adapter(model: str, adapters: list[Path], output: Path, *, accept_base: bool, force: bool, dry_run: bool, as_json: bool) -> None:
    """``--format pyreft``: one adapter, converted; there is no graph, so the options of graphs mean nothing."""
    from reft_export.base.adapters import folders_of
    from reft_export.importing.pyreft.write import export_to_pyreft
    from runtimes.errors import InputError

    if len(adapters) != 1 or dry_run:
        raise InputError(f"--format pyreft converts one adapter (-a), without --dry-run; {len(adapters)} are given")
    with progress() as report:
        result = export_to_pyreft(model, folders_of(adapters)[0], output, accept_base=accept_base, force=force, report=report)
    if as_json:
        print_json(
            {"adapter": str(output), "class": ", ".join(result.kinds), "interventions": result.interventions, "notes": list(result.notes)}
        )
        return
    for note in result.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    out.print(escape(f"{output}: {result.interventions} interventions, pyreft's {' and '.join(result.kinds)}"))


def show_result(output: Path, result, *, as_json: bool) -> None:
    """The bundle's size, its weight errors and its parity table; or all of it as JSON."""
    import json

    from reft_export.console import size
    from runtimes.files.records import to_json

    manifest = result.manifest
    total = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    if as_json:
        print_json(
            {
                "bundle": str(output),
                "bytes": total,
                "adapters": list(manifest.adapters),
                "weights": to_json(result.weight_errors),
                "parity": None if result.parity is None else json.loads(result.parity.to_json()),
                "note": result.note,
                "report": None if result.report is None else json.loads(result.report.to_json()),
            }
        )
        return
    if result.parity is not None:
        print_parity(result.parity, title="parity against eager PyTorch")
    for name, folder in result.refitted.items():
        out.print(f"{name} was trained on the quantized weights, and is in the bundle so: {folder}", markup=False)
    if result.weight_errors:
        before, after = (sum(getattr(w, f) for w in result.weight_errors) for f in ("bytes_before", "bytes_after"))
        worst = max(result.weight_errors, key=lambda w: w.relative)
        out.print(
            f"{len(result.weight_errors)} weights: {size(before)} to {size(after)}; "
            f"largest relative error {worst.relative:.3f} ({worst.name})",
            markup=False,
        )
    if result.note:
        out.print(result.note, markup=False)
    if not (output / "tokenizer.json").is_file():
        out.print("[yellow]the base has no fast tokenizer[/]: `reft-export run` needs tokenizer.json, in the base before it is exported")
    if manifest.genai != "supported":
        out.print(f"no genai_config.json: {manifest.genai}", markup=False)
    names = ", ".join(manifest.adapters) or "none"
    out.print(f"{output}: {size(total)}, {len(manifest.nodes)} edit nodes, adapters: {names}", markup=False)


def show_forecast(forecast: Forecast, *, as_json: bool, data: Any = None) -> None:
    """``data``: what JSON says of the data that is trained on."""
    from reft_export.console import cache_size, duration, size

    free = shutil.disk_usage(Path.cwd()).free
    if as_json:
        sizes = {"parameters": forecast.parameters, "memory": forecast.memory, "disk": forecast.disk, "seconds": forecast.seconds}
        print_json(
            {"steps": list(forecast.steps), **sizes, "kv_cache_token": forecast.token, "context": forecast.context}
            | ({} if data is None else {"data": data})
        )
        return
    for number, step in enumerate(forecast.steps, 1):
        out.print(f"{number}. {step}", markup=False)
    out.print(
        f"{forecast.parameters / 1e6:.1f} M parameters; about {size(forecast.memory)} memory, "
        f"{size(forecast.disk)} disk ({size(free)} free)"
    )
    if forecast.seconds is not None:
        out.print(f"about {duration(forecast.seconds)} of steps, on this machine as busy as it is now")
    if forecast.token is not None and forecast.context is not None:
        out.print(f"KV cache of a row: {cache_size(forecast.token, forecast.context)}")

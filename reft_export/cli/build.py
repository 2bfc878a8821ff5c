"""``reft-export build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, DryRun, Force, Output
from reft_export.console import escape, out, print_json, progress, size

if TYPE_CHECKING:
    from reft_export.building.build import BuildOutcome
    from reft_export.building.plan import BuildPlan


def register(app: typer.Typer) -> None:
    app.command("build")(guarded(build))


def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle: float, or quantized by one of the schemes qdq-int4, qdq-int8, fp8.")],
    output: Output,
    target: Annotated[str, typer.Option("--target", help="tensorrt: for the GPU here; tensorrt-rtx: anywhere, for a list of GPUs.")],
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            help="A GPU's compute capability, like 86; repeat for several. Default: the GPU here, else 86, 89 and 120 (tensorrt-rtx).",
        ),
    ] = None,
    freeze: Annotated[
        str | None, typer.Option("--freeze", help="An adapter that becomes part of the engine for good, or base. Default: adapters swap.")
    ] = None,
    plugin: Annotated[Path | None, typer.Option("--plugin", help="The plugin library. Default: the one that doctor shows.")] = None,
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Expand the edit into TensorRT's own layers.")] = False,
    max_batch: Annotated[int | None, typer.Option("--max-batch", min=1, help="Rows per call. Default: 4.")] = None,
    max_sequence: Annotated[
        int | None, typer.Option("--max-sequence", min=1, help="Columns of a prompt per call. Default: the context, at most 1024.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Columns of past and current tokens. Default: the model's, at most 4096.")
    ] = None,
    max_slots: Annotated[int | None, typer.Option("--max-slots", min=1, help="Slots of a bank. Default: 64.")] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="Rank of a bank. Default: 64; 8 without the plugin.")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option("--timing-cache", help="A file with kernel timings, read and written: later builds take less time.")
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option("--workspace", min=1, help="MiB of scratch memory that a layer may take. Default: all that the GPU has."),
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory and be streamed, for a GPU that cannot hold them.")
    ] = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Build a TensorRT engine of a bundle; its adapters still swap, by binding other banks."""
    from reft_export.building.settings import BuildSettings, parse_compute_capability
    from runtimes.files.folders import check_destination

    settings = BuildSettings(
        target=target,
        compute_capabilities=tuple(map(parse_compute_capability, sm or ())),
        freeze=freeze,
        plugin=plugin,
        use_plugin=not no_plugin,
        max_batch=max_batch,
        max_sequence=max_sequence,
        context=context,
        max_slots=max_slots,
        max_rank=max_rank,
        weight_streaming=weight_streaming,
        timing_cache=timing_cache,
        workspace=workspace,
    )
    if dry_run:
        from reft_export.building.plan import plan_build

        check_destination(output, force=force, inputs=[bundle])
        _show_plan(plan_build(bundle, settings), as_json=as_json)
        return

    from reft_export.building.build import build_engine

    with progress() as report:
        # trtexec says hundreds of lines: a log gets the one that is current, now and then.
        outcome = build_engine(
            bundle, output, settings, force=force, report=report, update=lambda text: report.update(text, done=0, total=1)
        )
    _show_engine(outcome, output, as_json=as_json)


def _show_plan(plan: BuildPlan, *, as_json: bool) -> None:
    if as_json:
        print_json({"steps": list(plan.steps), "notes": list(plan.notes), "memory": plan.memory, "disk": plan.disk})
        return
    for number, step in enumerate(plan.steps, 1):
        out.print(f"{number}. {escape(step)}")
    _show_notes(plan.notes)
    out.print(f"about {size(plan.memory)} memory, {size(plan.disk)} disk")


def _show_engine(outcome: BuildOutcome, output: Path, *, as_json: bool) -> None:
    engine = outcome.engine
    if as_json:
        print_json(
            {
                "engine": str(output),
                "bytes": outcome.size,
                "target": engine.target,
                "tensorrt_version": engine.tensorrt_version,
                "compute_capabilities": list(engine.compute_capabilities),
                "plugin": None if engine.plugin is None else engine.plugin.file,
                "frozen": engine.frozen,
                "seconds": outcome.result.seconds,
                "peak_memory": outcome.result.peak_memory,
                "notes": list(outcome.notes),
            }
        )
        return
    _show_notes(outcome.notes)
    out.print(
        f"{escape(str(output))}: {size(outcome.size)}, {engine.target} {engine.tensorrt_version}, compute capability "
        f"{', '.join(engine.compute_capabilities)}; built in {outcome.result.seconds:.1f} s with {size(outcome.result.peak_memory)} at most"
    )


def _show_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        out.print(f"[yellow]{escape(note)}[/]")

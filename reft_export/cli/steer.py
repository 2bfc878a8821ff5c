"""``reft-export steer``: from a contrast, or from a rotation and a source."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.groups import grouped
from reft_export.cli.guard import guarded
from reft_export.cli.options import AcceptBase, AsJson, DryRun, Force, Model, Output, flag_of, given, refuse_given
from reft_export.cli.placement import Device, Dtype, load_placed
from reft_export.console import escape, out, print_json, print_table, progress

if TYPE_CHECKING:
    from reft_export.contrasting.settings import SteerSettings
    from reft_export.contrasting.steer import SteerResult


def register(app: typer.Typer) -> None:
    app.command("steer")(guarded(grouped(steer)))


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What is made of the contrast."""

    method: Annotated[
        str, typer.Option("--method", help="add: the difference of the means is added; ablate: its direction is taken out.")
    ] = "add"
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="What is edited: all, 8-16, 3;9;18. Default of add: the earliest layer whose direction tells held-out lines apart best; "
            "of ablate: all.",
            show_default=False,
        ),
    ] = None
    streams: Annotated[str, typer.Option("--stream", help="block_output, block_input, attention_output, mlp_output; several with ;.")] = (
        "block_output"
    )
    from_layer: Annotated[
        int | None,
        typer.Option("--from-layer", help="Of ablate: the layer whose direction is taken out; default: chosen as for add."),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            help="Of add: times the difference of the means; negative: the other way. Default: chosen by measurement.",
            show_default=False,
        ),
    ] = None
    positions: Annotated[
        str, typer.Option("--positions", help="f7+l7: first 7 and last 7 prompt tokens; f3; l1; prompt: all of it; all: decode too.")
    ] = "all"


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What is read of the lines, and shown of them."""

    read: Annotated[
        str,
        typer.Option(
            "--read",
            help="Of a completion, else of the prompt or text: last token, mean over its tokens, or a number: 2 is the token before the "
            "last. auto: mean over completions and texts, last where there are prompts alone.",
        ),
    ] = "auto"
    chat_template: Annotated[str, typer.Option("--chat-template", help="For prompts: auto, always, never. Texts go without.")] = "auto"
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per line; default: the base's context.")] = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Lines a batch.")] = 8
    samples: Annotated[int, typer.Option("--samples", help="Prompts answered before and after.")] = 3
    probes: Annotated[
        int, typer.Option("--probes", help="Lines with a completion that the adapter carries, to be measured on. 0 to 32.")
    ] = 32


@dataclass(frozen=True, kw_only=True)
class Interchanged:
    """In place of a contrast."""

    rotation: Annotated[
        Path | None,
        typer.Option("--rotation", help="An adapter that train --objective interchange wrote; with --source, in place of a contrast."),
    ] = None
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="A prompt: the adapter sets what the rotation reads to what it reads at this prompt's edited tokens."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The base's."""

    dtype: Dtype = "auto"
    device: Device = "auto"
    base_bundle: Annotated[
        Path | None, typer.Option("--base", help="A quantized bundle of the base: measure on the exact weights that it ships.")
    ] = None
    accept_base: AcceptBase = False


def steer(
    context: typer.Context,
    model: Model,
    output: Output,
    direction: Direction,
    lines: Lines,
    interchanged: Interchanged,
    placement: Placement,
    positive: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL of the side to steer to: prompt and completion, messages, prompt, or text. Alone, every line holds both sides: "
            "positive and negative, or prompt, positive and negative."
        ),
    ] = None,
    negative: Annotated[Path | None, typer.Argument(help="JSONL of the side to steer away from, of any number of lines.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter from two sides of a contrast without training: the difference of their means, or its direction taken out.

    With --rotation and --source: one that sets a variable, whose rotation was trained, to its value in a source.
    """
    from reft_export.contrasting.settings import SteerSettings
    from reft_export.training.settings import TrainSettings
    from reft_export.training.sources import check_source
    from runtimes.artifacts.adapter_record import check_adapter_name
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.errors import InputError
    from runtimes.files.folders import check_destination, claimed

    if interchanged.rotation is not None or interchanged.source is not None:
        _steer_by_source(context, model, output, interchanged, placement, force=force, dry_run=dry_run, as_json=as_json)
        return
    if positive is None:
        raise InputError("steer needs the JSONL of the side to steer to; or --rotation with --source")
    settings = SteerSettings(**vars(direction), **vars(lines))
    placed = TrainSettings(dtype=placement.dtype, device=placement.device)
    if placement.base_bundle is not None and placed.dtype not in ("auto", "float32"):
        raise InputError(f"--base reads the bundle's weights to the bit, which --dtype {placed.dtype} would round; leave --dtype out")
    if dry_run:
        from reft_export.forecast import refuse_download

        refuse_download(model)
    check_adapter_name(output.resolve().name)
    files = [positive, *filter(None, (negative,))]
    inputs = [Path(model), *files, *filter(None, (placement.base_bundle,))]
    check_destination(output, force=force, inputs=inputs)
    for path in files:
        check_source(path)
    bundle = None if placement.base_bundle is None else open_bundle(placement.base_bundle)
    with nullcontext() if dry_run else claimed(output, force=force, inputs=inputs), progress() as report:
        base, trained_on = load_placed(model, bundle, placed, report, weights=not dry_run, accept_base=placement.accept_base)
        from reft_export.contrasting.steer import plan_steering, steer_adapter

        if dry_run:
            from reft_export.cli.export import show_forecast
            from reft_export.forecast import forecast_steering

            plan = plan_steering(base, positive, negative, output, settings, force=force)
            show_forecast(forecast_steering(model, base, plan), as_json=as_json)
            return
        result = steer_adapter(base, positive, negative, output, settings, trained_on=trained_on, force=force, report=report)
    _print_json(output, result) if as_json else _print(output, settings, result)


def _steer_by_source(
    context: typer.Context,
    model: str,
    output: Path,
    interchanged: Interchanged,
    placement: Placement,
    *,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """From a rotation and a source; writes an adapter like any other."""
    from reft_export.base.adapters import check_fit
    from reft_export.training.settings import TrainSettings
    from runtimes.artifacts.adapter_record import check_adapter_name
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.edits.adapter import load_adapter, save_adapter
    from runtimes.edits.form import described
    from runtimes.errors import InputError
    from runtimes.files.folders import check_destination, claimed, name_of

    rotation, source = interchanged.rotation, interchanged.source
    if rotation is None or source is None:
        raise InputError("--rotation and --source go together: what is set, and to what; give both")
    others = ("positive", "negative", *(field.name for group in (Direction, Lines) for field in fields(group)))
    if beside := [name for name in others if given(context, name)]:
        called = beside[0] if beside[0] in ("positive", "negative") else flag_of(context, beside[0])
        raise InputError(f"{called} is of a contrast, which --rotation is in place of; leave one of the two out")
    if dry_run:
        refuse_given(context, ("dry_run",), "of a contrast, and --rotation takes one forward of the source")
    placed = TrainSettings(dtype=placement.dtype, device=placement.device)
    check_adapter_name(output.resolve().name)
    inputs = [Path(model), rotation, *filter(None, (placement.base_bundle,))]
    check_destination(output, force=force, inputs=inputs)
    trained = load_adapter(rotation)
    bundle = None if placement.base_bundle is None else open_bundle(placement.base_bundle)
    with claimed(output, force=force, inputs=inputs), progress() as report:
        base, trained_on = load_placed(model, bundle, placed, report, weights=True, accept_base=placement.accept_base)
        check_fit(name_of(rotation), trained, base, accept_base=placement.accept_base)
        if trained_on != trained.trained_on:
            theirs = "the base itself" if trained.trained_on is None else f"the weights of a bundle ({trained.trained_on[:12]})"
            raise InputError(f"{rotation} was trained on {theirs}, where its source has to be read, too; give --base as train had it")
        from reft_export.training.interchange import adapter_of_source

        report("reading the source")
        made = adapter_of_source(base, trained, source)
        save_adapter(made, output, force=force)
    sites, positions = [str(site) for site in made.sites], str(made.where)
    if as_json:
        print_json({"adapter": str(output), "rotation": trained.digest, "source": source, "sites": sites, "positions": positions})
        return
    form = f"{described(made.site_forms)}, {', '.join(sites)}, positions {positions}"
    out.print(f"{output}: {form}; what {rotation} reads is set to its value in {source!r}", markup=False)


def _print_json(output: Path, result: SteerResult) -> None:
    from reft_export.contrasting.steer import figures_of
    from runtimes.files.records import to_json

    shown: dict[str, Any] = {
        "adapter": str(output),
        "method": result.adapter.training["settings"]["method"],
        "layer": result.layer,
        "read": result.read,
        "strength": result.strength,
        "edited": [str(site) for site in result.adapter.sites],
        "sites": [figures_of(each) for each in result.separations],
        "strengths": to_json(result.strengths),
        "samples_before": to_json(result.samples_before),
        "samples": to_json(result.samples_after),
    }
    print_json(shown)


def _print(output: Path, settings: SteerSettings, result: SteerResult) -> None:
    """Which layers carry the contrast, what strengths do, the answers before and after."""
    print_table(
        "",
        ("site", "accuracy", "margin", "|difference|", "residual", "share", ""),
        [_site_row(each, result) for each in result.separations],
    )
    header = ("strength", "positive", "negative", "base's answers", "")
    print_table("nats a token", header, [_strength_row(each, settings, result) for each in result.strengths])
    for before, after in zip(result.samples_before, result.samples_after, strict=True):
        out.print(f"[bold]{escape(before.prompt)}[/]\n  [dim]before:[/] {escape(before.text)}\n  [dim]after: [/] {escape(after.text)}")
    a = result.adapter
    sites = ", ".join(map(str, a.sites)) if len(a.sites) <= 4 else f"{len(a.sites)} sites"
    what = f"at strength {result.strength:g}" if settings.method == "add" else f"the direction of layer {result.layer}"
    out.print(f"{output}: {settings.method}, {what}, read {result.read}, {sites}, positions {a.positions}", markup=False)


def _site_row(each: Any, result: SteerResult) -> tuple[str, ...]:
    chosen = "chosen" if each.site.layer == result.layer else ""
    return (
        str(each.site),
        f"{each.accuracy:.3f}",
        f"{each.margin:.2f}",
        f"{each.norm:.3g}",
        f"{each.residual_norm:.3g}",
        f"{each.share:.3f}",
        chosen,
    )


def _strength_row(each: Any, settings: SteerSettings, result: SteerResult) -> tuple[str, ...]:
    name = "base" if not each.strength else f"{each.strength:g}" if settings.method == "add" else "ablated"
    figures = ("" if value is None else f"{value:.3f}" for value in (each.positive, each.negative, each.own))
    return name, *figures, "chosen" if result.strength is not None and each.strength == result.strength else ""

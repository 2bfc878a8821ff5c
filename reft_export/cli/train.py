"""``reft-export train``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.groups import grouped
from reft_export.cli.guard import guarded
from reft_export.cli.options import AcceptBase, AsJson, DryRun, Force, Model, Output, given, refuse_given
from reft_export.console import Progress, escape, out, print_json, progress
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.training.settings import TrainSettings
    from reft_export.training.trainer import TrainResult
    from runtimes.artifacts.bundle import Bundle
    from runtimes.edits.adapter import Adapter

OTHERS = {
    TEXT_CLASSIFICATION: (("chat_template", "format", "train_on", "samples"), "a decoder's, and {} is a classifier"),
    TEXT_GENERATION: (("head",), "a classifier's, and {} is a decoder"),
}
"""By the base's task: parameters that mean nothing for it, and why."""


def register(app: typer.Typer) -> None:
    app.command("train")(guarded(grouped(train)))


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an adapter is. With --start it is the started one's."""

    method: Annotated[str, typer.Option("--method", help="loreft, noreft, direft, consreft, lobireft; red: scale and bias.")] = "loreft"
    rank: Annotated[int, typer.Option("--rank", help="Rank of the edit; red has none.")] = 4
    layers: Annotated[str, typer.Option("--layers", help="all, 8-16, 3;9;18.")] = "all"
    streams: Annotated[str, typer.Option("--stream", help="block_output, block_input, attention_output, mlp_output; several with ;.")] = (
        "block_output"
    )
    positions: Annotated[
        str, typer.Option("--positions", help="f7+l7: first 7 and last 7 prompt tokens; f3; l1; prompt: all of it; all: decode too.")
    ] = "f7+l7"
    tied: Annotated[bool, typer.Option("--tied/--untied", help="One edit for prefix and suffix positions, or one each.")] = True
    activation: Annotated[str, typer.Option("--activation", help="relu, gelu, gelu_tanh, silu, tanh, sigmoid; default none.")] = ""
    dropout: Annotated[float, typer.Option("--dropout", help="On the edit, while training.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How its parameters move."""

    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 9e-4
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine or constant, after the warm-up.")] = "linear"
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps over which the rate rises.")] = 0.1
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 6
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps, in place of epochs.")] = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a batch.")] = 8
    gradient_accumulation: Annotated[int, typer.Option("--gradient-accumulation", help="Batches an optimizer step.")] = 1
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's; R stays orthonormal whatever it is.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is made of the data."""

    eval_fraction: Annotated[float, typer.Option("--eval-fraction", help="Share of the examples held out.")] = 0.0
    keep: Annotated[
        str, typer.Option("--keep", help="The adapter that is saved: best, by the held-out loss where there is one; or last.")
    ] = "best"
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per example; default: the base's context.")] = None
    chat_template: Annotated[str, typer.Option("--chat-template", help="For prompt/completion lines: auto, always, never.")] = "auto"
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Of a decoder's lines: prompt-completion, messages, text, alpaca, sharegpt; auto: by their keys. A form that is named "
            "leaves other keys unread.",
        ),
    ] = "auto"
    train_on: Annotated[str, typer.Option("--train-on", help="Of a conversation's answers: last, or all.")] = "last"
    samples: Annotated[int, typer.Option("--samples", help="Prompts answered before and after.")] = 3
    probes: Annotated[
        int, typer.Option("--probes", help="Lines that the adapter carries, to be measured on: held-out ones, if any. 0 to 32.")
    ] = 32


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run itself."""

    seed: Annotated[int, typer.Option("--seed")] = 42
    dtype: Annotated[str, typer.Option("--dtype", help="The base's: auto (bfloat16 on a GPU), float32, bfloat16, float16.")] = "auto"
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")] = "auto"
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")] = False


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the run starts from, beside base and data."""

    base_bundle: Annotated[
        Path | None, typer.Option("--base", help="A quantized bundle of the base: train on the exact weights that it ships.")
    ] = None
    start: Annotated[
        Path | None, typer.Option("--start", help="An adapter folder to go on from; the form of the edit is that adapter's.")
    ] = None
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Of a classifier: train its head with the edit, as the paper does. Default: --head."),
    ] = None
    orthogonal_to: Annotated[
        list[Path] | None,
        typer.Option(
            "--orthogonal-to",
            help="An adapter folder that the new adapter shall not interfere with: it writes nothing that this one writes or reads, and "
            "reads nothing that it writes. Repeat for several; NAME=FOLDER names one.",
        ),
    ] = None
    accept_base: AcceptBase = False


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            help="A JSONL or Parquet file, or a data set's folder: prompt and completion, messages, text, or --format's others; of a "
            "classifier text, label, and for a pair text_pair. Repeat for several, which are joined in their order.",
        ),
    ],
    output: Output,
    form: Form,
    optimization: Optimization,
    reading: Reading,
    run: Run,
    sources: Sources,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a ReFT intervention on a frozen base in eager PyTorch; writes an adapter folder.

    On a classifier, the paper's GLUE setting is --rank 1 --positions f1 --lr 6e-4 --batch-size 32 --max-length 256.
    """
    from reft_export.base.adapters import folders_of, load_adapters
    from reft_export.training.settings import TrainSettings
    from reft_export.training.sources import check_source
    from runtimes.artifacts.bundle import check_adapter_name, open_bundle
    from runtimes.edits.adapter import load_adapter
    from runtimes.files.folders import check_destination, claimed

    settings = TrainSettings(**vars(form), **vars(optimization), **vars(reading), **vars(run))
    started = None if sources.start is None else load_adapter(sources.start)
    if started is not None:
        settings = _of_form(started, settings, context)
    others = load_adapters(sources.orthogonal_to or [])
    _refuse_contradictions(context, settings, sources)
    if dry_run:
        from reft_export.forecast import refuse_download

        refuse_download(model)
    check_adapter_name(output.resolve().name)
    inputs = [Path(model), *data, *filter(None, (sources.base_bundle, sources.start)), *folders_of(sources.orthogonal_to or [])]
    check_destination(output, force=force, inputs=inputs)
    for path in data:
        check_source(path)
    bundle = None if sources.base_bundle is None else open_bundle(sources.base_bundle)
    with nullcontext() if dry_run else claimed(output, force=force, inputs=inputs), progress() as report:
        from reft_export.base.gguf import described

        report(f"loading {described(model)}")
        if bundle is not None and sources.accept_base:
            from reft_export.parity.ladder import made_from

            bundle = made_from(bundle, model)
        base = _load(model, bundle, settings, weights=not dry_run)
        _check_base(context, base, started, others, sources)
        trained_on = None if bundle is None else bundle.digest
        if dry_run:
            from reft_export.cli.export import show_forecast
            from reft_export.forecast import forecast_training
            from reft_export.training.objective import Origin
            from reft_export.training.trainer import prepare

            origin = Origin(start=started, trained_on=trained_on, head=sources.head, orthogonal_to=others)
            ready = prepare(base, data, settings, output, origin, force=force)
            show_forecast(forecast_training(model, base, len(ready.examples.training), settings), as_json=as_json)
            return
        from reft_export.training.trainer import train as run_training

        result = run_training(
            base,
            data,
            settings,
            output,
            head=sources.head,
            force=force,
            start=started,
            trained_on=trained_on,
            orthogonal_to=others,
            on_step=_StepLine(report),
            on_phase=report,
        )
    _print_json(output, result, others) if as_json else _print(output, settings, result, others)


def _of_form(started: Adapter, settings: TrainSettings, context: typer.Context) -> TrainSettings:
    """``settings`` with the form of the started adapter, and its way of rendering prompts, where the user did not say them."""
    from reft_export.training.settings import settings_like

    like = settings_like(started)
    names = [field.name for field in fields(Form)] + ["chat_template"]
    return replace(settings, **{name: getattr(like, name) for name in names if not given(context, name)})


def _refuse_contradictions(context: typer.Context, settings: TrainSettings, sources: Sources) -> None:
    from runtimes.edits.methods import METHODS
    from runtimes.errors import InputError

    method = METHODS[settings.method]
    if method.full_rank and given(context, "rank"):
        trained = " and a ".join(method.names)
        raise InputError(
            f"--rank {context.params['rank']} does not apply to {settings.method}, a {trained} per channel of full rank; leave it out"
        )
    if sources.base_bundle is not None and settings.dtype not in ("auto", "float32"):
        raise InputError(f"--base trains on the bundle's weights to the bit, which --dtype {settings.dtype} would round; leave --dtype out")
    if settings.max_steps is not None:
        refuse_given(context, ("epochs",), "what --max-steps is in place of")
    if sources.start is not None:
        refuse_given(context, ("orthogonal_to",), "for an adapter that begins anew, and --start goes on with one")


def _check_base(context: typer.Context, base: Base, started: Adapter | None, others: Mapping[str, Adapter], sources: Sources) -> None:
    """Raises AdapterError where an adapter is another base's, InputError for options of another task."""
    from reft_export.base.adapters import check_fit
    from runtimes.files.folders import name_of

    if started is not None and sources.start is not None:
        check_fit(name_of(sources.start), started, base, accept_base=sources.accept_base)
    for name, other in others.items():
        check_fit(name, other, base, accept_base=sources.accept_base)
    names, reason = OTHERS[base.task]
    refuse_given(context, names, reason.format(base.info.name))


def _load(model: str, bundle: Bundle | None, settings: TrainSettings, *, weights: bool) -> Base:
    """The base to train, on the bundle's weights where there is one; without ``weights`` only everything that they are not needed for."""
    from reft_export.base.load import load_base, load_without_weights

    dtype, device = settings.placement()
    if bundle is None:
        return (load_base if weights else load_without_weights)(model, dtype=dtype, device=device, require_tokenizer=True)
    from reft_export.quantizing.refit import load_on_bundle

    return load_on_bundle(bundle, model, device=device, weights=weights)


class _StepLine:
    """The training step, in the status line or now and then in the log."""

    def __init__(self, report: Progress) -> None:
        self._report = report

    def __call__(self, step: int, total: int, loss: float, eval_loss: float | None) -> None:
        held_out = "" if eval_loss is None else f", held out {eval_loss:.3f}"
        self._report.update(f"training, step {step}/{total}, loss {loss:.3f}{held_out}", step, total)


def _left(adapter: Adapter, others: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """Of every adapter that the new one is orthogonal to: sites that they share, the largest overlap and interaction there."""
    from reft_export.composing.compose import meetings_of

    left = {}
    for name, other in others.items():
        found = [each.overlap for each in meetings_of({"": adapter, name: other}) if each.overlap is not None]
        left[name] = {
            "sites": len(set(adapter.sites) & set(other.sites)),
            "overlap": max(each.write_overlap for each in found),
            "interaction": max(max(each.interaction, each.reverse_interaction) for each in found),
        }
    return left


def _print_json(output: Path, result: TrainResult, others: Mapping[str, Adapter]) -> None:
    from runtimes.files.records import to_json

    shown: dict[str, Any] = (
        {"samples": to_json(result.samples_after)} if result.accuracy is None else {"accuracy": to_json(result.accuracy)}
    )
    truncated = list(result.truncated_lines)
    kept = to_json(result.kept)
    if others:
        shown["orthogonal_to"] = _left(result.adapter, others)
    print_json({"adapter": str(output), "history": to_json(result.history), "kept": kept, "truncated": truncated, **shown})


def _print(output: Path, settings: TrainSettings, result: TrainResult, others: Mapping[str, Adapter]) -> None:
    """The answers before and after, or the accuracies; and the loss."""
    from runtimes.edits.methods import form_of

    accuracy = result.accuracy
    if result.truncated_lines:
        cut = "completions" if accuracy is None else "texts"
        out.print(f"{len(result.truncated_lines)} {cut} were cut to --max-length, first at {escape(result.truncated_lines[0])}")
    for before, after in zip(result.samples_before, result.samples_after, strict=True):
        out.print(f"[bold]{escape(before.prompt)}[/]\n  [dim]before:[/] {escape(before.text)}\n  [dim]after: [/] {escape(after.text)}")
    first, last = result.history[0], result.history[-1]
    parameters = sum(t.size for t in result.adapter.tensors.values())
    head = sum(t.size for t in result.adapter.head.values())
    line = (
        f"{output}: {form_of(settings.method, settings.rank)}, {len(result.adapter.sites)} sites, {parameters} parameters"
        f"{f' and a head of {head}' if head else ''}; loss {first.loss:.3f} to {last.loss:.3f} in {last.step} steps"
    )
    if held_out := [record for record in result.history if record.eval_loss is not None]:
        started, ended, kept = held_out[0], held_out[-1], result.kept
        line += f"; held out {started.eval_loss:.3f} to {ended.eval_loss:.3f}"
        if kept is ended:
            line += f"; the last step's adapter is saved{'' if settings.keep == 'last' else ', which is the best'}"
        else:
            line += f"; the adapter of step {kept.step} is saved, whose {kept.eval_loss:.3f} is the lowest"
    if accuracy is not None:
        line += (
            f"; accuracy on {accuracy.texts} {'held-out' if accuracy.held_out else 'training'} texts: base {accuracy.before:.1%}, "
            f"steered {accuracy.after:.1%}"
        )
    out.print(line, markup=False)
    for name, left in _left(result.adapter, others).items():
        out.print(
            f"{name}: overlap {left['overlap']:.2g}, interaction {left['interaction']:.2g} at {left['sites']} shared sites", markup=False
        )

"""``reft-export train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AcceptBase, AsJson, DryRun, Force, Model, Output, given, refuse_given
from reft_export.console import Progress, escape, out, print_json, progress

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.training.classification import ClassifierResult
    from reft_export.training.settings import TrainSettings
    from runtimes.artifacts.bundle import Bundle

FORM = {"method": "method", "rank": "rank", "layers": "layers", "stream": "streams", "positions": "positions", "tied": "tied"}
FORM |= {"activation": "activation", "dropout": "dropout", "chat_template": "chat_template"}
"""What an adapter is and how prompts reach it, by parameter of the verb and name of the setting; with --start it is the started one's."""


DECODERS_ONLY = ("chat_template", "samples")
"""Parameters that mean nothing for a classifier."""


def register(app: typer.Typer) -> None:
    app.command("train")(guarded(train))


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            help="JSONL: prompt and completion, or messages; of a classifier text, label, and for a pair text_pair. Repeat for several "
            "files, which are joined in their order.",
        ),
    ],
    output: Output,
    method: Annotated[str, typer.Option("--method", help="loreft, noreft, direft, consreft, lobireft; red: scale and bias.")] = "loreft",
    rank: Annotated[int, typer.Option("--rank", help="Rank of the edit; red has none.")] = 4,
    layers: Annotated[str, typer.Option("--layers", help="all, 8-16, 3;9;18.")] = "all",
    stream: Annotated[
        str, typer.Option("--stream", help="block_output, block_input, attention_output, mlp_output; several with ;.")
    ] = "block_output",
    positions: Annotated[
        str, typer.Option("--positions", help="f7+l7: first 7 and last 7 prompt tokens; f3; l1; prompt: all of it; all: decode too.")
    ] = "f7+l7",
    tied: Annotated[bool, typer.Option("--tied/--untied", help="One edit for prefix and suffix positions, or one each.")] = True,
    activation: Annotated[str, typer.Option("--activation", help="relu, gelu, gelu_tanh, silu, tanh, sigmoid; default none.")] = "",
    dropout: Annotated[float, typer.Option("--dropout", help="On the edit, while training.")] = 0.0,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 9e-4,
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine or constant, after the warm-up.")] = "linear",
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps over which the rate rises.")] = 0.1,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 6,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a batch.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option("--gradient-accumulation", help="Batches an optimizer step.")] = 1,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's; R stays orthonormal whatever it is.")] = 0.0,
    eval_fraction: Annotated[float, typer.Option("--eval-fraction", help="Share of the examples held out.")] = 0.0,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per example; default: the base's context.")] = None,
    chat_template: Annotated[str, typer.Option("--chat-template", help="For prompt/completion lines: auto, always, never.")] = "auto",
    samples: Annotated[int, typer.Option("--samples", help="Prompts answered before and after.")] = 3,
    seed: Annotated[int, typer.Option("--seed")] = 42,
    dtype: Annotated[str, typer.Option("--dtype", help="The base's: auto (bfloat16 on a GPU), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")] = False,
    base_bundle: Annotated[
        Path | None, typer.Option("--base", help="A quantized bundle of the base: train on the exact weights that it ships.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--start", help="An adapter folder to go on from; the form of the edit is that adapter's.")
    ] = None,
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Of a classifier: train its head with the edit, as the paper does. Default: --head."),
    ] = None,
    accept_base: AcceptBase = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a ReFT intervention on a frozen base in eager PyTorch; writes an adapter folder.

    On a classifier, the paper's GLUE setting is --rank 1 --positions f1 --lr 6e-4 --batch-size 32 --max-length 256.
    """
    from reft_export.training.settings import TrainSettings, settings_like
    from runtimes.edits.methods import METHODS, form_of

    settings = TrainSettings(
        method=method,
        rank=rank,
        layers=layers,
        streams=stream,
        positions=positions,
        tied=tied,
        activation=activation,
        dropout=dropout,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        weight_decay=weight_decay,
        eval_fraction=eval_fraction,
        max_length=max_length,
        chat_template=chat_template,
        samples=samples,
        seed=seed,
        dtype=dtype,
        device=device,
        resume=resume,
    )
    started = None
    if start is not None:
        from runtimes.edits.adapter import load_adapter

        started = load_adapter(start)
        like = settings_like(started)
        settings = replace(settings, **{field: getattr(like, field) for name, field in FORM.items() if not given(context, name)})
    if METHODS[settings.method].full_rank and given(context, "rank"):
        from runtimes.errors import InputError

        raise InputError(f"--rank {rank} does not apply to {settings.method}, a scale and a bias per channel of full rank; leave it out")
    if base_bundle is not None and dtype not in ("auto", "float32"):
        from runtimes.errors import InputError

        raise InputError(f"--base trains on the bundle's weights to the bit, which --dtype {dtype} would round; leave --dtype out")
    if max_steps is not None:
        refuse_given(context, ("epochs",), "what --max-steps is in place of")
    from reft_export.bundling.files import check_fit
    from reft_export.training.classification import prepare_classifier, train_classifier
    from reft_export.training.trainer import prepare
    from reft_export.training.trainer import train as run_training
    from runtimes.artifacts.bundle import check_adapter_name, open_bundle
    from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
    from runtimes.files.folders import check_destination

    if dry_run:
        from reft_export.forecast import refuse_download

        refuse_download(model)
    check_adapter_name(output.resolve().name)
    check_destination(output, force=force, inputs=[Path(model), *data, *filter(None, (base_bundle, start))])
    bundle = None if base_bundle is None else open_bundle(base_bundle)
    with progress() as report:
        report(f"loading {model}")
        if bundle is not None and accept_base:
            from reft_export.parity.ladder import made_from

            bundle = made_from(bundle, model)
        base = _load(model, bundle, settings, weights=not dry_run)
        if started is not None:
            check_fit(start.resolve().name, started, base, accept_base=accept_base)
        options = {"force": force, "start": started, "trained_on": None if bundle is None else bundle.digest}
        classifies = base.task == TEXT_CLASSIFICATION
        if classifies:
            refuse_given(context, DECODERS_ONLY, f"a decoder's, and {base.info.name} is a classifier")
            options["head"] = head is not False
        else:
            refuse_given(context, ("head",), f"a classifier's, and {base.info.name} is a decoder")
        if dry_run:
            from reft_export.cli.export import show_forecast
            from reft_export.forecast import forecast_training

            ready = (prepare_classifier if classifies else prepare)(base, data, settings, output, **options)
            show_forecast(forecast_training(model, base, len(ready.training), settings), as_json=as_json)
            return
        watched = {"on_phase": report, "on_step": _StepLine(report)}
        result = (train_classifier if classifies else run_training)(base, data, settings, output, **options, **watched)
    if classifies:
        show_classifier(output, settings, result, as_json=as_json)
        return
    if as_json:
        from runtimes.files.records import to_json

        print_json({"adapter": str(output), "history": to_json(result.history), "samples": to_json(result.samples_after)})
        return
    if result.truncated_lines:
        out.print(f"{len(result.truncated_lines)} completions were cut to --max-length, first at {escape(result.truncated_lines[0])}")
    for before, after in zip(result.samples_before, result.samples_after, strict=True):
        out.print(f"[bold]{escape(before.prompt)}[/]\n  [dim]before:[/] {escape(before.text)}\n  [dim]after: [/] {escape(after.text)}")
    first, last = result.history[0], result.history[-1]
    parameters = sum(t.size for t in result.adapter.tensors.values())
    out.print(
        f"{output}: {form_of(settings.method, settings.rank)}, {len(result.adapter.sites)} sites, {parameters} parameters; "
        f"loss {first.loss:.3f} to {last.loss:.3f} in {last.step} steps",
        markup=False,
    )


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


def show_classifier(output: Path, settings: TrainSettings, result: ClassifierResult, *, as_json: bool) -> None:
    """The loss and the accuracies, or all of it as JSON."""
    accuracy = {
        "before": result.accuracy_before,
        "after": result.accuracy_after,
        "texts": result.evaluated,
        "held_out": result.held_out,
    }
    if as_json:
        from runtimes.files.records import to_json

        print_json({"adapter": str(output), "history": to_json(result.history), "accuracy": accuracy})
        return
    if result.truncated_lines:
        out.print(f"{len(result.truncated_lines)} texts were cut to --max-length, first at {escape(result.truncated_lines[0])}")
    from runtimes.edits.methods import form_of

    first, last = result.history[0], result.history[-1]
    edits = sum(t.size for t in result.adapter.tensors.values())
    head = sum(t.size for t in result.adapter.head.values())
    out.print(
        f"{output}: {form_of(settings.method, settings.rank)}, {len(result.adapter.sites)} sites, {edits} parameters"
        f"{f' and a head of {head}' if head else ''}; loss {first.loss:.3f} to {last.loss:.3f} in {last.step} steps; "
        f"accuracy on {result.evaluated} {'held-out' if result.held_out else 'training'} texts: base {result.accuracy_before:.1%}, "
        f"steered {result.accuracy_after:.1%}",
        markup=False,
    )

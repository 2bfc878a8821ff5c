"""``reft-export evaluate``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.groups import grouped
from reft_export.cli.guard import guarded
from reft_export.cli.hub_adapters import here
from reft_export.cli.options import (
    AcceptBase,
    Adapters,
    AsJson,
    Force,
    Kernel,
    Provider,
    Threads,
    check_session_options,
    given,
    refuse_given,
)
from reft_export.cli.placement import Device, Dtype, load_placed
from reft_export.console import out, print_json, print_table, progress

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.console import Progress
    from runtimes.edits.adapter import Adapter


def register(app: typer.Typer) -> None:
    app.command("evaluate")(guarded(grouped(evaluate)))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every model is asked."""

    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="exact-match, accuracy, or FILE.py:FUNCTION, which is run and says of an answer and its line whether it is right; loss: "
            "the likelihood alone, which is always taken. Repeat for several. Default: exact-match; of a classifier accuracy.",
            show_default=False,
        ),
    ] = None
    format: Annotated[
        str, typer.Option("--format", help="prompt-completion, messages, text, alpaca, sharegpt; auto: by the lines' keys.")
    ] = "auto"
    chat_template: Annotated[
        str, typer.Option("--chat-template", help="always, never, or auto: as the adapters were trained, else where there is one.")
    ] = "auto"
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per line; default: the shortest context.")] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Of a greedy answer; default: the data's longest, and 64 at least for a function."),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts a batch.")] = 8
    limit: Annotated[int | None, typer.Option("--limit", help="The first so many lines.")] = None


@dataclass(frozen=True, kw_only=True)
class Runtimes:
    """Where eager PyTorch and sessions run."""

    dtype: Dtype = "float32"
    device: Device = "auto"
    provider: Provider = None
    kernel: Kernel = None
    threads: Threads = None


def evaluate(
    context: typer.Context,
    asked: Asked,
    runtimes: Runtimes,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            help="Held-out lines, as train reads them, of a classifier too. Repeat for several, which are joined in their order.",
        ),
    ],
    bundles: Annotated[list[Path] | None, typer.Argument(help="Bundles and engines, each with all its adapters.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base in eager PyTorch: a local folder, a .gguf file or a Hugging Face id.")
    ] = None,
    adapter: Adapters = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to write: report.md, evaluation.json, evaluation.png, answers.jsonl."),
    ] = None,
    accept_base: AcceptBase = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The same table of quality for a base, its adapters, bundles and engines: answers or labels, and likelihoods, on held-out lines."""
    from reft_export.base.adapters import folders_of, load_adapters
    from reft_export.evaluating.evaluate import SessionOptions, Table, artifacts_by_name, read_for
    from reft_export.evaluating.evaluate import evaluate as evaluate_table
    from reft_export.evaluating.report import answer_columns, likelihood_columns, note_lines, record_of, table_of, who_columns, write_report
    from reft_export.evaluating.settings import EvaluationSettings
    from reft_export.training.sources import check_source
    from runtimes.files.folders import atomic_folder, check_destination, claimed
    from runtimes.open import open_artifact

    metrics = None if asked.metric is None else tuple(asked.metric)
    settings = EvaluationSettings(metrics=metrics, **{name: value for name, value in vars(asked).items() if name != "metric"})
    _refuse_contradictions(context, model, bundles or [])
    check_session_options(runtimes.provider, runtimes.kernel)
    folders = here(adapter)
    adapters = load_adapters(folders)
    for path in data:
        check_source(path)
    artifacts = artifacts_by_name([(path, open_artifact(path)) for path in bundles or []])
    inputs = [*([] if model is None else [Path(model)]), *data, *folders_of(folders), *(bundles or [])]
    if output is not None:
        check_destination(output, force=force, inputs=inputs)
    if artifacts:
        read_for(data, Table(base=None, adapters={}, artifacts=artifacts), settings)  # what is refused is said before a base is loaded
    with nullcontext() if output is None else claimed(output, force=force, inputs=inputs), progress() as report:
        base = None if model is None else _load(model, adapters, runtimes, report, accept_base=accept_base)
        table = Table(base=base, adapters=adapters, artifacts=artifacts)
        options = SessionOptions(provider=runtimes.provider, kernel=runtimes.kernel, threads=runtimes.threads)
        found = evaluate_table(data, table, settings, options=options, report=report)
        if output is not None:
            report("writing the report")
            with atomic_folder(output, force=force) as work:
                write_report(found, settings, work)
    if as_json:
        print_json(record_of(found, settings))
        return
    for columns in filter(None, (answer_columns(found), likelihood_columns(found))):  # side by side they are wider than a terminal
        print_table("", *table_of(*who_columns(found), *columns))
    for line in note_lines(found):
        out.print(line, markup=False)
    if output is not None:
        out.print(f"report: {output / 'report.md'}", markup=False)


def _refuse_contradictions(context: typer.Context, model: str | None, bundles: list[Path]) -> None:
    from runtimes.errors import InputError

    if model is None and given(context, "adapter"):
        raise InputError("-a is an adapter of the base in eager PyTorch, a bundle has its own; name the base with -m, or leave -a out")
    if model is None and not bundles:
        raise InputError("there is nothing to evaluate; name a bundle, or a base with -m")
    if model is None:
        refuse_given(context, ("dtype", "device", "accept_base"), "eager PyTorch's, and there is no -m")
    if not bundles:
        refuse_given(context, ("provider", "kernel", "threads"), "a bundle's, and there is none")


def _load(model: str, adapters: dict[str, Adapter], runtimes: Runtimes, report: Progress, *, accept_base: bool) -> Base:
    from reft_export.base.adapters import check_fit
    from reft_export.training.settings import TrainSettings

    placed = TrainSettings(dtype=runtimes.dtype, device=runtimes.device)
    base, _ = load_placed(model, None, placed, report, weights=True, accept_base=accept_base)
    for name, adapter in adapters.items():
        check_fit(name, adapter, base, accept_base=accept_base)
    return base

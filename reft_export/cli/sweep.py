"""``reft-export sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.groups import grouped
from reft_export.cli.guard import guarded
from reft_export.cli.options import AcceptBase, AsJson, Model, refuse_given
from reft_export.cli.placement import load_placed
from reft_export.cli.train_options import Computing, Reading, Steps
from reft_export.console import out, print_json, print_table, progress

if TYPE_CHECKING:
    from reft_export.sweeping.first_pass import FirstPass
    from reft_export.sweeping.outcome import SweepResult
    from reft_export.sweeping.prepared import Prepared
    from reft_export.sweeping.settings import SweepSettings


def register(app: typer.Typer) -> None:
    app.command("sweep")(guarded(grouped(sweep)))


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What is searched."""

    layers: Annotated[
        str,
        typer.Option(
            "--layers", help="Candidates as 4,10,4;10;18,all; each: every layer alone; auto: what the first pass proposes, and even ones."
        ),
    ] = "auto"
    ranks: Annotated[str, typer.Option("--ranks", help="Candidates; red has none.")] = "1,2,4,8"
    positions: Annotated[str, typer.Option("--positions", help="Candidates of train's --positions.")] = "f7+l7,prompt,l1"
    learning_rates: Annotated[str, typer.Option("--learning-rates", help="A range, 1e-4..4e-3, or candidates, 1e-3,2e-3.")] = "1e-4..4e-3"
    methods: Annotated[str, typer.Option("--methods", help="Candidates: loreft, noreft, direft, consreft, lobireft, red.")] = "loreft"
    trials: Annotated[int, typer.Option("--trials", help="So many in all; those of earlier runs of the sweep count.")] = 20


@dataclass(frozen=True, kw_only=True)
class Held(Reading):
    """train's reading, of which some is always held out."""

    eval_fraction: Annotated[
        float, typer.Option("--eval-fraction", help="Share of the examples held out, by which trials are told apart.")
    ] = 0.2


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the trials are of, and where they are kept."""

    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out examples of their own, in place of --eval-fraction.")] = (
        None
    )
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="URL of a database for optuna's study; default: OUTPUT/study.db. Workers share the output, too."),
    ] = None
    probe_only: Annotated[
        bool, typer.Option("--probe-only", help="Print which layers carry the contrast, without any trial; nothing is written.")
    ] = False
    base_bundle: Annotated[
        Path | None, typer.Option("--base", help="A quantized bundle of the base: train on the exact weights that it ships.")
    ] = None
    accept_base: AcceptBase = False


def sweep(
    context: typer.Context,
    model: Model,
    data: Annotated[list[Path], typer.Option("--data", "-d", help="As train's; repeat for several, which are joined in their order.")],
    candidates: Candidates,
    steps: Steps,
    reading: Held,
    computing: Computing,
    place: Place,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The sweep's folder; the same command goes on in it.")] = None,
    streams: Annotated[str, typer.Option("--stream", help="As train's.")] = "block_output",
    as_json: AsJson = False,
) -> None:
    """Search layers, ranks, positions and learning rates by many short trainings; the best adapter is OUTPUT/best.

    Killed or stopped, the same command goes on; started several times at once, the processes share the trials.
    """
    from reft_export.sweeping.settings import SweepSettings
    from reft_export.training.settings import TrainSettings
    from reft_export.training.sources import check_source
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.errors import InputError

    if steps.max_steps is not None:
        refuse_given(context, ("epochs",), "what --max-steps is in place of")
    fraction = {}
    if place.eval_data is not None:
        refuse_given(context, ("eval_fraction",), "what --eval-data is in place of")
        fraction = {"eval_fraction": 0.0}
    if place.probe_only:
        refuse_given(context, ("output", "storage", "trials"), "of trials, and --probe-only makes none")
    elif output is None:
        raise InputError("-o is missing: the folder of the sweep; --probe-only needs none")
    training = TrainSettings(**{**vars(steps), **vars(reading), **vars(computing), **fraction, "streams": streams})
    settings = SweepSettings(**vars(candidates), training=training)
    inputs = [Path(model), *data, *filter(None, (place.eval_data, place.base_bundle))]
    if output is not None:
        from reft_export.sweeping.folder import check_folder
        from reft_export.sweeping.settings import check_optuna

        check_optuna()
        check_folder(output, inputs)
        if place.storage is not None:
            from reft_export.sweeping.study import check_storage

            check_storage(place.storage)
    for path in (*data, *filter(None, (place.eval_data,))):
        check_source(path)
    bundle = None if place.base_bundle is None else open_bundle(place.base_bundle)
    with progress() as report:
        base, trained_on = load_placed(model, bundle, training, report, weights=True, accept_base=place.accept_base)
        from reft_export.sweeping.prepared import prepare_sweep

        prepared = prepare_sweep(base, data, settings, output, eval_data=place.eval_data, trained_on=trained_on, report=report)
        if output is None:
            found = prepared.first_pass(report)
        else:
            from reft_export.sweeping.sweep import run_sweep

            result = run_sweep(prepared, output, storage=place.storage, report=report)
    if output is None:
        _show_first_pass(found, settings, as_json=as_json)
    else:
        _show(result, prepared, output, as_json=as_json)


def _show_first_pass(found: FirstPass, settings: SweepSettings, *, as_json: bool) -> None:
    from reft_export.sweeping.first_pass import candidates, proposals
    from reft_export.sweeping.report import explained, layer_columns, layer_rows
    from runtimes.files.records import to_json

    space = candidates(settings.space, found)
    proposed = proposals(space, found, settings.trials)
    if as_json:
        print_json({"first_pass": to_json(found), "space": to_json(space), "proposed": to_json(proposed)})
        return
    print_table("", layer_columns(found), layer_rows(found))
    out.print(explained(found), markup=False)
    _lines([f"would try first: {each}" for each in proposed])


def _show(result: SweepResult, prepared: Prepared, output: Path, *, as_json: bool) -> None:
    from reft_export.sweeping.report import TRIAL_COLUMNS, judgement_lines, record, summary, trial_rows

    if as_json:
        print_json({"output": str(output), **record(result, prepared)})
        return
    if result.front:
        print_table("the front", TRIAL_COLUMNS, trial_rows(result.front))
    _lines(judgement_lines(result))
    out.print(summary(result, prepared, output), markup=False)


def _lines(lines: Sequence[str]) -> None:
    for line in lines:
        out.print(line, markup=False)

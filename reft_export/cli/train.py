"""``reft-export train``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.groups import grouped
from reft_export.cli.guard import guarded
from reft_export.cli.hub_adapters import folder_here, here
from reft_export.cli.options import AsJson, DryRun, Force, Model, Output, flag_of, given, refuse_given
from reft_export.cli.placement import load_placed
from reft_export.cli.train_options import Aim, Form, Layers, Optimization, Reading, Run, Sources
from reft_export.cli.train_report import PREVIEWED, show_data, show_json, show_preview, show_result
from reft_export.console import Progress, err, progress
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.training.edits import LayerEdits
    from reft_export.training.settings import TrainSettings
    from reft_export.training.trainer import TrainResult
    from runtimes.edits.adapter import Adapter

OTHERS = {
    TEXT_CLASSIFICATION: (
        ("chat_template", "format", "train_on", "samples", "objective", "beta", "distill_system", "kl_weight"),
        "a decoder's, and {} is a classifier",
    ),
    TEXT_GENERATION: (("head",), "a classifier's, and {} is a decoder"),
}
"""By the base's task: parameters that mean nothing for it, and why."""


def register(app: typer.Typer) -> None:
    app.command("train")(guarded(grouped(train)))


def train(
    context: typer.Context,
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            help="A JSONL or Parquet file, or a data set's folder: prompt and completion, messages, text, or --format's others; of dpo and "
            "orpo prompt, chosen and rejected; of interchange prompt, source and completion; of a classifier text, label, and for a pair "
            "text_pair. Repeat for several, joined in their order.",
        ),
    ],
    output: Output,
    form: Form,
    layers: Layers,
    optimization: Optimization,
    aim: Aim,
    reading: Reading,
    run: Run,
    sources: Sources,
    force: Force = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Print three examples with their edited and trained tokens marked, and train nothing.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Train a ReFT intervention on a frozen base in eager PyTorch; writes an adapter folder.

    On a classifier, the paper's GLUE setting is --rank 1 --positions f1 --lr 6e-4 --batch-size 32 --max-length 256.
    """
    from reft_export.base.adapters import folders_of, load_adapters
    from reft_export.training.processes import agreed, join, leads
    from reft_export.training.settings import TrainSettings
    from reft_export.training.sources import check_source
    from runtimes.artifacts.adapter_record import check_adapter_name
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.edits.adapter import load_adapter
    from runtimes.files.folders import check_destination, claimed

    edits = _edits_of(context, layers)
    settings = TrainSettings(
        **_form_of(context, form, aim, edits), **vars(optimization), **aim.settings(), **vars(reading), **vars(run), edits=edits
    )
    sources = replace(sources, start=folder_here(sources.start), orthogonal_to=here(sources.orthogonal_to))
    started = None if sources.start is None else load_adapter(sources.start)
    if started is not None:
        settings = _of_form(started, settings, context)
    others = load_adapters(sources.orthogonal_to or [])
    _refuse_contradictions(context, settings, aim, sources)
    unweighted = dry_run or preview
    if unweighted:
        from reft_export.forecast import refuse_download

        refuse_download(model)
    check_adapter_name(output.resolve().name)
    inputs = [
        Path(model),
        *data,
        *filter(None, (layers.recipe, sources.eval_data, sources.base_bundle, sources.start)),
        *folders_of(sources.orthogonal_to or []),
    ]
    check_destination(output, force=force, inputs=inputs)
    for path in (*data, *filter(None, (sources.eval_data,))):
        check_source(path)
    bundle = None if sources.base_bundle is None else open_bundle(sources.base_bundle)
    join(settings.device)
    silent = not leads()
    with ExitStack() as held, progress(silent=silent) as report:
        if not unweighted:
            agreed(lambda: held.enter_context(claimed(output, force=force, inputs=inputs)))
        base, trained_on = load_placed(model, bundle, settings, report, weights=not unweighted, accept_base=sources.accept_base)
        _check_base(context, base, started, others, sources)
        if unweighted:
            from reft_export.cli.export import show_forecast
            from reft_export.forecast import forecast_training
            from reft_export.training.objective import Origin
            from reft_export.training.preparation import prepare
            from runtimes.files.records import to_json

            origin = Origin(start=started, trained_on=trained_on, head=sources.head, orthogonal_to=others)
            ready = prepare(base, data, settings, output, origin, eval_data=sources.eval_data, force=force)
            if preview:
                show_preview(ready.marked(PREVIEWED), as_json=as_json)
                return
            show_forecast(forecast_training(model, ready), as_json=as_json, data=to_json(ready.statistics))
            if not as_json:
                show_data(ready.statistics, settings)
            return
        from reft_export.training.trainer import train as run_training

        result = run_training(
            base,
            data,
            settings,
            output,
            eval_data=sources.eval_data,
            head=sources.head,
            force=force,
            start=started,
            trained_on=trained_on,
            orthogonal_to=others,
            on_ready=None if as_json or silent else lambda ready: show_data(ready.statistics, settings),
            on_step=_StepLine(report),
            on_phase=report,
        )
    if silent:
        return
    _leave_record(result, settings, output)
    show_json(output, result, others) if as_json else show_result(output, settings, result, others)


def _leave_record(result: TrainResult, settings: TrainSettings, output: Path) -> None:
    """The history and its picture beside the adapter, which is saved: what goes wrong here costs a line."""
    from reft_export.training.learning_curve import write_training_record

    try:
        write_training_record(result, settings, output)
    except OSError as e:
        err.print(f"note: the history could not be written beside the adapter: {e.strerror}", markup=False)


def _form_of(context: typer.Context, form: Form, aim: Aim, edits: Sequence[LayerEdits]) -> dict[str, Any]:
    """Its settings, with the defaults of an interchange in place of those of completions."""
    from reft_export.training.settings import INTERCHANGE, ROTATION

    if aim.objective != INTERCHANGE:
        return vars(form)
    own = {"positions": "l1"} if edits else {"positions": "l1", "method": ROTATION}
    return vars(form) | {name: value for name, value in own.items() if not given(context, name)}


def _of_form(started: Adapter, settings: TrainSettings, context: typer.Context) -> TrainSettings:
    """``settings`` with the form of the started adapter, and its way of rendering prompts, where the user did not say them."""
    from reft_export.training.settings import OF_EDITS, settings_like

    like = settings_like(started)
    names = {field.name for field in fields(Form)} | {"chat_template", "edits"}
    if settings.edits:
        names -= {"edits", *OF_EDITS}
    elif like.edits:
        refuse_given(context, OF_EDITS, "of one edit for all layers, and those of --start have each their own")
    return replace(settings, **{name: getattr(like, name) for name in names if name == "edits" or not given(context, name)})


def _edits_of(context: typer.Context, layers: Layers) -> tuple[LayerEdits, ...]:
    """Those of --edit or --recipe. Raises InputError for both, and for an option that they are in place of."""
    from reft_export.training.edits import LayerEdits
    from reft_export.training.recipe import read_recipe
    from reft_export.training.settings import OF_EDITS
    from runtimes.errors import InputError

    if not layers.edit and layers.recipe is None:
        return ()
    said = "--recipe" if layers.recipe else "--edit"
    if layers.edit and layers.recipe:
        raise InputError("--edit and --recipe both say the edits of layers; leave one of them out")
    if beside := [name for name in OF_EDITS if given(context, name)]:
        flag = flag_of(context, beside[0])
        raise InputError(f"{flag} is of one edit for all layers, and {said} says each layer's own; leave {flag} out, or {said}")
    return tuple(map(LayerEdits.parse, layers.edit or ())) if layers.recipe is None else read_recipe(layers.recipe)


def _refuse_contradictions(context: typer.Context, settings: TrainSettings, aim: Aim, sources: Sources) -> None:
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
    if sources.eval_data is not None:
        refuse_given(context, ("eval_fraction",), "what --eval-data is in place of")
    if settings.objective not in ("dpo", "orpo"):
        refuse_given(context, ("beta",), "of --objective dpo or orpo")
    if settings.objective == "interchange":
        refuse_given(context, ("probes",), "for answers that an adapter gives by itself, and an interchange's need their sources")
    if aim.distill_system is None:
        refuse_given(context, ("max_new_tokens",), "for answers that --distill-system gives")
    if settings.subspaces:
        refuse_given(context, ("rank", "samples", "probes"), "of an edit that acts whole, and --subspaces shares the rank out")
    if settings.max_steps is not None:
        refuse_given(context, ("epochs",), "what --max-steps is in place of")
    if sources.start is not None:
        refuse_given(context, ("orthogonal_to", "init"), "for an adapter that begins anew, and --start goes on with one")


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


class _StepLine:
    """The training step, in the status line or now and then in the log."""

    def __init__(self, report: Progress) -> None:
        self._report = report

    def __call__(self, step: int, total: int, loss: float, eval_loss: float | None) -> None:
        held_out = "" if eval_loss is None else f", held out {eval_loss:.3f}"
        self._report.update(f"training, step {step}/{total}, loss {loss:.3f}{held_out}", step, total)

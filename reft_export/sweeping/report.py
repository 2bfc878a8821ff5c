"""What a sweep leaves for people, beside its adapters: ``report.md``, ``report.json`` and the pictures that the first shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_export.sweeping.first_pass import FirstPass
from reft_export.sweeping.folder import BEST, TRIALS
from reft_export.sweeping.gains import STEP
from reft_export.sweeping.outcome import SweepResult
from reft_export.sweeping.plots import draw
from reft_export.sweeping.prepared import Prepared
from reft_export.sweeping.results import TrialResult, ranked
from runtimes.files.placed import place
from runtimes.files.records import to_json

MARKDOWN, RECORD = "report.md", "report.json"


def write_report(result: SweepResult, prepared: Prepared, output: Path) -> None:
    """Every file whole or not at all, ``report.json`` last. Pictures where matplotlib is installed. Raises OSError."""
    pictures: dict[str, bytes] = {}
    if find_spec("matplotlib") is not None:
        pictures = draw(result, quality_name(prepared), maximized=prepared.settings.maximized)
    for name, content in pictures.items():
        place(output / name, content)
    place(output / MARKDOWN, _markdown(result, prepared, tuple(pictures)).encode())
    place(output / RECORD, json.dumps(record(result, prepared), ensure_ascii=False, indent=1).encode())


def quality_name(prepared: Prepared) -> str:
    metric = prepared.settings.training.metric.rpartition(":")[2]
    return metric if prepared.settings.maximized else "held-out loss"


def record(result: SweepResult, prepared: Prepared) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "quality": quality_name(prepared),
        "maximized": prepared.settings.maximized,
        "asked": prepared.asked,
        "space": to_json(result.space),
        "best": to_json(result.best),
        "front": [each.number for each in result.front],
        "trials": to_json(result.trials),
        "left": result.left,
        "first_pass": to_json(result.first_pass),
        "judgement": to_json(result.judgement),
        "importances": dict(result.importances),
        "samples_before": to_json(result.samples_before),
        "samples": to_json(result.samples_after),
    }


TRIAL_COLUMNS = ("trial", "quality", "parameters", "multiply-adds", "method", "rank", "layers", "positions", "lr", "")


def trial_rows(trials: Sequence[TrialResult]) -> list[tuple[str, ...]]:
    return [
        (
            str(each.number),
            "" if each.quality is None else f"{each.quality:.4f}",
            str(each.parameters),
            f"{each.cost:.3g}",
            each.point.method,
            str(each.point.rank or ""),
            each.point.layers,
            each.point.positions,
            f"{each.point.lr:.2g}",
            ", ".join(filter(None, ("" if each.ended == "complete" else each.ended, "proposed" if each.proposed else ""))),
        )
        for each in trials
    ]


def layer_columns(found: FirstPass) -> tuple[str, ...]:
    positions = tuple(found.layers[0].gains)
    return ("layer", *(f"gain, {each}" for each in positions), *(("accuracy",) if found.answers else ()), "score", "")


def layer_rows(found: FirstPass) -> list[tuple[str, ...]]:
    best = found.order[:3]
    return [
        (
            str(each.layer),
            *(f"{gain:.4f}" for gain in each.gains.values()),
            *((f"{each.accuracy:.3f}",) if each.accuracy is not None else ()),
            f"{each.score:.4f}",
            f"{best.index(each.layer) + 1}." if each.layer in best else "",
        )
        for each in found.layers
    ]


def explained(found: FirstPass) -> str:
    """What the first pass measured, in words."""
    said = (
        f"Gain: nats a trained token that one vector of {STEP:g} of the stream's norm, added at the layer, takes off the loss to first "
        f"order (the gradient of the loss, judged on other lines than its direction is from; {found.lines} lines, one backward pass each)."
    )
    if found.answers:
        said += (
            f" Accuracy: of a ridge regression from the residual stream at the prompt's last token to the {found.answers} answers, "
            "cross-validated and balanced. Score: the gain times the share of the best layer's accuracy above chance."
        )
    return said


def judgement_lines(result: SweepResult) -> list[str]:
    """How good the first pass's guess was."""
    told, lines = result.judgement, []
    for number, rank in told.ranks:
        trial = next(each for each in result.trials if each.number == number)
        ended = f"rank {rank} of {told.ended} trials, of which {told.complete} were complete" if rank else trial.ended
        lines.append(f"proposal {number} (layers {trial.point.layers}, positions {trial.point.positions}): {ended}")
    if told.best_layers is not None and result.best is not None:
        lines.append(f"the best trial's layers, {result.best.point.layers}, were number {told.best_layers} of {told.searched} by score")
    if told.correlation is not None:
        lines.append(f"rank correlation of score and quality over {told.complete} complete trials: {told.correlation:+.2f}")
    return lines


def summary(result: SweepResult, prepared: Prepared, output: Path) -> str:
    counts = {ended: sum(each.ended == ended for each in result.trials) for ended in ("complete", "pruned", "failed")}
    told = ", ".join(f"{count} {ended}" for ended, count in counts.items() if count)
    best = result.best
    if best is None:
        return f"{output}: {told or 'no trial'}, {result.left} left to other workers"
    found = f"trial {best.number}, {quality_name(prepared)} {best.quality:.4f}, {best.parameters} parameters; {best.point}; {told}"
    left = f", {result.left} left to other workers: the last of them writes the report" if result.left else ""
    return f"{output / BEST}: {found}{left}"


def _markdown(result: SweepResult, prepared: Prepared, pictures: Sequence[str]) -> str:
    base, read = prepared.base.info, prepared.ready.read
    files = ", ".join(each.file for each in read.files)
    training, held_out = prepared.ready.examples.training, prepared.ready.examples.held_out
    parts = [
        "# Sweep",
        f"{base.name}, {files}: {len(training)} examples, {len(held_out)} held out. {summary(result, prepared, Path())}.",
        "## The front",
        f"No other trial is at least as good in {quality_name(prepared)}, parameters and multiply-adds of an example, and better in one. "
        f"Their adapters are in `{TRIALS}`; that of the first is `{BEST}`, too.",
        _table(TRIAL_COLUMNS, trial_rows(result.front)),
        *(f"![{name}]({name})" for name in pictures),
        "## Which layers carry it",
        explained(result.first_pass),
        _table(layer_columns(result.first_pass), layer_rows(result.first_pass)),
        "### How good that guess was",
        "\n".join(f"- {line}" for line in judgement_lines(result)),
    ]
    if result.samples_after:
        parts.append("## What the best says")
    for before, after in zip(result.samples_before, result.samples_after, strict=True):
        parts.append("\n".join((f"> {_quoted(before.prompt)}", "", f"- base: {_quoted(before.text)}", f"- steered: {_quoted(after.text)}")))
    if result.importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.importances.items())
        parts += ["## What mattered", f"Share of the quality's variance among the better trials (PED-ANOVA): {shares}."]
    rest = [each for each in result.trials if each.ended != "complete"]
    everything = [*ranked(result.trials, maximized=prepared.settings.maximized), *rest]
    parts += ["## All trials", "A pruned trial's quality is the last that was taken.", _table(TRIAL_COLUMNS, trial_rows(everything))]
    parts += [f"- trial {each.number}: {each.said}" for each in rest if each.said]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return " ".join(text.split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

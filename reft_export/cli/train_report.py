"""What ``reft-export train`` shows: its data before it trains, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.console import escape, out, print_json

if TYPE_CHECKING:
    from reft_export.training.settings import TrainSettings
    from reft_export.training.statistics import DataStatistics, Lengths, Run
    from reft_export.training.trainer import TrainResult
    from runtimes.edits.adapter import Adapter


SHOWN = 300
"""Characters of the first example."""
PREVIEWED = 3
"""Examples of --preview."""
STYLES = {(True, False): "cyan", (False, True): "green", (True, True): "bold yellow"}
"""Of tokens, by whether they are (edited, trained)."""
MARKS = {(True, False): "edited", (False, True): "trained", (True, True): "edited and trained"}


def show_data(statistics: DataStatistics, settings: TrainSettings) -> None:
    """A short table of what will be trained on."""
    s = statistics
    kinds = ", ".join(f"{count} {form}" for form, count in s.forms.items())
    first = s.first if len(s.first) <= SHOWN else f"{s.first[: SHOWN // 2]} .. {s.first[-SHOWN // 2 :]}"
    rows = {
        "data": f"{s.examples} examples{f', {s.held_out} held out' if s.held_out else ''}: {kinds}",
        "tokens": f"{_told(s.tokens)}; of the prompt {_told(s.prompt)}",
        "truncated": f"{s.truncated} of {s.examples + s.held_out}, at --max-length" if s.truncated else "none",
        "edited": f"{s.edited:.1%} of the tokens, by positions {'; '.join(settings.all_positions)}",
        "trained": f"{s.trained:.1%} of the tokens" if s.trained else "the label",
        "example": repr(first),
    }
    for name, value in rows.items():
        out.print(f"{name:<10} {value}", markup=False)


def _told(lengths: Lengths) -> str:
    return f"min {lengths.min}, median {lengths.median}, p95 {lengths.p95}, max {lengths.max}"


def show_preview(examples: Sequence[Sequence[Run]], *, as_json: bool) -> None:
    """Examples with what is edited and what is trained marked: by colour in a terminal, else in brackets."""
    if as_json:
        from runtimes.files.records import to_json

        print_json({"preview": to_json(examples)})
        return
    colours = out.is_terminal
    if colours:
        out.print(", ".join(f"[{STYLES[kind]}]{said}[/]" for kind, said in MARKS.items()))
    for number, runs in enumerate(examples, 1):
        out.print(f"--- example {number}", markup=False)
        out.print("".join(_marked(run, colours=colours) for run in runs))


def _marked(run: Run, *, colours: bool) -> str:
    kind = (run.edited, run.trained)
    if kind not in MARKS:
        return escape(run.text)
    return f"[{STYLES[kind]}]{escape(run.text)}[/]" if colours else escape(f"[{MARKS[kind]}: {run.text}]")


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


def show_json(output: Path, result: TrainResult, others: Mapping[str, Adapter]) -> None:
    from runtimes.files.records import to_json

    shown: dict[str, Any] = (
        {"samples": to_json(result.samples_after)} if result.accuracy is None else {"accuracy": to_json(result.accuracy)}
    )
    truncated = list(result.truncated_lines)
    kept = to_json(result.kept)
    if others:
        shown["orthogonal_to"] = _left(result.adapter, others)
    print_json(
        {
            "adapter": str(output),
            "history": to_json(result.history),
            "kept": kept,
            "truncated": truncated,
            "notes": list(result.notes),
            "data": to_json(result.statistics),
            **shown,
        }
    )


def show_result(output: Path, settings: TrainSettings, result: TrainResult, others: Mapping[str, Adapter]) -> None:
    """The answers before and after, or the accuracies; and the loss."""
    from reft_export.training.checkpoints import stale_evaluations
    from runtimes.edits.form import described

    accuracy = result.accuracy
    if result.truncated_lines:
        cut = "completions" if accuracy is None else "texts"
        out.print(f"{len(result.truncated_lines)} {cut} were cut to --max-length, first at {escape(result.truncated_lines[0])}")
    for before, after in zip(result.samples_before, result.samples_after, strict=True):
        out.print(f"[bold]{escape(before.prompt)}[/]\n  [dim]before:[/] {escape(before.text)}\n  [dim]after: [/] {escape(after.text)}")
    for note in result.notes:
        out.print(note, markup=False)
    first, last = result.history[0], result.history[-1]
    parameters = sum(t.size for t in result.adapter.tensors.values())
    head = sum(t.size for t in result.adapter.head.values())
    line = (
        f"{output}: {described(result.adapter.site_forms)}, {len(result.adapter.sites)} sites, {parameters} parameters"
        f"{f' and a head of {head}' if head else ''}; loss {first.loss:.3f} to {last.loss:.3f} in {last.step} steps"
    )
    if held_out := [record for record in result.history if record.eval_loss is not None]:
        started, ended, kept = held_out[0], held_out[-1], result.kept
        line += f"; held out {started.eval_loss:.3f} to {ended.eval_loss:.3f}"
        if ended.metric is not None:
            line += f", {settings.metric} {started.metric:.1%} to {ended.metric:.1%}"
        if settings.patience is not None and stale_evaluations(result.history) >= settings.patience:
            line += f"; ended after {settings.patience} evaluations without a better one"
        if kept is ended:
            line += f"; the last step's adapter is saved{'' if settings.keep == 'last' else ', which is the best'}"
        elif kept.metric is None:
            line += f"; the adapter of step {kept.step} is saved, whose {kept.eval_loss:.3f} is the lowest"
        else:
            line += f"; the adapter of step {kept.step} is saved, whose {settings.metric} of {kept.metric:.1%} is the best"
            line += ", at the lowest loss of those" if started.metric == kept.metric or ended.metric == kept.metric else ""
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

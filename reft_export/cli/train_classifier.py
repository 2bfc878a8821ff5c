"""What ``reft-export train`` says of a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.console import escape, out, print_json

if TYPE_CHECKING:
    from reft_export.training.classification import ClassifierResult
    from reft_export.training.settings import TrainSettings


def show_classifier(output: Path, settings: TrainSettings, result: ClassifierResult, *, as_json: bool) -> None:
    """The loss and the accuracies, or all of it as JSON."""
    accuracy = {
        "before": result.accuracy_before,
        "after": result.accuracy_after,
        "texts": result.evaluated,
        "held_out": result.held_out,
    }
    if as_json:
        from runtimes.records import to_json

        print_json({"adapter": str(output), "history": to_json(result.history), "accuracy": accuracy})
        return
    if result.truncated_lines:
        out.print(f"{len(result.truncated_lines)} texts were cut to --max-length, first at {escape(result.truncated_lines[0])}")
    from runtimes.adapter import form_of

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

"""How steered activation ranges differ from the base's, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from calibration.comparison import RangeRow
from calibration.selection import layer_of
from graph_passes.accessors import input_of, name_of
from graph_passes.find.weights import weight_name, weight_products
from graph_passes.tied_head import tied_head
from runtimes.files.placed import place, placed
from runtimes.files.records import to_json


def write_report(output: Path, rows: Sequence[RangeRow], graph: ir.Model, mixture: Mapping[str, float], observer: str) -> None:
    """<output>.calibration.json and <output>.calibration.png."""
    readers = _readers(graph)
    content = {
        "observer": observer,
        "mixture": dict(mixture),
        "activations": [{"layer": layer_of(readers[row.name][0]), "read_by": readers[row.name], **to_json(row)} for row in rows],
    }
    place(output.with_name(f"{output.name}.calibration.json"), f"{json.dumps(content, indent=1)}\n".encode())
    with placed(output.with_name(f"{output.name}.calibration.png")) as picture:
        _plot(rows, readers, picture)


def _readers(graph: ir.Model) -> dict[str, list[str]]:
    """The weights that each activation is multiplied by."""
    readers: dict[str, list[str]] = {}
    if head := tied_head(graph.graph):
        readers[name_of(input_of(head.node, 0))] = [head.name.removesuffix(".weight")]
    for node in weight_products(graph.graph):
        readers.setdefault(name_of(input_of(node, 0)), []).append(weight_name(node).removesuffix(".weight"))
    return readers


def _plot(rows: Sequence[RangeRow], readers: Mapping[str, list[str]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 0.16 * len(rows)), 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    places = range(len(rows))
    for label, ranges, colour, width in (
        ("base alone", [r.base for r in rows], "0.6", 0.8),
        ("with the edits on", [r.steered for r in rows], "C0", 0.4),
    ):
        top.bar(places, [high - low for low, high in ranges], bottom=[low for low, _ in ranges], width=width, color=colour, label=label)
    top.set_yscale("symlog", linthresh=1.0)
    top.set_ylabel("range of the activation")
    top.legend()
    bottom.bar(places, [100 * r.clipped_energy for r in rows], color="C3")
    bottom.set_ylabel("energy that base-only\nranges would clip (%)")
    bottom.set_xticks(list(places), [readers[r.name][0] for r in rows], rotation=90, fontsize=6)
    figure.savefig(path, dpi=120)

"""The table's results as JSON, and the page that is written from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from models import bases
from models import classifiers as encoders

from evidence.support_table.cells import EXPORTED, LAYERS, QUANTIZED, STREAMS, Cell
from runtimes.errors import InputError
from runtimes.parity.figures import BUDGETS

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE, RESULTS = DOCS / "SUPPORT.md", DOCS / "support.json"
ROUTES = {
    "dynamo": "`--exporter dynamo`, the default",
    "builder": "`--exporter builder`: onnxruntime-genai's model builder",
    "transformers": "`--exporter transformers`: `transformers.exporters`, for mixtures of experts",
    "optimum": "`--exporter optimum`: optimum-onnx, on transformers 4.57",
}
COLUMNS = (EXPORTED[0], *EXPORTED[1:], *QUANTIZED)

Results = dict[tuple[str, str, str], Cell]


def read_results(path: Path = RESULTS) -> Results:
    """Cells by (family, route, dtype); none without a file. Raises InputError for one that ``write_results`` did not write."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = [Cell(**{**row, "streams": tuple(row["streams"])}) for row in rows]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} does not hold results of the support table ({e}); delete it and run the table again") from None
    return {cell.key: cell for cell in cells}


def write_results(results: Mapping[tuple[str, str, str], Cell], path: Path = RESULTS) -> None:
    """One line a cell, in the table's order; atomically, as a run may be interrupted at any time."""
    order = {family: number for number, family in enumerate((*bases.FAMILIES, *encoders.CLASSIFIERS))}
    cells = sorted(results.values(), key=lambda c: (list(ROUTES).index(c.route), order.get(c.family, len(order)), COLUMNS.index(c.dtype)))
    lines = ",\n".join(json.dumps(asdict(cell)) for cell in cells)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f'{{"cells": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(partial, path)


def page(results: Mapping[tuple[str, str, str], Cell]) -> str:
    """The Markdown page. Every figure and reason is a result's; families that nobody ran are listed as such."""
    parts = [_introduction(results)]
    for route, title in ROUTES.items():
        cells = {key: cell for key, cell in results.items() if key[1] == route and key[0] not in encoders.CLASSIFIERS}
        parts.append(f"## {title}\n")
        parts.append(_route(cells, bases.FAMILIES) if cells else "Not run yet.\n")
    cells = {key: cell for key, cell in results.items() if key[0] in encoders.CLASSIFIERS}
    parts.append(_about_classifiers())
    parts.append(_route(cells, encoders.CLASSIFIERS) if cells else "Not run yet.\n")
    return "\n".join(parts)


def _about_classifiers() -> str:
    refused = ", ".join(route for route in ROUTES if route != encoders.ROUTE)
    return f"""## Encoders with a classification head: `--exporter {encoders.ROUTE}`

The other exporters ({refused}) are refused for classifiers, whatever the family. The bases have {LAYERS} layers of width
{bases.WIDTH} and {len(encoders.LABELS)} labels (`tests/models/classifiers.py`). The adapters are the decoders' two,
of which the tied one brings a head of its own, and a RED adapter with another head, which edits the block outputs of every token. A
figure is the worst of the base and the three adapters over one padded batch, single texts and more padding.
"""


def _introduction(results: Mapping[tuple[str, str, str], Cell]) -> str:
    dates = sorted({cell.date for cell in results.values()})
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    budgets = ", ".join(f"{name} {BUDGETS[name].logits:g}" for name in ("fp32", "fp16", "weight-only int8", "weight-only int4"))
    return f"""# Which families, through which exporter, at which precision

    $ PYTHONPATH=tests python -m evidence.support_table --route dynamo --family llama --dtype fp32 --results table.json
    [1/1] llama, dynamo
      fp32     ok 5.9e-07

Written by `PYTHONPATH=tests python -m evidence.support_table` ({when}); its results are [support.json](support.json). Do not edit
this page.

Every cell is a real run of `export`, and of `quantize` on the fp32 bundle for {", ".join(QUANTIZED)}, on a random model of
{LAYERS} layers of width {bases.WIDTH} (`tests/models/bases.py`), with two LoReFT adapters of rank 4: one tied at f2+l2 with
edits at every stream that the family shows, one untied at f1+l3 with edits at the block outputs. A figure is the largest logit error
relative to the largest logit of eager PyTorch; of a decoder, the worst of the base and both adapters over one forward, prefill and
decode, chunked prefill, single rows and padded batches. int8 and int4 are compared with eager PyTorch carrying the same dequantized
weights, at accuracy level 1. Budgets: {budgets}.

| cell | means |
|---|---|
| 5e-07 | exported at this parity |
| 5e-07 (t) | the same of the graph for `--target tensorrt`, run before there was another; its cache is copied |
| structure only | bfloat16: written and accepted by ONNX's checker; no CPU runs it |
| **wrong** 3e-01 \\[1\\] | misses a budget, which the note names: stopped by the parity gate, no bundle is written |
| no \\[1\\] | refused in one line, quoted below the table |
| . | not run yet |

Where fp32 is refused or wrong, the other precisions of that row are not tried. "Edits" says where adapters can stand: at the output of the
**b**lock, of its **a**ttention, of its **m**LP. "KV cache" says how it grows in the graph for `--target onnxruntime`, the default:
**in place** (one com.microsoft::GroupQueryAttention a layer), or **copied** at every step, as in every graph for
`--target tensorrt` and at bf16.
"""


def _route(cells: Mapping[tuple[str, str, str], Cell], known: Iterable[str]) -> str:
    notes: dict[str, int] = {}
    families = [family for family in known if any(key[0] == family for key in cells)]
    with_cache = any(cell.cache for cell in cells.values())
    lines = ["| family | edits | " + " | ".join(COLUMNS) + " |" + " KV cache |" * with_cache]
    lines.append("|---|---|" + "---|" * (len(COLUMNS) + with_cache))
    for family in families:
        row = {dtype: cell for (name, _, dtype), cell in cells.items() if name == family}
        lines.append(f"| {family} | {_edits(row.values(), notes)} | " + " | ".join(_cell(row.get(d), notes) for d in COLUMNS) + " |")
        if with_cache:
            lines[-1] += f" {_cache(tuple(row.values()), notes)} |"
    versions = sorted({", ".join(f"{k} {v}" for k, v in cell.versions.items()) for cell in cells.values()})
    told = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, "", *told, *([""] if told else []), "Versions: " + "; ".join(versions) + ".", ""])


def _edits(row: Iterable[Cell], notes: dict[str, int]) -> str:
    shown = next((cell for cell in row if cell.streams), None)
    if shown is None:
        return ""
    letters = " ".join(stream[0] for stream in STREAMS if stream in shown.streams)
    return f"{letters} {_note(shown.missing, notes)}" if shown.missing else letters


def _cache(row: Sequence[Cell], notes: dict[str, int]) -> str:
    """By the first column that has a graph: bfloat16's is always copied."""
    shown = next((cell for dtype in COLUMNS for cell in row if cell.dtype == dtype and cell.cache), None)
    if shown is None:
        return ""
    return f"{shown.cache} {_note(shown.copied, notes)}" if shown.copied else shown.cache


def _cell(cell: Cell | None, notes: dict[str, int]) -> str:
    if cell is None:
        return "."
    if cell.outcome == "ok":
        return f"{cell.relative:.0e}" + " (t)" * (cell.target == "tensorrt")
    if cell.outcome == "structure":
        return "structure only"
    if cell.outcome == "wrong":
        return f"**wrong** {cell.relative:.0e} {_note(cell.reason, notes)}"
    return ("no " if cell.outcome == "refused" else "**crash** ") + _note(cell.reason, notes)


def _note(reason: str, notes: dict[str, int]) -> str:
    return f"\\[{notes.setdefault(reason, len(notes) + 1)}\\]"

"""docs/quantization-quality.md and .png from the rows that quality.py measured: no figure in them is written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evidence.quality import LLAMA, LLAMA_CPP, Row, settings_of

PAGE, PICTURE, DATA = (f"quantization-quality.{end}" for end in ("md", "png", "json"))
GREY, BLUE, GRID = "#8a93a3", "#0b7285", "#e5e8ec"
NEAR = 1.02
"""Rows of at most this many times the bytes are neighbours."""
CLEARLY = 0.005
"""Nats by which a neighbour is better before a row is called worse."""
INTRODUCTION = """
What each scheme, method and block size keeps of a real model, beside llama.cpp's types of the same weights. This page is written by
[tests/evidence/quality.py](../tests/evidence/quality.py) from what it measured; `OUT/smollm2-fp32` and what else the command above takes
is made by

    PYTHONPATH=tests python -m models.relabel real-models/smollm2.gguf OUT/smollm2
    PYTHONPATH=tests python -m evidence.float_gguf real-models/smollm2.gguf OUT/smollm2 OUT/smollm2.gguf
    PYTHONPATH=tests python -m evidence.real_adapters train OUT/smollm2 OUT/tasks
    reft-export export -m OUT/smollm2 -a OUT/tasks/upper -a OUT/tasks/json -a OUT/tasks/sentiment -o OUT/smollm2-fp32
    PYTHONPATH=tests python -m evidence.quality llama OUT/smollm2.gguf OUT/smollm2-fp32 OUT/SmolLM2
    PYTHONPATH=tests python -m evidence.quality page OUT/SmolLM2

and Gemma 3 270M from `real-models/gemma3.gguf` likewise, without adapters: its scales and int8 weights are chosen on the base's golden rows
alone (2026-12-01; Q4_0, Q4_K_M and Q8_0 the day before). Its speed was measured by itself, twice on an idle machine that was slow that
day, and the lesser figure stands: what is in it is comparable, and nothing with SmolLM2's. A token of ours takes 1.4 to 1.7 times
what one takes llama.cpp at a like size. Its embedding has 168 of 268 million weights, so that
`-p int4` makes "int4 32, embedding int4 + int8, auto" of it: smaller than "int4 32", and it loses less. SmolLM2's rows were measured with
tokenizer.json as the base has it; bundles now hold it without its indentation, which is 1.9 MB less.

- The bases come out of 4-bit files. Their channels are permuted first, which leaves the function as it is and takes every block of 32 off
  the files' own grid: a method that only finds that grid again would look perfect.
- Perplexity is over review sentences (vaderSentiment 0.5), each alone: short texts, so it is high for every row. The figure that counts is
  the loss against the float model, in nats a token.
- Bytes are those of the bundle (graph, weights, tokenizer) without its golden arrays, and of the whole GGUF file.
- Decode: milliseconds a token behind 64 columns, one thread, the least of 24, on a machine that was not idle: of rows that are near each
  other no order follows. Quantized for TensorRT, a scheme runs in float here, and its speed says nothing.
- Retention: what each adapter keeps of its training on its own probes ([concepts](concepts.md#parity)). The gates of `quantize` are left
  out, and so are its mends: more bits below 0.9, and training on what ships below 0.8 or where more tokens fell than rose.
- 5,264 tokens are 200 sentences; differences of 0.01 nats are within what another 200 would change. 48,592 are 2,000
  (2026-11-30): of a bundle without adapters, so that scales and int8 weights were chosen on the base's golden rows alone; speed was not
  measured.
- llama.cpp's and our weight-only products round activations to int8 while they multiply; at accuracy level 1 they do not.
- "int4 32": weights in int4, blocks of 32, symmetric, scales by `--method imatrix` on the golden rows of base and adapters, no review among
  them; the embedding, and the head that is tied to it, in int8. "rtn" is onnxruntime's. "+ int8, 102 MB": the weights that lose most for
  each byte are int8, until all weights take 102 MB. llama.cpp's types are its own, without an importance matrix.
- A base alone is calibrated on its golden rows, 104 tokens of Gemma 3. 1,024 tokens more that the base draws itself at temperature 1
  did not help both bases: "int4 32" lost 0.020 ± 0.011 nats more of Gemma 3, and 0.014 ± 0.008 less of SmolLM2. Of Gemma 3 the drawn
  tokens alone lost 0.028 ± 0.012 more, 512 greedy ones 0.038 ± 0.013; golden rows alone whose first token counts eightfold, 0.009 ± 0.005
  less (2026-12-01; eager PyTorch on 48 of the sentences, 1,290 tokens; standard errors of the differences from golden rows alone).
"""


def write(models: Sequence[tuple[str, Sequence[Row]]], docs: Path) -> None:
    """The page, its picture, and the rows themselves, of which a test makes the page again."""
    rows = {model: [asdict(row) for row in rows] for model, rows in models}
    (docs / DATA).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (docs / PAGE).write_text(page(models), encoding="utf-8")
    plot(models, docs / PICTURE)


def read(docs: Path) -> list[tuple[str, list[Row]]]:
    rows = json.loads((docs / DATA).read_text(encoding="utf-8"))
    return [(model, [Row(**row) for row in of]) for model, of in rows.items()]


def page(models: Sequence[tuple[str, Sequence[Row]]]) -> str:
    text = ["# Bytes against perplexity\n", *_opening(models[0][1]), INTRODUCTION.lstrip()]
    text.append(f"![bytes against perplexity]({PICTURE})\n")
    for model, rows in models:
        text += [f"\n## {model}\n", *_table(rows), *_against_llama(rows), *(_missing(rows) if model == models[0][0] else ())]
    return "\n".join(text).rstrip() + "\n"


def _opening(rows: Sequence[Row]) -> list[str]:
    lines = ["    $ PYTHONPATH=tests python -m evidence.quality make OUT/smollm2-fp32 OUT/smollm2 OUT/SmolLM2"]
    return [*lines, *(f"    {row}" for row in rows[:3]), "    ...\n"]


def _table(rows: Sequence[Row]) -> list[str]:
    least = min(row.nats for row in rows if row.group in ("float", LLAMA_CPP) and _is_float(row))
    lines = [
        f"{rows[0].tokens:,} tokens.\n",
        "| | MB | perplexity | loss, nats | decode ms | retention | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.group == LLAMA_CPP, row.bytes)):
        speed = "" if row.decode_ms is None else f"{row.decode_ms:.1f}"
        retention = ", ".join(f"{name} {share:.2f}" for name, share in (row.retention or {}).items())
        told = "; ".join(filter(None, (worse_than(row, rows), row.note)))
        lines.append(
            f"| {row.name} | {row.bytes / 1e6:.1f} | {row.perplexity:.2f} | {row.nats - least:+.4f} | {speed} | {retention} | {told} |"
        )
    return lines


def _is_float(row: Row) -> bool:
    return row.name in ("fp32", "llama.cpp F32")


def worse_than(row: Row, rows: Sequence[Row]) -> str:
    """The best of our other rows that is no larger and clearly better, in words. Accuracy level 1 is another row's bundle, run slowly."""
    if row.group == LLAMA_CPP:
        return ""
    others = [
        o
        for o in rows
        if not o.name.endswith("accuracy level 1")
        and o.group != LLAMA_CPP
        and o.name != row.name
        and o.bytes <= NEAR * row.bytes
        and o.nats < row.nats - CLEARLY
    ]
    if not others:
        return ""
    best = min(others, key=lambda o: o.nats)
    return f"worse than {best.name} ({best.bytes / 1e6:.0f} MB)"


def curve_at(rows: Sequence[Row], size: float) -> float | None:
    """Nats of llama.cpp's types at so many bytes: straight lines between those that no smaller type beats, as far as they reach."""
    points: list[tuple[int, float]] = []
    for size_of, nats in sorted((row.bytes, row.nats) for row in rows if row.group == LLAMA_CPP and not _is_float(row)):
        if not points or nats < points[-1][1]:
            points.append((size_of, nats))
    for (left, high), (right, low) in zip(points, points[1:], strict=False):
        if left <= size <= right:
            return high + (low - high) * (size - left) / (right - left)
    return None


def _against_llama(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in sorted(rows, key=lambda row: row.bytes):
        at = None if row.group == LLAMA_CPP else curve_at(rows, row.bytes)
        if at is not None:
            side = "below" if row.nats <= at else "above"
            lines.append(f"- {row.name}: {abs(row.nats - at):.4f} nats {side} llama.cpp's curve at {row.bytes / 1e6:.1f} MB")
    return (
        [
            "\nBetween llama.cpp's smallest and largest type, against the line through those of its types that no smaller one beats:\n",
            *lines,
        ]
        if lines
        else []
    )


def _missing(rows: Sequence[Row]) -> list[str]:
    known = [*settings_of(), *(f"{LLAMA_CPP} {kind}" for kind in LLAMA)]
    left = [name for name in known if name not in {row.name for row in rows}]
    return [f"\nNot measured yet: {'; '.join(left)}."] if left else []


def plot(models: Sequence[tuple[str, Sequence[Row]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for (model, rows), axes in zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True):
        _draw(axes, model, rows)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _draw(axes: Any, model: str, rows: Sequence[Row]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    shown = [row for row in rows if not _is_float(row)]
    others = sorted((row.bytes / 1e6, row.perplexity, row.name) for row in shown if row.group == LLAMA_CPP)
    axes.plot([x for x, *_ in others], [y for _, y, _ in others], "o-", color=GREY, label=LLAMA_CPP)
    ours = [(row.bytes / 1e6, row.perplexity, row.name) for row in shown if row.group != LLAMA_CPP]
    axes.plot([x for x, *_ in ours], [y for _, y, _ in ours], "o", color=BLUE, label="reft-export")
    for x, y, name in (*others, *ours):
        axes.annotate(name.removeprefix("llama.cpp "), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
    for row in rows:
        if row.name == "fp32":
            axes.axhline(row.perplexity, color=BLUE, linewidth=0.8, linestyle=":", label=f"float32 ({row.perplexity:.1f})")
    points = [*others, *ours]
    least, highest = min(row.perplexity for row in rows), max(y for _, y, _ in points)
    smallest, largest = min(x for x, *_ in points), max(x for x, *_ in points)
    axes.set(title=model, xlabel="MB", ylabel="perplexity")
    axes.set_ylim(least * 0.98, min(highest, least * 1.5) * 1.02)
    axes.set_xlim(right=min(largest, 3 * smallest) * 1.05)
    axes.legend(frameon=False)

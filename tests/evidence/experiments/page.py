"""docs/experiments.md and its picture from docs/experiments.json: no figure in them is written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from evidence.experiments.plots import PICTURE, plot
from evidence.experiments.rows import Row, read
from evidence.experiments.setups import LOREFT, setups
from evidence.experiments.verdicts import Verdict, verdicts

PAGE = "experiments.md"
TITLE = "# The ReFT paper in miniature\n"
INTRODUCTION = """
What [the ReFT paper](https://arxiv.org/abs/2404.03592) says of models fifty times as large, tried on SmolLM2-135M-Instruct. This page is
written by [tests/evidence/experiments](../tests/evidence/experiments) from what it measured, `docs/experiments.json`; rows that are there
are not measured again. LoRA is peft's 0.21.2 (`pip install peft`), which nothing else here needs.

- **Sentiment**: "Is this review positive or negative?", film reviews of 5 to 16 words, half of each kind, 320 to train on. Held out are 200
  other film reviews, and 200 product reviews: another source. Accuracy is how often the right label is the likelier, 50 % by chance; one
  line is half a point, and the standard error of an accuracy near 90 % is 2 points. A loss is in nats a token of the completion, the end
  token among them. "Chosen by" are 80 more film reviews, of learning rates. Off task are the style's 60 questions with their answers in
  sentence case.
  `python -m evidence.experiments lines real-models OUT` writes them, for
  `train -m real-models/smollm2.gguf -d OUT/train.jsonl --eval-data OUT/products.jsonl --metric accuracy`.
- **Style**: the quickstart's answers in upper case, 48 exchanges to train on; held out are 12, and 20 prompts about other things, answered
  greedily in 24 tokens.
- **Equal steps**: every row of a section takes the same batches in the same order at one seed, by one loop: AdamW, a rate that rises over
  a tenth of the steps and falls to 0, gradients cut to 1, the loss of `train`. LoReFT, unless a row says otherwise: rank 4, layers
  4;10;18;24, positions `l1`, rate 2e-3, 60 steps of 8. LoRA: rank 8 (alpha 16, no dropout) in every layer.
- **Seconds** are the processor's in the training steps, one thread, on a machine that other work shared: compare rows by what they are made
  of, not by a tenth. With `l1` the base's keys and values before the edit are [computed once](train.md#what-a-step-computes), for all rows
  together, and their seconds are not in a row's. **Memory** is by how much the process grew at most over what it was before the first step.
- One seed unless a row says so. 200 lines and one seed tell 5 points apart, not 2.
"""
SECTIONS = (
    (
        "sentiment",
        "Review sentiment at equal steps",
        "Three seeds, each one's accuracy in brackets. LoReFT at the rate that was set beforehand, and at the one that was best for seed "
        "1 on other lines ([below](#learning-rates)); LoRA at one rate, whose others were not run: that is in LoReFT's favour. "
        "Differences below 3 points are within what 200 other lines would change.",
    ),
    (
        "terms",
        "The terms of the formula",
        "LoReFT is h + R^T (W h + b - R h). `noreft` lets go of R's orthonormal rows, `direft` also of what is subtracted; `consreft` sets "
        "the subspace to constants, `lobireft` only adds a vector; `red` scales and shifts every channel. All at LoReFT's rate.",
    ),
    (
        "rate",
        "Learning rates",
        "On 80 more film reviews. The guide's rates are 5e-4 to 1e-3, for many more steps.",
    ),
    (
        "form",
        "Other places for as many parameters",
        "At most a twentieth of LoRA's, on the lines that learning rates are chosen by: what is edited, and where. Rank 4 in layers "
        "4;10;18;24 unless a row says otherwise.",
    ),
    ("rank", "Rank", ""),
    ("layers", "Layers", ""),
    ("positions", "Positions, of sentiment", ""),
    ("style", "Style: positions, tied and untied", "40 steps of 4, at a rate of 4e-3 (LoRA 1e-3)."),
    (
        "memory",
        "A text in one edit of rank 1",
        "One edit of layer 14 at the last prompt token, 1,153 numbers, trained on one text, the beginning of Alice in Wonderland, which is "
        "then said greedily, its end included: 120 steps at 1e-2. The paper takes 1,000.",
    ),
    ("few", "From five examples", "40 steps of all five at once."),
    (
        "strength",
        "Strength against effect and fluency",
        "The edit of the style row `f5+l5`, trained at strength 1, times another strength. Fluency: what the base itself loses on the "
        "answers in sentence case, and how many of an answer's words are different ones.",
    ),
)
PERCENT: Callable[[float], str] = "{:.1f} %".format
NATS: Callable[[float], str] = "{:.3f}".format
COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "films": ("films", lambda x: PERCENT(100 * x)),
    "products": ("products", lambda x: PERCENT(100 * x)),
    "choosing": ("chosen by", lambda x: PERCENT(100 * x)),
    "films loss": ("films, loss", NATS),
    "products loss": ("products, loss", NATS),
    "choosing loss": ("chosen by, loss", NATS),
    "off task loss": ("off task, loss", NATS),
    "upper": ("in upper case", lambda x: PERCENT(100 * x)),
    "held loss": ("held out, loss", NATS),
    "recalled": ("tokens recalled", "{:.0f}".format),
    "tokens": ("of", "{:.0f}".format),
    "base loss": ("the base's loss", NATS),
    "distinct words": ("different words", lambda x: PERCENT(100 * x)),
    "train loss": ("loss of the last 10 steps", NATS),
}
"""A figure's heading and form, in the order of a table's columns."""


def write(docs: Path) -> None:
    rows = list(read(docs).values())
    (docs / PAGE).write_text(page(rows), encoding="utf-8")
    plot(rows, docs / PICTURE)


def page(rows: Sequence[Row]) -> str:
    text = [
        TITLE,
        *_opening(rows),
        INTRODUCTION.lstrip(),
        *_claims(verdicts(rows)),
        f"\n![parameters against accuracy, and strength]({PICTURE})",
    ]
    for section, title, said in SECTIONS:
        of = _rows_of(section, rows)
        if of:
            text += [f"\n## {title}\n", *([f"{said}\n"] if said else []), *_table(of), *_answers(of)]
    return "\n".join([*text, *_missing(rows)]).rstrip() + "\n"


def _opening(rows: Sequence[Row]) -> list[str]:
    lines = ["    $ PYTHONPATH=tests python -m evidence.experiments run real-models/smollm2.gguf real-models OUT"]
    return [*lines, *(f"    {row}" for row in rows[:2]), "    ...\n"]


def _claims(found: Sequence[Verdict]) -> Iterator[str]:
    yield "| what is claimed | by | here | |\n|---|---|---|---|"
    for each in found:
        yield f"| {each.claim} | {each.source} | {each.here} | {each.word} |"


def _rows_of(section: str, rows: Sequence[Row]) -> list[Row]:
    """With the row that all of a section's are held against, which another section has."""
    reference = {"terms": "LoReFT r4", "rank": "LoReFT r4", "layers": "LoReFT r4", "positions": "LoReFT r4", "rate": ""}
    beside = [r for r in rows if r.setup.section == "sentiment" and section in reference]
    own = [r for r in rows if r.setup.section == section]
    if section == "rate":
        beside = [r for r in beside if r.setup.seed == LOREFT.seed and r.setup.steps and r.setup.name in ("LoReFT r4", "LoRA q, v")]
    else:
        beside = [r for r in beside if r.setup.name == reference[section]] if section in reference else []
        if section != "terms":
            beside = [r for r in beside if r.setup.seed == LOREFT.seed]
    return [*beside, *own] if own else []


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of one name and of several seeds are one line: the mean, and each seed's accuracy."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(_name(row), []).append(row)
    section = rows[-1].setup.section
    measured = {name for row in rows if row.setup.section == section for name in row.figures}
    figures = [name for name in COLUMNS if name in measured and (section in ("rate", "form") or not name.startswith("choosing"))]
    trained = any(row.setup.steps for row in rows)
    heads = [*(COLUMNS[name][0] for name in figures), *(("parameters", "processor s", "memory MB") if trained else ())]
    yield "| | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|"
    for name, seeds in named.items():
        cells = [_cell(figure, [row.figures[figure] for row in seeds if figure in row.figures]) for figure in figures]
        if trained:
            cost = [f"{fmean(row.seconds for row in seeds):.0f}", f"{max(row.peak_mb for row in seeds):.0f}"]
            cells += [f"{seeds[0].parameters:,}", *(cost if seeds[0].setup.steps else ("", ""))]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _name(row: Row) -> str:
    rate = f", rate {row.setup.lr:g}" if row.setup.section == "sentiment" and row.setup.steps else ""
    return f"{row.setup.name}{rate}"


def _cell(figure: str, values: Sequence[float]) -> str:
    if not values or not all(map(math.isfinite, values)):
        return ""
    form = COLUMNS[figure][1]
    each = f" ({', '.join(form(value).removesuffix(' %') for value in values)})" if len(values) > 1 and "loss" not in figure else ""
    return form(fmean(values)) + each


def _answers(rows: Sequence[Row]) -> Iterator[str]:
    shown = [(row.setup.name, row.said[0]) for row in rows if row.said]
    if shown:
        yield "\nThe first answer of each:\n"
        yield from (f"- {name}: {' '.join(said.split())}" for name, said in shown)


def _missing(rows: Sequence[Row]) -> list[str]:
    done = {row.setup.key for row in rows}
    left: dict[str, list[str]] = {}
    for setup in setups():
        if setup.key not in done:
            left.setdefault(setup.section, []).append(f"{setup.name}, seed {setup.seed}")
    titles = {section: title for section, title, _ in SECTIONS}
    lines = [f"- {titles[section]}: {'; '.join(names)}" for section, names in left.items()]
    return ["\n## Not run\n", *lines, *NOT_WRITTEN]


NOT_WRITTEN = (
    "- Two orthogonal edits together against each alone ([what is proven of them](train.md#out-of-each-others-way)).",
    "- Perplexity of running text off the task: an edit of a prompt's tokens does not act on text without a prompt; what is measured are",
    "  other questions' answers.",
    "- Other instruction styles; other bases.",
)

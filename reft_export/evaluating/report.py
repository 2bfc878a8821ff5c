"""An evaluation for people and for programs: a table, report.md, evaluation.json, evaluation.png, and answers.jsonl, a line an example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_export.evaluating.evaluation import Evaluation, Row
from reft_export.evaluating.intervals import RESAMPLES, SEED, Interval
from reft_export.evaluating.settings import EvaluationSettings
from runtimes.files.folders import marker
from runtimes.files.records import to_json

RECORD_FILE = "evaluation.json"
"""By which --force knows a folder of this project's (runtimes/files/folders.py)."""
PAGE_FILE, PICTURE_FILE, ANSWERS_FILE = "report.md", "evaluation.png", "answers.jsonl"
SHOWN, SHOWN_CHARACTERS = 5, 300
"""Lines that the page shows of those that the rows answer differently, and how much of a text."""


def short(metric: str) -> str:
    """A function without its file."""
    return metric.rpartition(":")[2]


Column = tuple[str, Sequence[str]]
"""(name, a cell a row)."""


def who_columns(found: Evaluation) -> list[Column]:
    """That say which model a row is."""
    who = [row.who for row in found.rows]
    return [
        ("artifact", [each.artifact for each in who]),
        ("precision", [each.precision for each in who]),
        ("adapter", [each.adapter or "" for each in who]),
    ]


def answer_columns(found: Evaluation) -> list[Column]:
    """Shares of the lines and their differences from the first row's, in percent, with their 95 % intervals."""
    columns: list[Column] = []
    for name in found.held_out.metrics:
        shares = [row.shares[name] for row in found.rows]
        columns.append((short(name), [f"{100 * each.interval.value:.1f} {_bounds(each.interval, 100, 0)}" for each in shares]))
        columns += _difference(found, [each.difference for each in shares], 100, (1, 0))
    return columns


def likelihood_columns(found: Evaluation) -> list[Column]:
    """How likely the data's own answers are, in nats a token, and labels, in nats a text, with 95 % intervals; and what it all took."""
    rows = found.rows
    columns: list[Column] = [("NLL", [f"{row.loss.value:.3f} {_bounds(row.loss, 1, 2)}" for row in rows])]
    columns += _difference(found, [row.loss_difference for row in rows], 1, (2, 2))
    classified = found.held_out.gold is not None
    if not classified:
        columns.append(("perplexity", [f"{row.perplexity:.2f}" for row in rows]))
    figures = {
        "retention": [row.retention for row in rows],
        "macro F1": [row.macro_f1 for row in rows],
        "agreement": [row.agreement for row in rows],
    }
    for name, values in figures.items():
        if any(value is not None for value in values):
            columns.append((name, ["" if value is None else f"{value:.2f}" for value in values]))
    if not classified:
        columns.append(("new tokens", [str(row.new_tokens) for row in rows]))
    columns.append(("seconds", [f"{row.seconds:.1f}" for row in rows]))
    return columns


def table_of(*columns: Column) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(header, rows)."""
    return tuple(name for name, _ in columns), list(zip(*(cells for _, cells in columns), strict=True))


def _difference(found: Evaluation, intervals: Sequence[Interval | None], scale: float, digits: tuple[int, int]) -> list[Column]:
    """None of a table of one row. ``digits``: of the difference, which is exact for shares, and of its bounds."""
    return [("vs first", [_signed(each, scale, digits) for each in intervals])] if len(found.rows) > 1 else []


def _signed(interval: Interval | None, scale: float, digits: tuple[int, int]) -> str:
    if interval is None:
        return ""
    low, high = (f"{scale * each:+.{digits[1]}f}" for each in (interval.low, interval.high))
    return f"{scale * interval.value:+.{digits[0]}f} [{low}, {high}]"


def _bounds(interval: Interval, scale: float, digits: int) -> str:
    return f"[{scale * interval.low:.{digits}f}, {scale * interval.high:.{digits}f}]"


def note_lines(found: Evaluation) -> list[str]:
    """What the figures are, below the table."""
    held_out = found.held_out
    lines = [held_out.note()]
    if held_out.metrics:
        lines.append("shares in percent with Wilson's 95 % interval")
    unit = "token" if held_out.gold is None else "text"
    lines.append(
        f"NLL in nats a {unit}; its interval, and those of differences, by a bootstrap over lines ({RESAMPLES} resamples, seed {SEED}), "
        "paired with the first row"
    )
    if held_out.truncated:
        what = "" if held_out.gold is not None else ", and their answers with them"
        lines.append(f"{held_out.truncated} lines were cut to the shortest context or --max-length{what}")
    return lines


def record_of(found: Evaluation, settings: EvaluationSettings) -> dict[str, Any]:
    """evaluation.json: as JSON has it."""
    held_out = found.held_out
    return {
        "data": to_json(held_out.files),
        "lines": len(held_out),
        "truncated": held_out.truncated,
        **held_out.record(),
        "settings": to_json(settings),
        "intervals": {"level": 0.95, "shares": "wilson", "others": "bootstrap over lines, paired", "resamples": RESAMPLES, "seed": SEED},
        "rows": [_row_record(row, classified=held_out.gold is not None) for row in found.rows],
    }


def _row_record(row: Row, *, classified: bool) -> dict[str, Any]:
    who = row.who
    if classified:
        own = {"macro_f1": row.macro_f1, "agreement": row.agreement}
    else:
        own = {"perplexity": row.perplexity, "new_tokens": row.new_tokens}
    return {
        "artifact": who.artifact,
        "precision": who.precision,
        "adapter": who.adapter,
        "model": who.model,
        "metrics": {
            name: {"right": share.right, **to_json(share.interval), "difference": _or_null(share.difference)}
            for name, share in row.shares.items()
        },
        "nll": {**to_json(row.loss), "difference": _or_null(row.loss_difference)},
        "retention": row.retention,
        **own,
        "seconds": row.seconds,
    }


def _or_null(interval: Interval | None) -> Any:
    return None if interval is None else to_json(interval)


def answer_records(found: Evaluation) -> list[dict[str, Any]]:
    """answers.jsonl: every line with what each row makes of it, side by side."""
    lines = range(len(found.held_out))
    return [{**found.held_out.told(line), "rows": [_said(found, row, line) for row in range(len(found.rows))]} for line in lines]


def _said(found: Evaluation, row: int, line: int) -> dict[str, Any]:
    measured, held_out = found.measured[row], found.held_out
    return {
        "artifact": measured.who.artifact,
        "adapter": measured.who.adapter,
        **({"answer": measured.answers[line]} if measured.answers else {}),
        **({"chosen": held_out.choice(measured.chosen[line])} if measured.chosen else {}),
        **{name: bool(right[line]) for name, right in measured.right.items()},
        "nll": float(measured.losses[line]),
        **({} if held_out.gold is not None else {"tokens": len(measured.likelihoods[line])}),
    }


def write_report(found: Evaluation, settings: EvaluationSettings, folder: Path) -> None:
    """The files of the module's first line, into a folder that is being made; the picture where matplotlib is there. Raises OSError."""
    from reft_export.evaluating.picture import draw

    answers = answer_records(found)
    _write(folder / ANSWERS_FILE, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers))
    drawn = find_spec("matplotlib") is not None
    if drawn:
        draw(found, folder / PICTURE_FILE)
    _write(folder / PAGE_FILE, page(found, answers, picture=drawn))
    _write(marker(folder, RECORD_FILE), json.dumps(record_of(found, settings), ensure_ascii=False, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def page(found: Evaluation, answers: Sequence[Mapping[str, Any]], *, picture: bool) -> str:
    """report.md."""
    files = ", ".join(f"{each.file} (sha256 {each.sha256[:12]})" for each in found.held_out.files)
    parts = [
        f"# Evaluation on {_inline(files)}",
        _table(*table_of(*who_columns(found), *answer_columns(found), *likelihood_columns(found))),
    ]
    parts += ["\n".join(f"- {line}" for line in note_lines(found))]
    parts += [f"![the same figures]({PICTURE_FILE})"] if picture else []
    differing = found.differing
    if len(found.rows) > 1 and found.held_out.metrics:
        whom = "artifacts" if found.repeats else "rows"
        parts.append(f"## Lines that the {whom} answer differently: {len(differing)} of {len(answers)}")
        parts += [_line(answers[line]) for line in differing[:SHOWN]]
        parts.append(f"All lines: [{ANSWERS_FILE}]({ANSWERS_FILE}).")
    return "\n\n".join(parts) + "\n"


def _line(record: Mapping[str, Any]) -> str:
    rows = []
    for said in record["rows"]:
        verdicts = [key for key, value in said.items() if value is True]
        answer = said.get("answer", said.get("chosen", ""))
        rows.append((said["artifact"], said["adapter"] or "", _text(answer), ", ".join(map(short, verdicts))))
    asked = f"**{_inline(record['line'])}** {_text(record['prompt'])}\n\nexpected: {_text(record['expected'])}"
    return f"{asked}\n\n{_table(('artifact', 'adapter', 'answer', 'right by'), rows)}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "&#124;") for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    """On one line, and as it is: neither HTML nor Markdown of a model's is to be rendered."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " .."
    return _inline(" ".join(cut.split()))


def _inline(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{each}" if each in "\\`*_[]#" else each for each in escaped)

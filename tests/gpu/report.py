"""What the stages came to, as ``gpu.json`` and as the tables of ``gpu.md``; both are written again after every stage."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.process import ROOT

JSON_FILE, PAGE_FILE, LOG_FILE = "gpu.json", "gpu.md", "gpu.log"
PASSED, READY, FAILED, SKIPPED = "passed", "ready", "failed", "skipped"
"""``ready`` is a dry form's: everything up to the launch was done."""
NOT_REACHED = "not reached"
MACHINE = ("card", "compute capability", "driver", "CUDA", "date", "commit")
"""Of the machine's facts, those in the page's first table; the rest is in the JSON."""
CASE_HEADER = (
    "op",
    "type",
    "tokens",
    "edited",
    "width",
    "rank",
    "in place",
    "workspace",
    "us",
    "GB/s",
    "of the copy",
    "of an empty kernel",
    "goal",
)


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    stage: str
    result: str
    summary: str
    """What was seen, or why it failed or was skipped: one line."""
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Report:
    """One run of the script. ``names``: all of its stages, in order."""

    dry: bool
    names: Sequence[str]
    machine: dict[str, Any]
    stages: list[StageRecord] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        return [record.stage for record in self.stages if record.result == FAILED]

    def counts(self) -> str:
        """How many stages came to what, in one line."""
        counted = Counter(record.result for record in self.stages)
        told = ", ".join(f"{counted[result]} {result}" for result in (PASSED, READY, FAILED, SKIPPED) if counted[result])
        return f"{len(self.stages)} of {len(self.names)} stages{': ' if told else ''}{told}"

    def write(self, folder: Path) -> None:
        """Both files, each in one step: a run that is killed leaves what it has seen."""
        told = {"dry": self.dry, "machine": self.machine, "stages": [asdict(record) for record in self.stages]}
        finite = json.loads(json.dumps(told), parse_constant=str)  # JSON has no NaN, and a kernel or a training may come to one
        _replace(folder / JSON_FILE, json.dumps(finite, indent=1, allow_nan=False) + "\n")
        _replace(folder / PAGE_FILE, self.page())

    def page(self) -> str:
        title = "# Dry form: nothing was launched" if self.dry else f"# On a GPU: {self.machine['card']}"
        command = f"    $ tests/gpu/run.sh OUT{' --dry' if self.dry else ''}\n    {self.counts()}"
        reached = {record.stage: record for record in self.stages}
        rows = [_stage_row(name, reached.get(name)) for name in self.names]
        cases = [case for record in self.stages for case in record.figures.get("cases", [])]
        parts = [
            title,
            command,
            "Written by `tests/gpu/run.sh`; every figure is in the JSON beside this page.",
            _table(MACHINE, [[_text(self.machine.get(name)) for name in MACHINE]]),
            _table(("stage", "result", "seconds", "seen, or why not"), rows),
        ]
        if cases:
            parts.append(_table(CASE_HEADER, map(_case_row, cases)))
        return "\n\n".join(parts) + "\n"


def _replace(path: Path, text: str) -> None:
    text = text.replace(f"{ROOT}/", "")  # the files are committed, and where a clone lies is nobody's business
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _stage_row(name: str, record: StageRecord | None) -> Sequence[str]:
    if record is None:
        return (name, NOT_REACHED, "", "")
    return (name, record.result, f"{record.seconds:.1f}", record.summary)


def _case_row(case: Mapping[str, Any]) -> Sequence[str]:
    """Cells of a case of the benchmark; what was not measured is left empty."""
    edit = [case[name] for name in ("op", "dtype", "tokens", "edited", "width")]
    goal = "" if case["goal"] is None else f"{case['goal']}: {_verdict(case['met'])}"
    return [
        *map(str, edit),
        _text(case["rank"]),
        "yes" if case["in_place"] else "no",
        "" if case["workspace"] else "none",
        *(_number(case[name], form) for name, form in (("us", ".2f"), ("gb_per_s", ".0f"), ("of_copy", ".2f"), ("of_empty", ".2f"))),
        goal,
    ]


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

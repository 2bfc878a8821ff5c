"""A row: what it was, what was measured; and the file that keeps rows as they are measured, so that the work may be cut anywhere."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from evidence.experiments.setups import Setup

DATA = "experiments.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    setup: Setup
    figures: Mapping[str, float]
    """By name; a figure in percent or nats, as the page says."""
    parameters: int = 0
    seconds: float = 0.0
    """Of the processor, in the training steps."""
    peak_mb: float = 0.0
    day: str = field(default_factory=lambda: datetime.date.today().isoformat())
    said: Sequence[str] = ()
    """Some answers."""

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items() if not name.endswith("loss"))
        return f"{self.setup.key}: {figures}; {self.parameters:,} parameters, {self.seconds:.0f} s"


def read(docs: Path) -> dict[str, Row]:
    path = docs / DATA
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = [Row(**{**each, "setup": Setup(**each["setup"]), "said": tuple(each["said"])}) for each in found]
    return {row.setup.key: row for row in rows}


def keep(docs: Path, row: Row) -> None:
    """Beside those that are there; one of the same key goes."""
    rows = read(docs) | {row.setup.key: row}
    path = docs / DATA
    part = path.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(json.dumps(asdict(each)) for each in rows.values()) + "\n]\n", encoding="utf-8")
    part.replace(path)

"""Activation ranges for a bundle: from prompts, with the edits on, or from a file of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.quantize import Ranges
from calibration.settings import QuantizationSettings
from reft_export.bundling import Report
from runtimes.bundle import Bundle, CalibrationRecord
from runtimes.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """``data``: prompts to run; ``ranges``: the file of an earlier run. One of the two."""

    data: Path | None = None
    ranges: Path | None = None


def check_request(request: CalibrationRequest | None, settings: QuantizationSettings, bundle: Bundle) -> None:
    """Raises CalibrationError where a scheme needs ranges and has none, or has some and needs none."""
    static = settings.kind.activations == "static"
    if static and request is None:
        raise CalibrationError(f"--scheme {settings.scheme} fixes activation ranges; pass --calibrate DATA.jsonl")


def steered_ranges(
    bundle: Bundle, model: str, output: Path, request: CalibrationRequest, report: Report
) -> tuple[Ranges, CalibrationRecord]:
    raise NotImplementedError

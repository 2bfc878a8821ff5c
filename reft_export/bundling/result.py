"""What an export or a quantization says of the bundle that it made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from calibration.quantize import QuantizedGraph
from calibration.settings import QuantizationSettings
from calibration.weights import WeightError
from reft_export.evaluation.quantization_report import QuantizationReport
from runtimes.artifacts.manifest import CalibrationRecord, Manifest, Quantization
from runtimes.parity.figures import ParityReport


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    manifest: Manifest
    parity: ParityReport | None
    """None where this machine cannot run the graph (bfloat16 on onnxruntime's CPU provider); see ``note``."""
    weight_errors: tuple[WeightError, ...]
    note: str = ""
    report: QuantizationReport | None = None
    """What quantization did, variant by variant; None for an export."""
    refitted: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the adapters that a refit wrote, by name."""


def quantization_record(
    settings: QuantizationSettings, quantized: QuantizedGraph, *, calibration: CalibrationRecord | None = None
) -> Quantization:
    return Quantization(
        scheme=settings.scheme,
        bits=settings.bits,
        block_size=settings.block_size,
        symmetric=settings.symmetric,
        accuracy_level=settings.accuracy_level,
        method=settings.method,
        embeddings=quantized.embeddings,
        kept=quantized.float_weights,
        int8=quantized.int8,
        cache=settings.cache,
        origin=quantized.origin,
        calibration=calibration,
    )

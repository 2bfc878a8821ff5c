"""``reft-export quantize``: a float bundle to a quantized one, adapters and all, without exporting again.

What can be refused is refused before ``assemble.py``, which does the work, is imported: with it come torch and transformers, which take
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.settings import QuantizationSettings
from reft_export.base.adapters import folders_of
from reft_export.evaluation.quantization_report import Yardsticks
from reft_export.parity.quality import QualityGate
from reft_export.quantizing.settings import CalibrationRequest, QuantizeRequest, RefitSettings, check_bundle, check_task
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import CalibrationError
from runtimes.files.claims import sole_writer
from runtimes.files.folders import check_destination

if TYPE_CHECKING:
    from reft_export.bundling.files import Report
    from reft_export.bundling.result import ExportResult


def quantize_bundle(
    source: Path,
    model: str,
    output: Path,
    settings: QuantizationSettings,
    *,
    calibration: CalibrationRequest | None = None,
    refit: RefitSettings | None = None,
    yardsticks: Yardsticks = Yardsticks(),
    compare: bool = False,
    mixed: bool = False,
    budget_mb: float | None = None,
    quality: QualityGate = QualityGate(),
    adapters: Sequence[Path] = (),
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Writes the quantized bundle to ``output``, atomically; ``model`` is the base it was made from, for the eager reference.

    ``calibration``: the prompts or the ranges that a scheme with fixed activation ranges needs; what was collected stays beside the
    output. ``compare``: the report also shows what ranges of the base alone would have given. ``refit``: adapters to re-train on the
    quantized weights. ``quality``: what quantization may cost the adapters; where it costs more, what was measured to help is done first.
    ``adapters``: folders of the bundle's adapters, which can then be trained on their probes where that is what helps.
    ``yardsticks``: what the report measures beyond the golden inputs; with any, the float bundle is measured too.
    ``mixed``: the most sensitive of int4's weights in int8; ``budget_mb``: for the whole bundle, in MB (10^6 bytes), about.
    ``accept_base``: a base that differs from the bundle's in its config alone will do, and is the new bundle's.

    Raises CalibrationError for a bundle that the scheme cannot start from and for bad calibration data, AdapterError for another base and
    for adapters that are not the bundle's, ParityError for a missed budget and for adapters that lost too much.

    Of weights [K, N], ``settings.block_size`` counts the values along K that share a scale; ``settings.bits`` is per weight.

    Example::

        result = quantize_bundle(Path("pirate-bundle"), "base", Path("pirate-int4"), settings_for("weight-only", bits=4))
        print(result.parity.passed)
    """
    check_destination(output, force=force, inputs=[source, Path(model), *folders_of(refit.sources if refit else ())])
    opened = open_bundle(source)
    check_task(opened, refit=refit is not None, generates=yardsticks != Yardsticks(), checks=yardsticks.task is not None)
    if compare and settings.kind.activations != "static":
        raise CalibrationError(f"--compare is with ranges of the base alone, and --scheme {settings.scheme} has no ranges; leave it out")
    if (mixed or budget_mb is not None) and (settings.scheme, settings.bits) != ("weight-only", 4):
        raise CalibrationError(
            "--keep-high auto and --budget-mb choose int8 weights among int4 ones; use --scheme weight-only -p int4, or leave them out"
        )
    check_bundle(opened, settings, calibration)
    request = QuantizeRequest(
        settings=settings,
        calibration=calibration,
        refit=refit,
        yardsticks=yardsticks,
        compare=compare,
        mixed=mixed or budget_mb is not None,
        budget_mb=budget_mb,
        quality=quality,
        adapters=tuple(adapters),
        accept_base=accept_base,
    )

    with sole_writer(output):
        from reft_export.quantizing.assemble import make_quantized

        return make_quantized(opened, model, output, request, force=force, report=report)

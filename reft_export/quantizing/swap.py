"""Other adapters in a quantized bundle that stays as it is: hot-swap.

The graph, its weights, its quantization and every other file keep their bytes; adapters/<name>.* and golden/<name>.npz are written
anew, and the manifest with their hashes. The bundle is then held against the eager model again, as when it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reft_export.base.adapters import folders_of, load_adapters
from reft_export.bundling.files import Report
from reft_export.bundling.result import ExportResult
from reft_export.evaluation.quantization_report import Yardsticks
from reft_export.parity.quality import QualityGate
from reft_export.quantizing.settings import RefitSettings, check_task
from runtimes.artifacts.addition import check_addition
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import CalibrationError
from runtimes.files.claims import sole_writer
from runtimes.files.folders import check_destination


def swap_bundle(
    source: Path,
    model: str,
    output: Path,
    *,
    adapters: Sequence[Path] = (),
    refit: RefitSettings | None = None,
    yardsticks: Yardsticks = Yardsticks(),
    quality: QualityGate = QualityGate(),
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Writes to ``output`` the quantized bundle ``source`` with other adapters: those of ``adapters``, or its own refitted.

    Raises CalibrationError for a float bundle, AdapterError for adapters of another base, of other sites, or trained on another bundle's
    weights, ParityError for a missed budget and for adapters that lost more than ``quality`` lets them.
    """
    folders = refit.sources if refit else adapters
    check_destination(output, force=force, inputs=[source, Path(model), *folders_of(folders)])
    bundle = open_bundle(source)
    if bundle.manifest.quantization is None:
        raise CalibrationError(
            f"{source} is a float bundle: adapters get into it with `reft-export add`, and are trained with `reft-export train`"
        )
    check_task(bundle, refit=refit is not None, generates=yardsticks != Yardsticks(), checks=yardsticks.task is not None)
    if accept_base:
        from reft_export.parity.ladder import made_from

        bundle = made_from(bundle, model)
    given = {} if refit else load_adapters(adapters)
    for name, adapter in given.items():
        check_addition(bundle, name, adapter, accept_base=accept_base)

    with sole_writer(output):
        # torch comes with these, and takes seconds: nothing is left that could be refused without it
        from reft_export.quantizing.adapters import make_swapped
        from reft_export.quantizing.refit import plan_refit

        new = plan_refit(bundle, model, refit, output, force=force) if refit else given
        return make_swapped(bundle, model, output, new, yardsticks, quality, accept_base=accept_base, force=force, report=report)

"""``reft-export export``: a Hugging Face decoder and its adapters to a bundle.

Order: what is refused is refused, eager results are recorded, the graph is exported, edits are folded in, the base is quantized, and the
finished bundle is held against the recorded results before it takes its place. Nothing is left behind when any of it fails. torch is
loaded only when the files of base and adapters have nothing more to refuse.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.base.adapters import folders_of
from reft_export.base.origin import described
from reft_export.exporting.plan import ExportPlan, plan_export
from reft_export.exporting.settings import ExportSettings
from reft_export.parity.quality import QualityGate
from runtimes.errors import InputError
from runtimes.files.claims import scratch_folder, temporary_folder
from runtimes.files.folders import atomic_folder, claimed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_export.base.load import Base
    from reft_export.bundling.result import ExportResult
    from runtimes.artifacts.manifest import Manifest


def export_bundle(
    model: str | Path | PreTrainedModel | Base,
    adapter_folders: list[Path],
    output: Path,
    settings: ExportSettings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quality: QualityGate = QualityGate(),
    accept_base: bool = False,
    force: bool = False,
    report: Callable[[str], None] = print,
) -> ExportResult:
    """Writes a bundle to ``output``, atomically. Refusals come before any work; a missed parity budget leaves no bundle.

    ``model``: the base's folder or hub id; or a transformers model in memory, with its ``tokenizer``. The latter is saved beside
    ``output`` for as long as the export takes; it stays as it is, in eval mode.
    ``quality``: what int8 and int4 may cost the adapters; where they cost more, what was measured to help is done first.
    ``accept_base``: as for ``plan_export``. ``report`` is told each stage.
    The bundle's graph takes input_ids [B, S], attention_mask [B, past + S] and the KV cache, and answers logits [B, S, V].

    Raises InputError for settings, a base or an ``output`` that cannot be used, AdapterError for adapters of another base,
    BackendUnavailable for an exporter that is not installed, ExportError and GraphError where a graph cannot be exported or a stream not
    found in it, ParityError for a missed budget and for adapters that lost too much.

    Example::

        result = export_bundle("base", [Path("pirate")], Path("pirate-bundle"), ExportSettings(precision="int8"))
        print(result.manifest.adapters, result.parity.passed)
    """
    inputs = [*([Path(model)] if isinstance(model, (str, Path)) else []), *folders_of(adapter_folders)]
    with claimed(output, force=force, inputs=inputs), _on_disk(model, tokenizer, output) as (source, name):
        plan = plan_export(source, adapter_folders, output, settings, accept_base=accept_base, force=force, name=name)
        return _make(plan, adapter_folders, output, settings, quality, report, accept_base=accept_base, force=force)


@contextmanager
def _on_disk(
    model: str | Path | PreTrainedModel | Base,
    tokenizer: PreTrainedTokenizerBase | None,
    output: Path,
) -> Iterator[tuple[str | Path, str | None]]:
    """(Where the base lies, what it is called other than that): one in memory is saved into a folder that is gone afterwards."""
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise InputError(f"a tokenizer goes with a model in memory, and {model} has its own; leave it out")
        yield model, None
        return
    from reft_export.base.load import Base, base_from_memory, save_base

    base = model if isinstance(model, Base) else base_from_memory(model, tokenizer)
    if base.folder is not None:
        yield base.folder, base.info.name
        return
    with scratch_folder(output.absolute(), ".base") as folder:
        save_base(base, folder)
        yield folder, base.info.name


def _make(
    plan: ExportPlan,
    adapter_folders: list[Path],
    output: Path,
    settings: ExportSettings,
    quality: QualityGate,
    report: Callable[[str], None],
    *,
    accept_base: bool,
    force: bool,
) -> ExportResult:
    # torch, and all that needs it, when the files have nothing more to refuse.
    from reft_export.bundling.result import ExportResult
    from reft_export.exporting.assemble import assemble, check_model
    from reft_export.parity.gate import check_structure, gate
    from reft_export.quantizing.remedies import keep_steering

    plan = check_model(plan, settings, accept_base=accept_base)
    report(f"loading {described(plan.source)}")
    with atomic_folder(output, force=force) as work, temporary_folder() as proof:
        made = assemble(work, proof, plan, settings, quality, report)
        manifest, errors, note = made.manifest, made.errors, made.note
        if settings.float_type == "bf16":
            note = "; ".join(filter(None, (note, check_structure(work))))
            return ExportResult(manifest=manifest, parity=None, weight_errors=errors, note=note)
        gc.collect()  # the runtime is about to load the weights: the eager model's must not stay in memory beside them
        report("holding the bundle against the eager model")
        parity = gate(work, output, proof=proof, remedy=_remedy(manifest, settings), settles=True)
        manifest, parity, saved = keep_steering(
            work,
            output,
            str(plan.checkpoint.folder),
            parity,
            quality,
            adapter_folders,
            proof,
            report,
            tried=made.tried,
            force=force,
        )
        return ExportResult(manifest=manifest, parity=parity, weight_errors=errors, note=note, refitted=saved)


def _remedy(manifest: Manifest, settings: ExportSettings) -> str:
    """Where a budget is missed, beside the quantization's own advice: the family's attention may not be what the operator computes."""
    fused = manifest.kv_cache == "in-place" and settings.weight_only is None
    return "try --target tensorrt, whose graph writes attention out" if fused and settings.exporter == "dynamo" else ""

"""``reft-export add``: adapters into a finished bundle and out of it, in seconds, without exporting again.

The graph, its weights, its quantization and every other file keep their bytes; adapters/<name>.* and golden/<name>.npz are written, and
the manifest. The new folder takes the old one's place in one step, so that a bundle is whole at every moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reft_export.adding.files import copy_bundle, copy_unlisted, without_adapters, write_adapters
from reft_export.base.adapters import folders_of, load_adapters
from reft_export.bundling.files import Report
from reft_export.bundling.result import ExportResult
from reft_export.parity.quality import QualityGate
from runtimes.artifacts.addition import check_addition, check_free, check_known_base
from runtimes.artifacts.artifact import not_held
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.manifest import write_manifest
from runtimes.edits.adapter import Adapter
from runtimes.errors import BundleError, InputError
from runtimes.files.claims import sole_writer
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.first_steps import first_steps


def add_adapter(
    bundle: Path,
    adapters: Sequence[Path],
    *,
    model: str | None = None,
    output: Path | None = None,
    quality: QualityGate = QualityGate(),
    accept_base: bool = False,
    force: bool = False,
    report: Report = print,
) -> ExportResult:
    """Puts the adapters in the folders ``adapters`` into ``bundle``, in place or into the new bundle ``output``; an adapter's name is its
    folder's.

    With ``model``, the base's folder, .gguf file or hub id, eager PyTorch records what each adapter does to the bundle's weights, and the
    bundle is held to that: logits [K, V] over K golden tokens, relative to the largest reference logit, within its budget. Without it the
    first steps are taken (finite logits, a decode step) and the adapters are marked as not held, which ``inspect``, ``run`` and ``parity``
    say. ``quality``: what a quantized bundle may cost the new adapters. ``force`` replaces adapters of the same names, and an ``output``
    that exists. ``accept_base``: a base that differs in its config alone will do. ``report`` is told each stage.

    Raises InputError for a name that is taken and an ``output`` that cannot be written; AdapterError for an adapter of another base or
    size, or with edit nodes that the graph lacks; BundleError for a bundle that is damaged, or that ``model`` cannot be held to; GraphError
    where the first steps fail; ParityError for a missed budget and for an adapter of which the bundle's weights leave
    too little. The bundle is then as it was.

    Example::

        add_adapter(Path("pirate-bundle"), [Path("polite")], model="base")
        print(open_artifact("pirate-bundle").adapter_names)  # ("pirate", "polite")
    """
    target, in_place = _target(bundle, output, [*folders_of(adapters), *([] if model is None else [Path(model)])], force=force)
    with sole_writer(target):
        opened, given = plan_addition(bundle, adapters, model=model, output=output, accept_base=accept_base, force=force)
        with atomic_folder(target, force=force or in_place) as work:
            report(f"copying {opened.folder}")
            copy_bundle(opened, work, without=tuple(given))
            made = write_adapters(Bundle(folder=work, manifest=opened.manifest), given)
            if model is None:
                result = _unheld(made, tuple(given), target, report)
            else:
                result = _held(made, given, model, target, quality, report, before=opened, accept_base=accept_base)
            if in_place:
                copy_unlisted(opened, work)
    return result


def remove_adapter(
    bundle: Path, names: Sequence[str], *, output: Path | None = None, force: bool = False, report: Report = print
) -> ExportResult:
    """Takes adapters out of ``bundle``, in place or into the new bundle ``output``; without any adapter left it is its base's.

    ``force`` replaces an ``output`` that exists. ``report`` is told each stage. Raises BundleError for a name that the bundle does not
    have, InputError for an ``output`` that cannot be written.

    Example::

        remove_adapter(Path("pirate-bundle"), ["polite"])
    """
    target, in_place = _target(bundle, output, [], force=force)
    with sole_writer(target):
        opened = plan_removal(bundle, names, output=output, force=force)
        with atomic_folder(target, force=force or in_place) as work:
            report(f"copying {opened.folder}")
            copy_bundle(opened, work, without=names)
            left = without_adapters(opened, names).manifest
            write_manifest(work, left)
            if in_place:
                copy_unlisted(opened, work)
    return ExportResult(manifest=left, parity=None, weight_errors=())


def plan_addition(
    bundle: Path,
    adapters: Sequence[Path],
    *,
    model: str | None = None,
    output: Path | None = None,
    accept_base: bool = False,
    force: bool = False,
) -> tuple[Bundle, dict[str, Adapter]]:
    """Every refusal that needs no weights; writes nothing. ``add_adapter`` and its dry run both begin here."""
    if not adapters:
        raise InputError("no adapter is given; name the folder of one with --adapter (-a), or one to take out with --remove")
    _check_target(bundle, output, [*folders_of(adapters), *([] if model is None else [Path(model)])], force=force)
    opened, given = open_bundle(bundle), load_adapters(adapters)
    check_free(opened, tuple(given), force=force)
    if model is not None and not opened.golden_names:
        raise BundleError(
            f"{bundle} has no golden arrays, as one that was folded without its base: leave --model out, or fold it with --model"
        )
    for name, adapter in given.items():
        if model is None:
            check_known_base(opened, name, adapter, accept_base=accept_base)
        check_addition(opened, name, adapter, accept_base=accept_base)
    return opened, given


def plan_removal(bundle: Path, names: Sequence[str], *, output: Path | None = None, force: bool = False) -> Bundle:
    """Every refusal of ``remove_adapter``, whose dry run it is; writes nothing."""
    _check_target(bundle, output, [], force=force)
    opened = open_bundle(bundle)
    for name in names:
        opened.adapter(name)  # refuses one that is not there
    return opened


def _check_target(bundle: Path, output: Path | None, inputs: Sequence[Path], *, force: bool) -> None:
    if output is not None:
        check_destination(output, force=force, inputs=[bundle, *inputs])
    elif bundle.is_dir():  # what is none is refused where it is opened
        check_destination(bundle.resolve(), force=True, inputs=inputs)


def _target(bundle: Path, output: Path | None, inputs: Sequence[Path], *, force: bool) -> tuple[Path, bool]:
    """(where the new bundle goes, whether that is where the old one is). Of a linked folder it is the folder that is replaced."""
    _check_target(bundle, output, inputs, force=force)
    if output is None and not bundle.is_dir():
        open_bundle(bundle)  # says what it is instead
    return (bundle.resolve(), True) if output is None else (output, False)


def _unheld(made: Bundle, names: Sequence[str], shown: Path, report: Report) -> ExportResult:
    write_manifest(made.folder, made.manifest)
    report("taking the first steps")
    left = first_steps(made.folder, shown)
    notes = [not_held(shown, *names)] + ([f"no step was taken here: {left}"] if left else [])
    return ExportResult(manifest=made.manifest, parity=None, weight_errors=(), note="; ".join(notes))


def _held(
    made: Bundle,
    adapters: Mapping[str, Adapter],
    model: str,
    shown: Path,
    quality: QualityGate,
    report: Report,
    *,
    before: Bundle,
    accept_base: bool,
) -> ExportResult:
    # torch comes with these, and takes seconds: nothing is left that could be refused without it
    from reft_export.adding.held import held_to_eager

    return held_to_eager(made, adapters, model, shown, quality, report, before=before, accept_base=accept_base)

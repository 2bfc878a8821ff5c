"""``reft-export import``: a foreign adapter, told by its files, to an adapter folder of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.importing.assemble import assemble
from reft_export.importing.foreign import ForeignAdapter, Report, Request, activation_of
from reft_export.importing.subspaces import subspace_of
from reft_export.training.sources import check_source
from runtimes.artifacts.adapter_record import check_adapter_name
from runtimes.edits.adapter import CONFIG_FILE, Adapter, load_adapter, save_adapter
from runtimes.edits.edit import STREAMS
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError, ReftError
from runtimes.files.folders import check_destination
from runtimes.files.records import parse_json, read_regular

FORMATS = ("pyreft", "adapterhub", "red", "gguf", "npz", "safetensors")
OWN = "reft-export"
"""An adapter of this project, which is imported for other probes, and for a subspace of it."""
ADAPTERS = ("intkey_*.bin", "adapter_config.json")
"""Files that tell a folder of pyreft's or AdapterHub's."""
ARRAYS = (".npz", ".safetensors")
"""Steering vectors, or RED's scales and biases: their names tell."""
PICKLES = (".pth", ".pt")
"""What a file of RED is called; a .bin is more often a part of a folder, and needs --format red."""

if TYPE_CHECKING:  # torch takes seconds, and what is no adapter at all is refused without it
    from reft_export.base.load import Base, Outline

Reader = Callable[[Path, Request, "Outline"], ForeignAdapter]


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    adapter: Adapter
    format: str
    notes: tuple[str, ...]
    """What the user should know: where the foreign library does something that an adapter of ours does not, and what came of its probes."""


def import_adapter(
    source: Path,
    model: str,
    output: Path,
    request: Request = Request(),
    *,
    format: str | None = None,
    probes: Path | None = None,
    force: bool = False,
    report: Report = print,
) -> ImportResult:
    """Writes the adapter to ``output``, atomically. Everything is read and checked before anything is written.

    The foreign formats do not fingerprint their base: its width and depth are checked, and the one given is recorded.

    ``model``: the base's folder or hub id, whose weights are not loaded. ``request``: what the files do not say, as positions and method.
    ``format``: one of FORMATS; None tells it by the files. Parameters become float32, as ``runtimes.edits.methods.METHODS`` shapes
    them: R [r, D] of a low-rank edit, a vector [D].

    ``probes``: JSONL as ``train`` reads it, of which the adapter carries up to 32 lines: what it is measured on from then on. With them
    ``source`` may be an adapter of this project, which is copied with those in place of its own; with ``request.subspace`` it may be one
    that was trained in subspaces, of which that part is taken.

    Raises InputError for options, formats and folders that do not go together, and AdapterError for files that are damaged, of another
    base's width or depth, or that say what no adapter of ours can.

    Example::

        result = import_adapter(Path("pyreft-checkpoint"), "base", Path("pirate"), Request(positions="f7+l7"))
        print(result.format, *result.notes)
    """
    check_adapter_name(output.resolve().name)
    check_destination(output, force=force, inputs=[source, Path(model)])
    if not source.exists():
        raise InputError(f"{source} does not exist")
    if not source.is_file() and not source.is_dir():
        raise InputError(f"{source} is a pipe or a device; an adapter is a folder, or a regular file")
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format!r} is unknown; known: {', '.join(FORMATS)}")
    if request.method is not None and request.method not in METHODS:
        raise InputError(f"--method {request.method!r} is unknown; known: {', '.join(METHODS)}")
    if request.positions is not None:
        PositionRule.parse(request.positions)
    if request.stream is not None and request.stream not in STREAMS:
        raise InputError(f"--stream {request.stream!r} is unknown; known: {', '.join(STREAMS)}")
    activation_of(request.activation or "", "--activation")
    if probes is not None:
        check_source(probes)
    own = format is None and (source / CONFIG_FILE).is_file() and not _has_interventions(source / "config.json")
    if own and (probes is not None or request.subspace is not None):
        return _of_ours(source, model, output, request, probes, force=force, report=report)
    format = format or detect(source)
    _check_kind(source, format)

    from reft_export.base.load import outline_base

    report(f"reading {model}")
    outline = outline_base(model)
    report(f"reading {source}")
    if format != "pyreft":
        request.refuse(format, {"subspace": "it has none"})
    foreign = _reader(format, source)(source, request, outline)
    try:
        adapter = assemble(foreign, outline.info)
    except ReftError as e:
        raise AdapterError(f"{source}: {e}") from None
    notes = foreign.notes
    if probes is not None:
        adapter, said = _with_probes(adapter, probes, _unloaded(model), report)
        notes = (*notes, *said)
    save_adapter(adapter, output, force=force)
    return ImportResult(adapter=adapter, format=format, notes=notes)


def _of_ours(source: Path, model: str, output: Path, request: Request, probes: Path | None, *, force: bool, report: Report) -> ImportResult:
    """An adapter of ours: a subspace of it, or the whole; with the probes of a file in place of its own."""
    if given := [f.name for f in fields(request) if f.name != "subspace" and getattr(request, f.name) is not None]:
        raise InputError(f"{source} is an adapter of this project, which records its {given[0]}; leave --{given[0]} out")
    adapter = load_adapter(source)
    if request.subspace is not None:
        adapter = subspace_of(adapter, request.subspace)

    from reft_export.base.adapters import check_fit

    report(f"reading {model}")
    base = _unloaded(model)
    check_fit(output.resolve().name, adapter, base)
    adapter, notes = (adapter, ()) if probes is None else _with_probes(adapter, probes, base, report)
    save_adapter(adapter, output, force=force)
    return ImportResult(adapter=adapter, format=OWN, notes=notes)


def _unloaded(model: str) -> Base:
    from reft_export.base.load import load_without_weights

    return load_without_weights(model, require_tokenizer=True)


def _with_probes(adapter: Adapter, file: Path, base: Base, report: Report) -> tuple[Adapter, tuple[str, ...]]:
    """(the adapter with probes of ``file``, what to say of them)."""
    from reft_export.training.probes import read_probe_file

    report(f"reading {file}")
    probes, lines = read_probe_file(file, base, adapter)
    notes = () if lines == len(probes) else (f"{len(probes)} of the {lines} lines of {file} are its probes, spread over the file",)
    return replace(adapter, probes=probes), notes


def detect(source: Path) -> str:
    """The format that ``source``'s files are of; raises InputError where they are of none."""
    if source.is_dir():
        if (source / CONFIG_FILE).is_file():
            raise InputError(f"{source} is an adapter of this project already; use it as it is, or give it other probes with --probes")
        if (source / "adapter_config.json").is_file():
            return "adapterhub"
        if any(source.glob("intkey_*.bin")) or _has_interventions(source / "config.json"):
            return "pyreft"
        # A trainer's checkpoint, and AdapterHub's save_all_adapters, hold adapters one or two folders further down.
        inside = [p.parent for name in ADAPTERS for depth in ("*", "*/*") for p in sorted(source.glob(f"{depth}/{name}"))]
        also = f"; did you mean {' or '.join(map(str, list(dict.fromkeys(inside))[:3]))}?" if inside else ""
        raise InputError(
            f"{source} holds neither pyreft's config.json and intkey_*.bin nor AdapterHub's adapter_config.json{also}; a vector file is "
            "given by its own path"
        )
    with source.open("rb") as f:
        magic = f.read(4)
    if magic == b"GGUF":
        return "gguf"
    if source.suffix in ARRAYS:
        return source.suffix[1:]
    if source.suffix in PICKLES:
        return "red"
    raise InputError(
        f"{source} is not .gguf, .npz, .safetensors or RED's .pth, and pyreft and AdapterHub adapters are folders; pass the folder"
    )


def _check_kind(source: Path, format: str) -> None:
    folder = format in ("pyreft", "adapterhub")
    if source.is_dir() != folder:
        raise InputError(f"{source} is a {'file' if folder else 'folder'}; a {format} adapter is a {'folder' if folder else 'file'}")
    needed = {"pyreft": "intkey_*.bin", "adapterhub": "adapter_config.json"}.get(format)
    if needed and not any(source.glob(needed)):
        raise InputError(f"{source} is no {format} adapter: {needed} is missing")


def _has_interventions(config: Path) -> bool:
    try:
        return "intervention_types" in parse_json(read_regular(config).decode("utf-8-sig"))
    except (OSError, ValueError, TypeError):
        return False


def _reader(format: str, source: Path) -> Reader:
    if format == "pyreft":
        from reft_export.importing.pyreft.read import read_pyreft

        return read_pyreft
    if format == "adapterhub":
        from reft_export.importing.adapterhub import read_adapterhub

        return read_adapterhub
    if format == "red" and source.suffix in ARRAYS:
        from reft_export.importing.vectors import read_red_arrays

        return read_red_arrays
    if format == "red":
        from reft_export.importing.red import read_red

        return read_red
    from reft_export.importing.vectors import read_gguf, read_vectors

    return read_gguf if format == "gguf" else read_vectors

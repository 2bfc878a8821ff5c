"""The files that a manifest lists: all there, none changed, none read that is not listed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import DATA_FILE, FileRecord, Manifest
from runtimes.errors import BundleError
from runtimes.files.hashes import sha256_of

BANKS, EXPLICIT_BANKS = "onnx_adapter", "banks"
"""What the names of adapters' files end in: the second one where no graph computes the slots."""
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def check_adapters(listed_in: Path, files: Collection[str], adapters: Collection[str]) -> None:
    """Raises BundleError where files of an adapter are listed and the adapter is not, as no parity would be taken of it, or is twice."""
    if len(set(adapters)) != len(adapters):
        raise BundleError(f"{listed_in}: an adapter is listed twice ({', '.join(adapters)}); export again")
    for path in map(PurePosixPath, sorted(files)):
        name = path.name.rpartition(".")[0]
        if str(path.parent) in ("adapters", "golden") and name not in adapters and str(path) != f"golden/{BASE_GOLDEN}.npz":
            raise BundleError(f"{listed_in}: {path} is listed, and adapter {name!r} is not; export again")


def check_not_held(listed_in: Path, manifest: Manifest) -> None:
    """Raises BundleError where what is said not to be held is no adapter, or has golden arrays."""
    for name in manifest.not_held:
        if name not in manifest.adapters or f"golden/{name}.npz" in manifest.files:
            wrong = "has golden arrays" if name in manifest.adapters else "is no adapter of it"
            raise BundleError(f"{listed_in}: {name!r} is listed as not held, and {wrong}; export again")


def check_files(folder: Path, files: Mapping[str, FileRecord], listed_in: str, *, verify: bool) -> None:
    """Raises BundleError for a file of the list ``listed_in`` that is missing, changed or outside the folder, and for a file that
    would be read without being listed."""
    read = [name for name in (DATA_FILE, *TOKENIZER_FILES) if (folder / name).is_file()]
    read += [path.relative_to(folder).as_posix() for path in (folder / TEMPLATE_FOLDER).glob("*")]
    read += [path.relative_to(folder).as_posix() for path in (folder / "adapters").glob(f"*.{EXPLICIT_BANKS}")]
    if foreign := sorted(set(read) - set(files)):
        raise BundleError(f"{folder / foreign[0]} is not listed in {listed_in}, and would be used; remove it or export again")
    for name, record in files.items():
        _check_file(folder, name, record, listed_in, verify=verify)


def check_listed_name(name: str, listed_in: Path) -> PurePosixPath:
    """A file's name in a manifest, as a path inside its folder. Raises BundleError for one that leaves it."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"{listed_in} names {name!r}, which leaves the folder; it is refused")
    return relative


def _check_file(folder: Path, name: str, record: FileRecord, listed_in: str, *, verify: bool) -> None:
    path = folder / check_listed_name(name, folder / listed_in)
    # A link is as good as what it leads to, wherever that is: the hub's cache is made of them.
    if not path.is_file():
        raise BundleError(f"{path} is {'no regular file' if path.exists() else 'missing'}; copy the folder again")
    size = path.stat().st_size
    if size != record.size:
        raise BundleError(f"{path} has {size} bytes, expected {record.size}; it is truncated or was changed; copy the folder again")
    if sha256_of(path, remember=not verify) != record.sha256:
        raise BundleError(f"{path} does not match its sha256 in {listed_in}; it was changed or damaged; copy the folder again")

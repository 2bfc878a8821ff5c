"""A bundle with everything that it is installed from, as one tarball, for a device without a network.

    NAME.tar.gz           NAME/install.sh      checks every file, makes an environment beside itself, installs from wheels/ alone
    NAME.tar.gz.sha256    NAME/SHA256SUMS      of every other file
    archive.json          NAME/bundle/         the bundle
                          NAME/wheels/         of reft-export and of all that it needs

The same input makes the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import NOT_HASHED
from runtimes.errors import InputError
from runtimes.files.folders import atomic_folder, check_destination, marker
from runtimes.files.hashes import sha256_of

NEEDED = ("reft-export", "numpy", "ml-dtypes", "safetensors", "tokenizers", "jinja2", "typer", "rich")
RUNTIMES = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
"""By extra."""
LEVEL = 1
"""Of gzip: quantized weights do not shrink, and higher ones take minutes."""
INSTALL = """\
#!/bin/sh
# Installs {name} beside this file: ./install.sh [ENVIRONMENT], by default venv. Needs python3 with venv, and no network.
set -eu
cd "$(dirname "$0")"
sha256sum --check --quiet SHA256SUMS
"${{PYTHON:-python3}}" -m venv "${{1:-venv}}"
"${{1:-venv}}/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links wheels 'reft-export[{extra}]'
"${{1:-venv}}/bin/reft-export" inspect bundle
echo "installed; try: $(pwd)/${{1:-venv}}/bin/reft-export run bundle -p TEXT"
"""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    archive: Path
    sha256: str
    files: int
    size: int
    """Bytes of the archive."""


def package_archive(artifact: Artifact, wheels: Path, output: Path, *, force: bool = False) -> Packaged:
    """Writes the archive and its checksum into the folder ``output``, whole or not at all.

    ``wheels``: a folder of wheels for the device; which ones fit it is for pip to say there, as no other machine can.
    Raises InputError for an engine, and where ``wheels`` lacks a package that is needed, or has onnxruntime twice.
    """
    if not isinstance(artifact, Bundle):
        raise InputError(f"{artifact.folder} is an engine, which runs on the GPU it was built for; pack the bundle, and build it there")
    check_destination(output, force=force, inputs=[artifact.folder, wheels])
    found = _wheels(wheels)
    extra = _extra(found, wheels)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", artifact.folder.resolve().name) or "model"
    listed = [*artifact.manifest.files, *(file for file in NOT_HASHED if (artifact.folder / file).is_file())]
    with atomic_folder(output, force=force) as work:
        members = {f"bundle/{file}": artifact.folder / file for file in sorted(listed)}
        members |= {f"wheels/{path.name}": path for path in found}
        sums = "".join(f"{sha256_of(path)}  {member}\n" for member, path in members.items())
        texts = {"SHA256SUMS": sums, "install.sh": INSTALL.format(name=name, extra=extra)}
        archive = work / f"{name}.tar.gz"
        with (
            archive.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=LEVEL, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for member, text in texts.items():
                tar.addfile(_member(f"{name}/{member}", len(text.encode()), program=member == "install.sh"), io.BytesIO(text.encode()))
            for member, path in members.items():
                with path.open("rb") as content:
                    tar.addfile(_member(f"{name}/{member}", path.stat().st_size), content)
        digest, size = sha256_of(archive), archive.stat().st_size
        (work / f"{archive.name}.sha256").write_text(f"{digest}  {archive.name}\n", encoding="utf-8")
        record = {"archive": archive.name, "sha256": digest, "bytes": size}
        marker(work, "archive.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Packaged(archive=output / archive.name, sha256=digest, files=len(members) + len(texts), size=size)


def _member(name: str, size: int, *, program: bool = False) -> tarfile.TarInfo:
    """Of nobody, and of no time."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o755 if program else 0o644
    return member


def _wheels(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".whl" and path.is_file())
    except OSError as e:
        raise InputError(f"--wheels {folder} cannot be listed ({e.strerror}); pass a folder of wheels for the device") from None


def _extra(wheels: Sequence[Path], folder: Path) -> str:
    """The extra of reft-export that the wheels serve. Raises InputError where packages are missing."""
    names = set(_distributions(wheels))
    extras = [extra for extra, runtime in RUNTIMES.items() if runtime in names]
    missing = [name for name in NEEDED if name not in names]
    if not extras:
        missing.append("onnxruntime")
    if missing:
        raise InputError(
            f"{folder} has no wheel of {', '.join(missing)}; `make wheels` makes reft-export's own, and for another machine than this one: "
            f"pip download -d {folder} --only-binary=:all: --platform manylinux_2_28_aarch64 --python-version 3.11 "
            f"{' '.join((*NEEDED[1:], RUNTIMES['cpu']))}"
        )
    if len(extras) > 1:
        raise InputError(f"{folder} has wheels of onnxruntime and of onnxruntime-gpu, which share one folder; keep one of them")
    return extras[0]


def _distributions(wheels: Sequence[Path]) -> Iterator[str]:
    """Names as the index has them."""
    for path in wheels:
        yield re.sub(r"[-_.]+", "-", path.name.split("-", 1)[0]).lower()

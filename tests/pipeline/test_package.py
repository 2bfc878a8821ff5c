"""The tarball of `package --archive`: what is in it, the same bytes every time, and what is refused before anything is written."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from reft_export.packaging.archive import NEEDED, package_archive
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import InputError


def wheels(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl").write_bytes(name.encode())
    return folder


def test_everything_is_there_with_its_hash_and_nothing_else(bundle_folder, tmp_path: Path) -> None:
    bundle, packages = open_bundle(bundle_folder("llama")), wheels(tmp_path / "wheels", *NEEDED, "onnxruntime")
    made = package_archive(bundle, packages, tmp_path / "out")
    again = package_archive(bundle, packages, tmp_path / "again")
    assert made.sha256 == again.sha256 == hashlib.sha256(made.archive.read_bytes()).hexdigest()
    with tarfile.open(made.archive) as tar:
        names = tar.getnames()
        (root,) = {name.split("/")[0] for name in names}
        sums = tar.extractfile(f"{root}/SHA256SUMS").read().decode().splitlines()
        held = dict(line.split("  ")[::-1] for line in sums)
        for name, digest in held.items():
            assert hashlib.sha256(tar.extractfile(f"{root}/{name}").read()).hexdigest() == digest
        assert "'reft-export[cpu]'" in tar.extractfile(f"{root}/install.sh").read().decode()
        assert {member.mtime for member in tar} == {0} and tar.getmember(f"{root}/install.sh").mode == 0o755
    assert {f"{root}/{name}" for name in held} | {f"{root}/install.sh", f"{root}/SHA256SUMS"} == set(names)
    assert {f"bundle/{name}" for name in (*bundle.manifest.files, "manifest.json")} <= set(held)


def test_wheels_of_a_gpu_bring_its_extra(bundle_folder, tmp_path: Path) -> None:
    packages = wheels(tmp_path / "wheels", *NEEDED, "onnxruntime-gpu")
    made = package_archive(open_bundle(bundle_folder("llama")), packages, tmp_path / "out")
    with tarfile.open(made.archive) as tar:
        (script,) = (name for name in tar.getnames() if name.endswith("install.sh"))
        assert "'reft-export[gpu]'" in tar.extractfile(script).read().decode()


def test_force_replaces_an_archive_and_nothing_else(bundle_folder, tmp_path: Path) -> None:
    bundle, packages, output = open_bundle(bundle_folder("llama")), wheels(tmp_path / "wheels", *NEEDED, "onnxruntime"), tmp_path / "out"
    made = package_archive(bundle, packages, output)
    with pytest.raises(InputError, match="pass --force"):
        package_archive(bundle, packages, output)
    assert package_archive(bundle, packages, output, force=True).sha256 == made.sha256
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="other files than ours"):
        package_archive(bundle, packages, tmp_path / "mine", force=True)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (NEEDED, "no wheel of onnxruntime;.* rich onnxruntime"),
        ((*NEEDED[1:], "onnxruntime"), "no wheel of reft-export;"),
        ((*NEEDED, "onnxruntime", "onnxruntime-gpu"), "keep one of them"),
        ((), "no wheel of reft-export, numpy"),
    ],
)
def test_what_is_missing_is_named_and_nothing_written(names, match, bundle_folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        package_archive(open_bundle(bundle_folder("llama")), wheels(tmp_path / "wheels", *names), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wheels_that_are_no_folder_are_refused(bundle_folder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be listed"):
        package_archive(open_bundle(bundle_folder("llama")), tmp_path / "none", tmp_path / "out")

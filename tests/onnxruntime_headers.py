"""onnxruntime's C and C++ headers, which its wheel does not hold: those that ONNXRUNTIME_INCLUDE_DIR names, or those of an npm package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from shared_folders import shared_folder

PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
"""onnxruntime for Unity, which brings Microsoft's build for iOS, and with it the headers of 1.29."""
SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
MEMBERS = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"
MINUTES = 10
FOLDER = Path(__file__).parent.parent / ".onnxruntime-headers"
"""Kept between runs."""


def onnxruntime_headers(minor: int) -> Path:
    """A folder of headers that onnxruntime 1.``minor`` serves; skips the test where there is none. Downloads 150 MB once."""
    named = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    headers = Path(named) if named else shared_folder("onnxruntime-headers", _copy)
    version = int(re.findall(r"#define ORT_API_VERSION (\d+)", (headers / "onnxruntime_c_api.h").read_text(encoding="utf-8"))[0])
    if version > minor:
        pytest.skip(f"the headers in {headers} are of onnxruntime 1.{version}, and 1.{minor} is installed")
    return headers


def _copy(folder: Path) -> None:
    if not FOLDER.is_dir():
        _download()
    shutil.copytree(FOLDER, folder)


def _download() -> None:
    if shutil.which("npm") is None:
        pytest.skip("onnxruntime's headers are not here; ONNXRUNTIME_INCLUDE_DIR names their folder, or npm brings them")
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".onnxruntime-headers-") as made:
        command = ["npm", "pack", "--silent", "--fetch-retries=0", "--pack-destination", made, PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MINUTES * 60)
        except subprocess.TimeoutExpired:
            pytest.skip(f"onnxruntime's headers do not come: npm pack {PACKAGE} took more than {MINUTES} minutes")
        if done.returncode:
            pytest.skip(f"onnxruntime's headers do not come: npm pack {PACKAGE}: {(done.stderr or done.stdout).strip()[-200:]}")
        (archive,) = Path(made).iterdir()
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert found == SHA256, f"{PACKAGE} has sha256 {found}, expected {SHA256}"
        headers = Path(made) / "headers"
        headers.mkdir()
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.isfile() and member.name.startswith(MEMBERS):
                    file = opened.extractfile(member)
                    assert file is not None
                    (headers / Path(member.name).name).write_bytes(file.read())
        headers.rename(FOLDER)

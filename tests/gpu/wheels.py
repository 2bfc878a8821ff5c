"""Wheels that lie beside the script: split ones are joined, and each goes to the stage that it is for."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

HOW_TO_SPLIT = "split -b 55M -d NAME.whl NAME.whl.part"
"""Parts of less than 60 MB, NAME.whl.part00 and so on, where a machine takes no larger files."""
PART = re.compile(r"(?P<wheel>.+\.whl)\.part(?P<number>\d+)")
OWN_STAGE = ("onnxruntime-gpu", "tensorrt-rtx")
"""Stages of their own, by the first words of the wheels' names: onnxruntime-gpu would otherwise take onnxruntime's place everywhere."""
EVERY_STAGE = "every stage"


def collect(source: Path, joined: Path) -> dict[str, list[Path]]:
    """The wheels of ``source`` by the stage that they are for; parts become wheels in ``joined``.

    Raises ValueError for parts of which one is missing, for a wheel that is not whole, and for a source distribution.
    """
    for archive in source.glob("*.tar.gz"):
        raise ValueError(f"{archive.name} in {source.name} is no wheel, and is not built where there is no network; pip wheel makes one")
    wheels = sorted(source.glob("*.whl")) + join(source, joined)
    found: dict[str, list[Path]] = defaultdict(list)
    for wheel in wheels:
        if not zipfile.is_zipfile(wheel):
            raise ValueError(f"{wheel.name} is no whole wheel ({wheel.stat().st_size} bytes); copy it, or its last part, again")
        name = wheel.name.partition("-")[0].lower().replace("_", "-")
        found[next((stage for stage in OWN_STAGE if name.startswith(stage)), EVERY_STAGE)].append(wheel)
    return dict(found)


def join(source: Path, joined: Path) -> list[Path]:
    """Every wheel of which ``source`` has parts, put together in ``joined``; raises ValueError where a part is missing."""
    parts: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in source.iterdir():
        if match := PART.fullmatch(path.name):
            parts[match["wheel"]][int(match["number"])] = path
    joined.mkdir(parents=True, exist_ok=True)
    wheels = []
    for name, numbered in sorted(parts.items()):
        missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
        if missing:
            raise ValueError(f"{name} lacks part {missing[0]} of 0 to {max(numbered)}; copy all parts into {source.name}")
        with (joined / name).open("wb") as whole:
            for _, path in sorted(numbered.items()):
                with path.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        wheels.append(joined / name)
    return wheels

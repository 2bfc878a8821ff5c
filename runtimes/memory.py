"""How much memory a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_memory() -> int | None:
    """Bytes that a process can still take: the system's, or what its control group leaves; None where neither is told."""
    found = [room for room in (_system_memory(), *_group_memory()) if room is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What control groups leave (version 2, then 1); file pages that the kernel can drop are counted as used by it, and are not."""
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        numbers = [next(iter(_lines(folder / name)), "max") for name in (limit, used)]
        if all(n.isdigit() for n in numbers):
            dropped = (line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith(f"{cached} "))
            yield max(int(numbers[0]) - int(numbers[1]) + int(next(dropped, "0")), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system, or a container without it
        return []

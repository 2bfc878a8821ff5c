"""What memory is left: the system's word, and a control group's."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes import memory
from runtimes.artifacts.manifest import TensorRecord
from runtimes.kv_cache import stated_bytes_per_token

GROUPS = {
    "version 2": {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 400\ninactive_file 250\n"},
    "version 1": {
        "memory/memory.limit_in_bytes": "1000",
        "memory/memory.usage_in_bytes": "700",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 250\n",
    },
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("version", GROUPS)
def test_a_control_group_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path, version: str) -> None:
    write(tmp_path, GROUPS[version])
    assert list(memory._group_memory(tmp_path)) == [550]


def test_a_group_without_a_limit_and_a_system_without_groups(tmp_path: Path) -> None:
    write(tmp_path, GROUPS["version 2"] | {"memory.max": "max"})
    assert list(memory._group_memory(tmp_path)) == list(memory._group_memory(tmp_path / "none")) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_memory", lambda: 900)
    monkeypatch.setattr(memory, "_group_memory", lambda: iter([800]))
    assert memory.available_memory() == 800
    monkeypatch.setattr(memory, "_system_memory", lambda: None)
    monkeypatch.setattr(memory, "_group_memory", lambda: iter([]))
    assert memory.available_memory() is None


def test_what_a_token_of_the_cache_takes() -> None:
    """SmolLM2-135M: 30 layers, 3 KV heads of 64."""
    shape = ("batch", 3, "past", 64)
    names = [f"past_key_values.{i}.{part}" for i in range(30) for part in ("key", "value")]
    inputs = [TensorRecord(name="input_ids", dtype="int64", shape=("batch", "sequence"))]
    assert stated_bytes_per_token(inputs) == 0
    assert stated_bytes_per_token([*inputs, *(TensorRecord(name=n, dtype="float", shape=shape) for n in names)]) == 46080
    assert stated_bytes_per_token([*inputs, *(TensorRecord(name=n, dtype="float16", shape=shape) for n in names)]) == 23040

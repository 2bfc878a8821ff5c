"""Our JSON files as somebody who knows their format would change them: edited and sealed again, so that a test reaches its check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtimes.files.hashes import sha256_of
from runtimes.files.sealed import write_sealed

FILES = ("engine.json", "manifest.json", "adapter.json")


def reseal(path: Path, change: Callable[[dict[str, Any]], object] | None = None, /, **changes: object) -> None:
    """Edits a folder's own file (of an engine engine.json), or the file ``path``, and writes its canonical form with a right digest.

    ``change`` edits the content in place; ``changes`` replace keys. The hash of an adapter's tensors is taken anew unless it is given,
    and so is an engine's hash of the manifest in its folder.
    """
    if path.is_dir():
        path = next(path / name for name in FILES if (path / name).is_file())
    content = json.loads(path.read_text())
    tensors = path.with_name("adapter.safetensors")
    if path.name == "adapter.json" and tensors.is_file():
        content["tensors_sha256"] = sha256_of(tensors)
    if change is not None:
        change(content)
    write_sealed(path, content | changes)
    engine = path.with_name("engine.json")
    if path.name == "manifest.json" and engine.is_file():
        record = {"sha256": sha256_of(path), "size": path.stat().st_size}
        reseal(engine, lambda content: content["files"].update({path.name: record}))


def as_version_1(folder: Path) -> None:
    """Makes an adapter, a bundle or an engine what version 1 wrote: no digests, one rule in an adapter's own keys, plain JSON."""
    for path in (*folder.glob("adapter.json"), *folder.glob("adapters/*.json")):
        content = json.loads(path.read_text())
        (rule,) = content.pop("rules")
        content |= {**rule, "sites": [site["site"] for site in content["sites"]]}
        for key in ("digest", "tensors_sha256", "probes"):
            content.pop(key, None)
        _write_plain(path, content | ({"format_version": 1} if "format_version" in content else {}))
    for name in ("manifest.json", "engine.json"):
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        for key in ("digest", "kv_cache", "rules", "embeddings", "retention", "loss"):
            content.pop(key, None)
        for file in content["files"]:
            if (folder / file).is_file():
                content["files"][file] = {"sha256": sha256_of(folder / file), "size": (folder / file).stat().st_size}
        _write_plain(path, content | {"schema_version": 1})


def _write_plain(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")

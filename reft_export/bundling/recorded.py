"""What a manifest says of its graph that only a host can read of it: a session, which knows no onnx, sees inputs and outputs alone."""

from __future__ import annotations

import onnx_ir as ir

from reft_export.tasks.task import TASKS
from runtimes.artifacts.bundle import Bundle
from runtimes.errors import BundleError
from runtimes.files.sealed import FIRST_VERSION


def check_recorded(bundle: Bundle, graph: ir.Model) -> None:
    """Raises BundleError where ``graph``, the bundle's, is of another opset, IR version or KV cache than the manifest says."""
    m = bundle.manifest
    found: dict[str, object] = {"opset": graph.opset_imports.get(""), "ir_version": graph.ir_version}
    if m.schema_version != FIRST_VERSION:  # which did not record it
        found["kv_cache"] = TASKS[m.task].kv_cache(graph.graph)
    for key, value in found.items():
        if value != getattr(m, key):
            said = f"manifest.json says {key} {getattr(m, key)}, and {bundle.graph_path.name} has {value}"
            raise BundleError(f"{bundle.folder}: {said}; export the bundle again")

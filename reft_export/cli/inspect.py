"""``reft-export inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reft_export.cli.console import escape, guarded, out, print_json, print_table, size
from reft_export.cli.options import AsJson


def register(app: typer.Typer) -> None:
    app.command("inspect")(guarded(inspect))


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter folder, a bundle folder, or an ONNX graph.")],
    as_json: AsJson = False,
) -> None:
    """Show what is in an adapter, a graph or a bundle."""
    from runtimes.errors import InputError

    if not path.exists():
        raise InputError(f"{path} does not exist")
    if (path / "manifest.json").is_file():
        content = inspect_bundle(path)
    elif (path / "adapter.json").is_file():
        content = inspect_adapter(path)
    elif path.suffix == ".onnx" or list(path.glob("*.onnx")):
        content = inspect_graph(path)
    elif path.suffix == ".onnx_adapter":
        content = inspect_banks(path)
    else:
        raise InputError(f"{path} is not an adapter folder (adapter.json), a bundle (manifest.json) or an ONNX graph (.onnx)")
    if as_json:
        print_json(content)
        return
    tables = {k: v for k, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for key, value in content.items():
        if key not in tables:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.print(f"[bold]{key}[/]: {escape(str(text))}")
    for key, rows in tables.items():
        print_table(key, list(rows[0]), [[str(v) for v in row.values()] for row in rows])


def inspect_bundle(path: Path) -> dict[str, Any]:
    from runtimes.bundle import open_bundle
    from runtimes.records import to_json

    bundle = open_bundle(path)
    m = bundle.manifest
    adapters = []
    for name in bundle.adapter_names:
        r = bundle.adapter_record(name)
        row = {"name": name, "method": r.method, "rank": r.rank, "positions": r.positions, "tied": r.tied, "sites": len(r.sites)}
        adapters.append(row | {"trained on": (r.trained_on or "the base")[:12]})
    q = m.quantization
    return {
        "bundle": str(path),
        "digest": bundle.digest,
        "model": f"{m.model.name} ({m.model.model_type}, {m.model.num_hidden_layers} layers, width {m.model.hidden_size})",
        "fingerprint": m.model.fingerprint or "unknown: folded from a foreign graph",
        "context": m.model.context_length,
        "precision": m.precision,
        "quantization": "none" if q is None else quantization(q),
        "graph": f"exporter {m.exporter}, opset {m.opset}, IR {m.ir_version}, slots {m.slots}, logits {m.logits}",
        "genai": m.genai,
        "golden": list(bundle.golden_names),
        "parity budget": to_json(m.parity_budget),
        "adapters": adapters,
        "edit nodes": [n.name for n in bundle.nodes],
        "files": [{"file": n, "size": size(f.size), "sha256": f.sha256[:16]} for n, f in m.files.items()],
    }


def quantization(q: Any) -> str:
    """The manifest's record in one line."""
    parts = [f"{q.scheme} {'E4M3' if q.scheme == 'fp8' else f'int{q.bits}'}, {q.method}"]
    parts.append(f"blocks of {q.block_size}" if q.block_size else "a scale per output column")
    if q.scheme == "weight-only":
        parts.append(f"accuracy level {q.accuracy_level}")
    parts.append("activations " + ("quantized" if q.quantizes_activations else "in float"))
    if q.embeddings:
        parts.append(f"embedding int{q.embeddings}")
    if q.kept:
        parts.append(f"{len(q.kept)} weights in float ({', '.join(q.kept[:3])}{', ..' if len(q.kept) > 3 else ''})")
    if c := q.calibration:
        mixture = ", ".join(f"{name} {share:.0%}" for name, share in c.mixture.items())
        parts.append(f"ranges {c.observer} over {c.prompts} prompts, {c.tokens} tokens of {mixture} (data {c.data[:12]})")
    return "; ".join(parts)


def inspect_adapter(path: Path) -> dict[str, Any]:
    from runtimes.adapter import load_adapter

    a = load_adapter(path)
    return {
        "adapter": str(path),
        "method": a.method,
        "rank": a.rank,
        "positions": str(a.positions),
        "tied": a.tied,
        "activation": a.activation or "none",
        "base": f"{a.base.name} ({a.base.num_hidden_layers} layers, width {a.base.hidden_size}), fingerprint {a.base.fingerprint}",
        "trained on": a.trained_on or "the base's own weights",
        "sites": [str(s) for s in a.sites],
        "parameters": sum(t.size for t in a.tensors.values()),
        "training": ", ".join(f"{k} {v}" for k, v in a.training.items() if not isinstance(v, dict)),
        "tensors": [
            {"tensor": k, "shape": list(v.shape), "norm": f"{float((v.astype('f8') ** 2).sum() ** 0.5):.4g}"} for k, v in a.tensors.items()
        ],
    }


def inspect_graph(path: Path) -> dict[str, Any]:
    from graph_passes.external import load_graph
    from graph_passes.graph_file import graph_file
    from graph_passes.insert import is_edit
    from graph_passes.sites import find_sites

    path = graph_file(path)
    model = load_graph(path)
    edits = [n for n in model.graph if is_edit(n)]
    content: dict[str, Any] = {
        "graph": str(path),
        "opset": model.opset_imports.get(""),
        "ir version": model.ir_version,
        "nodes": len(list(model.graph)),
        "inputs": [v.name for v in model.graph.inputs if not v.is_initializer()],
        "outputs": [v.name for v in model.graph.outputs],
    }
    if edits:
        return content | {"edit nodes": [n.name for n in edits]}
    return content | {
        "sites": [{"site": str(s), "value": where.value.name, "how": where.how} for s, where in sorted(find_sites(model).items())]
    }


def inspect_banks(path: Path) -> dict[str, Any]:
    from runtimes.ort_adapter_file import read_onnx_adapter

    tensors = read_onnx_adapter(path)
    rows = [{"tensor": k, "dtype": v.dtype.name, "shape": list(v.shape)} for k, v in sorted(tensors.items()) if v.ndim > 1]
    rules = {k: v.tolist() for k, v in sorted(tensors.items()) if v.ndim == 1}
    return {"adapter file": str(path), "rules": rules, "banks": rows}

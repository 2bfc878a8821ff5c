"""``reft-export inspect``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson
from reft_export.console import cache_size, escape, out, print_json, print_table, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runtimes.artifacts.bundle import Bundle
    from runtimes.artifacts.manifest import Manifest
    from runtimes.edits.adapter import Adapter
    from runtimes.edits.edit import Site
    from runtimes.edits.form import EditForm

EXPLICIT = "no graph computes these positions: our own sessions hand the slots in, and a bundle has no .onnx_adapter for a stock runtime"
SENTENCES = ("sites", "not found")
"""Shown line by line: a tensor's name must not be cut."""


def register(app: typer.Typer) -> None:
    app.command("inspect")(guarded(inspect))


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter folder, a bundle folder, an engine folder, or an ONNX graph.")],
    as_json: AsJson = False,
) -> None:
    """Show what is in an adapter, a graph, a bundle or an engine."""
    content = _content(path)
    if as_json:
        print_json(content)
    else:
        _show(content)


def _content(path: Path) -> dict[str, Any]:
    from runtimes.artifacts.engine import is_engine
    from runtimes.errors import InputError

    if not path.exists():
        raise InputError(f"{path} does not exist")
    if is_engine(path):
        return inspect_engine(path)
    if (path / "manifest.json").is_file():
        return inspect_bundle(path)
    if (path / "adapter.json").is_file():
        return inspect_adapter(path)
    if path.suffix == ".onnx" or list(path.glob("*.onnx")):
        return inspect_graph(path)
    if path.suffix in (".onnx_adapter", ".banks"):
        return inspect_banks(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path} is GGUF: a model goes to -m of train, import, export and quantize, a control vector to import")
    raise InputError(f"{path} is not an adapter folder (adapter.json), a bundle (manifest.json), an engine or an ONNX graph (.onnx)")


def _show(content: dict[str, Any]) -> None:
    tables = {k: v for k, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for key, value in content.items():
        if key not in tables and value is not None and (value or key not in SENTENCES):
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.print(f"[bold]{key}[/]: {escape(str(text))}")
    for key, rows in tables.items():
        if key in SENTENCES:
            out.print(f"[bold]{key}[/]:")
            for row in rows:
                out.print(escape(f"  {row['site']}: " + ", ".join(v for k, v in row.items() if k != "site")), soft_wrap=True)
            continue
        print_table(key, list(rows[0]), [["" if v is None else str(v) for v in row.values()] for row in rows])


def inspect_bundle(path: Path) -> dict[str, Any]:
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.files.records import to_json

    bundle = open_bundle(path)
    m = bundle.manifest
    adapters = []
    for name in bundle.adapter_names:
        r = bundle.adapter_record(name)
        row = {"name": name, **_form(r.site_forms), "positions": r.positions, "tied": r.tied, "sites": len(r.sites)}
        row |= {"trained on": (r.trained_on or "the base")[:12], "held": name not in m.not_held}
        adapters.append(row | {"probes": _probes(bundle, name)})
    q = m.quantization
    head = {"head": f"{len(m.head)} parameters that adapters bring: {', '.join(m.head)}"} if m.head else {}
    return {
        "bundle": str(path),
        "version": _version(m.schema_version, m.digest),
        "digest": bundle.digest,
        "model": f"{m.model.name} ({m.model.model_type}, {m.model.num_hidden_layers} layers, width {m.model.hidden_size})",
        "task": m.task if not m.labels else f"{m.task}: {', '.join(m.labels)}",
        "fingerprint": m.model.fingerprint or "unknown: folded from a foreign graph",
        "context": m.model.context_length,
        "precision": m.precision,
        "quantization": "none" if q is None else quantization(q),
        "graph": f"exporter {m.exporter}, opset {m.opset}, IR {m.ir_version}, slots {m.slots}, logits {m.logits}, KV cache {m.kv_cache}, "
        f"rules {'of every row' if m.mixes_rows else 'shared by the rows of a batch'}",
        **head,
        **_kv_cache(m),
        "genai": m.genai,
        "golden": list(bundle.golden_names),
        "parity budget": to_json(m.parity_budget),
        **({"retention": _shares(m.retention)} if m.retention else {}),
        **({"accepted loss": ", ".join(f"{name} {nats:.3g} nats a token" for name, nats in m.loss.items())} if m.loss else {}),
        "adapters": adapters,
        "edit nodes": [n.name for n in bundle.nodes],
        "files": [{"file": n, "size": size(f.size), "sha256": f.sha256[:16]} for n, f in m.files.items()],
    }


def _probes(bundle: Bundle, name: str) -> int:
    """How many lines of its task the adapter is recorded on; 0 where the golden arrays are of an older version."""
    from reft_export.tasks.probe_rows import probe_rows, probe_texts
    from runtimes.errors import BundleError

    try:
        return len(probe_rows(bundle, name)) + len(probe_texts(bundle, name))
    except BundleError:
        return 0


def _kv_cache(manifest: Manifest) -> dict[str, str]:
    from runtimes.kv_cache import stated_bytes_per_token

    token = stated_bytes_per_token(manifest.inputs)
    return {"KV cache of a row": cache_size(token, manifest.model.context_length)} if token else {}


def _version(version: int, digest: str) -> str:
    """Of the file that says what the others are, and its own digest."""
    return f"{version}, digest {digest[:12]}" if digest else f"{version}, without digests: `reft-export upgrade` writes version 2"


def _shares(retention: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in retention.items())


def _form(forms: Mapping[Site, EditForm]) -> dict[str, Any]:
    """An adapter's methods, and its ranks: "2 to 8" where they differ, None where it has none, being of full rank."""
    methods = dict.fromkeys(form.method for form in forms.values())
    ranks = sorted({form.rank for form in forms.values() if form.rank})
    return {"method": " + ".join(methods), "rank": None if not ranks else ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"}


def inspect_engine(path: Path) -> dict[str, Any]:
    from runtimes.artifacts.engine import open_engine

    engine = open_engine(path)
    e, m = engine.engine, engine.manifest
    adapters = []
    for name in engine.adapter_names:
        r = engine.adapter_record(name)
        tensors = engine.adapter_tensors(name)
        adapters.append({"name": name, "positions": r.positions, "tied": r.tied, "bound": len(tensors) or "frozen"})
    names = dict.fromkeys(name for profile in e.profiles for name in profile.shapes)
    ranges = [(name, {p.name: _range(p.shapes[name]) for p in e.profiles if name in p.shapes}) for name in names]
    return {
        "engine": str(path),
        "version": _version(e.schema_version, e.digest),
        "target": f"{e.target} {e.tensorrt_version}",
        "compute capability": list(e.compute_capabilities),
        "model": f"{m.model.name} ({m.model.model_type}, {m.model.num_hidden_layers} layers, width {m.model.hidden_size})",
        "precision": m.precision if m.quantization is None else f"{m.precision}, {m.quantization.scheme}",
        "plugin": "none: the edit is expanded" if e.plugin is None else f"{e.plugin.file} ({e.plugin.sha256[:16]})",
        "frozen": e.frozen or "nothing: adapters swap",
        "weight streaming": e.weight_streaming,
        "cache": {"whole": "all of it at every step", "columns": "new columns at every step"}[e.cache],
        "bundle": e.bundle_digest,
        "graph": e.graph_digest,
        "built in": f"{e.build_seconds:.1f} s by {e.created_by}",
        "rebuild": e.rebuild,
        "adapters": adapters,
        "profiles (min, opt, max)": _alike("input", ranges),
        "inputs": _alike("input", [(t.name, _type(t)) for t in e.inputs]),
        "outputs": _alike("output", [(t.name, _type(t)) for t in e.outputs]),
        "files": [{"file": n, "size": size(f.size), "sha256": f.sha256[:16]} for n, f in e.files.items()],
    }


def _alike(column: str, named: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
    """One row for the tensors of all layers that differ in nothing but the layer."""
    counts: dict[tuple[str, ...], int] = {}
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for name, values in named:
        kind = re.sub(r"\.\d+\.", ".*.", name)
        key = (kind, *values.values())
        counts[key] = counts.get(key, 0) + 1
        rows[key] = {column: name if counts[key] == 1 else f"{kind} ({counts[key]})"} | values
    return list(rows.values())


def _type(tensor: Any) -> dict[str, str]:
    dims = (str(dim).rpartition(".")[2] for dim in tensor.shape)
    return {"dtype": tensor.dtype, "shape": " x ".join(dims)}


def _range(shape: Any) -> str:
    return " ".join("x".join(map(str, bound)) for bound in (shape.min, shape.opt, shape.max))


def quantization(q: Any) -> str:
    """The manifest's record in one line."""
    parts = [f"{q.scheme} {'E4M3' if q.scheme == 'fp8' else f'int{q.bits}'}, {q.method}"]
    parts.append(f"blocks of {q.block_size}" if q.block_size else "a scale per output column")
    if q.scheme == "weight-only":
        parts.append(f"accuracy level {q.accuracy_level}")
    parts.append("activations " + ("quantized" if q.quantizes_activations else "in float"))
    if q.cache != "float":
        parts.append(f"KV cache {q.cache}")
    if q.embeddings:
        parts.append(f"embedding int{q.embeddings}")
    if q.int8:
        parts.append(f"{len(q.int8)} weights in int8 ({', '.join(q.int8[:3])}{', ..' if len(q.int8) > 3 else ''})")
    if q.origin:
        parts.append(q.origin)
    if q.kept:
        parts.append(f"{len(q.kept)} weights in float ({', '.join(q.kept[:3])}{', ..' if len(q.kept) > 3 else ''})")
    if c := q.calibration:
        mixture = ", ".join(f"{name} {share:.0%}" for name, share in c.mixture.items())
        parts.append(f"ranges {c.observer} over {c.prompts} prompts, {c.tokens} tokens of {mixture} (data {c.data[:12]})")
    return "; ".join(parts)


def inspect_adapter(path: Path) -> dict[str, Any]:
    from runtimes.edits.adapter import load_adapter, read_adapter_config
    from runtimes.edits.positions import needs_slots

    a, config = load_adapter(path), read_adapter_config(path)
    return {
        "adapter": str(path),
        "version": _version(config.format_version, config.digest),
        **_form(a.site_forms),
        "positions": str(a.where),
        **({"explicit": EXPLICIT} if needs_slots(a.where) else {}),
        "tied": a.tied,
        "activation": " + ".join(dict.fromkeys(form.activation or "none" for form in a.site_forms.values())),
        "base": f"{a.base.name} ({a.base.num_hidden_layers} layers, width {a.base.hidden_size}), fingerprint {a.base.fingerprint}",
        "trained on": a.trained_on or "the base's own weights",
        "sites": [_site(a, s) for s in a.sites],
        "parameters": sum(t.size for t in a.tensors.values()),
        **({"labels": list(a.base.labels), "head": sum(t.size for t in a.head.values()) or "the base's"} if a.base.labels else {}),
        **({"probes": config.probes.count} if config.probes else {}),
        "training": ", ".join(f"{k} {v}" for k, v in a.training.items() if not isinstance(v, dict)),
        "tensors": [
            {"tensor": k, "shape": list(v.shape), "norm": f"{float((v.astype('f8') ** 2).sum() ** 0.5):.4g}"} for k, v in a.stored().items()
        ],
    }


def _site(adapter: Adapter, site: Site) -> str:
    """With what of it differs from site to site."""
    said = [str(adapter.form(site))] if adapter.forms else []
    said += [str(adapter.rule(site))] if adapter.rules else []
    return f"{site}: {', '.join(said)}" if said else str(site)


def inspect_graph(path: Path) -> dict[str, Any]:
    from graph_passes.external import load_graph
    from graph_passes.find.domains import check_domains
    from graph_passes.find.edge_llm import is_edge_llm
    from graph_passes.find.sites import survey_sites
    from graph_passes.graph_file import graph_file
    from graph_passes.insert import is_edit

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
    if not is_edge_llm(model.graph):  # whose operators are TensorRT plugins
        check_domains(model)
    survey = survey_sites(model)
    return content | {
        "layers": survey.layers,
        "sites": [{"site": str(s), "value": where.value.name, "how": where.how} for s, where in sorted(survey.found.items())],
        "not found": [{"site": str(s), "why": str(e)} for s, e in sorted(survey.refused.items())],
    }


def inspect_banks(path: Path) -> dict[str, Any]:
    from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
    from runtimes.edits.op import RULE_DEFAULTS

    tensors = read_onnx_adapter(path)
    rules = {k: v.tolist() for k, v in sorted(tensors.items()) if k in RULE_DEFAULTS}
    rows = [{"tensor": k, "dtype": v.dtype.name, "shape": list(v.shape)} for k, v in sorted(tensors.items()) if k not in rules]
    return {"adapter file": str(path), "rules": rules, "banks": rows}

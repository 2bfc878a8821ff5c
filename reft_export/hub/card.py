"""README.md of a repository: a model card in the hub's form, YAML between two lines of dashes, then Markdown.

https://huggingface.co/docs/hub/model-cards. Texts of the metadata are written as JSON, which YAML reads. A licence is the owner's to
choose, and left out where none is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reft_export.base.hub import HUB_ID
from runtimes.artifacts.adapter_record import AdapterRecord
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.form import described
from runtimes.edits.methods import METHODS

LIBRARY = "reft-export"


def adapter_card(adapter: Adapter, repository: str, *, base_model: str | None, license: str | None) -> str:
    """Of an adapter's folder. ``base_model``: the base's id on the hub; None: its recorded name, where that is one."""
    name = repository.rpartition("/")[2]
    methods = sorted({form.method for form in adapter.site_forms.values()})
    task = TEXT_CLASSIFICATION if adapter.base.labels else TEXT_GENERATION
    data = _metadata(adapter.base.name, base_model, license, task, ["reft", *methods], relation="adapter")
    parameters = sum(tensor.size for tensor in adapter.stored().values())
    facts = {
        "base": f"{_code(adapter.base.name)}, fingerprint {_code(adapter.base.fingerprint[:16])}",
        "edit": described(adapter.site_forms),
        "formula": "; ".join(f"`{METHODS[method].formula}`" for method in methods),
        "sites": _sites(adapter.sites),
        "positions": f"`{adapter.where}`, {'tied' if adapter.tied else 'prefix and suffix of their own'}",
        "parameters": f"{parameters:,}",
        "digest": f"`{adapter.digest[:16]}`",
        **_training(adapter.training),
        "probes": f"{len(adapter.probes)} lines of its own task, which quantization is measured on" if adapter.probes else "none",
    }
    base = base_model or _hub_id(adapter.base.name) or "MODEL"
    run = [
        f"pip install '{LIBRARY}[cpu,host]'",
        f"reft-export pull {repository} -o {name}",
        f"reft-export export -m {base} -a {name} -o {name}-bundle   # -p int4: the base quantized",
        f"reft-export run {name}-bundle -a {name} {_prompt(str(adapter.where))}",
    ]
    what = f"An edit of the residual stream of {_code(adapter.base.name)} (ReFT); the base's weights stay as they are."
    return _card(data, name, what, facts, [], run)


def bundle_card(bundle: Bundle, repository: str, *, base_model: str | None, license: str | None) -> str:
    """Of a bundle's folder."""
    m, name = bundle.manifest, repository.rpartition("/")[2]
    records = {each: bundle.adapter_record(each) for each in bundle.adapter_names}
    methods = sorted({form.method for record in records.values() for form in record.site_forms.values()})
    relation = "adapter" if m.quantization is None else "quantized"
    data = _metadata(m.model.name, base_model, license, m.task, ["onnx", "onnxruntime", "reft", *methods], relation=relation)
    facts = {
        "base": f"{_code(m.model.name)} ({_code(m.model.model_type)}, {m.model.num_hidden_layers} layers, width {m.model.hidden_size})",
        "precision": m.precision if m.quantization is None else f"{m.quantization.label}, {m.quantization.method}; edits in {m.precision}",
        "context": f"{m.model.context_length:,} tokens",
        "size": f"{sum(file.size for file in m.files.values()) / 1e6:.1f} MB",
        "digest": f"`{bundle.digest[:16]}`",
        **({"labels": ", ".join(map(_code, m.labels))} if m.labels else {}),
    }
    first = next(iter(records), None)
    asked = _prompt(str(records[first].positions) if first else "")
    run = [
        f"pip install '{LIBRARY}[cpu]'",
        f"reft-export pull {repository} -o {name}",
        f"reft-export run {name}{f' -a {first}' if first else ''} {asked}",
        f"reft-export parity {name}",
    ]
    what = f"{_code(m.model.name)} as an ONNX graph, with edits of its residual stream (ReFT) that swap by request; it runs without torch."
    return _card(data, name, what, facts, [_row(each, record, bundle) for each, record in records.items()], run)


def _row(name: str, record: AdapterRecord, bundle: Bundle) -> dict[str, str]:
    m = bundle.manifest
    kept, cost = (m.retention or {}).get(name), (m.loss or {}).get(name)
    return {
        "adapter": name,
        "edit": described(record.site_forms),
        "sites": _sites(tuple(record.site_forms)),
        "positions": f"`{record.positions}`",
        "kept by quantization": "" if kept is None else f"{kept:.2f}",
        "accepted loss, nats a token": "" if cost is None else f"{cost:.3g}",
        "held against eager PyTorch": "no" if name in m.not_held else "yes",
    }


def _metadata(
    recorded: str, base_model: str | None, license: str | None, task: str, tags: Sequence[str], *, relation: str
) -> dict[str, Any]:
    base = base_model or _hub_id(recorded)
    return {
        **({} if base is None else {"base_model": base, "base_model_relation": relation}),
        "library_name": LIBRARY,
        "pipeline_tag": task,
        "tags": [LIBRARY, *tags],
        **({} if license is None else {"license": license}),
    }


def _hub_id(recorded: str) -> str | None:
    """A base's name as the hub's id; None where it is a folder's or a file's."""
    return recorded if "/" in recorded and HUB_ID.fullmatch(recorded) else None


def _training(record: Mapping[str, Any]) -> dict[str, str]:
    """Figures of the training, as far as the adapter records them; it may be of anybody's making."""
    data, found = record.get("data"), dict[str, str]()
    if isinstance(data, Mapping) and isinstance(data.get("examples"), int):
        steps = record.get("steps")
        found["trained on"] = f"{data['examples']} examples" + (f", {steps} steps" if isinstance(steps, int) else "")
    for key, said in {
        "kept_metric": "held out, right",
        "kept_eval_loss": "held-out loss, nats a token",
        "final_loss": "last loss, nats a token",
    }.items():
        if isinstance(value := record.get(key), float):
            found[said] = f"{value:.4g}"
    return found


def _prompt(positions: str) -> str:
    """For ``run``. Where marked tokens are edited a prompt has to mark some."""
    return f'-p "Tell me about {"[[the moon]]" if "marked" in positions else "the moon"}."'


def _sites(sites: Sequence[Site]) -> str:
    streams = dict.fromkeys(site.stream for site in sites)
    return "; ".join(f"{stream} of layers {', '.join(str(s.layer) for s in sites if s.stream == stream)}" for stream in streams)


def _code(text: str) -> str:
    """A text of somebody else's, which Markdown shows as it is."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"


def _card(
    data: Mapping[str, Any], name: str, what: str, facts: Mapping[str, str], rows: Sequence[Mapping[str, str]], run: Sequence[str]
) -> str:
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in data.items())
    table = _table(["", ""], [[key, value] for key, value in facts.items()])
    used = [key for key in rows[0] if any(row[key] for row in rows)] if rows else []
    adapters = f"\n## Adapters\n\n{_table(used, [[row[key] for key in used] for row in rows])}" if rows else ""
    commands = "".join(f"    {line}\n" for line in run)
    return f"---\n{front}---\n\n# {name}\n\n{what}\n\n{table}{adapters}\n## How to run\n\n{commands}\nMade with {LIBRARY}.\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

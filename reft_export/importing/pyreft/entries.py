"""Which interventions a pyreft folder holds: those of its config.json, or in a trainer's checkpoint, those of its files' names.

Source: pyvene/models/intervenable_base.py, save and _get_representation_key; configuration_intervenable_model.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_export.base.load import Outline
from reft_export.importing.foreign import ForeignEdit, listed
from reft_export.importing.pyreft.sites import ComponentSites, Place
from reft_export.importing.pyreft.states import CLASSES
from reft_export.importing.statements import check_kind
from runtimes.errors import AdapterError
from runtimes.files.records import read_json_object

CONFIG_FILE = "config.json"

REPRESENTATION = ("layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
                  "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
                  "hidden_source_representation", "latent_dim")  # fmt: skip
"""The fields of a representation, which config.json holds as a list in this order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One intervention of the folder. ``kind`` is its class, "" where the folder has no config.json (a trainer's checkpoint)."""

    key: str
    kind: str
    place: Place
    rank: object = None
    """low_rank_dimension: the rank of every class of pyreft's; null where the user gave it to the intervention alone."""
    width: object = None
    """intervention_dimensions, pyvene's interchange_dim; null for Loreft's of old versions."""
    partition: object = None
    """subspace_partition: [start, stop] of every part of the rank that can be chosen at a call."""
    chooses: bool = False
    """Whether it edits by the rows that are chosen at a call alone: pyreft's own classes edit by all of them."""


def read_entries(folder: Path, sites: ComponentSites) -> list[Entry]:
    """In the order in which pyvene hooks them; raises AdapterError for files of interventions that the config does not list."""
    if not (folder / CONFIG_FILE).is_file():
        return _checkpoint(folder, sites)
    entries = _configured(folder, sites)
    _check_sorted_keys(folder, entries)
    listed_files = {f"intkey_{entry.key}.bin" for entry in entries}
    if more := sorted({path.name for path in folder.glob("intkey_*.bin")} - listed_files):
        raise AdapterError(
            f"{folder / CONFIG_FILE} does not list {listed(more)}, which lies beside it; add it there, or remove the file to do without it"
        )
    return entries


def check_recorded(folder: Path, entries: Sequence[Entry], edits: Sequence[ForeignEdit]) -> None:
    """Raises AdapterError where the config records another rank or width than the tensors have."""
    for entry, edit in zip(entries, edits, strict=True):
        rank, width = next(value.shape for value in edit.parameters.values() if value.ndim == 2)
        for name, recorded, found in (("low_rank_dimension", entry.rank, rank), ("intervention_dimensions", entry.width, width)):
            number = isinstance(recorded, int | float) and not isinstance(recorded, bool)
            if number and recorded != found:
                raise AdapterError(
                    f"{folder / CONFIG_FILE}: {name} of {entry.key} is {recorded}, expected {found}, which its tensors have; the "
                    "adapter is damaged"
                )


def check_model(folder: Path, outline: Outline) -> None:
    """Raises AdapterError where the config records the class of another model, or another base's type or size."""
    from transformers import CONFIG_MAPPING

    path = folder / CONFIG_FILE
    config = read_json_object(path) if path.is_file() else {}
    # Of a class, its package in transformers says which family it is of: GPT2Model and GPT2LMHeadModel lie in one.
    package = re.match(r"<class 'transformers\.models\.(\w+)\.", str(config.get("intervenable_model_type")))
    for key, family in (("intervenable_model_type", package and package[1]), ("model_type", config.get("model_type"))):
        if isinstance(family, str) and family in CONFIG_MAPPING:
            check_kind(f"{path}: {key}", family, outline)
    for key, own in (("hidden_size", outline.info.hidden_size), ("num_hidden_layers", outline.info.num_hidden_layers)):
        if config.get(key, own) != own:
            raise AdapterError(
                f"{path}: {key} is {config[key]!r}, expected {own}, as {outline.info.name} has it; pass the base the adapter was trained on"
            )


def _check_sorted_keys(folder: Path, entries: Sequence[Entry]) -> None:
    """pyvene hooks what sorted_keys lists: it is the same interventions, in whatever order."""
    keys = read_json_object(folder / CONFIG_FILE).get("sorted_keys")
    if isinstance(keys, list) and (odd := {str(key).replace(".", "_") for key in keys} ^ {e.key.replace(".", "_") for e in entries}):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: sorted_keys and representations do not list the same interventions: {listed(sorted(odd))}; the "
            "adapter is damaged"
        )


def _configured(folder: Path, sites: ComponentSites) -> list[Entry]:
    config = read_json_object(folder / CONFIG_FILE)
    representations, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(representations, list) or not isinstance(types, list) or len(types) != len(representations) or not types:
        raise AdapterError(f"{folder / CONFIG_FILE}: representations and intervention_types are not two lists of one length")
    if config.get("mode", "parallel") != "parallel":
        raise AdapterError(f"{folder / CONFIG_FILE}: mode {config['mode']!r} runs sources one after the other; only parallel is known")
    widths = config.get("intervention_dimensions")
    if not isinstance(widths, list):
        widths = [None] * len(types)
    if len(widths) != len(types):
        raise AdapterError(f"{folder / CONFIG_FILE}: {len(widths)} intervention_dimensions for {len(types)} interventions; it is damaged")
    entries, seen = [], Counter()
    for item, kind, width in zip(representations, types, widths, strict=True):
        fields = _representation(item, folder)
        stems = _key_stems(fields)
        keys = [f"{stem}#{seen[stems]}" for stem in stems]
        key = next((k for k in keys if (folder / f"intkey_{k}.bin").exists()), keys[0])
        place = sites.of_component(fields["component"], fields["layer"])
        rank = fields.get("low_rank_dimension")
        chooses, partition = _chooses(kind), fields.get("subspace_partition")
        kind = "LoreftIntervention" if chooses else _class_name(kind, folder)
        entries.append(Entry(key=key, kind=kind, place=place, rank=rank, width=width, partition=partition, chooses=chooses))
        seen[stems] += 1
    return entries


def _representation(item: object, folder: Path) -> dict[str, Any]:
    if isinstance(item, str):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: representation {item[:60]!r} is text, expected a list or an object; move {CONFIG_FILE} away, and the "
            "places are read from the names of the intkey_*.bin files"
        )
    stated: dict[str, Any] = item if isinstance(item, dict) else {}
    if isinstance(item, list) and len(item) <= len(REPRESENTATION):
        stated.update(zip(REPRESENTATION, item, strict=False))
    if not isinstance(stated.get("component"), str):
        raise AdapterError(f"{folder / CONFIG_FILE}: representation {stated or item!r} is not understood")
    fields = {"layer": 0, "unit": "pos", "max_number_of_units": 1} | stated
    unusual = [n for n in REPRESENTATION[8:13] if fields.get(n) is not None and n != "group_key"]
    if fields["unit"] != "pos" or fields["max_number_of_units"] != 1 or unusual:
        what = f"{unusual[0]} {fields[unusual[0]]!r}" if unusual else f"unit {fields['unit']!r} x {fields['max_number_of_units']!r}"
        raise AdapterError(f"{folder / CONFIG_FILE}: {fields['component']} with {what} cannot be imported; only single positions can")
    return fields


def _key_stems(fields: Mapping[str, Any]) -> tuple[str, str]:
    """pyvene's file names for a representation, of 0.1.7 on and of before, without the counter that tells those of one name apart."""
    component = fields["component"]
    parts = ["comp", component] if "." in component else ["layer", str(fields["layer"]), "comp", component]
    dotted = ".".join([*parts, "unit", "pos", "nunit", "1"])
    return dotted.replace(".", "_"), dotted


def _chooses(text: object) -> bool:
    """Whether it is the LoReFT with subspaces of pyreft's examples, which lies in whichever module its user copied it to."""
    return re.fullmatch(r"<class '[\w.]+\.SubloreftIntervention'>", str(text)) is not None


def _class_name(text: object, folder: Path) -> str:
    match = re.fullmatch(r"<class '([\w.]+)\.(\w+)'>", str(text))
    module, name = match.groups() if match else ("", str(text))
    if module.partition(".")[0] != "pyreft" or name not in CLASSES:
        known = ", ".join(CLASSES)
        if re.match(r"red(?!ft)", name.lower()):
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {name} is RED, which pyreft itself does not have; store its vectors as <layer>.<stream>.scale and"
                " .bias in an .npz, which the import reads"
            )
        raise AdapterError(f"{folder / CONFIG_FILE}: intervention {module}.{name} is not one of pyreft's own: {known}")
    return name


def _checkpoint(folder: Path, sites: ComponentSites) -> list[Entry]:
    """A folder that pyreft's trainer saved: weights alone. The counters in the names give the order: all prefixes, then all suffixes."""
    found = []
    for path in folder.glob("intkey_*.bin"):
        match = re.fullmatch(r"intkey_(.+)#(\d{1,40})", path.stem)
        if not match:
            raise AdapterError(f"{path} is not named as pyreft names interventions, intkey_<place>#<number>.bin")
        found.append((int(match[2]), sites.of_key(match[1]), path.stem.removeprefix("intkey_")))
    return [Entry(key=key, kind="", place=place) for _, place, key in sorted(found)]

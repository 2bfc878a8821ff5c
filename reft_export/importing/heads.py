"""A classifier's head that another library saved beside its adapter.

pyreft keeps the base's trained parameters in pytorch_model.bin, AdapterHub a model's own head in model_head.safetensors or
pytorch_model_head.bin: both by the base's parameter names. AdapterHub's flexible heads are modules of their own,
``heads.<name>.<index>``; the classification head that it adds by default (dropout, dense, tanh, dropout, dense, on the first token) is
RoBERTa's. Others are refused.

Source: adapters/heads/base.py, ClassificationHead; pyvene/models/intervenable_base.py, save.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reft_export.base.classifiers import head_parameters
from reft_export.base.load import Outline
from reft_export.importing.foreign import listed, short
from reft_export.importing.tensors import as_float32
from runtimes.errors import AdapterError
from runtimes.files.records import read_json_object

HEAD_CONFIG_FILE = "head_config.json"

FLEXIBLE = re.compile(r"heads\.([^.]+)\.(\d{1,40})\.(weight|bias)")
FLEXIBLE_ROBERTA = {"1": "classifier.dense", "4": "classifier.out_proj"}
"""Places of the linear layers in AdapterHub's default classification head, and RoBERTa's names of the same."""


def head_of(
    state: Mapping[str, Tensor], outline: Outline, path: Path, config: Mapping[str, Any] | None = None, adapter: str = ""
) -> dict[str, np.ndarray]:
    """The head's parameters by the base's names, float32, in their order.

    ``config``: AdapterHub's head_config.json; ``adapter``: the adapter's name there, which its own head bears. Raises AdapterError for a
    head that is not the base's, and for other trained parameters.
    """
    if any(FLEXIBLE.fullmatch(name) for name in state):
        state = _flexible(_one_head(state, path, adapter), outline, path, config or {})
    own = {name: tuple(parameter.shape) for name, parameter in head_parameters(outline.model).items()}
    if set(state) != set(own):
        raise AdapterError(
            f"{path} holds {listed(sorted(set(state) ^ set(own)))} other than the head of {outline.info.name} ({', '.join(own)}); pass the "
            "base that the adapter was trained on, or remove the file to import the edit alone"
        )
    return {name: as_float32(state[name], shape, f"{path}: {name}") for name, shape in own.items()}


def read_head_config(folder: Path) -> dict[str, Any]:
    """AdapterHub's head_config.json, its config and label2id of the right types; empty where there is none."""
    path = folder / HEAD_CONFIG_FILE
    if not path.is_file():
        return {}
    recorded = read_json_object(path)
    config = recorded.get("config")
    if not isinstance(config, dict | None):
        raise AdapterError(f"{path}: config is {short(config)}, expected an object or null")
    for where, labels in (("label2id", recorded.get("label2id")), ("config.label2id", (config or {}).get("label2id"))):
        if not isinstance(labels, dict | None) or not all(type(number) is int for number in (labels or {}).values()):
            raise AdapterError(f"{path}: {where} is {short(labels)}, expected a number for each label, or null")
    return recorded


def check_labels(config: Mapping[str, Any], outline: Outline, path: Path) -> None:
    """Raises AdapterError where AdapterHub records names of labels that are not the base's; LABEL_0, .. are no names."""
    recorded = config.get("label2id") or (config.get("config") or {}).get("label2id") or {}
    labels = tuple(sorted(recorded, key=lambda name: recorded[name]))
    named = [label for label in labels if not re.fullmatch(r"LABEL_\d{1,40}", str(label))]
    if named and labels != outline.info.labels:
        raise AdapterError(
            f"{path}: the adapter was trained with labels {', '.join(labels)}, {outline.info.name} has {', '.join(outline.info.labels)}; "
            "pass the base it was trained on"
        )


def _one_head(state: Mapping[str, Tensor], path: Path, adapter: str) -> Mapping[str, Tensor]:
    """``state`` with one ``heads.<name>`` in it: where there are several, the one that bears the adapter's name."""
    names = {name: match[1] for name in state if (match := FLEXIBLE.fullmatch(name))}
    heads = sorted(set(names.values()))
    if len(heads) == 1:
        return state
    if adapter not in heads:
        raise AdapterError(
            f"{path} holds {len(heads)} heads ({listed(heads)}), none of them named {adapter} as the adapter is; save the adapter with its "
            "own head alone"
        )
    return {name: value for name, value in state.items() if names.get(name, adapter) == adapter}


def _flexible(state: Mapping[str, Tensor], outline: Outline, path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    form = config.get("config") or {}
    plain = form.get("head_type") == "classification" and form.get("layers") == 2 and form.get("activation_function") == "tanh"
    kind = outline.model.config.model_type
    matches = {name: FLEXIBLE.fullmatch(name) for name in state}
    fits = all(match and match[2] in FLEXIBLE_ROBERTA for match in matches.values())
    if kind not in ("roberta", "xlm-roberta") or not plain or form.get("use_pooler") or not fits:
        raise AdapterError(
            f"{path}: AdapterHub's head ({form.get('head_type', 'unknown')}, {form.get('layers', '?')} layers, "
            f"{form.get('activation_function', '?')}) is not the head of a {kind}; only its default classification head on RoBERTa is; "
            "remove the file to import the edit alone"
        )
    return {f"{FLEXIBLE_ROBERTA[match[2]]}.{match[3]}": state[name] for name, match in matches.items() if match}

"""The fingerprint that ties an adapter or a bundle to its base, and what two bases differ in.

    "v2_" + sha256(canonical config, weights)          canonical config: reft_export/base/config.py
    weights = sha256(name, shape, sampled values of every tensor, in name order)

Values are compared as numbers: SAMPLES evenly spaced blocks of SAMPLE_VALUES of every stored tensor, both ends among them, in float64. So
neither shards, nor safetensors or .bin, nor a wider dtype that holds the same values, nor the release of transformers that wrote the
folder change it; a narrower dtype, which rounds, does. Left out: a head that is stored though it is tied and equal to the embedding;
position tables that older releases stored. A prefix that a checkpoint of the bare model lacks (``model.``) is dropped from the names.

Fingerprints of version 1 (64 hexadecimal digits and no prefix) are known again: they are computed anew where one was recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from reft_export.base.classifiers import is_classifier
from reft_export.base.config import canonical_config, family_config
from reft_export.base.model_folder import read_config
from reft_export.base.stored import Tensor, of_torch, stored_tensors, without_tables
from runtimes.edits.adapter import BaseParts
from runtimes.edits.same_base import VERSION, grouped


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which base it is. ``tied``: a head that is stored beside the embedding it is tied to, and differs from it; "" where none does."""

    fingerprint: str
    parts: BaseParts
    tied: str = ""


# --- making it ------------------------------------------------------------------------------------


def identify(folder: Path) -> Identity:
    """The base in ``folder``, read from its config and, a few pages each, its weight files; a .bin checkpoint is unpickled (weights only).

    Raises InputError for a folder without config or weights, and for damaged files.
    """
    return _identity(read_config(folder), stored_tensors(folder), folder / "config.json")


def identify_model(model: PreTrainedModel) -> Identity:
    """The same of a model in memory: what ``identify`` would say of the folder that its ``save_pretrained`` writes."""
    return _identity(memory_config(model), {n: of_torch(tensor) for n, tensor in _stored_state(model).items()}, "the model in memory")


def memory_config(model: PreTrainedModel) -> dict[str, Any]:
    """config.json of a model in memory, as this transformers spells it."""
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}


def _stored_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as a checkpoint names and shapes it: transformers 5 joins the experts of a layer when it loads them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads what is stored
        return model.state_dict()
    return revert_weight_conversion(model, model.state_dict())


def fingerprint(folder: Path) -> str:
    """The fingerprint of the base in ``folder``; raises InputError as ``identify`` does."""
    return identify(folder).fingerprint


def memory_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a model that has no files."""
    return identify_model(model).fingerprint


def _identity(written: Mapping[str, Any], tensors: Mapping[str, Tensor], where: Path | str) -> Identity:
    config = canonical_config(written, where)
    tensors = without_tables(tensors)
    tied = ""
    if head := _tied_head(written, tensors):
        name, equal = head
        tied = "" if equal else name
        tensors = {n: t for n, t in tensors.items() if n != name or not equal}
    tensors = _without_prefix(tensors, _prefix(written))
    weights = hashlib.sha256("".join(f"{n} {t.digest}\n" for n, t in sorted(tensors.items())).encode()).hexdigest()
    whole = hashlib.sha256(json.dumps([config, weights], sort_keys=True).encode()).hexdigest()
    parts = BaseParts(config=config, weights=weights, tensors=grouped({name: tensor.digest for name, tensor in tensors.items()}))
    return Identity(fingerprint=VERSION + whole, parts=parts, tied=tied)


def _tied_head(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, bool] | None:
    """A decoder's stored output head where config.json ties it to the embedding, and whether they are equal.

    Both are [vocabulary, width]; the head stands outside the model, so its name has fewer parts.
    """
    config = family_config(written)
    text = config.get_text_config()
    ties = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
    if is_classifier(written) or not ties:
        return None
    rows = getattr(text, "vocab_size", None)
    tables = sorted((n for n, t in tensors.items() if len(t.shape) == 2 and t.shape[0] == rows), key=lambda n: n.count("."))
    if len(tables) < 2 or tables[0].count(".") == tables[1].count("."):
        return None
    head, others = tables[0], tables[1:]
    equal = any(tensors[head] == tensors[other] for other in others)
    return (head, equal) if equal or len(others) == 1 else None


def _prefix(written: Mapping[str, Any]) -> str:
    """What a checkpoint of the whole model has before the names of the bare one."""
    auto = AutoModelForSequenceClassification if is_classifier(written) else AutoModelForCausalLM
    try:
        family = auto._model_mapping[CONFIG_MAPPING[written["model_type"]]]
    except KeyError:  # no decoder of that type
        return ""
    return getattr(family, "base_model_prefix", "")  # several classes have none


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not prefix:
        return dict(tensors)
    short = {name: name.removeprefix(f"{prefix}.") for name in tensors}
    return {(name if short[name] != name and short[name] in tensors else short[name]): tensor for name, tensor in tensors.items()}

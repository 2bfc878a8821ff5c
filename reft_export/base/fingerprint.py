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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from reft_export.base.classifiers import is_classifier
from reft_export.base.config import canonical_config, family_config
from reft_export.base.model_folder import not_finite, read_config, safetensors_parts, unpickled, weight_files
from reft_export.base.same_base import VERSION, grouped
from runtimes.edits.adapter import BaseParts
from runtimes.errors import InputError

SAMPLES, SAMPLE_VALUES = 32, 16
"""Of every tensor this many evenly spaced blocks of this many values are compared, with both ends."""

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
"""By safetensors' names of types; all others are compared byte by byte."""

TORCH_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip

NOT_WEIGHTS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|embeddings\.position_ids)$")
"""Tables that older releases stored, and that newer ones compute."""

CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")
"""GPT-2's stored mask, [1, 1, T, T]; of other families such a name is a bias [D]."""


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    digest: str


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
    tensors: dict[str, _Tensor] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            for name, (dtype, shape, sample) in safetensors_parts(path, _values).items():
                if dtype in FLOATS and np.isnan(np.frombuffer(sample, "<f8")).any():
                    # Said before the base is compared with an adapter's: it is damaged, not another one.
                    raise InputError(not_finite(folder, name))
                tensors[name] = _Tensor(shape, _digest(shape, sample))
        else:
            tensors |= {name: _of_torch(tensor) for name, tensor in unpickled(path).items()}
    return _identity(read_config(folder), tensors, folder / "config.json")


def identify_model(model: PreTrainedModel) -> Identity:
    """The same of a model that has no files, by its state dict and its config as this transformers spells it."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__]}
    return _identity(config, {name: _of_torch(tensor) for name, tensor in model.state_dict().items()}, "the model in memory")


def fingerprint(folder: Path) -> str:
    """The fingerprint of the base in ``folder``; raises InputError as ``identify`` does."""
    return identify(folder).fingerprint


def memory_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a model that has no files."""
    return identify_model(model).fingerprint


def _identity(written: Mapping[str, Any], tensors: Mapping[str, _Tensor], where: Path | str) -> Identity:
    config = canonical_config(written, where)
    tensors = _without_tables(tensors)
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


def _without_tables(tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not NOT_WEIGHTS.search(name) and not (CAUSAL_MASK.search(name) and len(tensor.shape) == 4)
    }


def _tied_head(written: Mapping[str, Any], tensors: Mapping[str, _Tensor]) -> tuple[str, bool] | None:
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
        return auto._model_mapping[CONFIG_MAPPING[written["model_type"]]].base_model_prefix
    except (KeyError, AttributeError):  # no decoder of that type, or several classes for it
        return ""


def _without_prefix(tensors: Mapping[str, _Tensor], prefix: str) -> dict[str, _Tensor]:
    if not prefix:
        return dict(tensors)
    short = {name: name.removeprefix(f"{prefix}.") for name in tensors}
    return {(name if short[name] != name and short[name] in tensors else short[name]): tensor for name, tensor in tensors.items()}


# --- values ---------------------------------------------------------------------------------------


def _digest(shape: tuple[int, ...], sample: bytes) -> str:
    return hashlib.sha256(f"{list(shape)} ".encode() + sample).hexdigest()


def _values(dtype: str, data: Any, begin: int, end: int) -> bytes:
    """The sampled values of ``data[begin:end]``, floats as float64 whatever they are stored in."""
    size = ITEM_BYTES.get(dtype, 1)
    count, block = (end - begin) // size, SAMPLE_VALUES
    if count <= SAMPLES * block:
        sample = bytes(data[begin:end])
    else:
        starts = (begin + size * ((count - block) * i // (SAMPLES - 1)) for i in range(SAMPLES))
        sample = b"".join(bytes(data[start : start + size * block]) for start in starts)
    if dtype not in FLOATS:
        return dtype.encode() + sample
    return (np.frombuffer(sample, np.dtype(FLOATS[dtype]).newbyteorder("<")).astype("<f8") + 0.0).tobytes()


def _of_torch(tensor: torch.Tensor) -> _Tensor:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    return _Tensor(shape, _digest(shape, _values(TORCH_NAMES.get(name, name), data, 0, data.size)))

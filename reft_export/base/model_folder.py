"""What lies in a model folder: its config, its weight files and what they store; and fingerprints as version 1 made them."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from runtimes.errors import InputError
from runtimes.files.records import parse_json, read_json_object

if TYPE_CHECKING:  # what a folder's files tell is told before torch is loaded
    import torch
    from transformers import PreTrainedModel

VOLATILE_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of config.json that say how a model was written or is run, not what it computes."""

SAMPLES, SAMPLE_BYTES = 32, 16
"""Of every stored tensor, this many evenly spaced blocks of this many bytes enter version 1 of the fingerprint, with both ends."""

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
"""Bits of a value in a safetensors file; types that no float checkpoint has are not checked."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""


MERGE = "merge it into its base with peft's merge_and_unload() and save_pretrained(), and pass that folder"

HUB_KERNEL_KEYS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
"""Keys of config.json that may name code on the Hugging Face hub."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a base's folder.

    Raises InputError where it is missing or no JSON object, and where transformers would load something else than what config.json says
    and the checkpoint stores: in some environments and releases only, or another file.
    """
    config = _read_config(folder)
    _check_alone(folder)
    _check_plain(folder, config)
    return config


def _check_alone(folder: Path) -> None:
    if list(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise InputError(
            f"{folder} holds a distributed checkpoint (shard-*-model-*.safetensors), which transformers 5 loads in place of the model's; "
            "save it with save_pretrained() into a folder of its own"
        )


def _check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json names nothing that is loaded in place of the checkpoint beside it."""
    path, text = folder / "config.json", config.get("text_config")
    quantization = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if quantization:
        method = quantization.get("quant_method", "by a method that it does not name") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"{folder} is quantized ({method}), which is not read (GPTQ, AWQ and compressed-tensors are); pass the float model it was made "
            "from: `reft-export quantize` quantizes its bundle, and `reft-export train --base BUNDLE` trains on the weights that it ships"
        )
    weights = config.get("transformers_weights")
    if weights and weights not in WEIGHT_FILES[:1]:
        raise InputError(
            f"{path}: transformers_weights names {weights} in place of {WEIGHT_FILES[0]}; save the model with save_pretrained()"
        )
    if others := [name for name in config.get("configuration_files") or () if name != "config.json"]:
        raise InputError(
            f"{path} lists {others[0]}, which some releases of transformers read in its place; remove configuration_files, and keep the "
            "config that is meant as config.json"
        )
    if config.get("fusion_config"):
        raise InputError(f"{path}: fusion_config changes the model in transformers 5 alone; remove it")
    for key in HUB_KERNEL_KEYS:
        if "/" in str(config.get(key)):
            raise InputError(f"{path}: {key} names {config[key]}, code on the Hugging Face hub, which is not run; remove it")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which transformers loads where peft is installed and nowhere else; "
            f"{MERGE}"
        )
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: config.json is missing")
    return read_json_object(path, InputError)


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files in name order, safetensors before .bin as transformers chooses; every shard is there."""
    chosen = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if chosen is None:
        raise InputError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    if chosen.suffix != ".json":
        return [chosen]
    try:
        shards = sorted(set(parse_json(chosen.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{chosen} is not a weight index; download the model again") from None
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise InputError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[:1]}; download it again")
    return [folder / name for name in shards]


def not_finite(folder: Path | str, name: str) -> str:
    return f"{folder}: parameter {name} holds values that are not finite; the checkpoint is damaged: download it again"


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sample: bytes


def fingerprint_v1(folder: Path) -> str:
    """Version 1 of the fingerprint, by which older adapters and bundles name their base.

    sha256 over a model folder's config.json (less VOLATILE_KEYS and nulls) and, in name order, every stored tensor's name, dtype, shape
    and SAMPLES evenly spaced blocks of SAMPLE_BYTES of its bytes.

    Only stored bytes matter: the dtype a model is loaded in and the version of transformers change nothing. safetensors
    files are read directly, a few pages each; a ``.bin`` checkpoint is unpickled (weights only) and its state dict
    sampled. The same model saved again in another dtype, or by a transformers release that writes other config keys, has
    another one.

    Raises InputError for a folder without config or weights, and for damaged files.
    """
    tensors: dict[str, _Stored] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            tensors |= safetensors_parts(path, lambda _, data, begin, end: _sample(data, begin, end))
        else:
            tensors |= {name: _stored(tensor) for name, tensor in unpickled(path).items()}
    return _digest(read_config(folder), tensors)


def memory_fingerprint_v1(model: PreTrainedModel) -> str:
    """Version 1 for a model that has no files: over its state dict and its config as this transformers spells it."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return _digest(config, {name: _stored(tensor) for name, tensor in model.state_dict().items()})


def _digest(config: Mapping[str, Any], tensors: Mapping[str, _Stored]) -> str:
    digest = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    for name in sorted(tensors):
        dtype, shape, sample = tensors[name]
        digest.update(f"\n{name} {dtype} {list(shape)} ".encode())
        digest.update(sample)
    return digest.hexdigest()


def _architecture(value: Any) -> Any:
    """``value`` without volatile keys and nulls (an absent key and a null one mean the same), at every depth."""
    if isinstance(value, dict):
        kept = {k: _architecture(v) for k, v in value.items() if k not in VOLATILE_KEYS}
        return {k: v for k, v in kept.items() if v is not None}
    return [_architecture(v) for v in value] if isinstance(value, list) else value


def _sample(data: Any, start: int, end: int) -> bytes:
    """SAMPLES blocks of ``data[start:end]``, evenly spaced from first to last byte; all of it where it is short."""
    room = end - start - SAMPLE_BYTES
    if room < SAMPLES * SAMPLE_BYTES:
        return bytes(data[start:end])
    offsets = (start + room * i // (SAMPLES - 1) for i in range(SAMPLES))
    return b"".join(bytes(data[o : o + SAMPLE_BYTES]) for o in offsets)


def safetensors_parts(path: Path, sample: Callable[[str, Any, int, int], bytes]) -> dict[str, _Stored]:
    """The header of a safetensors file (8 bytes of length, JSON, data), and ``sample(dtype, data, begin, end)`` of every tensor's data."""
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            if start > len(data):
                raise ValueError(f"its header of {start - 8} bytes ends behind the file's end")
            header = parse_json(data[8:start].decode("utf-8"))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = (start + offset for offset in entry["data_offsets"])
                if not start <= begin <= end <= len(data):
                    raise ValueError(f"{name} ends behind the file's end")
                bits = math.prod(entry["shape"]) * BITS.get(entry["dtype"], 0)
                if entry["dtype"] in BITS and bits != 8 * (end - begin):
                    raise ValueError(f"{name} of shape {entry['shape']} takes {bits // 8} bytes, and has {end - begin}")
                tensors[name] = _Stored(entry["dtype"], tuple(entry["shape"]), sample(entry["dtype"], data, begin, end))
            return tensors
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise InputError(f"{path} is damaged or cut short ({first_line(e)}); download it again") from None


def unpickled(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.detach() for name, tensor in state.items()}
    except Exception as e:  # torch raises pickle, zip, runtime and type errors for a damaged file
        raise InputError(f"{path} is damaged, or holds more than weights ({first_line(e)}); download it again") from e


def _stored(tensor: torch.Tensor) -> _Stored:
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _sample(data, 0, data.size))


def first_reason(error: BaseException) -> str:
    """What an exporter was stopped by, in one line."""
    return shorten(str(error.__cause__ or error), 300, placeholder=" ...") or type(error).__name__

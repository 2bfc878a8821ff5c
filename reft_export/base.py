"""The base model on the host: loading it, and the fingerprint that ties an adapter to it."""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtimes.adapter import BaseModel
from runtimes.errors import BackendUnavailable, InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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
"""Of every stored tensor, this many evenly spaced blocks of this many bytes enter the fingerprint, both ends among them."""

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A decoder that adapters are trained on and folded into, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: BaseModel
    folder: Path | None
    """Where its files lie; None for a model that was made in memory."""


def load_base(
    model: str | Path, *, dtype: str = "float32", device: str = "cpu", require_tokenizer: bool = False
) -> Base:
    """Loads a decoder from a local folder or a Hugging Face hub id.

    Raises InputError, in one line, for a folder that is no model, missing or damaged weights, parameters that the checkpoint
    lacks (transformers would fill them with random values), an unknown or non-decoder model type, a hub that cannot be
    reached, and a missing tokenizer when ``require_tokenizer``; BackendUnavailable for a device that is not there.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    check_device(device)
    folder = Path(model) if Path(model).is_dir() else _download(str(model))
    config = _read_config(folder)
    _check_decoder(config, folder)
    files = _weight_files(folder)
    tokenizer = _load_tokenizer(folder, required=require_tokenizer)
    # The fingerprint comes first: it reads every header, and so finds a damaged file before the long load does.
    digest = fingerprint(folder)
    with _quiet():
        loaded = _load_model(folder, files[0], DTYPES[dtype])
    loaded.requires_grad_(False)
    name = folder.resolve().name if Path(model).is_dir() else str(model)
    return Base(
        model=loaded.to(device).eval(), tokenizer=tokenizer, info=_info(loaded, name=name, digest=digest), folder=folder
    )


def wrap_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, name: str) -> Base:
    """A Base around a model that is already in memory; its fingerprint is ``memory_fingerprint``'s."""
    info = _info(model, name=name, digest=memory_fingerprint(model))
    return Base(model=model.eval(), tokenizer=tokenizer, info=info, folder=None)


def _info(model: PreTrainedModel, *, name: str, digest: str) -> BaseModel:
    config = model.config.get_text_config()
    return BaseModel(
        name=name, fingerprint=digest, num_hidden_layers=config.num_hidden_layers, hidden_size=config.hidden_size
    )


def check_device(device: str) -> None:
    """Raises BackendUnavailable where torch cannot reach ``device``, InputError where it is no device at all."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"device {device!r} is unknown; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda was asked for, and torch finds no CUDA GPU here; use --device cpu")


# --- what is in the folder ---------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: config.json is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return config


def _check_decoder(config: Mapping[str, Any], folder: Path) -> None:
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind is None:
        raise InputError(f"{folder / 'config.json'} lacks model_type; it was not written by transformers")
    if kind not in CONFIG_MAPPING:
        custom = ", and code shipped inside model folders is not run" if "auto_map" in config else ""
        raise InputError(f"{folder}: model type {kind!r} is unknown to transformers {__version__}{custom}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise InputError(f"{folder}: {kind} is not a decoder language model; only decoders can be steered")


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's files in name order: safetensors before .bin, as transformers chooses. Every shard must be there."""
    chosen = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if chosen is None:
        raise InputError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
    if chosen.suffix != ".json":
        return [chosen]
    try:
        shards = sorted(set(json.loads(chosen.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{chosen} is not a weight index; download the model again") from None
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or not shards:
        raise InputError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[:1]}; download it again")
    return [folder / name for name in shards]


def _load_model(folder: Path, first: Path, dtype: torch.dtype) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=".safetensors" in first.name,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError) as e:
        raise InputError(f"{folder} cannot be loaded: {_first_line(e)}") from e
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{folder}: the checkpoint lacks {len(missing)} parameters, first {missing[0]}; download it again")
    return model


def _load_tokenizer(folder: Path, *, required: bool) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if required:
            raise InputError(f"{folder} has no tokenizer; expected tokenizer.json beside config.json")
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {_first_line(e)}") from e


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(model):
        raise InputError(f"{model} is not a folder, nor the form of a Hugging Face id (owner/name)")
    # Other frameworks' copies, and Mistral's second copy of the weights, are not ours to download.
    text, other = ["*.json", "*.jinja", "*.model", "*.txt"], ["*/*", "consolidated*"]
    try:
        with _quiet():
            folder = Path(snapshot_download(model, allow_patterns=[*text, "*.safetensors"], ignore_patterns=other))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(model, allow_patterns=[*text, "pytorch_model*.bin"], ignore_patterns=other))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise InputError(
            f"{model} is not a folder here, and cannot be had from the Hugging Face hub: {_first_line(e)}; "
            "give a folder with config.json, or check the name, the network and `hf auth login`"
        ) from e
    return folder


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from the libraries where nobody watches: a log file is not a terminal."""
    import sys

    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# --- fingerprint -------------------------------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sample: bytes


def fingerprint(folder: Path) -> str:
    """sha256 over a model folder's config.json (less VOLATILE_KEYS and nulls) and, in name order, every stored tensor's
    name, dtype, shape and SAMPLES evenly spaced blocks of SAMPLE_BYTES of its bytes.

    Only stored bytes matter: the dtype a model is loaded in and the version of transformers change nothing. safetensors
    files are read directly, a few pages each; a ``.bin`` checkpoint is unpickled (weights only) and its state dict sampled.
    The same model saved again in another dtype, or by a transformers release that writes other config keys, is another base.

    Raises InputError for a folder without config or weights, and for damaged files.
    """
    tensors: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        tensors.update(_safetensors(path) if path.suffix == ".safetensors" else _pickled(path))
    return _digest(_read_config(folder), tensors)


def memory_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a model that has no files: over its state dict and its config as this transformers spells it.

    It is not the fingerprint of the folder that ``save_pretrained`` would write, and it changes with the dtype.
    """
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
    """SAMPLES blocks of ``data[start:end]``, evenly spaced from the first byte to the last; all of it where it is short."""
    room = end - start - SAMPLE_BYTES
    if room < SAMPLES * SAMPLE_BYTES:
        return bytes(data[start:end])
    offsets = (start + room * i // (SAMPLES - 1) for i in range(SAMPLES))
    return b"".join(bytes(data[o : o + SAMPLE_BYTES]) for o in offsets)


def _safetensors(path: Path) -> dict[str, _Stored]:
    """The header of a safetensors file (8 bytes of length, JSON, data) and samples of its data."""
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start].decode("utf-8"))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = (start + offset for offset in entry["data_offsets"])
                if not start <= begin <= end <= len(data):
                    raise ValueError(f"{name} ends behind the file's end")
                tensors[name] = _Stored(entry["dtype"], tuple(entry["shape"]), _sample(data, begin, end))
            return tensors
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise InputError(f"{path} is damaged or cut short ({_first_line(e)}); download it again") from None


def _pickled(path: Path) -> dict[str, _Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: _stored(tensor) for name, tensor in state.items()}
    except Exception as e:  # torch raises pickle, zip, runtime and type errors for a damaged file
        raise InputError(f"{path} is damaged, or holds more than weights ({_first_line(e)}); download it again") from e


def _stored(tensor: torch.Tensor) -> _Stored:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _Stored(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _sample(data, 0, data.size))

"""The base model on the host: loading it, and the fingerprint that ties an adapter to it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.classifiers import check_classifier, check_has_head, is_classifier, labels_of
from reft_export.base.fingerprint import Identity, identify, identify_model
from reft_export.base.model_folder import MERGE, fingerprint_v1, first_line, memory_fingerprint_v1, not_finite, read_config, weight_files
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.adapter import BaseModel
from runtimes.errors import BackendUnavailable, InputError
from runtimes.files.records import parse_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    TOKENIZER_CONFIG,
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A decoder, or an encoder with a classification head, that adapters are trained on and folded into, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: BaseModel
    folder: Path | None
    """Where its files lie; None for a model that was made in memory."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def task(self) -> str:
        return TEXT_CLASSIFICATION if self.info.labels else TEXT_GENERATION

    def former_fingerprint(self) -> str:
        """Version 1 of its fingerprint, which older adapters and bundles record."""
        return memory_fingerprint_v1(self.model) if self.folder is None else fingerprint_v1(self.folder)


def load_base(
    model: str | Path, *, dtype: str = "float32", device: str = "cpu", require_tokenizer: bool = False, checked: bool = False
) -> Base:
    """Loads a decoder, or an encoder with a classification head, from a local folder or a Hugging Face hub id.

    Raises InputError, in one line, for a folder that is no model, missing or damaged weights, parameters that the
    checkpoint lacks (transformers would fill them with random values), a model type of neither kind, a hub that
    cannot be reached, and a missing tokenizer when ``require_tokenizer``; BackendUnavailable for a device that is not
    there.

    ``checked``: its values were found finite before. They are mapped files then, which cost no memory until they are read.

    ``dtype``: float32, float16 or bfloat16. A model that is in memory already becomes a Base by ``wrap_base``.

    Example::

        base = load_base("HuggingFaceTB/SmolLM2-135M", require_tokenizer=True)
        print(base.info.num_hidden_layers, base.info.hidden_size, base.task)
    """
    found = _examine(model, dtype=dtype, device=device, require_tokenizer=require_tokenizer)
    with _quiet():
        loaded = _load_model(found.folder, found.files[0], DTYPES[dtype], found.config)
    if not checked:
        _check_finite(loaded, found.folder)
    loaded.requires_grad_(False)
    info = _info(loaded, found.name, found.identity)
    return Base(model=loaded.to(device).eval(), tokenizer=found.tokenizer, info=info, folder=found.folder)


def load_without_weights(model: str | Path, *, dtype: str = "float32", device: str = "cpu", require_tokenizer: bool = False) -> Base:
    """What ``load_base`` loads, its model on torch's meta device: for the checks before any work, and for a dry run.

    Raises what ``load_base`` raises, but for what only the weights' values and the parameters' names show: weights that are not finite,
    parameters that the checkpoint lacks or has in another shape.
    """
    found = _examine(model, dtype=dtype, device=device, require_tokenizer=require_tokenizer)
    skeleton = _skeleton(found.folder, found.config).to(DTYPES[dtype]).eval()
    if (found.folder / "generation_config.json").is_file():
        skeleton.generation_config = _generation_config(found.folder)
    info = _info(skeleton, found.name, found.identity)
    return Base(model=skeleton.requires_grad_(False), tokenizer=found.tokenizer, info=info, folder=found.folder)


class _Found(NamedTuple):
    """A base's files, examined."""

    folder: Path
    name: str
    config: dict[str, Any]
    files: list[Path]
    tokenizer: PreTrainedTokenizerBase | None
    identity: Identity


def _examine(model: str | Path, *, dtype: str, device: str, require_tokenizer: bool) -> _Found:
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    check_device(device)
    folder, name = _locate(model)
    config = read_config(folder)
    _check_kind(config, folder)
    _check_rotary(config, folder)
    files = weight_files(folder)
    tokenizer = _load_tokenizer(folder, required=require_tokenizer)
    # The fingerprint comes before the weights: it reads every header, and so finds a damaged file before the long load does.
    return _Found(folder, name, config, files, tokenizer, _identified(folder))


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """A base without its weights: enough to say whether an adapter fits it. ``model`` lies on torch's meta device."""

    model: PreTrainedModel
    info: BaseModel
    folder: Path

    def former_fingerprint(self) -> str:
        """As of a Base."""
        return fingerprint_v1(self.folder)


def outline_base(model: str | Path) -> Outline:
    """What ``load_base`` would load, in a fraction of its time and memory; raises InputError as it does."""
    folder, name = _locate(model)
    written = read_config(folder)
    _check_kind(written, folder)
    identity = _identified(folder)
    skeleton = _skeleton(folder, written)
    return Outline(model=skeleton, info=_info(skeleton, name, identity), folder=folder)


def _skeleton(folder: Path, written: Mapping[str, Any]) -> PreTrainedModel:
    """The model that config.json describes, on torch's meta device."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"), _errors_only():
            return _auto_class(written).from_config(config, trust_remote_code=False)
    except Exception as e:  # a config that contradicts itself fails anywhere in the family's code, with any error
        raise InputError(f"{folder} cannot be loaded: {first_line(e)}") from e


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a file that contradicts itself fails with any error
        raise InputError(f"{folder} cannot be loaded: {first_line(e)}") from e


def _locate(model: str | Path) -> tuple[Path, str]:
    """The base's folder, downloaded where it is a hub id, and its name."""
    if Path(model).is_file():
        raise InputError(f"{model} is a file; a base is given by its folder, or by its Hugging Face id")
    if Path(model).is_dir():
        return Path(model), Path(model).resolve().name
    return _download(str(model)), str(model)


def base_folder(model: str | Path) -> Path:
    """Where the base's files lie; a Hugging Face id is downloaded. Raises InputError as ``load_base`` does."""
    return _locate(model)[0]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer without its model. Raises InputError where it has none."""
    return _load_tokenizer(folder, required=True)


def wrap_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, name: str) -> Base:
    """A Base around a model that is already in memory; its fingerprint is ``identify_model``'s."""
    return Base(model=model.eval(), tokenizer=tokenizer, info=_info(model, name, identify_model(model)), folder=None)


def _info(model: PreTrainedModel, name: str, identity: Identity) -> BaseModel:
    config = model.config.get_text_config()
    return BaseModel(
        name=name,
        fingerprint=identity.fingerprint,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        labels=labels_of(model),
        parts=identity.parts,
        model_type=config.model_type,
    )


def check_device(device: str) -> None:
    """Raises BackendUnavailable where torch cannot reach ``device``, InputError where it is no device at all."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"device {device!r} is unknown; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device cuda was asked for, and torch finds no CUDA GPU here; use --device cpu")


# --- what is in the folder ------------------------------------------------------------------------


def _identified(folder: Path) -> Identity:
    """Raises InputError, too, for weights that are two models in one: with a LoRA beside them, or a head that is and is not tied."""
    identity = identify(folder)
    if lora := [name for name in identity.parts.tensors if ".lora_" in name]:
        raise InputError(f"{folder}: the checkpoint stores a LoRA that is not merged ({lora[0]}), which transformers would drop; {MERGE}")
    if identity.tied:
        raise InputError(
            f"{folder}: config.json ties {identity.tied} to the embedding, and the checkpoint stores another one: transformers 4 drops it, "
            "transformers 5 uses it; set tie_word_embeddings to false, or save the model again"
        )
    return identity


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    if is_classifier(config):
        check_classifier(config, folder)
    else:
        check_has_head(config, folder)
        _check_decoder(config, folder)


def _auto_class(config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM


def _check_decoder(config: Mapping[str, Any], folder: Path) -> None:
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind is None:
        raise InputError(f"{folder / 'config.json'} lacks model_type; it was not written by transformers")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        custom = ", and code shipped inside model folders is not run" if "auto_map" in config else ""
        raise InputError(f"{folder}: model type {kind!r} is unknown to transformers {__version__}{custom}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise InputError(f"{folder}: {kind} is not a decoder language model; decoders and encoder classifiers can be steered")


def _check_rotary(config: Mapping[str, Any], folder: Path) -> None:
    """transformers 4 does not read the rope_parameters that transformers 5 writes, and would rotate by its defaults."""
    from transformers import AutoConfig, __version__

    written = config.get("rope_parameters")
    if not written or int(__version__.partition(".")[0]) >= 5:
        return
    used = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for kind, rope in (written if "rope_type" not in written else {"": written}).items():
        for key, value in rope.items():
            name = "rope_local_base_freq" if (kind, key) == ("sliding_attention", "rope_theta") else key
            if value != ("default" if key == "rope_type" else getattr(used, name, None)):
                raise InputError(
                    f"{folder} was saved by transformers 5, and transformers {__version__} would ignore its "
                    f"{key} {value}; load it with transformers 5"
                )


def _load_model(folder: Path, first: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> PreTrainedModel:
    try:
        with _errors_only():  # what transformers would warn of is refused below, in one line
            model, report = _auto_class(config).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=".safetensors" in first.name,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as e:  # a config that contradicts itself fails anywhere in the family's code, with any error
        raise InputError(f"{folder} cannot be loaded: {first_line(e)}") from e
    # transformers 5 lists (name, shape in the checkpoint, shape in the model), transformers 4 the name alone.
    if different := sorted(entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]):
        stated = list(model.state_dict()[different[0]].shape)
        raise InputError(
            f"{folder}: {different[0]} is {stated} by config.json, and of another shape in the checkpoint; correct config.json, or "
            "download the model again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"{folder}: the checkpoint lacks {len(missing)} parameters, first {missing[0]}; download it again")
    return model


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        # A sum is finite only where every value is, but for float32 sums that overflow: those are looked at again.
        if not math.isfinite(parameter.detach().sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise InputError(not_finite(folder, name))


def _load_tokenizer(folder: Path, *, required: bool) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        if required:
            raise InputError(f"{folder} has no tokenizer; expected tokenizer.json beside config.json")
        return None
    config = _tokenizer_config(folder)
    _check_tokenizer_file(config, folder)
    try:
        # transformers 5 writes tokenizer_class TokenizersBackend, its new name for PreTrainedTokenizerFast, which
        # transformers 4 does not know.
        backend = config.get("tokenizer_class") == "TokenizersBackend" and (folder / "tokenizer.json").is_file()
        loader = PreTrainedTokenizerFast if backend else AutoTokenizer
        with _errors_only():
            return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {first_line(e)}") from e


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none; InputError for what is no JSON object."""
    path = folder / TOKENIZER_CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {first_line(e)}; download it again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a JSON {type(config).__name__}, expected an object; download it again")
    return config


def _check_tokenizer_file(config: Mapping[str, Any], folder: Path) -> None:
    """transformers reads another file than tokenizer.json where tokenizer_config.json lists one for its release; a device does not."""
    listed = config.get("fast_tokenizer_files")
    if others := [name for name in (listed if isinstance(listed, list) else ()) if name != "tokenizer.json"]:
        raise InputError(
            f"{folder / TOKENIZER_CONFIG} lists {others[0]}, which some releases of transformers read in place of tokenizer.json; remove "
            "fast_tokenizer_files, and keep the tokenizer that is meant as tokenizer.json"
        )


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
            f"{model} is not a folder here, and cannot be had from the Hugging Face hub: {first_line(e)}; "
            "give a folder with config.json, or check the name, the network and `hf auth login`"
        ) from e
    return folder


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


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without transformers' warnings: that the class in tokenizer_config.json has another name, its table of what a checkpoint lacks."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

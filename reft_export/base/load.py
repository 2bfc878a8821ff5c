"""The base model on the host: loading it, and the fingerprint that ties an adapter to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.checkpoint import Checkpoint, open_checkpoint, task_of
from reft_export.base.classifiers import labels_of
from reft_export.base.fingerprint import Identity, identify, identify_model, memory_config
from reft_export.base.hub import locate, without_progress_bars
from reft_export.base.model_folder import MERGE, fingerprint_v1, first_line, memory_fingerprint_v1, not_finite
from reft_export.base.packed.left_out import tell_left_out
from reft_export.base.tokenizer import errors_only, load_tokenizer, load_tokenizer_if_any
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.adapter import BaseModel
from runtimes.errors import BackendUnavailable, InputError
from runtimes.files.folders import name_of
from runtimes.precision import TORCH_DTYPES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in TORCH_DTYPES.values()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A decoder, or an encoder with a classification head, that adapters are trained on and folded into, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: BaseModel
    task: str
    """One of runtimes/artifacts/task_names.py, by config.json."""
    folder: Path | None
    """Where its files lie; None for a model in memory."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    def former_fingerprint(self) -> str:
        """Version 1 of its fingerprint, which older adapters and bundles record."""
        return memory_fingerprint_v1(self.model) if self.folder is None else fingerprint_v1(self.folder)


def load_base(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    require_tokenizer: bool = False,
    checked: bool = False,
    name: str | None = None,
) -> Base:
    """Loads a decoder, or an encoder with a classification head, from a local folder or a Hugging Face hub id.

    Raises InputError, in one line, for a folder that is no model, missing or damaged weights, parameters that the
    checkpoint lacks (transformers would fill them with random values), a model type of neither kind, a hub that
    cannot be reached, and a missing tokenizer when ``require_tokenizer``; BackendUnavailable for a device that is not
    there.

    ``checked``: its values were found finite before. They are mapped files then, which cost no memory until they are read.
    ``name``: what it is called in records, rather than its folder's name or its id.

    ``dtype``: float32, float16 or bfloat16. A model that is in memory already becomes a Base by ``base_from_memory``.

    Example::

        base = load_base("HuggingFaceTB/SmolLM2-135M", require_tokenizer=True)
        print(base.info.num_hidden_layers, base.info.hidden_size, base.task)
    """
    found = _examine(model, dtype=dtype, device=device, require_tokenizer=require_tokenizer, name=name)
    with without_progress_bars():
        loaded = _load_model(found.checkpoint, DTYPES[dtype])
    if not checked:
        _check_finite(loaded, found.checkpoint.folder)
    return found.base(move(loaded, device))


def load_without_weights(
    model: str | Path, *, dtype: str = "float32", device: str = "cpu", require_tokenizer: bool = False, name: str | None = None
) -> Base:
    """What ``load_base`` loads, its model on torch's meta device: for the checks before any work, and for a dry run.

    Raises what ``load_base`` raises, but for what only the weights' values and the parameters' names show: weights that are not finite,
    parameters that the checkpoint lacks or has in another shape.
    """
    found = _examine(model, dtype=dtype, device=device, require_tokenizer=require_tokenizer, name=name)
    folder = found.checkpoint.folder
    skeleton = move(_skeleton(folder, found.checkpoint.task), DTYPES[dtype])
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = _generation_config(folder)
    return found.base(skeleton)


def base_from_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, name: str | None = None) -> Base:
    """A Base around a transformers model that is already in memory. The model is frozen and put into eval mode; nothing is copied.

    Its fingerprint is that of the folder that its ``save_pretrained`` writes, so that adapters trained on either fit both. ``name``: what
    it is called in records; by default what it was loaded as.

    Raises InputError for what is no such model, for weights that are quantized, not there (torch's meta device) or not finite, for a LoRA
    that is not merged, and for a model that is neither a decoder nor a supported classifier.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a model in memory is a transformers PreTrainedModel, and this is a {type(model).__name__}; load it with from_pretrained() of "
            f"AutoModelForCausalLM or AutoModelForSequenceClassification; of a PEFT model, {MERGE}"
        )
    kind = type(model).__name__
    _check_memory(model, kind)
    config = memory_config(model)
    task = task_of(config, f"the {kind} in memory")
    if task != TEXT_CLASSIFICATION:
        _check_decoder(config, f"the {kind} in memory")
        if model.get_output_embeddings() is None:
            raise InputError(f"the {kind} in memory has no head that gives logits; load it with AutoModelForCausalLM.from_pretrained()")
    info = _info(model, name or _memory_name(model), identify_model(model))
    return Base(model=_frozen(model), tokenizer=tokenizer, info=info, task=task, folder=None)


def _check_memory(model: PreTrainedModel, kind: str) -> None:
    """Weights as they were trained, all of them there."""
    if getattr(model.config, "quantization_config", None) or getattr(model, "is_quantized", False):
        raise InputError(f"the {kind} in memory is quantized; load the float model: `reft-export quantize` quantizes its bundle")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"the {kind} in memory has no values for {name} (torch's meta device); load it whole, without device_map")
        if ".lora_" in name:
            raise InputError(f"the {kind} in memory has a LoRA that is not merged ({name}); {MERGE}")
        if not parameter.is_floating_point():
            raise InputError(f"the {kind} in memory holds {name} as {parameter.dtype}; load the float model")
    _check_finite(model, f"the {kind} in memory")


def save_base(base: Base, folder: Path) -> None:
    """Writes a base that is in memory as a model folder with the base's own fingerprint; InputError where it cannot be saved."""
    try:
        base.model.save_pretrained(folder)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(folder)
    except ValueError as e:  # a generation_config that contradicts itself
        raise InputError(f"{base.info.name} cannot be saved: {first_line(e)}; correct its generation_config") from e


def _memory_name(model: PreTrainedModel) -> str:
    """As ``load_base`` would call it: the folder's name or the hub id that it came from; of a model made here, its type."""
    source = model.name_or_path
    return (name_of(Path(source)) if Path(source).is_dir() else source) if source else str(model.config.model_type)


def move(model: PreTrainedModel, to: str | torch.dtype) -> PreTrainedModel:
    """``model`` on another device or in another dtype, in place. transformers wraps ``to`` for quantized models, which none is here."""
    torch.nn.Module.to(model, to)
    return model


def set_precision(model: PreTrainedModel, precision: str) -> None:
    """Rounds the weights to a bundle's float type (fp32, fp16, bf16), in place."""
    move(model, DTYPES[TORCH_DTYPES[precision]])


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    return model.eval()


class _Found(NamedTuple):
    """A base's files, examined."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None
    identity: Identity

    def base(self, model: PreTrainedModel) -> Base:
        checkpoint = self.checkpoint
        info = _info(model, checkpoint.name, self.identity)
        return Base(model=_frozen(model), tokenizer=self.tokenizer, info=info, task=checkpoint.task, folder=checkpoint.folder)


def _examine(model: str | Path, *, dtype: str, device: str, require_tokenizer: bool, name: str | None) -> _Found:
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    check_device(device)
    checkpoint = open_checkpoint(model, name=name)
    folder = checkpoint.folder
    if checkpoint.task != TEXT_CLASSIFICATION:
        _check_decoder(checkpoint.config, folder)
    _check_rotary(checkpoint.config, folder)
    tokenizer = load_tokenizer(folder) if require_tokenizer else load_tokenizer_if_any(folder)
    # The fingerprint comes before the weights: it reads every header, and so finds a damaged file before the long load does.
    return _Found(checkpoint, tokenizer, _identified(folder))


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
    checkpoint = open_checkpoint(model)
    folder = checkpoint.folder
    if checkpoint.task != TEXT_CLASSIFICATION:
        _check_decoder(checkpoint.config, folder)
    identity = _identified(folder)
    skeleton = _skeleton(folder, checkpoint.task)
    return Outline(model=skeleton, info=_info(skeleton, checkpoint.name, identity), folder=folder)


def _skeleton(folder: Path, task: str) -> PreTrainedModel:
    """The model that config.json describes, on torch's meta device."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"), errors_only():
            return _auto_class(task).from_config(config, trust_remote_code=False)
    except Exception as e:  # a config that contradicts itself fails anywhere in the family's code, with any error
        raise InputError(f"{folder} cannot be loaded: {first_line(e)}") from e


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # a file that contradicts itself fails with any error
        raise InputError(f"{folder} cannot be loaded: {first_line(e)}") from e


def base_folder(model: str | Path) -> Path:
    """Where the base's files lie; a Hugging Face id is downloaded. Raises InputError as ``load_base`` does."""
    return locate(model)[0]


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


def _auto_class(task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == TEXT_CLASSIFICATION else AutoModelForCausalLM


def _check_decoder(config: Mapping[str, Any], where: Path | str) -> None:
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config["model_type"]
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        custom = ", and code shipped inside model folders is not run" if "auto_map" in config else ""
        raise InputError(f"{where}: model type {kind!r} is unknown to transformers {__version__}{custom}")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        raise InputError(f"{where}: {kind} is not a decoder language model; decoders and encoder classifiers can be steered")


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


def _load_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    folder = checkpoint.folder
    try:
        with errors_only():  # what transformers would warn of is refused below, in one line
            model, report = _auto_class(checkpoint.task).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=".safetensors" in checkpoint.files[0].name,
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
    tell_left_out(folder, checkpoint.name, type(model).__name__, sorted(report["unexpected_keys"]))
    return model


def _check_finite(model: PreTrainedModel, where: Path | str) -> None:
    for name, parameter in model.named_parameters():
        # A sum is finite only where every value is, but for float32 sums that overflow: those are looked at again.
        if not math.isfinite(parameter.detach().sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise InputError(not_finite(where, name))

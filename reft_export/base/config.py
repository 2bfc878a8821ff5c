"""config.json without its spelling: what of it decides what a base computes, alike for every release of transformers that wrote it.

read by the family's config class, which fills in defaults and reads the keys of older releases
less HARMLESS_KEYS, dropout and nulls; of decoders less DECODER_HARMLESS_KEYS too
rotary settings under one key, rope_parameters, as transformers 5 writes them, and whole: their defaults differ between releases
less what follows from other keys or is the family's default, so that a key which a later release adds changes nothing
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.base.classifiers import is_classifier
from reft_export.base.model_folder import VOLATILE_KEYS, first_line
from runtimes.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERATION_KEYS = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
        "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
    }
)  # fmt: skip
"""Keys of generation_config.json, which older releases of transformers kept in config.json."""

HARMLESS_KEYS = VOLATILE_KEYS | GENERATION_KEYS | frozenset(
    {
        "_experts_implementation", "_model_name_or_path", "auto_map", "aux_loss_alpha", "bos_token_id", "cls_token_id",
        "decoder_start_token_id", "eos_token_id", "finetuning_task", "gradient_checkpointing", "initializer_factor", "initializer_range",
        "mask_token_id", "model_max_length", "output_router_logits", "prefix", "pretraining_tp", "router_aux_loss_coef", "sep_token_id",
        "seq_aux", "task_specific_params", "tokenizer_class", "torchscript", "transformers.js_config", "transformers_weights",
        "unk_token_id", "unsloth_fixed", "unsloth_version",
    }
)  # fmt: skip
"""Keys that say how a base is run, stopped, trained from nothing or was written, not what it computes from token ids."""

DECODER_HARMLESS_KEYS = frozenset(
    {"architectures", "audio_config", "id2label", "label2id", "num_labels", "pad_token_id", "problem_type", "vision_config"}
)
"""Keys that only classifiers answer by, whose encoders may number positions from the pad on, and those of towers beside the text model."""

PAD_COUNTS = frozenset(
    {
        "camembert", "data2vec-text", "marian", "musicgen", "musicgen_melody", "pegasus", "roberta", "roberta-prelayernorm", "trocr",
        "xglm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    }
)  # fmt: skip
"""Decoders whose table of positions depends on pad_token_id."""

DROPOUT = re.compile(r"(dropout|drop|pdrop)(_prob|_rate|_p)?$")
"""Bases are frozen in eval mode."""

ROTARY_KEYS = ("rope_theta", "partial_rotary_factor")
"""Of transformers 4, beside rope_scaling; in transformers 5 they are keys of rope_parameters."""

BY_DEFAULT = {"rope_type": "default", "partial_rotary_factor": 1}

POSITIONS_BY_DEFAULT = ("absolute", "rope")
"""transformers 4 writes position_embedding_type, which transformers 5 knows no more where there is nothing to choose."""


NEVER_BY_DEFAULT = ("head_dim", "rope_parameters")
"""Keys that are kept whatever the family's default is: without one, head_dim follows from the width."""


def family_config(written: Mapping[str, Any]) -> PretrainedConfig:
    """config.json as its family's class reads it; floats that JSON has no words for are ``{"__float__": "Infinity"}`` in it."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[written["model_type"]].from_dict(_floats(written))


def _floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _floats(v) for k, v in value.items()}
    return [_floats(v) for v in value] if isinstance(value, (list, tuple)) else value


def canonical_config(written: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """What of config.json, ``written``, decides what the base computes; InputError for a model type that transformers does not know."""
    from transformers import CONFIG_MAPPING, __version__

    kind = written.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(f"{where}: model type {kind!r} is unknown to transformers {__version__}")
    try:
        read = family_config(written).to_dict()
    except Exception as e:  # a config that contradicts itself fails anywhere in the family's code, with any error
        raise InputError(f"{where} cannot be loaded: {first_line(e)}") from e
    try:
        default = CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # a family without defaults fails in whatever it lacks; then every key counts
        default = {}
    harmless = HARMLESS_KEYS if is_classifier(written) else HARMLESS_KEYS | DECODER_HARMLESS_KEYS
    if kind in PAD_COUNTS:
        harmless -= {"pad_token_id"}
    mine, families = (_meaning(_one_spelling(config), harmless) for config in (read | _newer_rotary(written), default))
    return {"model_type": kind} | _less(mine, families)


def stated_alike(canonical: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether config.json, ``written``, states whatever ``canonical`` does, in the same words.

    Told without transformers, and so not of what ``canonical`` leaves out, which is the family's default there.
    """
    harmless = HARMLESS_KEYS if is_classifier(written) else HARMLESS_KEYS | DECODER_HARMLESS_KEYS
    try:
        return _states(_meaning(_one_spelling(written), harmless - {"pad_token_id"}), canonical)
    except (AttributeError, TypeError, ZeroDivisionError):  # values of other types than a config's
        return False


def _states(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict) and isinstance(theirs, Mapping):
        return all(key in mine and _states(mine[key], value) for key, value in theirs.items())
    return mine == theirs


def _newer_rotary(written: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters as written: transformers 4 reads them into nothing."""
    return {"rope_parameters": written["rope_parameters"]} if written.get("rope_parameters") else {}


def _one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with its rotary settings under rope_parameters, by type of layer where they differ by it; so at every depth."""
    rest = {k: _one_spelling(v) if isinstance(v, dict) and not k.startswith("rope_") else v for k, v in config.items()}
    if "num_experts" in rest:
        rest.setdefault("num_local_experts", rest.pop("num_experts"))
    if rest.get("position_embedding_type") in POSITIONS_BY_DEFAULT:
        del rest["position_embedding_type"]
    if set(rest.get("layer_types") or ()) == {"full_attention"}:
        del rest["layer_types"]
    width: Any = rest.get("hidden_size")
    heads: Any = rest.get("num_attention_heads")
    if width and heads and rest.get("head_dim") == width // heads:
        del rest["head_dim"]
    old = {k: rest.pop(k) for k in ROTARY_KEYS if k in rest}
    local = rest.pop("rope_local_base_freq", None)
    scaling, parameters = rest.pop("rope_scaling", None), rest.pop("rope_parameters", None)
    if not parameters:
        parameters = old | dict(scaling or {})
        if local is not None:  # Gemma 3 of transformers 4: only full attention is scaled
            parameters = {"full_attention": parameters, "sliding_attention": {"rope_theta": local}}
    kinds = parameters if any(isinstance(v, dict) for v in parameters.values()) else {"": parameters}
    context = rest.get("original_max_position_embeddings")
    rotary = {kind: _rotary(values, context) for kind, values in kinds.items() if isinstance(values, dict)}
    rotary = rotary.get("", rotary)
    return rest | ({"rope_parameters": rotary} if rotary else {})


def _rotary(values: Mapping[str, Any], context: Any) -> dict[str, Any]:
    values = {"rope_type" if k == "type" else k: v for k, v in values.items()}
    if values.get("original_max_position_embeddings") == context:
        values.pop("original_max_position_embeddings", None)
    return {k: v for k, v in values.items() if v is not None and v != BY_DEFAULT.get(k)}


def _meaning(value: Any, harmless: frozenset[str]) -> Any:
    """``value`` without harmless keys and nulls, whole numbers as int and all keys as JSON has them, at every depth."""
    if isinstance(value, Mapping):
        kept = {str(k): _meaning(v, harmless) for k, v in value.items() if k not in harmless and not DROPOUT.search(str(k))}
        return {k: v for k, v in kept.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_meaning(v, harmless) for v in value]
    # A release reads 10000.0 where another reads 10000.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _less(mine: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """``mine`` without what equals ``default``, at every depth."""
    left = {}
    for key, value in mine.items():
        theirs = default.get(key) if key not in NEVER_BY_DEFAULT else None
        if isinstance(value, dict) and isinstance(theirs, dict):
            value, theirs = _less(value, theirs), {}
        if value != theirs or type(value) is not type(theirs):
            left[key] = value
    return left

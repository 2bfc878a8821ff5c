"""What a file of vectors says about itself, compared with what the import makes of it. A contradiction is refused, its key named.

    said                    by the keys, of a dotted one the last word         refused where
    the operation           mode, operation, peft_type, adapter.type, ..       it is not the one that is applied
                            method, algorithm, type, .. (also extraction's)    it is a word for another one
    the base's kind         model_hint, model_type, architecture               it is neither transformers' nor llama.cpp's name of it
    its size                hidden_size, n_embd, num_hidden_layers, ..         the base has another
    layers, streams         layer, layers, .., hook_point, component, ..       others are edited
    positions               positions                                          others are edited
    the strength            scale, coefficient, alpha_default, ..              it is not 1, and the user gives none

A base's name alone proves nothing, as folders are renamed and finetunes take the vectors of their base: it becomes a note. Everything
else (authors, licences, how the vectors were found) is no statement about what they do.

Source: llama.cpp, tools/cvector-generator (model_hint is general.architecture, layer_count the number of vectors); repeng, extract.py
(model_hint is config.model_type); EasySteer, easysteer/steer (method is the extraction's, easysteer.component the place); the GLP files'
glp.mode, where nothing said means add, glp.hook_point and glp.alpha_default; psyctl (paths of modules as layers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reft_export.base.load import Outline
from reft_export.importing.foreign import listed, short
from reft_export.importing.pyreft.sites import ComponentSites
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError
from runtimes.files.records import parse_json

Statements = Mapping[str, object]
"""By key: strings, numbers, and lists of either."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the import makes of a file."""

    does: str
    """In messages: ``adds vectors``."""
    operations: re.Pattern[str]
    """Words for that, lower case, letters and digits alone."""
    sites: frozenset[Site]
    """Those that are edited: of the file's, the ones that the user chose."""
    stored: int
    """How many the file has vectors for."""
    positions: PositionRule
    scale: float | None
    """The user's; None where none was given."""
    scalable: bool = True
    """Whether --scale applies to it."""
    array: str | None = None
    """The name of an array that is alone in its file: it may be the path of a module."""


ADDS = re.compile(
    r"add(s|ed|ition|itive)?|actadd|activationaddition|(contrastive)?(caa|activationaddition)|direct|steer(ing)?|(steering|control)?vectors?"
    r"|bias|shift|lobireft"
)
SCALES_AND_SHIFTS = re.compile(r"red|scale(and)?bias|representationediting|affine")
OTHER_OPERATION = re.compile(
    r"project|ablat|replac|clamp|subtract|multipl|rotat|angular|householder|interchange|router|lora|dora|ia3|(?<!lobi)reft|prefixtuning"
    r"|prompttuning|^red$|attentionadd|^scale(and)?bias$|perexecutionstep"
)
"""Words, or parts of words, for what is no addition. Extraction's own (pca_diff, mean_diff, probe, ..) are none of them."""

OPERATION = {"operation", "op", "mode", "apply_mode", "application_mode", "intervention_type", "steering_mode", "steering_type",
             "steering_operation", "peft_type", "adapter_type", "adapter.type"}  # fmt: skip
OPERATION_OR_OTHER = {"method", "algorithm", "intervention", "steering_method", "structure", "type", "kind", "format"}
KIND = {"model_hint", "model_type", "base_model_type", "architecture", "architectures", "model_architecture"}
NAME = {"model", "model_name", "model_id", "base_model", "base_model_name", "base_model_name_or_path"}
WIDTH = {"hidden_size", "hidden_dim", "n_embd", "d_model", "embedding_length"}
DEPTH = {"num_hidden_layers", "num_layers", "n_layers", "n_layer", "block_count"}
LAYERS = {"layer", "layer_index", "layer_idx", "layer_id", "target_layer", "layers", "layer_indices", "layer_ids", "target_layers",
          "layer_ids_zero_based"}  # fmt: skip
PLACE = {"stream", "component", "hook", "hook_point", "hook_name"}
STRENGTH = {"scale", "coefficient", "coeff", "strength", "multiplier", "alpha", "alpha_default", "default_scale", "default_strength"}
SILENT = ("", "unknown", "none", "null")
ELSEWHERE = ("general.architecture",)
"""Compared where the file is told from others."""

STREAM_WORDS = {
    "block_output": r"blockoutput|layeroutput|output|postlayer|resid(ual)?(post|stream)?(postlayer)?|hookresidpost|hiddenstates?",
    "block_input": r"blockinput|layerinput|prelayer|residpre|residualstreamprelayer|hookresidpre",
    "attention_output": r"attentionoutput|attention|attn(out)?(preresidual)?|selfattn|hookattnout",
    "mlp_output": r"mlpoutput|(mlp|ffn)(out)?(preresidual)?|hookmlpout",
}

LLAMA_CPP_NAMES = {
    "cohere": ("command-r",),
    "deepseek_v2": ("deepseek2",),
    "deepseek_v3": ("deepseek2",),
    "glm": ("chatglm", "glm4"),
    "gpt_bigcode": ("starcoder",),
    "granitemoehybrid": ("granitehybrid",),
    "granitemoeshared": ("granitemoe",),
    "hunyuan_v1_dense": ("hunyuan-dense",),
    "hunyuan_v1_moe": ("hunyuan-moe",),
    "ministral": ("llama", "mistral3"),
    "ministral3": ("llama", "mistral3"),
    "mistral": ("llama",),
    "mistral3": ("llama", "mistral3"),
    "mixtral": ("llama",),
    "olmo3": ("olmo2",),
    "phi": ("phi2",),
    "qwen2_5_vl": ("qwen2vl",),
}
"""llama.cpp's architecture by transformers' model type, where they differ by more than - and _. Source: convert_hf_to_gguf.py."""


def check_statements(path: Path, statements: Statements, meaning: Meaning, outline: Outline) -> tuple[str, ...]:
    """Notes on what could not be compared; raises AdapterError for a contradiction, InputError for a strength that --scale has to say."""
    notes = []
    if meaning.array is not None:
        _check_places(f"{path}: the name of its array", meaning.array, meaning, outline, named=False)
    for key, value in _flat(statements):
        last = key.rpartition(".")[2]
        names = {key.lower(), last.lower()}
        if key in ELSEWHERE or (isinstance(value, str) and value.strip().lower() in SILENT):
            continue
        where = f"{path}: {key}"
        if names & OPERATION or (names & OPERATION_OR_OTHER and OTHER_OPERATION.search(_word(value))):
            _check_operation(where, value, meaning)
        elif names & KIND:
            notes += check_kind(where, value, outline)
        elif names & NAME or re.fullmatch(r"general\.base_model\.\d{1,40}\.name", key):
            notes += _check_name(where, value, outline)
        elif names & WIDTH:
            _check_number(where, value, {outline.info.hidden_size}, f"the width of {outline.info.name}")
        elif names & DEPTH:
            _check_number(where, value, {outline.info.num_hidden_layers, meaning.stored}, f"the layers of {outline.info.name}")
        elif last == "layer_count":
            _check_layer_count(where, value, meaning, outline)
        elif names & LAYERS | names & PLACE:
            _check_places(where, value, meaning, outline, named=bool(names & PLACE))
        elif last == "positions":
            _check_positions(where, value, meaning)
        elif names & STRENGTH:
            _check_strength(where, value, meaning)
    return tuple(notes)


def check_kind(where: str, value: object, outline: Outline) -> list[str]:
    """Raises AdapterError for the name of another family than the base's; a note for what is no family's name at all.

    transformers' model type, llama.cpp's architecture and the name of the model's class are all names of a family.
    """
    text = str(value[0] if isinstance(value, list) and len(value) == 1 else value)
    config = outline.model.config
    types = {config.model_type, config.get_text_config().model_type}
    accepted = sorted({name for kind in types for name in (kind, kind.removesuffix("_text"), *LLAMA_CPP_NAMES.get(kind, ()))})
    family = re.sub(r"(ForCausalLM|ForSequenceClassification|AdapterModel|LMHeadModel|Model)$", "", text)
    if family != text:
        family = family.lower()
    if _word(family) in {_word(name) for name in (*accepted, outline.info.name)}:
        return []
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", family):
        return _check_name(where, value, outline)
    raise AdapterError(
        f"{where} is {short(text)}, expected {' or '.join(accepted)}, as {outline.info.name} is; pass the base that it was made for, or "
        "where the file says this wrongly, save it again without"
    )


def _flat(statements: Statements) -> Iterator[tuple[str, object]]:
    """Every key and value; what holds a JSON object stands for the entries of that object."""
    for key, value in statements.items():
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            with suppress(ValueError):  # a text that only begins like JSON
                value = parse_json(value)
        if isinstance(value, dict):
            yield from _flat({f"{key}.{name}": inner for name, inner in value.items()})
        elif value is not None:
            yield key, value


def _word(value: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(value).lower())


def _check_operation(where: str, value: object, meaning: Meaning) -> None:
    if not meaning.operations.fullmatch(_word(value)):
        raise AdapterError(
            f"{where} is {short(value)}, and the import {meaning.does}: it would do something else; only where the file says this wrongly, "
            "save it again without"
        )


def _check_name(where: str, value: object, outline: Outline) -> list[str]:
    """A name that is a family's is held against the base's family; any other that is not the base's makes a note."""
    from transformers import CONFIG_MAPPING

    text = str(value)
    if text in CONFIG_MAPPING:
        return check_kind(where, text, outline)
    if _word(text.rstrip("/").rpartition("/")[2]) == _word(outline.info.name.rpartition("/")[2]):
        return []
    return [f"{where} is {short(text)}, the base given is {outline.info.name}; whether it is the same, or made of it, nothing here shows"]


def _check_number(where: str, value: object, accepted: set[int], what: str) -> None:
    number = _number(value)
    if number is not None and number not in accepted:
        raise AdapterError(
            f"{where} is {number:g}, expected {' or '.join(map(str, sorted(accepted)))}, {what}; pass the base that the file was made for"
        )


def _check_layer_count(where: str, value: object, meaning: Meaning, outline: Outline) -> None:
    """The number of vectors, or of the base's layers, or anything between: writers differ."""
    number, layers = _number(value), outline.info.num_hidden_layers
    if number is None:
        raise AdapterError(f"{where} is {short(value)}, expected a number; the file is damaged")
    if not meaning.stored <= number <= layers:
        raise AdapterError(
            f"{where} is {number:g}, expected {meaning.stored}, the vectors that are stored, to {layers}, the layers of "
            f"{outline.info.name}; pass the base that the file was made for"
        )


def _check_places(where: str, value: object, meaning: Meaning, outline: Outline, *, named: bool) -> None:
    """``named``: the key says in which stream, so that a word for none is refused."""
    layers: set[int] = set()
    streams: set[str] = set()
    for part in value if isinstance(value, list) else re.split(r"[,;]", str(value)):
        layer, stream = _place(str(part).strip(), outline)
        if layer is not None:
            layers.update(layer)
        if stream is not None:
            streams.add(stream)
        elif named:
            raise AdapterError(f"{where} is {short(value)}, which is no stream that can be edited; save the vectors of one that is")
    edited = {site.layer for site in meaning.sites}
    if layers and not edited <= layers:
        raise AdapterError(
            f"{where} is {short(value)}, and the import edits layer {listed(sorted(edited - layers))}; pass the file's own with --layers"
        )
    if streams and (wrong := sorted({site.stream for site in meaning.sites} - streams)):
        right = sorted(streams)[0]
        raise AdapterError(
            f"{where} is {short(value)}, and the import edits {wrong[0]}; pass --stream {right}, or of a GGUF store the vectors in an .npz "
            f"as <n>.{right}"
        )


def _place(text: str, outline: Outline) -> tuple[range | None, str | None]:
    """(layers, stream) of a number, a range, a word for a stream, a hook's name or a module's path; None for what it does not say."""
    count = outline.info.num_hidden_layers
    if numbers := re.fullmatch(r"(-?\d{1,40})(?:-(\d{1,40}))?", text):
        first = int(numbers[1]) + (count if int(numbers[1]) < 0 else 0)
        return range(first, int(numbers[2] or first) + 1), None
    hook = re.fullmatch(r"blocks\.(\d{1,40})\.(hook_\w+)", text)
    word = _word(hook[2] if hook else text)
    stream = next((stream for stream, words in STREAM_WORDS.items() if re.fullmatch(words, word)), None)
    if hook or stream:
        return None if hook is None else range(int(hook[1]), int(hook[1]) + 1), stream
    try:
        site = ComponentSites(outline.model).of_component(f"{text}.output", None).site
    except AdapterError:
        return None, None
    return range(site.layer, site.layer + 1), site.stream


def _check_positions(where: str, value: object, meaning: Meaning) -> None:
    try:
        said = PositionRule.parse(str(value))
    except InputError:
        return  # of the prompts that the vectors were found with, or in another grammar
    if str(said) != str(meaning.positions):
        raise AdapterError(f"{where} is {said}, and the import edits {meaning.positions}; say them with --positions {said}")


def _check_strength(where: str, value: object, meaning: Meaning) -> None:
    number = _number(value)
    if number in (None, 1):
        return
    if not meaning.scalable:
        raise AdapterError(f"{where} is {number:g}, and the import {meaning.does} as they are; save the arrays with the strength in them")
    if meaning.scale is None:
        raise InputError(
            f"{where} is {number:g}, a strength that is in no vector; pass --scale {number:g} to apply it, or --scale 1 to leave it out"
        )


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None

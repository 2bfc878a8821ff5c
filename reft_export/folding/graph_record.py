"""What a foreign graph, and the configuration files beside it, say of the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.selection import token_embedding
from graph_passes.accessors import input_of, shape_of
from graph_passes.find.encoder import is_classifier
from graph_passes.find.sites import SiteSurvey, locate_sites, survey_sites
from graph_passes.find.streams import stream_types, stream_width
from graph_passes.find.weights import constant_matrix
from reft_export.base.classifiers import DEFAULT_POSITIONS, longest_input
from reft_export.base.token_rules import DEFAULT_CONTEXT, stated_context, whole_number
from reft_export.bundling.genai import read_genai_config, stated_json
from runtimes.artifacts.manifest import ModelRecord
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.edits.op import EditNode
from runtimes.errors import GraphError, InputError
from runtimes.files.folders import name_of
from runtimes.precision import FLOAT_TYPES
from runtimes.text.chat import ChatTemplate
from runtimes.text.stop_tokens import stop_token_ids
from runtimes.text.tokenizer import GENERATION_FILE, TOKENIZER_FILE, Tokenizer

MOST_TOKEN_TYPES = 4
"""A table of more rows, beside that of the tokens, is one of positions."""


def task_of(graph: ir.Graph) -> str:
    """What a graph does that no manifest tells of: the one place where that is read off the graph."""
    return TEXT_CLASSIFICATION if is_classifier(graph) else TEXT_GENERATION


def logits_of(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.outputs if value.name == "logits")


def logit_count(graph: ir.Graph) -> int:
    """Tokens that a decoder tells apart, or a classifier's labels. Raises GraphError where the graph does not declare it."""
    shape = logits_of(graph).shape
    count = None if shape is None else shape[-1]
    if not isinstance(count, int):
        raise GraphError("the graph does not declare how many logits there are; run onnx.shape_inference over it first")
    return count


def foreign_record(model: ir.Model, source: Path, task: str) -> ModelRecord:
    """What the graph, and the configuration files beside it, say of the model."""
    folder, survey = source.parent, survey_sites(model)
    count = logit_count(model.graph)
    config = stated_config(folder)
    if task == TEXT_CLASSIFICATION:
        context = _encoder_context(model.graph, config)
        vocab_size, stop = whole_number(config, "vocab_size") or _rows(token_embedding(model.graph)), ()
    else:
        context = stated_context(config, "context_length") or DEFAULT_CONTEXT
        vocab_size, stop = count, stated_stop_tokens(folder, config, count)
    return ModelRecord(
        name=name_of(folder),
        model_type=str(config.get("model_type") or config.get("type") or "unknown"),
        fingerprint="",
        vocab_size=vocab_size,
        hidden_size=_width(survey, whole_number(config, "hidden_size")),
        num_hidden_layers=survey.layers,
        context_length=context,
        num_attention_heads=whole_number(config, "num_attention_heads", "n_head"),
        bos_token_id=_token_id(config, "bos_token_id"),
        eos_token_ids=stop,
        pad_token_id=_token_id(config, "pad_token_id"),
        sliding_window=config.get("sliding_window"),
    )


def stated_stop_tokens(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """By the rule of runtimes/text/stop_tokens.py, from the files beside the graph; ``config``: what they say of the model."""
    genai = read_genai_config(folder).get("model")
    # What genai_config.json states its owner's runtime stops at: no model class's default, of which words count for nothing.
    stated = (stated_json(folder / GENERATION_FILE), genai if isinstance(genai, dict) else {})
    generation = tuple(token for each in stated for token in _token_ids(each, "eos_token_id"))
    configured = _token_ids(config, "eos_token_id")
    if not (folder / TOKENIZER_FILE).is_file():
        return stop_token_ids(generation=generation, config=configured, tokenizer=None, vocab_size=vocab_size)
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    return stop_token_ids(
        generation=generation,
        config=configured,
        tokenizer=tokenizer.eos_token_id,
        end_of_turn=None if template is None else template.end_of_turn(tokenizer),
        special=tokenizer.special_token_ids,
        vocab_size=vocab_size,
    )


def _token_ids(config: dict[str, Any], key: str) -> tuple[int, ...]:
    """None, one or several, as configs state them; InputError for what is no number."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise InputError(f"{key} is {value!r} in the configuration beside the graph, expected a token's number; correct the file")
    return tuple(ids)


def _token_id(config: dict[str, Any], key: str) -> int | None:
    """The first where there are several."""
    return next(iter(_token_ids(config, key)), None)


def stated_config(folder: Path) -> dict[str, Any]:
    """What config.json and genai_config.json say of the decoder; the latter wins, as it is about the graph."""
    model, config = read_genai_config(folder).get("model"), stated_json(folder / "config.json")
    text = config.get("text_config")  # a multimodal model's decoder
    return config | (text if isinstance(text, dict) else {}) | (model if isinstance(model, dict) else {})


def _encoder_context(graph: ir.Graph, config: dict[str, Any]) -> int:
    """Tokens of the longest text."""
    positions = stated_context(config, "context_length") or _position_rows(graph) or DEFAULT_POSITIONS
    return longest_input(str(config.get("model_type")), positions, _token_id(config, "pad_token_id"))


def _position_rows(graph: ir.Graph) -> int | None:
    """Rows of the table [P, D] that an encoder's positions are looked up in; RoBERTa leaves the first of them out."""
    token = token_embedding(graph)
    lookups = [node for node in graph if node.op_type == "Gather" and node is not token and constant_matrix(node.inputs[0]) is not None]
    return min((rows for rows in map(_rows, lookups) if rows > MOST_TOKEN_TYPES), default=None)


def _rows(lookup: ir.Node) -> int:
    """Of the constant table that a Gather looks up in."""
    return shape_of(input_of(lookup, 0))[0]


def _width(survey: SiteSurvey, stated: int | None) -> int:
    """That of most streams, by their shapes or the weights around them; a config.json beside the graph may be of another model."""
    told = Counter(filter(None, map(stream_width, survey.found.values())))
    if told:
        return told.most_common(1)[0][0]
    if stated is None:
        raise GraphError("neither shapes nor weights of the graph tell the width of its streams; run onnx.shape_inference over it first")
    return stated


def edited_precision(model: ir.Model, nodes: tuple[EditNode, ...], width: int, source: Path) -> str:
    """The float type of the streams that are edited: an adapter file has one, and one ``width``."""
    types = stream_types(locate_sites(model, {node.site for node in nodes}))
    if other := [site for site, kind in sorted(types.items()) if kind.width != width]:
        raise GraphError(f"{source}: the stream at {other[0]} is {types[other[0]].width} wide, expected {width} as elsewhere; leave it out")
    kinds = {kind.dtype for kind in types.values()}
    precisions = [precision for precision, e in FLOAT_TYPES.items() if kinds == {ir.DataType.from_numpy(e.dtype)}]
    if not precisions:
        raise GraphError(f"the edited streams are of types {sorted(k.name for k in kinds)}; one of float32, float16, bfloat16 is expected")
    return precisions[0]

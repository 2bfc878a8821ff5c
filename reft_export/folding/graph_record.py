"""What a foreign graph, and the configuration files beside it, say of the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.selection import constant_matrix, token_embedding
from graph_passes.find.encoder import is_classifier
from graph_passes.find.sites import SiteSurvey, locate_sites, survey_sites
from graph_passes.find.streams import stream_types, stream_width
from reft_export.base.classifiers import DEFAULT_POSITIONS, longest_input
from reft_export.base.token_rules import DEFAULT_CONTEXT, stated_context, whole_number
from reft_export.bundling.genai import read_genai_config, stated_json
from runtimes.artifacts.bundle import ModelRecord
from runtimes.edits.op import EditNode
from runtimes.errors import GraphError, InputError
from runtimes.text.chat import ChatTemplate
from runtimes.text.stop_tokens import stop_token_ids
from runtimes.text.tokenizer import GENERATION_FILE, TOKENIZER_FILE, Tokenizer

PRECISION = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
MOST_TOKEN_TYPES = 4
"""A table of more rows, beside that of the tokens, is one of positions."""


def foreign_record(model: ir.Model, source: Path) -> ModelRecord:
    """What the graph, and the configuration files beside it, say of the model."""
    folder, survey = source.parent, survey_sites(model)
    vocabulary = next(v for v in model.graph.outputs if v.name == "logits").shape
    if vocabulary is None or not isinstance(vocabulary[-1], int):
        raise GraphError("the graph does not declare how many logits there are; run onnx.shape_inference over it first")
    config = stated_config(folder)
    if is_classifier(model.graph):
        positions = stated_context(config, "context_length") or _position_rows(model.graph) or DEFAULT_POSITIONS
        context = longest_input(str(config.get("model_type")), positions, _token_id(config, "pad_token_id"))
    else:
        context = stated_context(config, "context_length") or DEFAULT_CONTEXT
    vocab_size = vocabulary[-1]
    if is_classifier(model.graph):
        vocab_size = int(whole_number(config, "vocab_size") or token_embedding(model.graph).inputs[0].shape[0])
    stop = () if is_classifier(model.graph) else stated_stop_tokens(folder, config, vocab_size)
    return ModelRecord(
        name=folder.resolve().name,
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


def _position_rows(graph: ir.Graph) -> int | None:
    """Rows of the table [P, D] that an encoder's positions are looked up in; RoBERTa leaves the first of them out."""
    token = token_embedding(graph)
    tables = [constant_matrix(node.inputs[0]) for node in graph if node.op_type == "Gather" and node is not token]
    return min((table.shape[0] for table in tables if table is not None and table.shape[0] > MOST_TOKEN_TYPES), default=None)


def _width(survey: SiteSurvey, stated: int | None) -> int:
    """That of most streams, by their shapes or the weights around them; a config.json beside the graph may be of another model."""
    told = Counter(filter(None, map(stream_width, survey.found.values())))
    if not told and stated is None:
        raise GraphError("neither shapes nor weights of the graph tell the width of its streams; run onnx.shape_inference over it first")
    return told.most_common(1)[0][0] if told else stated


def edited_precision(model: ir.Model, nodes: tuple[EditNode, ...], width: int, source: Path) -> str:
    """The float type of the streams that are edited: an adapter file has one, and one ``width``."""
    types = stream_types(locate_sites(model, {node.site for node in nodes}))
    if other := [site for site, kind in sorted(types.items()) if kind.width != width]:
        raise GraphError(f"{source}: the stream at {other[0]} is {types[other[0]].width} wide, expected {width} as elsewhere; leave it out")
    kinds = {kind.dtype for kind in types.values()}
    if len(kinds) != 1 or not kinds <= set(PRECISION):
        raise GraphError(f"the edited streams are of types {sorted(k.name for k in kinds)}; one of float32, float16, bfloat16 is expected")
    return PRECISION[kinds.pop()]

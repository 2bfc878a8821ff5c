"""Bases that classify: an encoder, or a decoder, with a classification head, and the head's parameters, which are trained with the edit.

The head is every parameter outside the encoder or decoder (transformers' ``base_model``): ``classifier`` of BERT, whose pooler belongs to
the encoder, ``classifier.dense`` and ``classifier.out_proj`` of RoBERTa and ELECTRA, ``pre_classifier`` and ``classifier`` of DistilBERT;
``score`` of a decoder, which reads the last token that is not the pad token. PEFT saves the same modules (modules_to_save).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.edits.adapter import Adapter
from runtimes.errors import AdapterError, InputError

if TYPE_CHECKING:  # fold runs without torch, whose import takes longer than the fold
    import torch
    from transformers import PreTrainedModel

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
"""Model types whose classifiers are exported and held to parity."""

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3")
"""Those of decoders, which a text is as a prompt to: a row of logits for its last token."""

ARCHITECTURE = "ForSequenceClassification"

DEFAULT_POSITIONS = 512
"""Of an encoder whose configuration does not say how many it has, as of BERT."""


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a classifier in ``architectures``."""
    return any(name.endswith(ARCHITECTURE) for name in _architectures(config))


def _architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def check_classifier(config: Mapping[str, Any], folder: Path | str) -> None:
    """Raises InputError for a classifier that is none of ``ENCODERS`` and ``DECODERS``, that does not choose one of two labels or more, or
    that cannot tell where a text ends."""
    kind = config.get("model_type")
    if kind not in (*ENCODERS, *DECODERS):
        raise InputError(
            f"{folder} is a classifier on {kind}; classifiers are supported on {', '.join((*ENCODERS, *DECODERS))}, and other decoders as "
            "language models"
        )
    pad = config.get("pad_token_id")
    if kind in DECODERS and not (isinstance(pad, int) and pad >= 0):
        raise InputError(
            f"{folder}: config.json names no pad_token_id{'' if pad is None else f' but {pad!r}'}, by which a {kind} classifier tells a "
            "text's last token; set it to a token that no text ends with, as the tokenizer's pad"
        )
    problem, labels = config.get("problem_type"), stated_labels(config, Path(folder) / "config.json")
    if problem not in (None, "single_label_classification") or len(labels) == 1:
        raise InputError(
            f"{folder}: {'a single output' if problem is None else problem} is no choice of one label; only single-label classification "
            "with two labels or more is supported"
        )


def stated_labels(config: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The labels that config.json states, in the order of the logits; none where it has no ``id2label``.

    Raises InputError for one that does not number its labels from 0 on, or has one twice: an answer could not be told from another.
    """
    named = config.get("id2label")
    if named is None:
        return ()
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    if not numbers or set(named) != set(numbers) or not all(type(label) in (str, int) for label in named.values()):
        raise InputError(f'{path}: id2label is {str(named)[:80]}, expected an object like {{"0": "bad", "1": "good"}}; correct the file')
    labels = tuple(str(named[number]) for number in numbers)
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise InputError(f"{path}: id2label has the label {twice} twice; give each label a name of its own")
    return labels


def check_has_head(config: Mapping[str, Any], folder: Path | str) -> None:
    """Raises InputError for a bare encoder: transformers would open some of them as decoders, with random weights or masks."""
    kind = config.get("model_type")
    if kind in ENCODERS and not config.get("is_decoder"):
        kinds = ", ".join(_architectures(config)) or "no architecture"
        raise InputError(
            f"{folder} holds {kinds}, a {kind} without a classification head; give it one with transformers' "
            "AutoModelForSequenceClassification.from_pretrained(.., num_labels=N).save_pretrained(FOLDER), and train it with the edit"
        )


def labels_of(model: PreTrainedModel) -> tuple[str, ...]:
    """A classifier's labels in the order of its logits; none of a decoder."""
    if not type(model).__name__.endswith(ARCHITECTURE):
        return ()
    names: dict[Any, str] = model.config.id2label or {}
    return tuple(str(names[i]) for i in range(len(names)))


def takes_token_types(model: PreTrainedModel) -> bool:
    """Whether the model tells the texts of a pair apart by token_type_ids; RoBERTa has one type only."""
    return getattr(model.config, "type_vocab_size", 0) > 1


def decodes(model: PreTrainedModel) -> bool:
    """Whether it is a decoder, which would keep keys and values of a text that nothing follows."""
    return model.config.model_type in DECODERS


def context_of(model: PreTrainedModel) -> int:
    """Tokens of the longest input."""
    config = model.config
    return longest_input(config.model_type, getattr(config, "max_position_embeddings", None) or DEFAULT_POSITIONS, config.pad_token_id)


def longest_input(kind: str, positions: int, pad_token_id: int | None) -> int:
    """Tokens for ``positions`` (max_position_embeddings): RoBERTa counts from the pad token's id + 1 on, and so has as many fewer."""
    return positions - (1 if pad_token_id is None else pad_token_id) - 1 if kind in ("roberta", "xlm-roberta") else positions


def head_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The head's parameters by name, in the order in which they are applied."""
    inside = f"{model.base_model_prefix}."
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(inside)}


def check_head(adapter: Adapter, model: PreTrainedModel) -> None:
    """Raises AdapterError where the adapter's head, or its labels, are not those of ``model``."""
    if adapter.base.labels != labels_of(model):
        raise AdapterError(
            f"the adapter was trained on {adapter.base.name} with labels {', '.join(adapter.base.labels) or 'none'}; this base has "
            f"{', '.join(labels_of(model)) or 'none'}; use the base it was trained on"
        )
    if not adapter.head:
        return
    shapes = {name: list(parameter.shape) for name, parameter in head_parameters(model).items()}
    found = {name: list(value.shape) for name, value in adapter.head.items()}
    if different := sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name)):
        name = different[0]
        raise AdapterError(
            f"the adapter's head does not fit this base: {name} is {found.get(name, 'missing')} in the adapter, "
            f"{shapes.get(name, 'missing')} in the base; use the base it was trained on"
        )


@contextmanager
def with_head(model: PreTrainedModel, head: Mapping[str, np.ndarray]) -> Iterator[None]:
    """``model`` with these head parameters, rounded once to its dtype, inside the ``with``; an empty ``head`` changes nothing."""
    import torch

    own = head_parameters(model) if head else {}
    before = {name: own[name].data for name in head}
    for name, value in head.items():
        own[name].data = torch.from_numpy(np.array(value, np.float32)).to(before[name])
    try:
        yield
    finally:
        for name, data in before.items():
            own[name].data = data

"""Tiny random encoder classifiers made from configs, and tokenizers that frame a text as theirs do."""

from __future__ import annotations

from pathlib import Path

from models import classifiers
from models.adapters import random_head
from models.classifiers import CLASSIFIERS, LABELS, PAD, POSITIONS, framing_tokenizer
from tiny import LAYERS
from transformers import PreTrainedModel

__all__ = ["LABELS", "PAD", "POSITIONS", "random_head"]
FAMILIES = tuple(CLASSIFIERS)
tokenizer = framing_tokenizer


def build(family: str = "roberta", *, labels: tuple[str, ...] = LABELS, **overrides: object) -> PreTrainedModel:
    """A random classifier of LAYERS layers whose logits depend on its text."""
    return classifiers.build_classifier(family, layers=LAYERS, labels=labels, overrides=overrides)


def save_base(folder: Path, family: str = "roberta", *, labels: tuple[str, ...] = LABELS, **overrides: object) -> Path:
    """A classifier's folder as a user has one."""
    return classifiers.save_classifier(folder, family, layers=LAYERS, labels=labels, overrides=overrides)

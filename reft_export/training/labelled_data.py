"""JSONL training data of a classifier: one text, or one pair of texts, and its label a line.

``{"text": "...", "label": ...}`` or ``{"text": "...", "text_pair": "...", "label": ...}``; a label is a name of the base's labels or its
number from 0. Empty lines are skipped. Texts are framed by the tokenizer's own special tokens, which count as tokens for positions; what
exceeds max_length is cut from the longer text's end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reft_export.tasks.classification import encode
from reft_export.training.data import TrainingData, joined
from reft_export.training.sources import Lines, Source, check_text, read_object
from runtimes.errors import InputError
from runtimes.text.encoded_text import EncodedText, padded

if TYPE_CHECKING:  # held-out lines are read for a bundle without torch
    import torch
    from transformers import PreTrainedTokenizerBase

KEYS = {"text", "label"}
PAIR = "text_pair"


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """One tokenized line; ``label`` counts from 0."""

    text: EncodedText
    label: int
    where: str
    """File and line, for messages."""
    truncated: bool = False

    @property
    def form(self) -> str:
        return "labelled text"

    @property
    def trained(self) -> tuple[tuple[int, int], ...]:
        """No token: the loss is on the label."""
        return ()

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.text.ids

    @property
    def prompt_length(self) -> int:
        """All of a text is prompt."""
        return len(self.text)

    @property
    def length(self) -> int:
        return len(self.text)

    @property
    def marks(self) -> tuple[int, ...]:
        """None: positions marked are of a decoder's prompts."""
        return ()


def load_labelled(data: Lines, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, max_length: int) -> TrainingData[LabelledText]:
    """Reads and tokenizes the data. Raises InputError naming file and line for anything not of the form above."""

    def read(source: Source) -> Iterator[LabelledText]:
        found = False
        for line in source.lines():
            record = read_object(line)
            if record is not None:
                found = True
                text, pair, label = _checked(record, labels, line.where)
                encoded, cut = encode(tokenizer, text, pair, max_length, line.where)
                yield LabelledText(text=encoded, label=label, where=line.where, truncated=cut)
        if not found:
            raise InputError(f"{source.where} has no examples; expected lines like {json.dumps({'text': '...', 'label': labels[0]})}")

    return joined(data, read)


def collate_labelled(examples: Sequence[LabelledText], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, token_type_ids [B, S] (right-padded to the longest) and labels [B], all int64."""
    import torch

    ids, mask, types = map(torch.from_numpy, padded([example.text for example in examples], pad_token_id))
    labels = torch.tensor([example.label for example in examples])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": labels}


def _checked(record: dict[str, Any], labels: Sequence[str], where: str) -> tuple[str, str | None, int]:
    missing, unknown = sorted(KEYS - set(record)), sorted(set(record) - KEYS - {PAIR})
    if missing or unknown:
        said = f"lacks {missing}" if missing else f"has unknown keys {unknown}"
        raise InputError(f"{where}: {said}; a classifier's line has text, label and for a pair text_pair")
    for key in ("text", PAIR):
        if key in record:
            check_text(record[key], key, where)
    return record["text"], record.get(PAIR), label_number(record["label"], labels, where)


def label_number(label: Any, labels: Sequence[str], where: str) -> int:
    """``label``'s place among the base's labels, given by name or number; raises InputError for another."""
    if isinstance(label, str) and label in labels:
        return list(labels).index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    raise InputError(f"{where}: label {label!r} is none of the base's: {', '.join(labels)}, or 0 to {len(labels) - 1}")

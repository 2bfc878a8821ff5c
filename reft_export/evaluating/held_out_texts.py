"""The held-out texts of a classifier, tokenized once for every model in the table, and what is asked of them: their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.evaluating.settings import EvaluationSettings
from reft_export.training.data import DataFile
from reft_export.training.labelled_data import LabelledText, load_labelled
from reft_export.training.settings import ACCURACY, LOSS
from runtimes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reft_export.evaluating.device_tokenizer import DeviceTokenizer

OF_DECODERS = {"format": "auto", "chat_template": "auto", "max_new_tokens": None}
"""Settings that mean nothing for a label, and what they are where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutTexts:
    """``labels``: the base's, in the order of the logits."""

    files: tuple[DataFile, ...]
    examples: tuple[LabelledText, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    tokenizer: Any
    """As of HeldOut: it makes text of the tokens for the report."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def gold(self) -> tuple[int, ...]:
        """Each text's label, by number."""
        return tuple(example.label for example in self.examples)

    @property
    def truncated(self) -> int:
        return sum(example.truncated for example in self.examples)

    def choice(self, number: int) -> str:
        return self.labels[number]

    def told(self, line: int) -> dict[str, str]:
        example = self.examples[line]
        text = str(self.tokenizer.decode(list(example.text.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return {"line": example.where, "prompt": text, "expected": self.labels[example.label]}

    def record(self) -> dict[str, Any]:
        return {"labels": list(self.labels)}

    def note(self) -> str:
        return f"{len(self)} texts, labels {', '.join(self.labels)}"


def read_texts(
    data: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | DeviceTokenizer,
    settings: EvaluationSettings,
    *,
    who: str,
    labels: tuple[str, ...],
    context: int,
) -> HeldOutTexts:
    """``who`` reads them, for messages; ``context``: the shortest in the table. Raises InputError for lines and settings that are not a
    classifier's."""
    for name, unsaid in OF_DECODERS.items():
        if getattr(settings, name) != unsaid:
            raise InputError(f"--{name.replace('_', '-')} is of a decoder's answers, and {who} is a classifier; leave it out")
    if other := next((name for name in settings.metrics or () if name not in (ACCURACY, LOSS)), None):
        raise InputError(f"--metric {other} is of a decoder's answers, and {who} is a classifier; use accuracy or loss, or leave it out")
    reader: Any = tokenizer  # either one: what is read of it is what DeviceTokenizer has
    read = load_labelled(list(data), reader, labels, max_length=settings.max_length or context)
    return HeldOutTexts(
        files=read.files,
        examples=read.examples[: settings.limit],
        labels=labels,
        metrics=tuple(name for name in settings.metrics or (ACCURACY,) if name != LOSS),
        tokenizer=tokenizer,
    )


def check_same_texts(one: HeldOutTexts, who: str, other: HeldOutTexts, whose: str) -> None:
    """Raises InputError, naming the first line, where two models' tokenizers read the data otherwise."""
    for mine, others in zip(one.examples, other.examples, strict=True):
        if mine.text != others.text:
            raise InputError(
                f"{mine.where} is {len(mine.text)} tokens to {who} and {len(others.text)} to {whose}, or other ones: they have other "
                "tokenizers; evaluate them apart"
            )

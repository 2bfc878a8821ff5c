"""What ``reft-export run`` does with a classifier: texts, or pairs of texts, to labels and their probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reft_export.cli.run_options import RunOptions, check_adapters
from reft_export.console import say
from runtimes.artifacts.artifact import Artifact
from runtimes.errors import InputError
from runtimes.session import ClassifierSession, Session, as_classifier
from runtimes.text.encoded_text import EncodedText
from runtimes.text.prompts import ADAPTER, OPTIONS, batches_of_alike, in_order, own_options, read_lines, refuse_unknown
from runtimes.text.tokenizer import Tokenizer

KEYS = {"text", "text_pair", "label", *ADAPTER}
HINTS = dict.fromkeys({*OPTIONS, "prompt", "messages"} - {*ADAPTER}, "for text generation, which a classifier does not do")


@dataclass(frozen=True, kw_only=True)
class Text:
    """``where`` it was given, for messages; ``options`` of its own: the ``adapter``, or nothing."""

    where: str
    text: str
    pair: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def prepare(opened: Artifact, options: RunOptions) -> Callable[[Session], None]:
    """What is left to do in a session. Raises InputError and BundleError, with the line, for what can be refused before there is one."""
    if options.prompts is not None and options.pair:
        raise InputError(f"--pair goes with --prompt; of {options.prompts}, a line's text_pair is the second text")
    texts = given_texts(options) if options.prompts is None else read_texts(options.prompts)
    check_adapters(opened, texts)
    return partial(_classify, texts=texts, encoded=_encoded(opened, texts), options=options)


def given_texts(options: RunOptions) -> list[Text]:
    """Of -p and --pair; raises InputError where they are not as many."""
    prompts, pairs = options.prompt, options.pair
    if pairs and len(pairs) != len(prompts):
        raise InputError(f"{len(prompts)} --prompt and {len(pairs)} --pair are given; a pair of texts needs one of each")
    seconds = pairs or [None] * len(prompts)
    return [Text(where=f"prompt {i}", text=text, pair=pair) for i, (text, pair) in enumerate(zip(prompts, seconds, strict=True), 1)]


def read_texts(path: Path) -> list[Text]:
    """Of a JSONL file with ``text``, for a pair ``text_pair``, and an ``adapter`` of its own a line (a ``label`` is not read).

    Raises InputError with the line.
    """
    texts = []
    for where, value in read_lines(path):
        if isinstance(value, dict):
            refuse_unknown(value, KEYS, where, HINTS)
        pair = value.get("text_pair") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not isinstance(pair, str | None):
            raise InputError(f'{where}: expected {{"text": "..."}} or {{"text": "...", "text_pair": "..."}}')
        texts.append(Text(where=where, text=value["text"], pair=pair, options=own_options(value, ADAPTER, where)))
    return texts


def _encoded(opened: Artifact, texts: Sequence[Text]) -> list[EncodedText]:
    """Raises InputError for a text that is empty or too long."""
    model = opened.manifest.model
    tokenizer = Tokenizer.load(opened.folder, model)
    encoded = []
    for text in texts:
        if not text.text.strip() or (text.pair is not None and not text.pair.strip()):
            raise InputError(f"{text.where} is empty; a classifier needs a text")
        encoded.append(tokenizer.encode_text(text.text, text.pair))
        if len(encoded[-1]) > model.context_length:
            raise InputError(
                f"{text.where} has {len(encoded[-1])} tokens, and {model.name} takes {model.context_length} at most; shorten it"
            )
    return encoded


def _classify(session: Session, *, texts: Sequence[Text], encoded: Sequence[EncodedText], options: RunOptions) -> None:
    """Prints one line a text: the label and the probabilities of all labels, the likeliest first; as JSON in the labels' own order."""
    labels = session.bundle.manifest.labels
    adapters = [text.options.get("adapter", options.adapter) for text in texts]
    for index, row in in_order(_probabilities(as_classifier(session), encoded, adapters, options.batch_size)):
        _show(index, dict(zip(labels, map(float, row), strict=True)), adapters[index], as_json=options.as_json)


def _probabilities(
    session: ClassifierSession, encoded: Sequence[EncodedText], adapters: Sequence[str | None], batch_size: int
) -> Iterator[tuple[int, Any]]:
    """(number, probabilities of the labels) of every text, in batches of one adapter."""
    for batch in batches_of_alike(adapters, batch_size):
        session.set_adapter(adapters[batch[0]])
        yield from zip(batch, session.probabilities([encoded[i] for i in batch]), strict=True)


def _show(index: int, probabilities: dict[str, float], adapter: str | None, *, as_json: bool) -> None:
    label = max(probabilities, key=lambda name: probabilities[name])
    if as_json:
        record: dict[str, Any] = {"index": index, "adapter": adapter, "label": label, "probabilities": probabilities}
        say(json.dumps(record, ensure_ascii=False) + "\n")
    else:
        ranked = sorted(probabilities.items(), key=lambda item: -item[1])
        say(f"{label}\t{', '.join(f'{name} {value:.4f}' for name, value in ranked)}\n")

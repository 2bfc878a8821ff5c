"""Probes: lines of an adapter's own task that it carries, chosen from its data, read from a file, and as the tokens that a base gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reft_export.training.data import Example, Tokenized, load_data
from reft_export.training.forms import AsProbe, probe_as_it_is, probe_of_form
from reft_export.training.sources import Data, Lines, read_object, sources_of
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import needs_marks
from runtimes.edits.probes import MOST, Probe, spread
from runtimes.errors import AdapterError, InputError

if TYPE_CHECKING:  # what has no probes needs no torch
    from reft_export.base.load import Base
    from reft_export.training.labelled_data import LabelledText


def probes_of(data: Lines, examples: Sequence[Tokenized], count: int, as_probe: AsProbe) -> tuple[Probe, ...]:
    """The lines of ``data`` that ``count`` of its ``examples`` were read from, spread over them. Reads the data once more."""
    chosen = {examples[index].where for index in spread(len(examples), count)}
    if not chosen:
        return ()
    lines = {
        line.where: line for source in sources_of(data) for line in source.lines() if line.where in chosen
    }  # a file may be given twice
    return tuple(as_probe(record, where) for where, line in lines.items() if (record := read_object(line)) is not None)


def read_probe_file(data: Data, base: Base, adapter: Adapter) -> tuple[tuple[Probe, ...], int]:
    """(probes for ``adapter``, how many lines ``data`` has): all of them, or MOST that are spread over it.

    ``base`` may lie on torch's meta device. Raises InputError, naming file and line, for what is not of the form of the base's training
    data, or longer than its context.
    """
    examples = tokenized(data, base, adapter)
    as_probe = probe_as_it_is if base.task == TEXT_CLASSIFICATION else probe_of_form()
    return probes_of(data, examples, MOST, as_probe), len(examples)


def probe_examples(base: Base, adapter: Adapter) -> Sequence[Any]:
    """The adapter's probes as training with its settings reads them: ``Example`` of a decoder, ``LabelledText`` of a classifier.

    Raises AdapterError for probes that the base's tokenizer makes nothing of.
    """
    try:
        return tokenized([dict(probe) for probe in adapter.probes], base, adapter)
    except InputError as e:
        raise AdapterError(f"the adapter's probes do not fit this base: {e}; give it others (reft-export import --probes)") from None


def tokenized(data: Data, base: Base, adapter: Adapter) -> Sequence[Example] | Sequence[LabelledText]:
    """``data`` by the rules of the adapter's own training: its chat template, and the base's context."""
    from reft_export.base.token_rules import context_of, stop_tokens
    from reft_export.training.labelled_data import load_labelled
    from reft_export.training.objective import tokenizer_of

    tokenizer, context = tokenizer_of(base), context_of(base)
    if base.task == TEXT_CLASSIFICATION:
        return load_labelled(data, tokenizer, base.info.labels, max_length=context).examples
    trained = adapter.training.get("data")
    plain = isinstance(trained, dict) and trained.get("chat_template") is False
    template = "never" if plain else "auto"
    marks = needs_marks(adapter.where)
    read = load_data(data, tokenizer, max_length=context, chat_template=template, stop_tokens=stop_tokens(base), marks=marks)
    return read.examples

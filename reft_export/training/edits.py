"""Edits that differ from layer to layer: the grammar of layers and streams, and of ``--edit`` "LAYERS: METHOD [rN] [..]"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtimes.edits.edit import ACTIVATIONS, STREAMS, Site
from runtimes.edits.form import EditForm
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError

GRAMMAR = "LAYERS: METHOD [rN] [ACTIVATION] [POSITIONS] [STREAM], for example '4-10: loreft r4' or '18: red all mlp_output'"
RANK = 4
"""Of a low-rank method, where none is said."""


@dataclass(frozen=True, kw_only=True)
class LayerEdits:
    """The edits of some layers, each at every one of the streams. Raises InputError for what no edit is."""

    layers: str
    """As ``parse_layers`` reads them."""
    method: str = "loreft"
    rank: int | None = None
    """None: 4, and 0 of a method of full rank, which has none to choose."""
    activation: str = ""
    positions: str | None = None
    """None: those of the run."""
    streams: str = "block_output"
    """As ``parse_streams`` reads them."""

    def __post_init__(self) -> None:
        parse_streams(self.streams)
        if self.positions is not None:
            PositionRule.parse(self.positions)
        try:
            form = self.form
        except AdapterError as e:
            raise InputError(f"the edit of layers {self.layers}: {e}") from None
        object.__setattr__(self, "rank", form.rank)

    @property
    def form(self) -> EditForm:
        full_rank = self.method in METHODS and METHODS[self.method].full_rank
        rank = (0 if full_rank else RANK) if self.rank is None else self.rank
        return EditForm(method=self.method, rank=rank, activation=self.activation)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        rank = f" r{self.rank}" if self.rank else ""
        streams = "" if self.streams == "block_output" else f" {';'.join(parse_streams(self.streams))}"
        said = "".join(f" {word}" for word in (self.activation, self.positions) if word)
        return f"{self.layers}: {self.method}{rank}{said}{streams}"

    @classmethod
    def parse(cls, text: str) -> LayerEdits:
        """GRAMMAR; the words behind the method in any order. Raises InputError."""
        layers, colon, rest = text.partition(":")
        words = rest.split()
        if not colon or not layers.strip() or not words:
            raise InputError(f"edit {text!r} is not understood; expected {GRAMMAR}")
        method, *others = words
        if method not in METHODS:
            raise InputError(f"edit {text!r}: method {method!r} is unknown; known: {', '.join(METHODS)}")
        said: dict[str, str] = {}
        for word in others:
            key = _kind(word)
            if key is None:
                raise InputError(f"edit {text!r}: {word!r} is no rank (r4), activation, stream or positions; expected {GRAMMAR}")
            if key in said:
                raise InputError(f"edit {text!r} says its {key} twice, {said[key]} and {word}; leave one of them out")
            said[key] = word
        rank = int(said["rank"][1:]) if "rank" in said else None
        if rank is not None and METHODS[method].full_rank:
            raise InputError(f"edit {text!r}: {method} is of full rank and has none to choose; leave {said['rank']} out")
        return cls(
            layers=layers.strip(),
            method=method,
            rank=rank,
            activation=said.get("activation", ""),
            positions=said.get("positions"),
            streams=said.get("stream", "block_output"),
        )


def _kind(word: str) -> str | None:
    if re.fullmatch(r"r\d{1,9}", word):
        return "rank"
    if word and word in ACTIVATIONS:
        return "activation"
    if all(part in STREAMS for part in re.split("[;,]", word)):
        return "stream"
    try:
        PositionRule.parse(word)
    except InputError:
        return None
    return "positions"


def forms_of_edits(edits: Sequence[LayerEdits], num_hidden_layers: int) -> dict[Site, EditForm]:
    """Every edited site with its form, in order. Raises InputError for layers that the base lacks, and for a site that two edits name."""
    return {site: edit.form for site, edit in _by_site(edits, num_hidden_layers).items()}


def rules_of_edits(edits: Sequence[LayerEdits], num_hidden_layers: int, otherwise: PositionRule) -> dict[Site, PositionRule]:
    """Every edited site with its positions; ``otherwise`` where its edit says none. Raises InputError as ``forms_of_edits``."""
    return {
        site: otherwise if edit.positions is None else PositionRule.parse(edit.positions)
        for site, edit in _by_site(edits, num_hidden_layers).items()
    }


def _by_site(edits: Sequence[LayerEdits], num_hidden_layers: int) -> dict[Site, LayerEdits]:
    found: dict[Site, LayerEdits] = {}
    for edit in edits:
        for layer in parse_layers(edit.layers, num_hidden_layers):
            for stream in parse_streams(edit.streams):
                site = Site(layer=layer, stream=stream)
                if site in found:
                    raise InputError(f"edits '{found[site]}' and '{edit}' are both of {site}, which has one edit; leave it out of one")
                found[site] = edit
    return {site: found[site] for site in sorted(found)}


def edits_of_forms(forms: Mapping[Site, EditForm], rules: Mapping[Site, PositionRule] | None = None) -> tuple[LayerEdits, ...]:
    """The inverse of ``forms_of_edits``, and with ``rules`` of ``rules_of_edits``."""
    groups: dict[tuple[EditForm, str | None, str], list[int]] = {}
    for site, form in sorted(forms.items(), key=lambda item: item[0]):
        groups.setdefault((form, str(rules[site]) if rules else None, site.stream), []).append(site.layer)
    return tuple(
        LayerEdits(
            layers=";".join(map(str, layers)),
            method=form.method,
            rank=form.rank,
            activation=form.activation,
            positions=positions,
            streams=stream,
        )
        for (form, positions, stream), layers in groups.items()
    )


def parse_layers(text: str, num_hidden_layers: int) -> tuple[int, ...]:
    """``all``, ``8-16`` (both ends), ``3;9;18`` or a mix, as increasing layer numbers; raises InputError."""
    if text.strip() == "all":
        return tuple(range(num_hidden_layers))
    layers: set[int] = set()
    for part in re.split("[;,]", text):
        match = re.fullmatch(r"\s*(\d{1,40})\s*(?:-\s*(\d{1,40})\s*)?", part)
        if not match:
            raise InputError(f"layers {text!r} are not understood at {part!r}; use all, 8-16 or 3;9;18")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(f"layers {text!r}: the range {first}-{last} runs backwards; did you mean {last}-{first}?")
        if last >= num_hidden_layers:
            raise InputError(f"layer {last} does not exist in this base ({num_hidden_layers} layers, 0 to {num_hidden_layers - 1})")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def parse_streams(text: str) -> tuple[str, ...]:
    """Streams separated by ``;`` or ``,``, in the order in which a block computes them; raises InputError."""
    asked = [part.strip() for part in re.split("[;,]", text)]
    if unknown := [stream for stream in asked if stream not in STREAMS]:
        raise InputError(f"stream {unknown[0]!r} is unknown; known: {', '.join(STREAMS)}")
    return tuple(stream for stream in STREAMS if stream in asked)

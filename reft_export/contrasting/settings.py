"""What one adapter from a contrast is, and the grammar of the position that is read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from reft_export.training.edits import parse_layers, parse_streams
from reft_export.training.settings import CHAT_TEMPLATE
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule
from runtimes.edits.probes import MOST
from runtimes.errors import InputError

METHODS = ("add", "ablate")
READ = ("auto", "last", "mean")


@dataclass(frozen=True, kw_only=True)
class SteerSettings:
    """Raises InputError for values out of range, and for options that mean nothing together."""

    method: str = "add"
    """add: h + s, the difference of the means; ablate: h - v v^T h, its direction taken out."""
    layers: str | None = None
    """As of training. None: add edits the one layer that is chosen, ablate every layer."""
    streams: str = "block_output"
    from_layer: int | None = None
    """Of ablate: the layer whose direction is taken out; None: the one that is chosen."""
    strength: float | None = None
    """Of add: times the difference of the means, negative ones steer the other way; None: chosen by measurement."""
    positions: str = "all"
    read: str = "auto"
    """Of the tokens that are read (reft_export/contrasting/passages.py): last, mean over them, or n: the n-th from their end. auto: mean
    over completions and texts, last where there are prompts alone."""
    chat_template: str = "auto"
    """Whether prompts are rendered through the tokenizer's chat template; auto: where there is one. Texts never are."""
    max_length: int | None = None
    """Tokens of a line; None: the base's context."""
    batch_size: int = 8
    samples: int = 3
    """Prompts that are answered before and after; 0 for none."""
    probes: int = MOST
    """Lines with a completion that the adapter carries."""

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("chat_template", CHAT_TEMPLATE)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        if self.read not in READ and not re.fullmatch(r"-?[1-9]\d{0,8}", self.read):
            raise InputError(f"read {self.read!r} is not understood; use last, mean, or a number: 2 is the token before the last")
        for name, least in (("batch_size", 1), ("samples", 0), ("probes", 0), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")
        if self.probes > MOST:
            raise InputError(f"probes is {self.probes}; it must be at most {MOST}")
        if self.strength is not None and (not math.isfinite(self.strength) or self.strength == 0):
            raise InputError(f"strength is {self.strength}, expected a finite number other than 0; negative steers the other way")
        if self.method == "ablate" and self.strength is not None:
            raise InputError(
                "strength does not apply to ablate, which takes the whole direction out; run --strength takes out a part of it"
            )
        if self.method == "add" and self.from_layer is not None:
            raise InputError("from_layer is ablate's; what is added at a layer was measured there: give layers")
        if self.rule.marked:
            raise InputError("positions marked are of prompts that mark tokens, and a contrast's do not; use other positions")
        parse_streams(self.streams)

    @property
    def rule(self) -> PositionRule:
        return PositionRule.parse(self.positions)

    def candidates(self, num_hidden_layers: int) -> tuple[Site, ...]:
        """Where the two sides are read: where an edit may be, and for ablate the residual stream behind every block."""
        chosen = "all" if self.layers is None or self.method == "ablate" else self.layers
        streams = ("block_output",) if self.method == "ablate" else parse_streams(self.streams)
        return tuple(Site(layer=layer, stream=stream) for layer in parse_layers(chosen, num_hidden_layers) for stream in streams)

    def ablated(self, num_hidden_layers: int) -> tuple[Site, ...]:
        """Where ``ablate`` takes its direction out. Raises InputError for a layer that does not exist."""
        if self.from_layer is not None:
            parse_layers(str(self.from_layer), num_hidden_layers)
        layers = parse_layers(self.layers or "all", num_hidden_layers)
        return tuple(Site(layer=layer, stream=stream) for layer in layers for stream in parse_streams(self.streams))

    def record(self) -> dict[str, Any]:
        """The settings that decide what the adapter is, as it records them."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch_size", "samples", "probes")}

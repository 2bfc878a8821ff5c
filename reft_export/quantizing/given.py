"""Weights that the base's own checkpoint holds in 4-bit blocks: an int4 bundle keeps their integers, scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from calibration.settings import QuantizationSettings
from calibration.weight_only import Blocks, GivenBlocks
from reft_export.base.packed.blocks import PackedBlocks, packed_blocks
from runtimes.artifacts.manifest import WeightSource

NO_POINTS = 0x88
"""Two zero points of 8, which a symmetric weight means."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """``blocks``: by initializer; ``label``: what quantized them, "" where nothing did."""

    label: str = ""
    blocks: Mapping[str, GivenBlocks] = field(default_factory=dict)

    def described(self, kept: int, weights: int) -> str:
        """210 of 211 weights as GPTQ, 4 bits, groups of 128; "" where nothing was given."""
        return f"{kept} of {weights} weights as {self.label}" if self.label else ""


def given_blocks(folder: Path | None, sources: Mapping[str, WeightSource], settings: QuantizationSettings) -> Given:
    """Of a graph's initializers [K, N] those that are whole weights of the base, rows of one, or several one below the other.

    What an exporter stored otherwise (experts in one tensor) is not among them, and is quantized as any other weight.
    """
    packed = packed_blocks(folder) if settings.keep_given and folder is not None else None
    if packed is None:
        return Given()
    found = {}
    for name, source in sources.items():
        parts = (source, *source.joined)
        formats = [packed.formats.get(part.parameter) for part in parts]
        known = [format for format in formats if format is not None]
        if len(known) < len(parts) or len({format.block_size for format in known}) > 1:
            continue
        if all(part.transpose and part.axis in (None, 0) for part in parts):
            # One weight without zero points among others takes theirs.
            format = next((format for format in known if not format.symmetric), known[0])
            found[name] = GivenBlocks(format=format, read=partial(_read, packed, parts, symmetric=format.symmetric))
    return Given(label=packed.label, blocks=found)


def _read(packed: PackedBlocks, parts: Sequence[WeightSource], *, symmetric: bool) -> Blocks:
    each = [_rows(packed.read(part.parameter), part, symmetric=symmetric) for part in parts]
    return Blocks(
        packed=np.concatenate([blocks.packed for blocks in each]),
        scales=np.concatenate([blocks.scales for blocks in each]),
        zero_points=None if symmetric else np.concatenate([blocks.zero_points for blocks in each if blocks.zero_points is not None]),
    )


def _rows(blocks: Blocks, part: WeightSource, *, symmetric: bool) -> Blocks:
    """The outputs that ``part`` means, with zero points unless all are ``symmetric``."""
    points = blocks.zero_points
    if points is None and not symmetric:
        outputs, count = blocks.scales.shape
        points = np.full((outputs, -(-count // 2)), NO_POINTS, np.uint8)
    rows = slice(part.start, part.stop)
    return Blocks(packed=blocks.packed[rows], scales=blocks.scales[rows], zero_points=None if points is None else points[rows])

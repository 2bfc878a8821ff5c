"""The integers that stand beside a dequantized checkpoint, in MatMulNBits' blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from calibration.settings import BlockFormat, QuantizationSettings
from reft_export.base.packed.scheme import BITS
from runtimes.errors import CalibrationError, InputError
from runtimes.files.records import read_json_object

if TYPE_CHECKING:  # which comes with onnx: a base is opened without
    from calibration.weight_only import Blocks

ORIGIN, PACKED = "quantized.json", "quantized.safetensors"
PARTS = ("packed", "scales", "zero_points")
"""Ends of the names in PACKED, after a parameter's: the fields of ``Blocks``."""


class PackedBlocks(NamedTuple):
    """The integers of a base's weights. ``formats``: by parameter [N, K], of those that blocks can hold."""

    label: str
    formats: Mapping[str, BlockFormat]
    without: tuple[str, ...]
    """Quantized parameters that no blocks of MatMulNBits can hold."""
    path: Path

    def read(self, parameter: str) -> Blocks:
        from safetensors import safe_open

        from calibration.weight_only import Blocks

        with safe_open(self.path, "np") as file:
            packed, scales = (file.get_tensor(f"{parameter}.{part}") for part in PARTS[:2])
            points = None if self.formats[parameter].symmetric else file.get_tensor(f"{parameter}.{PARTS[2]}")
        return Blocks(packed=packed, scales=scales, zero_points=points)


def packed_blocks(folder: Path) -> PackedBlocks | None:
    """Of a base's folder that ``plain_folder`` made; None of any other."""
    if not (folder / ORIGIN).is_file():
        return None
    origin = read_json_object(folder / ORIGIN, InputError)
    formats = {
        name: BlockFormat(bits=BITS, block_size=each["block_size"], symmetric=each["symmetric"]) for name, each in origin["weights"].items()
    }
    return PackedBlocks(origin["label"], formats, tuple(origin["without"]), folder / PACKED)


def check_given(folder: Path, settings: QuantizationSettings) -> None:
    """Raises CalibrationError for integers of a base that no blocks hold, where they are to be kept."""
    packed = packed_blocks(folder) if settings.keep_given else None
    if packed is not None and packed.without:
        raise CalibrationError(
            f"{len(packed.without)} of {len(packed.without) + len(packed.formats)} weights of {packed.label} are in groups that int4 "
            f"blocks cannot hold, first {packed.without[0]}: ordered by activation (desc_act), or no multiple of 16; pass a checkpoint "
            "without desc_act, or --method imatrix, which quantizes them again"
        )

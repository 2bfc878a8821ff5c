"""The calibration file: histograms of every activation, for the base and each adapter apart, and what they are of.

One .npz, written atomically every few prompts: a run that was interrupted goes on from it, and a complete one serves any mixture, observer
and scheme with fixed ranges. ``header`` is JSON (``Header``), ``counts.<source>`` int64 [tensors, bins], ``limits.<source>`` float64
[tensors, 3] (limit, low, high), in the order of ``header.tensors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration.histogram import BINS, Histogram
from runtimes.errors import CalibrationError
from runtimes.files.records import RecordError, from_json, parse_json, to_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """``done`` of ``prompts`` prompts are in; ``tokens`` of all sources together."""

    format: int = FORMAT
    graph: str
    """Digest of the float bundle."""
    adapters: dict[str, str]
    """sha256 of each adapter's banks."""
    data: str
    """sha256 of the prompts' file."""
    decode_tokens: int
    sources: tuple[str, ...]
    tensors: tuple[str, ...]
    prompts: int
    done: int = 0
    tokens: int = 0

    @property
    def complete(self) -> bool:
        return self.done == self.prompts

    def same_run(self, other: Header) -> bool:
        return replace(self, done=0, tokens=0) == replace(other, done=0, tokens=0)


@dataclass(kw_only=True, eq=False)
class Collected:
    header: Header
    histograms: dict[str, dict[str, Histogram]]
    """By source ("base" or an adapter's name) and value."""

    @classmethod
    def empty(cls, header: Header) -> Collected:
        return cls(header=header, histograms={s: {t: Histogram.empty() for t in header.tensors} for s in header.sources})

    def digest(self) -> str:
        """sha256 over everything in it."""
        digest = hashlib.sha256(json.dumps(to_json(self.header), sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Replaces ``path`` in one step."""
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            arrays = {"header": np.array(json.dumps(to_json(self.header))), **self._arrays()}
            # numpy's stub takes one of the arrays for its allow_pickle.
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {}
        for source, histograms in self.histograms.items():
            ordered = [histograms[name] for name in self.header.tensors]
            arrays[f"counts.{source}"] = np.stack([h.counts for h in ordered])
            arrays[f"limits.{source}"] = np.array([(h.limit, h.low, h.high) for h in ordered])
        return arrays


def load_collected(path: Path) -> Collected:
    """Raises CalibrationError for a file that is missing, damaged, of another version, or holds what no run writes."""
    if not path.is_file():
        raise CalibrationError(f"{path} is not a file; ranges are written by `reft-export quantize --calibrate`")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            header = from_json(Header, parse_json(str(arrays["header"])))
            histograms = {}
            for source in header.sources:
                counts, limits = arrays[f"counts.{source}"], arrays[f"limits.{source}"]
                _check(counts, limits, header, path)
                histograms[source] = {
                    name: Histogram(counts=counts[i].copy(), limit=float(limits[i, 0]), low=float(limits[i, 1]), high=float(limits[i, 2]))
                    for i, name in enumerate(header.tensors)
                }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, RecordError) as e:
        raise CalibrationError(f"{path} is not a calibration file of this version, or is damaged ({e}); calibrate again") from None
    return Collected(header=header, histograms=histograms)


def _check(counts: np.ndarray, limits: np.ndarray, header: Header, path: Path) -> None:
    tensors = len(header.tensors)
    if header.format != FORMAT or counts.shape != (tensors, BINS) or limits.shape != (tensors, 3) or counts.dtype != np.int64:
        raise ValueError("other shapes than its header says")
    if not header.done:
        return
    bad = ~np.isfinite(limits).all(1) | (limits[:, 1] > limits[:, 2]) | (counts.min(1) < 0) | (counts.sum(1) == 0)
    if bad.any():
        index = int(bad.argmax())
        raise CalibrationError(
            f"{path}: the range of {header.tensors[index]} is [{limits[index, 1]}, {limits[index, 2]}], which no run collects; "
            "calibrate again"
        )

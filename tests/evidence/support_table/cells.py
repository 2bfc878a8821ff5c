"""One cell of the table: a family, through one exporter, at one precision, by the real ``export`` and ``quantize``."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from models import bases
from models.adapters import random_adapter, random_head
from models.classifiers import CLASSIFIERS, save_classifier

from calibration.settings import QuantizationSettings, settings_for
from reft_export.base.load import load_base
from reft_export.bundling.result import ExportResult
from reft_export.eager.steering import site_module
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.quantizing.quantize import quantize_bundle
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import GraphError, InputError, ParityError, ReftError
from runtimes.parity.figures import ParityReport

LAYERS = 2
STREAMS = ("block_output", "attention_output", "mlp_output")
EXPORTED = ("fp32", "fp16", "bf16")
QUANTIZED = ("int8", "int4", "qdq-int4")
DTYPES = (*EXPORTED[:1], *QUANTIZED, *EXPORTED[1:])
"""In the order they are run: what is quantized starts from the fp32 bundle."""
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "optimum-onnx")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``outcome``: ok; structure (written, but no CPU runs it); wrong (stopped by the parity gate); refused; crashed (a defect of ours)."""

    family: str
    route: str
    dtype: str
    outcome: str
    relative: float | None = None
    """Largest |logit - eager logit| over the largest |eager logit|: the worst of base and adapters, in every layout of the gate."""
    reason: str = ""
    streams: tuple[str, ...] = ()
    """Where the adapters' edits stood."""
    missing: str = ""
    """Why not at all of STREAMS."""
    target: str = "onnxruntime"
    """What the graph was exported for; the table runs the default."""
    cache: str = ""
    """How a decoder's KV cache grows: in place, or copied."""
    copied: str = ""
    """Why copied, where the target would rather have it in place."""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.family, self.route, self.dtype


def run_family(family: str, route: str, dtypes: Sequence[str], on_cell: Callable[[Cell], None]) -> None:
    """Runs the cells of one family and route; each is handed on as soon as it is done."""
    with tempfile.TemporaryDirectory(prefix="reft-support-") as scratch, _quiet():
        _Family(family, route, Path(scratch), on_cell).run(dtypes)


class _Family:
    """The random base of a family, its adapters, and the fp32 bundle that is quantized."""

    def __init__(self, family: str, route: str, folder: Path, on_cell: Callable[[Cell], None]) -> None:
        self.family, self.route, self.folder, self.on_cell = family, route, folder, on_cell
        self.streams: tuple[str, ...] = STREAMS
        self.missing = ""
        self.cache = self.copied = ""

    def run(self, dtypes: Sequence[str]) -> None:
        try:
            save = save_classifier if self.family in CLASSIFIERS else bases.save_base
            save(self.folder / "base", self.family, layers=LAYERS)
            self._narrow_to_modules()
        except ReftError as e:
            for dtype in dtypes:
                self._done(dtype, "refused", reason=self._words(e))
            return
        exported = self._cell("fp32", lambda: self._export("fp32"), told="fp32" in dtypes)
        for dtype in [dtype for dtype in DTYPES if dtype in dtypes and dtype != "fp32"]:
            if exported.outcome != "ok":  # the same graph at another precision
                self._done(dtype, exported.outcome, relative=exported.relative, reason=exported.reason)
            elif dtype in QUANTIZED:
                self._cell(dtype, lambda dtype=dtype: self._quantize(dtype))
            else:
                self._cell(dtype, lambda dtype=dtype: self._export(dtype))

    def _narrow_to_modules(self) -> None:
        model = load_base(self.folder / "base").model
        found = []
        for stream in self.streams:
            try:
                site_module(model, Site(layer=0, stream=stream))
                found.append(stream)
            except InputError as e:
                if stream == "block_output":
                    raise
                self.missing = str(e)
        self.streams = tuple(found)

    def _export(self, dtype: str) -> ExportResult:
        settings = ExportSettings(exporter=self.route, precision=dtype)
        model, output = str(self.folder / "base"), self.folder / dtype
        try:
            return export_bundle(model, self._adapters(), output, settings, report=lambda _: None)
        except GraphError as e:
            if self.streams == ("block_output",):
                raise
            self.streams, self.missing = ("block_output",), self._words(e)
        return export_bundle(model, self._adapters(), output, settings, report=lambda _: None)

    def _quantize(self, dtype: str) -> ExportResult:
        return quantize_bundle(
            self.folder / "fp32", str(self.folder / "base"), self.folder / dtype, quantization(dtype), report=lambda _: None
        )

    def _adapters(self) -> list[Path]:
        """LoReFT at every stream, tied, and untied at the block outputs alone; for a classifier also RED there, and heads with two of them.

        Decoders go without RED: their recorded figures are those of these two.
        """
        base = load_base(self.folder / "base")
        sites = [Site(layer=layer, stream=stream) for stream in self.streams for layer in range(LAYERS)]
        adapters: dict[str, Adapter] = {
            "tied": random_adapter(base.info, sites),
            "untied": random_adapter(base.info, sites[:LAYERS], tied=False, positions="f1+l3", seed=1),
        }
        if self.family in CLASSIFIERS:
            adapters["red"] = random_adapter(base.info, sites[:LAYERS], method="red", positions="prompt", seed=2)
            for seed, name in enumerate(("tied", "red")):
                adapters[name] = replace(adapters[name], head=random_head(base.model, seed))
        for name, adapter in adapters.items():
            save_adapter(adapter, self.folder / name, force=True)
        return [self.folder / name for name in adapters]

    def _cell(self, dtype: str, make: Callable[[], ExportResult], *, told: bool = True) -> Cell:
        try:
            result = make()
        except ParityError as e:
            return self._done(dtype, "wrong", relative=_worst(e.report, dtype), reason=self._words(e), told=told)
        except ReftError as e:
            return self._done(dtype, "refused", reason=self._words(e), told=told)
        except Exception as e:  # a traceback that a user would see; the table is there to show it
            return self._done(dtype, "crashed", reason=f"{type(e).__name__}: {self._words(e)}", told=told)
        self._note_cache(result)
        if result.parity is None:
            return self._done(dtype, "structure", told=told)
        return self._done(dtype, "ok", relative=_worst(result.parity, dtype), told=told)

    def _note_cache(self, result: ExportResult) -> None:
        """A quantized bundle has the cache of its float one."""
        if result.manifest.task != TEXT_GENERATION or result.manifest.quantization is not None:
            return
        self.cache = "in place" if result.manifest.padding == "none" else "copied"
        self.copied = result.note.partition("; ")[0] if self.cache == "copied" else ""

    def _done(self, dtype: str, outcome: str, *, relative: float | None = None, reason: str = "", told: bool = True) -> Cell:
        cell = Cell(
            family=self.family,
            route=self.route,
            dtype=dtype,
            outcome=outcome,
            relative=relative,
            reason=reason,
            streams=self.streams if outcome in ("ok", "structure") else (),
            missing=self.missing if outcome in ("ok", "structure") else "",
            cache=self.cache if outcome in ("ok", "structure") else "",
            copied=self.copied if outcome in ("ok", "structure") else "",
            date=datetime.date.today().isoformat(),
            versions=versions(),
        )
        if told:
            self.on_cell(cell)
        return cell

    def _words(self, error: Exception) -> str:
        """One line, without this run's temporary folder."""
        line = " ".join(str(error).split()).replace(f"{self.folder}/", "")
        return re.sub(r"; no bundle was written.*|\.[\w-]+\.\w+\.partial/", "", line)[:300]


def quantization(dtype: str) -> QuantizationSettings:
    """The scheme behind a column of the table."""
    return settings_for("qdq-int4") if dtype == "qdq-int4" else settings_for("weight-only", int(dtype.removeprefix("int")))


def versions() -> dict[str, str]:
    """Of the packages that decide what a graph says; those that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _worst(report: ParityReport, dtype: str) -> float:
    """int8 and int4 by their exact rungs, at accuracy level 1: at level 4 the product itself rounds its inputs."""
    exact = [rung for rung in report.rungs if "level 1" in rung.name]
    return max(rung.figures.max_relative for rung in (exact if dtype in QUANTIZED and exact else report.rungs))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' warnings about random weights and short configs tell nothing here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()

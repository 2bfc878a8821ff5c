"""What can be asked of a quantization beside the weights' own settings; what cannot be is refused here, before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from calibration.observers import Observer
from calibration.settings import SCHEMES, QuantizationSettings, check_source
from reft_export.evaluation.quantization_report import Yardsticks
from reft_export.parity.quality import QualityGate
from reft_export.tasks.probe_rows import probe_rows, probe_texts
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.positions import needs_marks
from runtimes.errors import CalibrationError, InputError

ONE_SOURCE = "pass --calibrate DATA.jsonl or --ranges FILE, not both; neither is the probes of the bundle's adapters"
OBJECTIVES = ("teacher", "data")
REMEDY = "a refit that goes too far: try fewer --refit-steps or a lower --refit-lr; or the quantization itself, without --refit"
"""Where a refitted bundle misses its budget."""


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """``data``: prompts to run, in the form of training data; ``ranges``: the file of an earlier run. Neither: the adapters' own probes.

    ``mixture``: how much the base and each adapter count; empty is all alike. ``decode_tokens``: greedy tokens after each prompt.
    """

    data: Path | None = None
    ranges: Path | None = None
    mixture: Mapping[str, float] = field(default_factory=dict)
    observer: Observer = Observer()
    decode_tokens: int = 16

    def __post_init__(self) -> None:
        if self.data is not None and self.ranges is not None:
            raise CalibrationError(ONE_SOURCE)
        if not 0 <= self.decode_tokens <= 1024:
            raise CalibrationError(f"--decode-tokens {self.decode_tokens}: expected 0 to 1024")

    @property
    def of_probes(self) -> bool:
        return self.data is None and self.ranges is None


@dataclass(frozen=True, kw_only=True)
class RefitSettings:
    """``sources``: folders of the adapters to refit; ``data``: JSONL as for training; None: each adapter's own probes."""

    data: Path | None
    sources: tuple[Path, ...]
    steps: int = 40
    lr: float = 1e-3
    """High rates forget more than quantization took: AdamW's first steps are as long as the rate, however small the gradient."""
    batch_size: int = 8
    objective: str = "teacher"
    output: Path | None = None
    """Where the refitted adapters' folders go; None: <the bundle's output>.adapters."""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"--refit-objective {self.objective!r} is unknown; known: {', '.join(OBJECTIVES)}")
        if self.steps < 1 or self.batch_size < 1 or not 0 < self.lr < float("inf"):
            raise InputError(f"a refit takes at least one step and a positive rate, not {self.steps} steps at {self.lr:g}")
        if not self.sources:
            raise InputError(
                "a bundle holds folded adapters, which cannot be trained; name the folders of those to refit with --adapter (-a)"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """Everything that ``quantize_bundle`` is asked for, but where from and where to."""

    settings: QuantizationSettings
    calibration: CalibrationRequest | None = None
    refit: RefitSettings | None = None
    yardsticks: Yardsticks = Yardsticks()
    compare: bool = False
    mixed: bool = False
    budget_mb: float | None = None
    quality: QualityGate = QualityGate()
    adapters: tuple[Path, ...] = ()
    """Folders of the bundle's adapters: those that lose too much may be trained on the quantized weights."""
    accept_base: bool = False


def check_bundle(bundle: Bundle, settings: QuantizationSettings, request: CalibrationRequest | None) -> None:
    """Everything about bundle and request that can be refused before a model is loaded."""
    m = bundle.manifest
    check_source(
        settings,
        quantized=None if m.quantization is None else m.quantization.bits,
        precision=m.precision,
        opset=m.opset,
        where=str(bundle.folder),
    )
    if settings.cache != "float" and m.kv_cache != "in-place":
        raise CalibrationError(
            f"--cache {settings.cache} is of graphs with GroupQueryAttention, and {bundle.folder} has a KV cache that is {m.kv_cache}; "
            "leave it out, or export the bundle with --target onnxruntime"
        )
    check_request(request, settings, bundle)


def check_request(request: CalibrationRequest | None, settings: QuantizationSettings, bundle: Bundle) -> None:
    """Raises CalibrationError where a scheme needs ranges and gets none, or takes none and gets some, and for an unknown source."""
    static = settings.kind.activations == "static"
    if static and (request is None or request.of_probes) and not has_probes(bundle):
        raise CalibrationError(
            f"--scheme {settings.scheme} fixes the ranges of activations, and {bundle.folder} has no adapter with probes to measure "
            "them on; pass --calibrate DATA.jsonl, or --ranges of an earlier run"
        )
    if request is None:
        return
    if not static:
        fixed = ", ".join(name for name, s in SCHEMES.items() if s.activations == "static")
        raise CalibrationError(f"--scheme {settings.scheme} takes no activation ranges; leave out --calibrate and --ranges, or use {fixed}")
    known = (BASE_GOLDEN, *bundle.adapter_names)
    for name, share in request.mixture.items():
        if name not in known:
            raise CalibrationError(f"--mixture names {name!r}; {bundle.folder} has {', '.join(known)}")
        if not 0 <= share < float("inf"):
            raise CalibrationError(f"--mixture {name}={share:g}: a share is a number from 0 on")
    if request.mixture and not any(request.mixture.values()):
        raise CalibrationError("--mixture leaves nothing to calibrate on: every share is 0")


def has_probes(bundle: Bundle) -> bool:
    return any(probe_rows(bundle, name) or probe_texts(bundle, name) for name in bundle.adapter_names)


def check_task(bundle: Bundle, *, refit: bool, generates: bool, checks: bool) -> None:
    """Raises CalibrationError where a classifier is asked for what only decoders have; and, before hours of work, for a checker whose
    prompts some adapter could not answer."""
    if bundle.manifest.task == TEXT_CLASSIFICATION and (refit or generates):
        what = "--refit trains adapters on completions" if refit else "--perplexity and --checker read generated text"
        advice = "train on its weights with `reft-export train --base`" if refit else "leave them out"
        raise CalibrationError(f"{what}, and {bundle.folder} is a classifier; {advice}")
    for name in bundle.adapter_names if checks else ():
        if needs_marks(bundle.adapter_record(name).where):
            raise CalibrationError(
                f"--checker asks every adapter of {bundle.folder}, and {name} is at positions marked, which are not read here; leave it out"
            )

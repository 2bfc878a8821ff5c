"""What quantization did to the model and to its steering, variant by variant: the float bundle, the quantized one, the refitted one.

Every figure is taken on the exported graph in onnxruntime, by the session that ``run`` uses:

    perplexity   runtimes/parity/perplexity.py's, of a given text, for the base and under each adapter
    delta        cosine and norm ratio of (steered - base) logits against the float32 eager model's, on the golden inputs
    KL           mean KL(float32 eager, steered || steered here) over the golden positions, in nats
    success      the checker's mean score of greedy answers (reft_export/evaluation/checker.py)
    agreement    of the float bundle's steered answers, the share of tokens that the variant would choose too, given all before them

A refitted adapter is held to the float32 model steered by the adapter that it was refitted from: did it give back what was lost?
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.console import count, size
from reft_export.evaluation.checker import CheckedTask
from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE
from runtimes.errors import InputError
from runtimes.files.placed import place, placed
from runtimes.files.records import to_json
from runtimes.golden import steering_figures
from runtimes.parity.figures import Delta, Figures, ParityReport
from runtimes.parity.perplexity import agreement, perplexity
from runtimes.session import Session
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # it brings onnx, and a refusal comes before any graph is read
    from calibration.weights import WeightError

Answers = Mapping[str, Sequence[Sequence[int]]]
"""The float bundle's steered answers, as tokens, by adapter."""


@dataclass(frozen=True, kw_only=True)
class Yardsticks:
    """What variants are measured with beyond their golden arrays; both are optional."""

    text: str | None = None
    task: CheckedTask | None = None


@dataclass(frozen=True, kw_only=True)
class Steering:
    """One adapter in one variant."""

    adapter: str
    delta: Delta
    figures: Figures
    """Steered logits against the float32 eager model's."""
    perplexity: float | None = None
    success: float | None = None
    agreement: float | None = None

    @property
    def shown(self) -> Delta | None:
        """The delta; None where the adapter moves no logit here nor in the float32 model, so that there is none."""
        return self.delta if self.delta.moved else None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One bundle, or one bundle before a refit. ``size``: bytes of the graph and its weights."""

    name: str
    size: int
    perplexity: float | None
    success: float | None
    """Of the base."""
    steering: tuple[Steering, ...]


@dataclass(frozen=True, kw_only=True)
class RefitFigures:
    """The refit's own loss over its data, before and after; ``kept``: it did not fall, and the adapter stayed as it was."""

    adapter: str
    objective: str
    before: float
    after: float
    steps: int
    kept: bool


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    bundle: str
    variants: tuple[Variant, ...]
    weights: tuple[WeightError, ...] = ()
    refits: tuple[RefitFigures, ...] = ()
    checker: str | None = None
    parity: ParityReport | None = field(default=None)

    HEADER = ("bundle", "size", "adapter", "ppl", "steered ppl", "delta cos", "delta norm", "KL", "agree", "base", "success")

    def rows(self) -> list[tuple[str, ...]]:
        """One row per variant and adapter under HEADER; a figure that was not asked for is empty."""
        rows = []
        for v in self.variants:
            for s in v.steering or (None,):
                rows.append(
                    (
                        v.name,
                        size(v.size),
                        "" if s is None else s.adapter,
                        _figure(v.perplexity, "{:.3f}"),
                        _figure(s and s.perplexity, "{:.3f}"),
                        _figure(s and s.shown and s.shown.cosine, "{:.4f}"),
                        _figure(s and s.shown and s.shown.norm_ratio, "{:.3f}"),
                        _figure(s and s.figures.kl, "{:.4f}"),
                        _figure(s and s.agreement, "{:.1%}"),
                        _figure(v.success, "{:.0%}"),
                        _figure(s and s.success, "{:.0%}"),
                    )
                )
        return rows

    def to_json(self) -> str:
        content: dict[str, Any] = {"bundle": self.bundle, "checker": self.checker}
        content |= {name: to_json(getattr(self, name)) for name in ("variants", "refits", "weights")}
        content["parity"] = None if self.parity is None else json.loads(self.parity.to_json())
        return json.dumps(content, indent=1, allow_nan=False)


def measure(
    name: str, bundle: Bundle, yardsticks: Yardsticks, reference: Answers | None, report: Callable[[str], None]
) -> tuple[Variant, Answers]:
    """(the bundle's figures, its steered answers by adapter); ``reference``: the float bundle's answers, for ``agreement``."""
    from runtimes.open import ort_session

    session = ort_session(bundle)
    answers: dict[str, Sequence[Sequence[int]]] = {}
    steering = []
    for adapter in bundle.adapter_names:
        figures, delta = steering_figures(bundle, session, adapter)  # leaves the adapter on
        told, answers[adapter] = _told(bundle, session, yardsticks, None if reference is None else reference[adapter], report)
        steering.append(
            Steering(
                adapter=adapter, delta=delta, figures=figures, perplexity=told.perplexity, success=told.success, agreement=told.agreement
            )
        )
    session.set_adapter(None)
    told, _ = _told(bundle, session, yardsticks, None, report)
    variant = Variant(
        name=name,
        size=sum(bundle.manifest.files[f].size for f in (GRAPH_FILE, DATA_FILE) if f in bundle.manifest.files),
        perplexity=told.perplexity,
        success=told.success,
        steering=tuple(steering),
    )
    return variant, answers


@dataclass(frozen=True, kw_only=True)
class _Told:
    """By the yardsticks, of the session's active adapter."""

    perplexity: float | None = None
    success: float | None = None
    agreement: float | None = None


def _told(
    bundle: Bundle,
    session: Session,
    yardsticks: Yardsticks,
    reference: Sequence[Sequence[int]] | None,
    report: Callable[[str], None],
) -> tuple[_Told, Sequence[Sequence[int]]]:
    """What is asked for, and the answers to the task's prompts; ``reference``: the float bundle's, for ``agreement``."""
    if yardsticks == Yardsticks():
        return _Told(), []
    tokenizer, task = Tokenizer.load(bundle.folder, bundle.manifest.model), yardsticks.task
    who = session.adapter or "the base"
    said = task.answer(bundle, session, lambda done, of: count(report, f"{who} answered {done} of {of} prompts", done, of)) if task else []
    told = _Told(
        perplexity=None if yardsticks.text is None else perplexity(session, tokenizer, yardsticks.text),
        success=task.success([answer.text.strip() for answer in said]) if task else None,
        agreement=_agreement(bundle, session, tokenizer, task, reference) if task and reference is not None else None,
    )
    return told, [answer.tokens for answer in said]


class Measurements:
    """Variants in the order in which they were measured. The answers of one are what later ones' are held to, where it is the float one."""

    def __init__(self, yardsticks: Yardsticks, report: Callable[[str], None] = lambda _: None) -> None:
        self._yardsticks, self._report = yardsticks, report
        self._reference: Answers | None = None
        self.variants: list[Variant] = []

    @property
    def wanted(self) -> bool:
        """Whether more is asked for than the golden arrays tell."""
        return self._yardsticks != Yardsticks()

    def add(self, name: str, bundle: Bundle) -> None:
        variant, answers = measure(name, bundle, self._yardsticks, self._reference, self._report)
        self.variants.append(variant)
        if bundle.manifest.quantization is None:
            self._reference = answers

    def report(self, output: Path, **more: Any) -> QuantizationReport:
        task = self._yardsticks.task
        return QuantizationReport(bundle=str(output), variants=tuple(self.variants), checker=None if task is None else task.name, **more)


def write_reports(report: QuantizationReport, output: Path) -> tuple[Path, Path]:
    """<output>.quantization.json and .png beside the bundle, which holds only what a device needs."""
    from reft_export.evaluation.quantization_plot import plot

    paths = output.with_name(f"{output.name}.quantization.json"), output.with_name(f"{output.name}.quantization.png")
    place(paths[0], f"{report.to_json()}\n".encode())
    with placed(paths[1]) as picture:
        plot(report, picture)
    return paths


def read_text(path: Path) -> str:
    """The text that perplexity is taken of; InputError for what cannot be read as one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--perplexity {path} cannot be read as UTF-8 text: {e}") from None
    if not text.strip():
        raise InputError(f"--perplexity {path} holds no text")
    return text


def trimmed(report: QuantizationReport) -> tuple[list[str], list[list[str]]]:
    """(header, rows) without the columns in which no row has a figure, nor the adapter's where there is one only."""
    rows = report.rows()
    one = len({s.adapter for v in report.variants for s in v.steering}) < 2
    keep = [i for i, name in enumerate(report.HEADER) if any(row[i] for row in rows) and not (one and name == "adapter")]
    return [report.HEADER[i] for i in keep], [[row[i] for i in keep] for row in rows]


def variant_name(bundle: Artifact) -> str:
    q = bundle.manifest.quantization
    if q is None:
        return bundle.manifest.precision
    return f"int{q.bits}" if q.scheme == "weight-only" else q.scheme


def _agreement(bundle: Bundle, session: Session, tokenizer: Tokenizer, task: CheckedTask, answers: Sequence[Sequence[int]]) -> float:
    pairs = zip(task.encoded(bundle, tokenizer, session.adapter), answers, strict=True)
    counted = [agreement(session, [*prompt, *answer], len(prompt)) for prompt, answer in pairs]
    return sum(hits for hits, _ in counted) / sum(count for _, count in counted)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

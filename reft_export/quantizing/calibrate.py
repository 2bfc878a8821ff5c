"""Activation ranges for a bundle: from prompts, run with the edits on, or from the calibration file of an earlier run.

The file lies beside the output, ``<output>.calibration``: an interrupted run goes on from it, and ``--ranges`` uses it again. With it go
``<output>.calibration.json`` and ``.png``: how the steered ranges differ from those of the base alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from calibration.activations import ACTIVATION_OF
from calibration.collect import collect, expose_inputs, product_inputs
from calibration.collected import Collected, Header, load_collected
from calibration.comparison import compare_with_base
from calibration.observers import Observer
from calibration.quantize import Ranges
from calibration.settings import SCHEMES, QuantizationSettings
from graph_passes.external import load_graph
from reft_export.base.dequantized import expert_matrices
from reft_export.base.load import load_tokenizer, outline_base
from reft_export.bundling.files import Report
from reft_export.parity.changed_bundle import variant
from reft_export.parity.ladder import check_same_base
from reft_export.quantizing.calibration_report import write_report
from reft_export.training.data import iter_examples
from reft_export.training.labelled_data import load_labelled
from runtimes.artifacts.bundle import BASE_GOLDEN, Bundle, CalibrationRecord
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.errors import CalibrationError, InputError
from runtimes.files.hashes import sha256_of
from runtimes.open import ort_session


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """``data``: prompts to run, in the form of training data; ``ranges``: the file of an earlier run. Exactly one of the two.

    ``mixture``: how much the base and each adapter count; empty is all alike. ``decode_tokens``: greedy tokens after each prompt.
    """

    data: Path | None = None
    ranges: Path | None = None
    mixture: Mapping[str, float] = field(default_factory=dict)
    observer: Observer = Observer()
    decode_tokens: int = 16

    def __post_init__(self) -> None:
        if (self.data is None) == (self.ranges is None):
            raise CalibrationError("pass --calibrate DATA.jsonl or --ranges FILE, one of the two")
        if not 0 <= self.decode_tokens <= 1024:
            raise CalibrationError(f"--decode-tokens {self.decode_tokens}: expected 0 to 1024")


def check_request(request: CalibrationRequest | None, settings: QuantizationSettings, bundle: Bundle) -> None:
    """Raises CalibrationError where a scheme needs ranges and gets none, or takes none and gets some, and for an unknown source."""
    static = settings.kind.activations == "static"
    if static and request is None:
        raise CalibrationError(
            f"--scheme {settings.scheme} fixes the ranges of activations; pass --calibrate DATA.jsonl (prompts to measure them on), "
            "or --ranges of an earlier run"
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


def steered_ranges(
    bundle: Bundle, settings: QuantizationSettings, model: str, output: Path, request: CalibrationRequest, report: Report
) -> tuple[Ranges, Ranges, CalibrationRecord]:
    """(ranges of every quantizable product's input, what they would be of the base alone, where they came from). Writes the report beside
    ``output``."""
    state = output.with_name(f"{output.name}.calibration")
    if request.ranges is not None:
        collected = reusable(load_collected(request.ranges), request.ranges, bundle)
    else:
        collected = _collected(bundle, model, state, request, report)
    mixture = shares(request.mixture, collected.header)
    kind, observer = ACTIVATION_OF[settings.scheme], request.observer
    report(f"choosing ranges ({observer})")
    ranges = {
        name: observer.range([(share, collected.histograms[source][name]) for source, share in mixture.items()], kind)
        for name in collected.header.tensors
    }
    rows = compare_with_base(collected, mixture, observer, kind, ranges)
    write_report(output, rows, load_graph(bundle.graph_path), mixture, str(observer))
    h = collected.header
    record = CalibrationRecord(
        ranges=collected.digest(),
        graph=h.graph,
        data=h.data,
        observer=str(observer),
        mixture=mixture,
        prompts=h.prompts,
        tokens=h.tokens,
    )
    return ranges, {row.name: row.base for row in rows}, record


def shares(mixture: Mapping[str, float], header: Header) -> dict[str, float]:
    """The sources that count, by shares that add up to 1. Raises CalibrationError for one that was not collected."""
    wanted = {name: share for name, share in mixture.items() if share} or dict.fromkeys(header.sources, 1.0)
    if missing := [name for name in wanted if name not in header.sources]:
        raise CalibrationError(f"--mixture names {missing[0]}, which the ranges were not collected with; calibrate again")
    whole = sum(wanted.values())
    return {name: share / whole for name, share in wanted.items()}


def reusable(collected: Collected, path: Path, bundle: Bundle) -> Collected:
    """Raises CalibrationError for ranges of another graph or other adapters, and for those of a run that did not end."""
    h = collected.header
    if h.graph != bundle.digest:
        raise CalibrationError(
            f"{path} holds ranges of another graph (digest {h.graph[:12]}, {bundle.folder} has {bundle.digest[:12]}); they are stale: "
            "calibrate this bundle with --calibrate"
        )
    for name, digest in h.adapters.items():
        if banks_digest(bundle, name) != digest:
            raise CalibrationError(f"{path} was collected with another adapter {name} than the one in {bundle.folder}; calibrate again")
    if not h.complete:
        raise CalibrationError(f"{path} is of a run that ended after {h.done} of {h.prompts} prompts; finish it with --calibrate")
    return collected


def banks_digest(bundle: Bundle, name: str) -> str | None:
    record = bundle.manifest.files.get(f"adapters/{name}.onnx_adapter")
    return None if record is None else record.sha256


def _collected(bundle: Bundle, model: str, state: Path, request: CalibrationRequest, report: Report) -> Collected:
    report(f"reading {request.data}")
    base = outline_base(model)
    check_same_base(bundle, base, model)
    tokenizer = load_tokenizer(base.folder)
    classifies = bundle.manifest.task == TEXT_CLASSIFICATION
    decode_tokens = 0 if classifies else request.decode_tokens
    room = bundle.manifest.model.context_length - decode_tokens

    def prompts() -> Iterator[Any]:
        if classifies:
            labelled = load_labelled(request.data, tokenizer, bundle.manifest.labels, max_length=room)
            yield from (example.text for example in labelled.examples)
            return
        stop = bundle.manifest.model.eos_token_ids
        for example in iter_examples(request.data, tokenizer, max_length=room, stop_tokens=stop):
            yield example.input_ids[: example.prompt_length]

    try:
        count = sum(1 for _ in prompts())
    except InputError as e:
        raise CalibrationError(f"--calibrate: {e}") from None
    experts = expert_matrices(bundle.manifest.weights)
    # A source with share 0 is not run. The base always is: the report compares with it.
    asked = [name for name in bundle.adapter_names if request.mixture.get(name, 0) or not request.mixture]
    header = Header(
        graph=bundle.digest,
        adapters={name: banks_digest(bundle, name) for name in asked},
        data=sha256_of(request.data),
        decode_tokens=decode_tokens,
        sources=(BASE_GOLDEN, *asked),
        tensors=product_inputs(load_graph(bundle.graph_path), experts),
        prompts=count,
    )
    collected = _resumed(header, state, report)
    if collected.header.complete:
        return collected
    with variant(bundle, partial(expose_inputs, float_inputs=experts)) as exposed:
        session = ort_session(exposed)
        report(f"calibrating on {count} prompts: {', '.join(header.sources)}")
        update = getattr(report, "update", None)

        def on_prompt(done: int) -> None:
            if update:
                update(f"calibrating: {done} of {count} prompts, {', '.join(header.sources)}", done, count)

        return collect(session, prompts(), collected, state, on_prompt=on_prompt)


def _resumed(header: Header, state: Path, report: Report) -> Collected:
    """What an earlier run of the same kind left in ``state``; a file of another run is written over, and said so."""
    if not state.is_file():
        return Collected.empty(header)
    try:
        earlier = load_collected(state)
    except CalibrationError as e:
        report(f"starting anew: {e}")
        return Collected.empty(header)
    if not earlier.header.same_run(header):
        report(f"starting anew: {state} is of other data, adapters or settings")
        return Collected.empty(header)
    report(f"going on from {state}: {earlier.header.done} of {header.prompts} prompts are in")
    return earlier

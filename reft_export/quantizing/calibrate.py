"""Activation ranges for a bundle: from prompts (the adapters' probes, or a file's), run with the edits on, or from an earlier run's file.

The file lies beside the output, ``<output>.calibration``: an interrupted run goes on from it, and ``--ranges`` uses it again. With it go
``<output>.calibration.json`` and ``.png``: how the steered ranges differ from those of the base alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from calibration.activations import ACTIVATION_OF
from calibration.collect import collect, expose_inputs, product_inputs
from calibration.collected import Collected, Header, load_collected
from calibration.comparison import compare_with_base
from calibration.quantize import Ranges
from calibration.settings import QuantizationSettings
from graph_passes.external import load_graph
from reft_export.base.dequantized import expert_matrices
from reft_export.base.load import load_tokenizer, outline_base
from reft_export.bundling.files import Report
from reft_export.console import count
from reft_export.parity.changed_bundle import variant
from reft_export.parity.ladder import check_same_base
from reft_export.quantizing.calibration_report import write_report
from reft_export.quantizing.settings import CalibrationRequest
from reft_export.tasks.probe_rows import probe_rows, probe_texts
from reft_export.training.data import iter_examples
from reft_export.training.labelled_data import load_labelled
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.manifest import CalibrationRecord, Manifest
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.positions import needs_slots
from runtimes.errors import CalibrationError, InputError
from runtimes.files.hashes import sha256_of
from runtimes.open import ort_session
from runtimes.text.encoded_text import EncodedText

Prompt = Sequence[int] | EncodedText


def steered_ranges(
    bundle: Bundle, settings: QuantizationSettings, model: str, output: Path, request: CalibrationRequest, report: Report
) -> tuple[Ranges, Ranges, CalibrationRecord]:
    """(ranges of every quantizable product's input, what they would be of the base alone, where they came from). Writes the report beside
    ``output``."""
    collected = _collected(bundle, model, output.with_name(f"{output.name}.calibration"), request, report)
    mixture = shares(request.mixture, collected.header)
    kind, observer = ACTIVATION_OF[settings.scheme], request.observer
    report(f"choosing ranges ({observer})")
    ranges: dict[str, tuple[float, float]] = {}
    for name in collected.header.tensors:
        ranges[name] = observer.range([(share, collected.histograms[source][name]) for source, share in mixture.items()], kind)
        # Of most observers it is a moment's work: a log is told where it is not.
        count(report, f"choosing ranges ({observer}): {len(ranges)} of {len(collected.header.tensors)}", 0, 1)
    report("comparing them with the ranges of the base alone")
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


def banks_digest(bundle: Bundle, name: str) -> str:
    """Of the adapter's file, and of its rules where that file has none, as no graph computes them; empty for one that the bundle does not
    have."""
    if name not in bundle.adapter_names:
        return ""
    stored = bundle.adapter(name)
    record = bundle.manifest.files.get(stored.file.relative_to(bundle.folder).as_posix())
    if record is None or not needs_slots(stored.positions):
        return "" if record is None else record.sha256
    return hashlib.sha256(f"{record.sha256} {stored.positions!r} {stored.tied}".encode()).hexdigest()


def _collected(bundle: Bundle, model: str, state: Path, request: CalibrationRequest, report: Report) -> Collected:
    if request.ranges is not None:
        return reusable(load_collected(request.ranges), request.ranges, bundle)
    return _calibrated(bundle, model, request, state, report)


def _calibrated(bundle: Bundle, model: str, request: CalibrationRequest, state: Path, report: Report) -> Collected:
    """Ranges of the request's prompts, or of the probes, run by the base and with every adapter; ``state`` keeps them, and what an earlier
    run left."""
    report("reading the adapters' probes" if request.data is None else f"reading {request.data}")
    base = outline_base(model)
    check_same_base(bundle, base, model)
    if request.data is None:
        prompts, decode_tokens, digest = _probes(bundle, request.decode_tokens)
    else:
        prompts, decode_tokens = _prompts(bundle.manifest, request.data, load_tokenizer(base.folder), request.decode_tokens)
        digest = ""
    try:
        number = sum(1 for _ in prompts())
    except InputError as e:
        raise CalibrationError(f"--calibrate: {e}") from None
    experts = expert_matrices(bundle.manifest.weights)
    # A source with share 0 is not run. The base always is: the report compares with it.
    asked = [name for name in bundle.adapter_names if request.mixture.get(name, 0) or not request.mixture]
    header = Header(
        graph=bundle.digest,
        adapters={name: banks_digest(bundle, name) for name in asked},
        data=digest if request.data is None else sha256_of(request.data),
        decode_tokens=decode_tokens,
        sources=(BASE_GOLDEN, *asked),
        tensors=product_inputs(load_graph(bundle.graph_path), experts),
        prompts=number,
    )
    collected = _resumed(header, state, report)
    if collected.header.complete:
        return collected
    with variant(bundle, partial(expose_inputs, float_inputs=experts)) as exposed:
        session = ort_session(exposed)
        report(f"calibrating on {number} prompts: {', '.join(header.sources)}")
        return collect(session, prompts(), collected, state, on_prompt=partial(_show_prompt, report, header))


def _show_prompt(report: Report, header: Header, done: int) -> None:
    count(report, f"calibrating: {done} of {header.prompts} prompts, {', '.join(header.sources)}", done, header.prompts)


def _prompts(m: Manifest, data: Path, tokenizer: PreTrainedTokenizerBase, decode_tokens: int) -> tuple[Callable[[], Iterator[Prompt]], int]:
    """(what reads the prompts anew, greedy tokens after each): texts for a classifier, which generates none, and tokens for a decoder."""
    if m.task == TEXT_CLASSIFICATION:
        return partial(_texts, m, data, tokenizer), 0
    return partial(_prompt_tokens, m, data, tokenizer, m.model.context_length - decode_tokens), decode_tokens


def _probes(bundle: Bundle, decode_tokens: int) -> tuple[Callable[[], Iterator[Prompt]], int, str]:
    """(what gives the prompts of all adapters' probes, greedy tokens after each, sha256 of them). A prompt that leaves no room for those
    tokens is left out. Raises CalibrationError where none is left."""
    texts = [text for name in bundle.adapter_names for text, _ in probe_texts(bundle, name)]
    room = bundle.manifest.model.context_length - decode_tokens
    rows = [row.prompt for name in bundle.adapter_names for row in probe_rows(bundle, name) if row.prompt_length <= room]
    found: list[Prompt] = [*texts, *rows]
    if not found:
        raise CalibrationError(f"{bundle.folder} has no probes that could be calibrated on; pass --calibrate DATA.jsonl")
    tokens = [[*text.ids, *text.types] for text in texts] + rows
    digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
    return partial(iter, found), 0 if texts else decode_tokens, digest


def _texts(m: Manifest, data: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Prompt]:
    for example in load_labelled(data, tokenizer, m.labels, max_length=m.model.context_length).examples:
        yield example.text


def _prompt_tokens(m: Manifest, data: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Iterator[Prompt]:
    for example in iter_examples(data, tokenizer, max_length=max_length, stop_tokens=m.model.eos_token_ids):
        yield example.input_ids[: example.prompt_length]


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

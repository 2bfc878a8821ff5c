"""Bytes, perplexity, speed and steering of a bundle under every scheme, beside llama.cpp's types: for docs/quantization-quality.md.

    PYTHONPATH=tests python -m evidence.quality make FLOAT_BUNDLE/ MODEL OUT/ [--only NAME]...
    PYTHONPATH=tests python -m evidence.quality llama FLOAT.gguf OUT/ [--only Q4_0]...
    PYTHONPATH=tests python -m evidence.quality page OUT/... [--docs docs]

``MODEL`` is a relabelled base (models.relabel), FLOAT_BUNDLE its fp32 export, FLOAT.gguf the same weights (evidence.float_gguf). Every row
is kept in OUT/rows.jsonl as soon as it is measured, and a row that is there is not measured again: the work may be cut anywhere.

    bytes        of the bundle without its golden arrays; of the GGUF file
    perplexity   exp(mean negative log-likelihood) over the tokens but the first of review sentences (evidence.review_text), each alone
    decode       milliseconds a token behind 64 columns, one thread: the least of 24; not with --no-speed, for a machine that is not idle
    retention    what each adapter of FLOAT_BUNDLE keeps of its training, on its own probes (runtimes/parity/retention.py)

A bundle is measured on the graph that ships, in onnxruntime, at its accuracy level. Its weights are quantized by the product's own code;
the gates of ``quantize`` are left out, so that a row of a scheme that they refuse is there too.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.settings import QuantizationSettings, settings_for
from calibration.weight_only import WeightBlocks

ROWS = "rows.jsonl"
COLUMNS = 64
LONGEST = 256
"""Tokens of a sentence; what comes behind is left out."""
LLAMA_CPP = "llama.cpp"
LLAMA = ("Q4_0", "Q4_1", "Q4_K_M", "Q5_K_M", "Q8_0", "F32")
AUTO = "int4 32 + int8, auto"
TABLE_AUTO = "int4 32, embedding int4 + int8, auto"
"""What ``-p int4`` makes of a model whose embedding takes most of the bytes."""
BUDGETS: dict[str, int | None] = {
    AUTO: None,
    TABLE_AUTO: None,
    **{f"int4 {block} + int8, {size} MB": size * 1_000_000 for block in (32, 64) for size in (102, 119)},
}
"""Bytes of all weights where the most sensitive ones are int8, of the rows of that name; None is what ``--keep-high auto`` takes."""
CALIBRATED_ON = 48
"""Sentences for the ranges of activations: others than the perplexity's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    group: str
    """llama.cpp, weight-only, or another scheme."""
    bytes: int
    nats: float
    """Mean negative log-likelihood of a token."""
    tokens: int
    decode_ms: float | None
    seconds: float | None = None
    """To quantize the weights."""
    note: str = ""
    retention: Mapping[str, float] | None = None
    """By adapter; None where no adapter was measured."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    def __str__(self) -> str:
        speed = "" if self.decode_ms is None else f", {self.decode_ms:.1f} ms"
        return f"{self.name}: {self.bytes / 1e6:.1f} MB, perplexity {self.perplexity:.3f}{speed}"


def settings_of() -> dict[str, QuantizationSettings | None]:
    """By the row's name; None is the float bundle as it is."""

    def int4(block_size: int = 32, *, symmetric: bool = True, **more: Any) -> QuantizationSettings:
        return settings_for("weight-only", 4, block_size=block_size, symmetric=symmetric, **more)

    return {
        "fp32": None,
        "int8": settings_for("weight-only", 8),
        "int4 32": int4(),
        "int4 32 rtn": int4(method="rtn"),
        AUTO: int4(),
        "int4 32 + int8, 102 MB": int4(),
        "int4 32 + int8, 119 MB": int4(),
        "int4 64 + int8, 102 MB": int4(64),
        "int4 64 + int8, 119 MB": int4(64),
        "int4 16": int4(16),
        "int4 16 rtn": int4(16, method="rtn"),
        "int4 64": int4(64),
        "int4 64 rtn": int4(64, method="rtn"),
        "int4 32 with zero points": int4(symmetric=False),
        "int4 32 k_quant": int4(symmetric=False, method="k_quant"),
        "int4 32, embedding int4": int4(embeddings=4),
        TABLE_AUTO: int4(embeddings=4),
        "int4 32, accuracy level 1": int4(accuracy_level=1),
        "dynamic": settings_for("dynamic"),
        "static": settings_for("static"),
        "qdq-int4": settings_for("qdq-int4"),
        "qdq-int8": settings_for("qdq-int8"),
        "fp8": settings_for("fp8"),
    }


# --- the text -------------------------------------------------------------------------------------


def token_rows(folder: Path, reviews: Path, sentences: int) -> list[list[int]]:
    """Ids of every sentence, as the bundle's own tokenizer makes them; ``folder``: a bundle's."""
    from evidence.review_text import sentences as drawn
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder, open_bundle(folder).manifest.model)
    rows = [tokenizer.encode(text)[:LONGEST] for text in drawn(reviews, sentences)]
    return [row for row in rows if len(row) > 1]


def log_likelihood(session: Any, rows: Sequence[Sequence[int]], at_once: int = 16) -> tuple[float, int]:
    """(negative log-likelihood in nats, tokens), both summed over ``rows``; right-padded batches of rows of like lengths."""
    total, count = 0.0, 0
    order = sorted(rows, key=len)
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        width = max(map(len, batch))
        ids, mask = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.int64)
        for i, row in enumerate(batch):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        logits = session.step(ids, mask).logits
        for i, row in enumerate(batch):
            said = logits[i, : len(row) - 1].astype(np.float32)
            said -= said.max(-1, keepdims=True)
            chosen = said[np.arange(len(row) - 1), row[1:]]
            total += float((np.log(np.exp(said).sum(-1, dtype=np.float64)) - chosen).sum())
            count += len(row) - 1
    return total, count


# --- rows -----------------------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, Row]:
    """The last row of each name."""
    path = folder / ROWS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def keep(folder: Path, row: Row) -> None:
    with (folder / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    print(row, flush=True)


def size_of(folder: Path) -> int:
    """Bytes of a bundle without its golden arrays."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "golden")


def quantized(source: Path, model: str, name: str, settings: QuantizationSettings, folder: Path, calibrated_on: Path) -> float:
    """Writes the quantized bundle of ``source`` to ``folder``, its golden arrays as they were; seconds that the weights took."""
    from calibration.quantize import quantize_graph
    from graph_passes.external import load_graph, write_graph
    from reft_export.base.dequantized import expert_matrices
    from reft_export.base.load import load_base
    from reft_export.eager.banks import bank_steerer
    from reft_export.parity.ladder import stored_inputs
    from reft_export.quantizing import assemble
    from reft_export.quantizing.importance import input_importance
    from reft_export.quantizing.settings import CalibrationRequest
    from runtimes.artifacts.bundle import open_bundle

    bundle = open_bundle(source)
    request = CalibrationRequest(data=calibrated_on, decode_tokens=4) if settings.kind.activations == "static" else None
    plan = assemble.planned(bundle, model, folder, settings, request, lambda _: None)
    graph, sources = load_graph(bundle.graph_path), bundle.manifest.weights
    started = time.monotonic()
    blocks = WeightBlocks()
    if settings.method == "imatrix":
        inputs = stored_inputs(bundle)
        steerers = {each: bank_steerer(bundle, each) for each in bundle.adapter_names}
        blocks = WeightBlocks(input_importance(load_base(model, checked=True).model, sources, inputs, steerers))
    if name in BUDGETS:
        settings = _mixed(model, bundle, graph, settings, BUDGETS[name], calibrated_on.parent, blocks)
    left = expert_matrices(sources)
    done = quantize_graph(graph, settings, plan.ranges, float_inputs=left, parameters=sources, blocks=blocks)
    seconds = time.monotonic() - started
    write_graph(graph, folder)
    shutil.copytree(source / "golden", folder / "golden")
    assemble._copy_unchanged(bundle, folder)
    assemble._finish(replace(plan, settings=settings), folder, graph, done)
    return seconds


def _mixed(
    model: str, bundle: Any, graph: Any, settings: QuantizationSettings, budget: int | None, memory: Path, blocks: WeightBlocks
) -> QuantizationSettings:
    """The product's choice, by sensitivities on the rows of the bundle's own golden arrays; they are kept in the folder ``memory``."""
    from calibration.mixed import choose_int8, sizes
    from graph_passes.tied_head import untie_head
    from reft_export.base.load import load_base
    from reft_export.parity.ladder import stored_inputs
    from reft_export.quantizing.sensitivity import rows_of, sensitivities
    from runtimes.artifacts.golden_schema import BASE_GOLDEN

    untie_head(graph.graph)
    sources, path = bundle.manifest.weights, memory / f"sensitivities-{settings.block_size}.json"
    if not path.is_file():
        rows = rows_of({BASE_GOLDEN: stored_inputs(bundle)[BASE_GOLDEN].arrays}, {})
        path.write_text(json.dumps(sensitivities(load_base(model, checked=True).model, graph.graph, sources, settings, rows, blocks)))
    chosen = choose_int8(json.loads(path.read_text()), sizes(graph.graph, settings, (), sources), budget)
    return replace(settings, int8=chosen)


@dataclass(frozen=True, kw_only=True)
class Measured:
    nats: float
    tokens: int
    decode_ms: float | None
    retention: dict[str, float]


def measure(folder: Path, source: Path, rows: Sequence[Sequence[int]], *, threads: int, speed: bool = True) -> Measured:
    """Of the bundle ``folder``, made of the float one ``source``, whose golden arrays say what the float adapters do."""
    from evidence.context_bench import BLOCKS, STEPS, Fed
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.ort.session import OrtSession

    opened = open_bundle(folder)
    with OrtSession(opened, threads=threads) as session:
        nats, tokens = log_likelihood(session, rows)
        kept_of = _retention(session, open_bundle(source))
    decode = None
    if speed:
        with OrtSession(opened, threads=1) as session:
            fed = Fed(session, None, COLUMNS + STEPS + 2, time.perf_counter)
            fed.feed(COLUMNS)
            decode = min(ms for _ in range(BLOCKS) for ms in fed.decode(STEPS))
    return Measured(nats=nats / tokens, tokens=tokens, decode_ms=decode, retention=kept_of)


def _retention(session: Any, source: Any) -> dict[str, float]:
    from runtimes.parity.retention import quality
    from runtimes.tasks.generation import DecoderGolden, completions

    found = {}
    for name in source.adapter_names:
        golden = DecoderGolden.read(source, name, steering=False)
        session.set_adapter(name)
        if golden.recorded is not None:
            found[name] = quality(name, completions(session, golden), golden.recorded).retention
    session.set_adapter(None)
    return {name: share for name, share in found.items() if share is not None}


def make(asked: argparse.Namespace) -> None:
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = token_rows(asked.bundle, asked.reviews, asked.sentences)
    calibrated_on = asked.folder / "calibration.jsonl"
    calibrated_on.write_text("".join(_prompts(asked.reviews, asked.sentences)), encoding="utf-8")
    for name, settings in settings_of().items():
        if name in kept(asked.folder) or (asked.only and name not in asked.only):
            continue
        with _bundle_of(name, settings, asked, calibrated_on) as (folder, seconds):
            found = measure(folder, asked.bundle, rows, threads=asked.threads, speed=asked.speed)
            scheme = "float" if settings is None else settings.scheme
            runs = settings is None or settings.kind.runtime == "onnxruntime"
            keep(
                asked.folder,
                Row(
                    name=name,
                    group=scheme,
                    bytes=size_of(folder),
                    nats=found.nats,
                    tokens=found.tokens,
                    decode_ms=found.decode_ms if runs else None,
                    seconds=seconds,
                    retention=found.retention or None,
                    note="" if runs else "made for TensorRT: its speed was not measured here",
                ),
            )


def _prompts(reviews: Path, behind: int) -> Iterator[str]:
    from evidence.review_text import sentences

    for text in sentences(reviews, behind + CALIBRATED_ON)[behind:]:
        words = text.split()
        prompt, completion = (" ".join(part) for part in (words[: len(words) // 2], words[len(words) // 2 :]))
        yield json.dumps({"prompt": prompt, "completion": completion}) + "\n"


class _bundle_of:
    """The float bundle itself, or its quantized one in a folder that goes with the context."""

    def __init__(self, name: str, settings: QuantizationSettings | None, asked: argparse.Namespace, calibrated_on: Path) -> None:
        self.name, self.settings, self.asked, self.calibrated_on = name, settings, asked, calibrated_on
        self.made = tempfile.TemporaryDirectory(dir=asked.folder)

    def __enter__(self) -> tuple[Path, float | None]:
        if self.settings is None:
            return self.asked.bundle, None
        folder = Path(self.made.name) / "bundle"
        folder.mkdir()
        return folder, quantized(self.asked.bundle, self.asked.model, self.name, self.settings, folder, self.calibrated_on)

    def __exit__(self, *_: object) -> None:
        self.made.cleanup()


def llama(asked: argparse.Namespace) -> None:
    from evidence.llama_cpp import llama_cpp

    asked.folder.mkdir(parents=True, exist_ok=True)
    program, rows = llama_cpp(asked.home), token_rows(asked.tokenizer, asked.reviews, asked.sentences)
    for kind in LLAMA:
        if f"llama.cpp {kind}" in kept(asked.folder) or (asked.only and kind not in asked.only):
            continue
        file = asked.folder / f"{kind}.gguf"
        if kind == "F32":
            file = asked.gguf
        elif not file.is_file():
            program.quantize(asked.gguf, file, kind, threads=asked.threads)
        found = program.likelihoods(file, rows, threads=asked.threads)
        tokens, nats = sum(count for count, _ in found), math.fsum(total for _, total in found)
        decode = None
        if asked.speed:
            decode = min(program.bench(file, [COLUMNS], flash=flash).decode_ms[0] for flash in (False, True))
        row = Row(
            name=f"llama.cpp {kind}", group="llama.cpp", bytes=file.stat().st_size, nats=nats / tokens, tokens=tokens, decode_ms=decode
        )
        keep(asked.folder, row)


def page(asked: argparse.Namespace) -> None:
    """Of ``asked.folders``, and of the models that the page holds already."""
    from evidence.quality_page import DATA, read, write

    models = dict(read(asked.docs)) if (asked.docs / DATA).is_file() else {}
    write(list((models | {folder.name: list(kept(folder).values()) for folder in asked.folders}).items()), asked.docs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs: Mapping[str, Callable[[argparse.Namespace], None]] = {"make": make, "llama": llama, "page": page}
    verb = {name: verbs.add_parser(name) for name in runs}
    verb["make"].add_argument("bundle", type=Path)
    verb["make"].add_argument("model")
    verb["llama"].add_argument("gguf", type=Path)
    verb["llama"].add_argument("tokenizer", type=Path, help="a bundle of the same model")
    verb["llama"].add_argument("--home", type=Path, default=Path("real-models"), help="where llama_cpp.py downloads and builds it")
    for name in ("make", "llama"):
        verb[name].add_argument("folder", type=Path)
        verb[name].add_argument("--only", action="append")
        verb[name].add_argument("--sentences", type=int, default=2000)
        verb[name].add_argument("--threads", type=int, default=2)
        verb[name].add_argument("--no-speed", dest="speed", action="store_false")
        verb[name].add_argument("--reviews", type=Path, default=Path("real-models"))
    verb["page"].add_argument("folders", type=Path, nargs="+")
    verb["page"].add_argument("--docs", type=Path, default=Path("docs"))
    asked = parser.parse_args(arguments)
    runs[asked.verb](asked)


if __name__ == "__main__":
    main()

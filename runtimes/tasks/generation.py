"""Holds a decoder against its golden arrays: logits, greedy tokens, steering, the KV cache fed in every way, and of an adapter with probes
the log-probabilities of all their completions; and what is left of those where the bundle is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.errors import BundleError
from runtimes.generation import call_widths, columns, greedy_tokens, padding_of
from runtimes.parity.figures import NOTHING, Budget, Delta, Figures, Rung, compare_deltas, judge
from runtimes.parity.golden_arrays import Golden, Steering, read_arrays, steering_shown
from runtimes.parity.perplexity import log_likelihoods
from runtimes.parity.retention import Quality, Recorded, quality, recorded
from runtimes.parity.sampled_logits import SampledLogits, compare_sampled
from runtimes.session import DecoderSession

SLOW_TOKENS = 16
"""Greedy tokens that are compared where a step takes as long as reading the whole model does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderGolden(Golden):
    rows: list[np.ndarray]
    """The real tokens of each row."""
    prompt_length: np.ndarray
    marks: np.ndarray | None
    """bool [B, S], where the adapter's positions are marked."""
    positions: np.ndarray
    greedy: np.ndarray
    reference: SampledLogits
    """``logits`` and what goes with them."""
    unquantized: SampledLogits
    """The same of the float32 model where it was recorded, else ``reference``."""
    recorded: Recorded | None
    """Of the completions' tokens; None where they are no probes."""

    @classmethod
    def read(cls, artifact: Artifact, name: str, *, steering: bool = True) -> DecoderGolden:
        arrays, fields = read_arrays(artifact, name, steering=steering)
        reference = sampled(arrays)
        return cls(
            rows=[row[real > 0] for row, real in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)],
            prompt_length=arrays["prompt_length"],
            marks=arrays["marks"] > 0 if "marks" in arrays else None,
            positions=arrays["logit_positions"],
            greedy=arrays["greedy_tokens"],
            reference=reference,
            unquantized=sampled(arrays, "fp32_") if "fp32_logits" in arrays else reference,
            recorded=recorded(name, arrays),
            **fields,
        )

    @property
    def fed(self) -> list[np.ndarray]:
        """The rows that are fed in every way, as far as their logits are recorded."""
        rows, columns = self.positions.T
        return [row[: max(columns[rows == number].max(initial=0) + 1, n)] for number, row, n in self._continued()]

    @property
    def prompts(self) -> list[list[int]]:
        """Those that have greedy tokens."""
        return [row[:n].tolist() for _, row, n in self._continued()]

    @property
    def marked(self) -> list[list[int]] | None:
        """The numbers of each row's marked tokens."""
        return None if self.marks is None else [np.flatnonzero(row).tolist() for row in self.marks]

    def _continued(self) -> Iterator[tuple[int, np.ndarray, int]]:
        return zip(range(len(self.greedy)), self.rows, self.prompt_length.tolist(), strict=False)


def sampled(arrays: Mapping[str, np.ndarray], kind: str = "") -> SampledLogits:
    """The recorded logits of one of golden_schema's KINDS."""
    tokens = arrays[f"{kind}best_tokens"]
    return SampledLogits(
        columns=arrays["logit_columns"],
        logits=arrays[f"{kind}logits"],
        tokens=tokens,
        at_tokens=arrays[f"{kind}best_logits"],
        logsumexp=arrays[f"{kind}logsumexp"],
        best=tokens[:, 0],
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """One way to bring the golden tokens into the session."""

    side: str = "none"
    """Where prompts get pads up to one width; continuations follow in the columns after it. "none": a row's continuation directly."""
    pads: int = 0
    """Pads beyond those that make the prompts equally wide."""
    chunk: int | None = None
    """Columns per call; None is all at once."""
    decode: bool = False
    """The prompts in one call, then one column per call."""
    alone: bool = False
    """Every row in a batch of its own."""
    only: int | None = None
    """The row that is run; None is all."""

    def columns(self, lengths: Sequence[int], prompt: Sequence[int]) -> list[np.ndarray]:
        """The column of every token, for rows of ``lengths`` tokens of which the first ``prompt`` are the prompt."""
        width = max(prompt) + self.pads
        places = []
        for tokens, own in zip(lengths, prompt, strict=True):
            place = np.arange(tokens)
            if self.side == "left":
                place = place + width - own
            elif self.side == "right":
                place = np.where(place < own, place, place + width - own)
            places.append(place)
        return places

    def widths(self, total: int, prompt: Sequence[int]) -> list[int]:
        """Columns of each call, ``total`` in all."""
        if self.decode:
            width = max(prompt) + self.pads
            return [width, *[1] * (total - width)]
        return call_widths(total, self.chunk)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """What a session said at the positions that a layout has to show; those that it gave no logits for are not ``logits.given``."""

    logits: SampledLogits
    wanted: list[int]


def _run(session: DecoderSession, golden: DecoderGolden, layout: _Layout, reference: SampledLogits | None = None) -> _Found:
    """The sample of ``reference``, by default the golden one's; a graph with the last logits only has those of one column per call."""
    rows = golden.fed
    every = range(len(rows)) if layout.only is None else [layout.only]
    logits, wanted = SampledLogits.like(reference or golden.reference), []
    for chosen in [[row] for row in every] if layout.alone else [list(every)]:
        wanted += _run_batch(session, golden, rows, layout, chosen, logits)
    return _Found(logits=logits, wanted=sorted(wanted))


def _run_batch(
    session: DecoderSession, golden: DecoderGolden, rows: list[np.ndarray], layout: _Layout, chosen: list[int], logits: SampledLogits
) -> list[int]:
    """Puts the positions of the rows ``chosen`` into ``logits``; those that the layout has to show."""
    prompt = golden.prompt_length[chosen]
    places = layout.columns([len(rows[row]) for row in chosen], prompt.tolist())
    total = max(int(place[-1]) + 1 for place in places) + (layout.pads if layout.side == "right" else 0)
    ids = np.zeros((len(chosen), total), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(chosen):
        ids[i, places[i]], mask[i, places[i]] = rows[row], 1
    wanted = {k: (chosen.index(row), places[chosen.index(row)][c]) for k, (row, c) in enumerate(golden.positions) if row in chosen}
    widths = layout.widths(total, prompt.tolist())
    if session.bundle.manifest.logits == "last":
        ends = set((np.cumsum(widths) - 1).tolist())
        wanted = {k: (i, column) for k, (i, column) in wanted.items() if column in ends}
    marks = None if golden.marks is None else golden.marks[chosen]
    for start, output in columns(session, ids, mask, prompt, widths, marks=marks):
        first = max(start, output.past.width - output.logits.shape[1])
        _check_width(session, output.logits)
        for k, (i, column) in wanted.items():
            if first <= column < output.past.width:
                logits.put(k, output.logits[i, column - first])
    return list(wanted)


def _check_width(session: DecoderSession, logits: np.ndarray) -> None:
    width = session.bundle.manifest.model.vocab_size
    if logits.shape[2] != width:
        raise BundleError(
            f"{session.bundle.folder} gives {logits.shape[2]} logits a token, its manifest and golden arrays say {width}; export it again"
        )


def completions(session: DecoderSession, golden: DecoderGolden) -> np.ndarray:
    """log p [T] of every token of all completions after all before it, each row alone, under the session's adapter."""
    marks = golden.marked or [None] * len(golden.rows)
    rows = zip(golden.rows, golden.prompt_length.tolist(), marks, strict=True)
    return np.concatenate([log_likelihoods(session, row.tolist(), prompt, marked) for row, prompt, marked in rows])


def _layouts(session: DecoderSession, golden: DecoderGolden) -> dict[str, _Layout]:
    """Every way that the session's graph takes, by what its rung is called; the first one feeds the tokens as they stand."""
    padding, prompt = padding_of(session), golden.prompt_length[: len(golden.greedy)]
    alone = padding != "left"
    only_last = session.bundle.manifest.logits == "last"
    # In place several rows share calls of one column, and a first one that is right padded; chunks of them are fed row by row.
    layouts = {
        "token by token" if only_last else "full forward": _Layout(chunk=1 if only_last else None, alone=alone),
        "prefill and decode": _Layout(side="right" if padding == "right" else "left", decode=True, alone=padding == "none"),
        "chunked prefill": _Layout(side="left", chunk=-(-int(prompt.max()) // 3), alone=alone),
        "single rows": _Layout(alone=True, decode=padding == "right"),
    }
    if padding == "right" and session.bundle.manifest.quantization is not None:
        # One row shows it: without quantized activations a call unpacks every weight anew, and each row takes a call a token.
        layouts["single rows"] = replace(layouts["single rows"], only=int(np.argmax(prompt)))
    if padding == "left":
        layouts["left padding"] = _Layout(side="left", pads=2, decode=only_last)
        right = _Layout(side="right", pads=2, chunk=1 if only_last else None)
        window = session.bundle.manifest.model.sliding_window
        width = max(map(len, golden.fed)) + int(prompt.max() - prompt.min()) + right.pads
        if window is None or width <= window:  # a window counts columns: pads between prompt and answer would fill it
            layouts["right padding"] = right
    return layouts


def check_decoder(session: DecoderSession, golden: DecoderGolden, budget: Budget) -> list[Rung]:
    """All rungs of the base or of one adapter; the first one also takes greedy tokens and steering."""
    session.set_adapter(golden.adapter)
    rungs: list[Rung] = []
    for name, layout in _layouts(session, golden).items():
        found = _run(session, golden, layout)
        figures, wanted = NOTHING, found.wanted
        if wanted:
            figures = compare_sampled(found.logits.at(wanted), golden.reference.at(wanted))
        given = int(found.logits.given.sum())
        expected = len(golden.positions) if layout.only is None else len(wanted)
        note = "" if given == expected else f"{given} of {expected} positions have logits"
        delta, unmoved = None, ""
        if not rungs:
            differs = _greedy_difference(session, golden)
            if golden.steering is not None:
                delta, unmoved = steering_shown(session, golden.name, _delta(session, golden, golden.steering, found, layout))
            figures, note = replace(figures, greedy_equal=not differs), differs or unmoved or note
        widened = golden.widened(budget, compared=len(wanted))
        rungs.append(judge(f"{golden.name}: {name}", "eager", figures, widened, delta=delta, note=note))
    if golden.recorded is not None and session.bundle.manifest.quantization is None:  # else they are what its quality is measured on
        figures = _compare_completions(completions(session, golden), golden.recorded.exact, golden.reference.scale)
        rungs.append(judge(f"{golden.name}: completions", "eager", figures, golden.widened(budget, compared=figures.compared)))
    return rungs


def _compare_completions(candidate: np.ndarray, reference: np.ndarray, scale: float) -> Figures:
    """|log p - log p'| / 2 at most, over T tokens: logits that are off by e change a log-probability by no more than 2 e.

    ``scale``: the largest logit, which the error is relative to. Logits for some of the tokens only are an error without end."""
    error = float(np.abs(candidate - reference).max()) / 2 if candidate.shape == reference.shape else np.inf
    error = error if np.isfinite(error) else np.inf
    return Figures(
        compared=len(reference),
        max_abs=error,
        max_relative=error / scale if scale else (np.inf if error else 0.0),
        kl=None,
        top1=None,
    )


def _greedy_difference(session: DecoderSession, golden: DecoderGolden) -> str:
    """Where the session's greedy tokens leave the golden ones; empty where they do not."""
    q = session.bundle.manifest.quantization
    # onnxruntime has no float kernel for int8 weights: every call unpacks them all, a token of SmolLM2 takes 0.2 s for its head alone.
    slow = q is not None and not q.quantizes_activations and bool(q.bits == 8 or q.embeddings == 8 or q.int8)
    expected = golden.greedy[:, :SLOW_TOKENS] if slow else golden.greedy
    marks = None if golden.marked is None else golden.marked[: len(golden.prompts)]
    tokens = greedy_tokens(session, golden.prompts, expected.shape[1], marks=marks)
    differs = np.argwhere((tokens != expected) & (expected >= 0))
    return f"greedy tokens differ from row {differs[0][0]}, token {differs[0][1]} on" if len(differs) else ""


def _delta(session: DecoderSession, golden: DecoderGolden, steering: Steering, steered: _Found, layout: _Layout) -> Delta:
    session.set_adapter(None)
    base = _run(session, golden, layout)
    session.set_adapter(golden.name)
    found = steered.wanted
    return compare_deltas(steered.logits.logits[found], base.logits.logits[found], steering[0][found], steering[1][found])


def decoder_figures(session: DecoderSession, golden: DecoderGolden) -> tuple[Figures, Delta]:
    """What ``runtimes.golden.steering_figures`` says, of a decoder."""
    steering, layout = golden.stored_steering(), next(iter(_layouts(session, golden).values()))
    session.set_adapter(golden.name)
    found = _run(session, golden, layout, golden.unquantized)
    figures = compare_sampled(found.logits.at(found.wanted), golden.unquantized.at(found.wanted))
    return figures, _delta(session, golden, steering, found, layout)


def decoder_quality(session: DecoderSession, golden: DecoderGolden) -> Quality | None:
    """What is left of ``golden``'s name on its completions; None where no likelihood of them was recorded."""
    if golden.recorded is None:
        return None
    session.set_adapter(golden.adapter)
    return quality(golden.name, completions(session, golden), golden.recorded)
